"""UsageService."""

from typing import Any, Protocol

from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.redis.reconciling import LiveHold
from budgetguard.core.entities import LedgerFilter, LedgerRow, Page, UsageGroup, UsageSum
from budgetguard.core.errors import InvalidError
from budgetguard.core.money import format_usd
from budgetguard.v1 import usage_pb2, usage_pb2_grpc
from control_plane.fields import instants_between
from control_plane.messages import ENDS_BACK, GROUPS, hold_message, ledger_message, sum_message
from control_plane.services.tenants import Tenants


class Ledger(Protocol):
    """Where the ledger is read; see ``LedgerReader`` for what each may raise."""

    async def list(self, wanted: LedgerFilter, *, page_size: int = 0, page_token: str = "") -> Page[LedgerRow]: ...
    async def sums(self, wanted: LedgerFilter, *, by: UsageGroup) -> tuple[UsageSum, ...]: ...
    async def total(self, wanted: LedgerFilter) -> tuple[int, int]: ...


class Holds(Protocol):
    """The calls under way; raises ``CountersUnavailableError``."""

    async def live_holds(self, tenant_id: str) -> tuple[LiveHold, ...]: ...


class UsageService(usage_pb2_grpc.UsageServiceServicer):
    """The ledger, read."""

    def __init__(self, *, ledger: Ledger, tenants: Tenants, book: Holds) -> None:
        self._ledger = ledger
        self._book = book
        self._tenants = tenants

    async def ListLedgerRows(
        self, request: usage_pb2.ListLedgerRowsRequest, _context: Any
    ) -> usage_pb2.ListLedgerRowsResponse:
        end = ENDS_BACK.get(request.end)
        if request.end and end is None:
            raise InvalidError("end", "expected EXPIRED, ESTIMATED, RELEASED, CONFIRMED or CORRECTED")
        from_ms, until_ms = instants_between(request)
        wanted = LedgerFilter(
            tenant_id=request.tenant_id,
            key_id=request.api_key_id,
            model=request.model,
            provider_id=request.provider_id,
            tag=request.tag_id,
            session_id=request.session_id,
            end_user=request.end_user,
            operation_id=request.operation_id,
            end=end,
            from_ms=from_ms,
            until_ms=until_ms,
        )
        page = await self._ledger.list(wanted, page_size=request.page_size, page_token=request.page_token)
        return usage_pb2.ListLedgerRowsResponse(
            rows=[ledger_message(row) for row in page.items], next_page_token=page.next_page_token
        )

    async def ListHolds(self, request: usage_pb2.ListHoldsRequest, _context: Any) -> usage_pb2.ListHoldsResponse:
        tenant = await self._tenants.get(request.tenant_id)
        listing, limit = f"holds/{tenant.tenant_id}", page_limit(request.page_size)
        after = read_token(request.page_token, listing, [int, str])
        holds = sorted(await self._book.live_holds(tenant.tenant_id), key=_place, reverse=True)
        # Calls end and others come between two pages: a place tells where to go on, whoever is there now.
        left = [hold for hold in holds if after is None or _place(hold) < after]
        page = make_page(left[: limit + 1], limit=limit, listing=listing, position=_place)
        return usage_pb2.ListHoldsResponse(
            holds=[hold_message(hold.facts, hold.hold_nanos) for hold in page.items],
            next_page_token=page.next_page_token,
            total_operations=len(holds),
            total_usd=format_usd(sum(hold.hold_nanos for hold in holds)),
        )

    async def SumUsage(self, request: usage_pb2.SumUsageRequest, _context: Any) -> usage_pb2.SumUsageResponse:
        by = GROUPS.get(request.group_by)
        if by is None:
            raise InvalidError("group_by", "expected DAY, MODEL, API_KEY, TAG, SESSION, END_USER or PROVIDER")
        # An unknown tenant is an error, not an empty list of sums.
        tenant = await self._tenants.get(request.tenant_id)
        from_ms, until_ms = instants_between(request)
        wanted = LedgerFilter(tenant_id=tenant.tenant_id, from_ms=from_ms, until_ms=until_ms)
        sums = await self._ledger.sums(wanted, by=by)
        operations, nanos = await self._ledger.total(wanted)
        return usage_pb2.SumUsageResponse(
            sums=[sum_message(usage_sum) for usage_sum in sums],
            total_usd=format_usd(nanos),
            total_operations=operations,
        )


def _place(hold: LiveHold) -> list[int | str]:
    return [hold.facts.held_at_ms, hold.facts.operation_id]
