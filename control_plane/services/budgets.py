"""BudgetService."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty

from budgetguard.adapters.redis.client import CountersUnavailableError
from budgetguard.core.counter import counter_name
from budgetguard.core.entities import BUDGETS_PER_TENANT_MAX, Budget, BudgetChanges, BudgetDraft, Page
from budgetguard.core.errors import InvalidError, NotFoundError
from budgetguard.core.window import bounds
from budgetguard.v1 import budget_pb2, budget_pb2_grpc
from control_plane.budget_drafts import budget_changes, budget_draft, budget_drafts, names_a_day
from control_plane.fields import etag_version
from control_plane.messages import budget_message
from control_plane.services import ACTOR

logger = logging.getLogger(__name__)


class Budgets(Protocol):
    """Where budgets are kept; see ``BudgetRepository`` for what each may raise."""

    async def create(self, draft: BudgetDraft, *, actor: str, tenant_id: str, request_id: str = "") -> Budget: ...
    async def set_many(
        self, drafts: Sequence[BudgetDraft], *, actor: str, tenant_id: str, remove_others: bool = False
    ) -> tuple[Budget, ...]: ...
    async def get(self, budget_id: str) -> Budget: ...
    async def list(self, tenant_id: str, *, page_size: int = 0, page_token: str = "") -> Page[Budget]: ...
    async def update(
        self, budget_id: str, changes: BudgetChanges, *, actor: str, expected_version: int | None = None
    ) -> Budget: ...
    async def delete(self, budget_id: str, *, actor: str, expected_version: int | None = None) -> Budget: ...


class CounterReader(Protocol):
    """What is spent and held now; see ``StandingReader``."""

    async def counted(self, tenant_id: str, names: Sequence[str]) -> list[tuple[int, int]] | None: ...


class TenantPublisher(Protocol):
    """Tells the data plane of a tenant and its budgets; raises ``NotPublishedError``."""

    async def tenant(self, tenant_id: str) -> None: ...


class BudgetService(budget_pb2_grpc.BudgetServiceServicer):
    """Budgets. ``now_ms`` is the clock that decides which window is open."""

    def __init__(
        self,
        *,
        budgets: Budgets,
        counters: CounterReader,
        publisher: TenantPublisher,
        new_id: Callable[[], str],
        now_ms: Callable[[], int],
    ) -> None:
        self._budgets = budgets
        self._counters = counters
        self._publisher = publisher
        self._new_id = new_id
        self._now_ms = now_ms

    async def CreateBudget(self, request: budget_pb2.CreateBudgetRequest, _context: Any) -> budget_pb2.Budget:
        draft = budget_draft(request, budget_id=self._new_id())
        budget = await self._budgets.create(
            draft, actor=ACTOR, tenant_id=request.tenant_id, request_id=request.request_id
        )
        await self._publisher.tenant(budget.tenant_id)
        return await self._published(budget)

    async def SetBudgets(self, request: budget_pb2.SetBudgetsRequest, _context: Any) -> budget_pb2.SetBudgetsResponse:
        if len(request.budgets) > BUDGETS_PER_TENANT_MAX:
            raise InvalidError("budgets", f"expected at most {BUDGETS_PER_TENANT_MAX} budgets")
        if request.delete_all and request.budgets:
            raise InvalidError("delete_all", "expected it only without budgets")
        if not request.budgets and not request.delete_all:
            raise InvalidError("budgets", "expected at least one budget; delete_all deletes every budget of the tenant")
        budgets = await self._budgets.set_many(
            budget_drafts(request.budgets, new_id=self._new_id),
            actor=ACTOR,
            tenant_id=request.tenant_id,
            remove_others=True,
        )
        await self._publisher.tenant(request.tenant_id)
        # Read again: publishing gives new counters their past, and they are enforced from then on.
        page = await self._budgets.list(request.tenant_id, page_size=BUDGETS_PER_TENANT_MAX)
        standing = {budget.budget_id: budget for budget in page.items}
        return budget_pb2.SetBudgetsResponse(
            budgets=await self._messages([standing.get(budget.budget_id, budget) for budget in budgets])
        )

    async def GetBudget(self, request: budget_pb2.GetBudgetRequest, _context: Any) -> budget_pb2.Budget:
        return (await self._messages((await self._budgets.get(request.budget_id),)))[0]

    async def ListBudgets(
        self, request: budget_pb2.ListBudgetsRequest, _context: Any
    ) -> budget_pb2.ListBudgetsResponse:
        page = await self._budgets.list(request.tenant_id, page_size=request.page_size, page_token=request.page_token)
        return budget_pb2.ListBudgetsResponse(
            budgets=await self._messages(page.items), next_page_token=page.next_page_token
        )

    async def UpdateBudget(self, request: budget_pb2.UpdateBudgetRequest, _context: Any) -> budget_pb2.Budget:
        # Days of a custom period are days of its zone, which the request need not name.
        zone = (await self._budgets.get(request.budget_id)).zone if names_a_day(request) else ""
        budget = await self._budgets.update(
            request.budget_id,
            budget_changes(request, zone=zone),
            actor=ACTOR,
            expected_version=etag_version(request.etag),
        )
        await self._publisher.tenant(budget.tenant_id)
        return await self._published(budget)

    async def DeleteBudget(self, request: budget_pb2.DeleteBudgetRequest, _context: Any) -> Empty:
        deleted = await self._budgets.delete(
            request.budget_id, actor=ACTOR, expected_version=etag_version(request.etag)
        )
        await self._publisher.tenant(deleted.tenant_id)
        return Empty()

    async def _published(self, budget: Budget) -> budget_pb2.Budget:
        """Spell a budget as it stands now that it is published; as it was, if it is deleted meanwhile."""
        try:
            budget = await self._budgets.get(budget.budget_id)
        except NotFoundError:
            logger.info("budget was deleted since", extra={"budget_id": budget.budget_id})
        return (await self._messages((budget,)))[0]

    async def _messages(self, budgets: Sequence[Budget]) -> list[budget_pb2.Budget]:
        """Spell budgets of one tenant, with what is spent and held as far as Redis tells."""
        now_ms = self._now_ms()
        # A template has no window of its own: each of its subjects has a counter.
        windows = [None if budget.each else bounds(budget.spec(), now_ms) for budget in budgets]
        open_ = [(budget, window) for budget, window in zip(budgets, windows, strict=True) if window is not None]
        counted: dict[str, tuple[int, int]] = {}
        ready = True
        if budgets:
            names = [counter_name(budget.spec(), window) for budget, window in open_]
            try:
                rows = await self._counters.counted(budgets[0].tenant_id, names)
            except CountersUnavailableError:
                logger.warning("budgets told without their counters", exc_info=True)
            else:
                ready = rows is not None
                counted = {budget.budget_id: row for (budget, _), row in zip(open_, rows or (), strict=ready)}
        return [
            budget_message(budget, window=window, counted=counted.get(budget.budget_id), ready=ready, now_ms=now_ms)
            for budget, window in zip(budgets, windows, strict=True)
        ]
