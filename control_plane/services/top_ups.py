"""TopUpService."""

from collections.abc import Callable
from typing import Any, Protocol

from budgetguard.core.entities import BudgetTopUp, Page, TopUpDraft
from budgetguard.core.errors import InvalidError
from budgetguard.v1 import top_up_pb2, top_up_pb2_grpc
from control_plane.fields import dollars, milliseconds
from control_plane.messages import top_up_message
from control_plane.services import ACTOR


class TopUps(Protocol):
    """Where top-ups are kept; see ``TopUpRepository`` for what each may raise."""

    async def add(self, draft: TopUpDraft, *, actor: str, budget_id: str, request_id: str = "") -> BudgetTopUp: ...
    async def list(self, budget_id: str, *, page_size: int = 0, page_token: str = "") -> Page[BudgetTopUp]: ...
    async def remove(self, budget_id: str, top_up_id: str, *, actor: str) -> BudgetTopUp: ...


class TenantPublisher(Protocol):
    """Tells the data plane of a tenant and its budgets; raises ``NotPublishedError``."""

    async def tenant(self, tenant_id: str) -> None: ...


class TopUpService(top_up_pb2_grpc.TopUpServiceServicer):
    """Money added to budgets once."""

    def __init__(self, *, top_ups: TopUps, publisher: TenantPublisher, new_id: Callable[[], str]) -> None:
        self._top_ups = top_ups
        self._publisher = publisher
        self._new_id = new_id

    async def AddTopUp(self, request: top_up_pb2.AddTopUpRequest, _context: Any) -> top_up_pb2.TopUp:
        if not request.amount_usd:
            raise InvalidError("amount_usd", "expected US dollars as a decimal number, got none")
        draft = TopUpDraft(
            top_up_id=self._new_id(),
            amount_nanos=dollars(request.amount_usd, field="amount_usd"),
            reason=request.reason,
            starts_at_ms=(
                milliseconds(request.start_time, field="start_time") if request.HasField("start_time") else None
            ),
            expires_at_ms=(
                milliseconds(request.expire_time, field="expire_time") if request.HasField("expire_time") else None
            ),
        )
        top_up = await self._top_ups.add(draft, actor=ACTOR, budget_id=request.budget_id, request_id=request.request_id)
        await self._publisher.tenant(top_up.tenant_id)
        return top_up_message(top_up)

    async def ListTopUps(self, request: top_up_pb2.ListTopUpsRequest, _context: Any) -> top_up_pb2.ListTopUpsResponse:
        page = await self._top_ups.list(request.budget_id, page_size=request.page_size, page_token=request.page_token)
        return top_up_pb2.ListTopUpsResponse(
            top_ups=[top_up_message(top_up) for top_up in page.items], next_page_token=page.next_page_token
        )

    async def RemoveTopUp(self, request: top_up_pb2.RemoveTopUpRequest, _context: Any) -> top_up_pb2.TopUp:
        removed = await self._top_ups.remove(request.budget_id, request.top_up_id, actor=ACTOR)
        await self._publisher.tenant(removed.tenant_id)
        return top_up_message(removed)
