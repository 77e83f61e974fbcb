"""Brings what a calendar window left unused into the next one, and again while calls of the old one still end."""

import logging
from collections.abc import Callable
from typing import Protocol

from budgetguard.adapters.postgres.carries import Carry, CarryRepository
from budgetguard.adapters.postgres.ledger import LedgerRepository
from budgetguard.adapters.postgres.ledger_activity import LedgerActivity
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core.counter import counter_name
from budgetguard.core.entities import Budget
from budgetguard.core.limits import unused_nanos
from budgetguard.core.money import COUNTER_NANOS_MAX
from budgetguard.core.window import Window, bounds

logger = logging.getLogger(__name__)

# A call takes at most a day; so long what a closed window has spent may still change.
LATE_S = 25 * 3600
# Budgets looked at in one query.
PAGE = 500
# Windows that are made up for when no control plane ran as they began.
CHAIN_MAX = 62


class TenantSnapshots(Protocol):
    """Brings a tenant's record to Redis."""

    async def publish(self, tenant_id: str) -> None:
        """Bring one tenant's."""


class CarryOver:
    """Looks at every budget with a cap; a sum is taken only of windows that are new or have changed."""

    name = "carry_over"
    interval_s = 5.0

    def __init__(
        self,
        *,
        carries: CarryRepository,
        ledger: LedgerRepository,
        activity: LedgerActivity,
        counters: Counters,
        publisher: TenantSnapshots,
        now_ms: Callable[[], int],
    ) -> None:
        self._carries = carries
        self._ledger = ledger
        self._activity = activity
        self._counters = counters
        self._publisher = publisher
        self._now_ms = now_ms
        self._looked_at_ms: int | None = None

    async def run_once(self) -> bool:
        """Look once."""
        activity = await self._activity.since(self._looked_at_ms, first_look_s=LATE_S)
        changed: set[str] = set()
        after = ""
        while page := await self._carries.budgets(after=after, limit=PAGE):
            for budget in page:
                oldest_held_ms = activity.oldest_held_ms.get(budget.tenant_id)
                if await self._carry(budget, oldest_held_ms=oldest_held_ms):
                    changed.add(budget.tenant_id)
            after = page[-1].budget_id
        for tenant_id in sorted(changed):
            await self._publisher.publish(tenant_id)
        # Only now: what failed above is looked at again.
        self._looked_at_ms = activity.until_ms
        if changed:
            logger.info("job=%s tenants=%d", self.name, len(changed))
        return False

    async def _carry(self, budget: Budget, *, oldest_held_ms: int | None) -> bool:
        changed = False
        for window, closed, limit_nanos in await self._to_carry_into(budget, oldest_held_ms=oldest_held_ms):
            carried = await self._unused(budget, closed, limit_nanos=limit_nanos)
            carry = Carry(window_starts_at_ms=window.starts_at_ms, carried_nanos=carried, limit_nanos=limit_nanos)
            changed = await self._carries.write(budget, carry, actor=self.name) or changed
        return changed

    async def _to_carry_into(self, budget: Budget, *, oldest_held_ms: int | None) -> list[tuple[Window, Window, int]]:
        """List (window, the closed one before it, the limit that one had), oldest first: each leaves to the next."""
        spec, now_ms = budget.spec(), self._now_ms()
        found: list[tuple[Window, Window, int]] = []
        window = bounds(spec, now_ms)
        if (
            window is not None
            and budget.carried_into_ms == window.starts_at_ms
            and not _is_late(window, oldest_held_ms=oldest_held_ms, now_ms=now_ms)
        ):
            return found
        # What was over before the budget carried anything leaves nothing.
        while window is not None and window.starts_at_ms > budget.carries_since_ms and len(found) < CHAIN_MAX:
            known = (await self._carries.read(budget, from_ms=window.starts_at_ms)).get(window.starts_at_ms)
            if known is not None and not _is_late(window, oldest_held_ms=oldest_held_ms, now_ms=now_ms):
                break
            closed = bounds(spec, window.starts_at_ms - 1)
            if closed is None:
                break
            # A limit that was edited since does not change what was left at the time.
            found.append((window, closed, budget.limit_nanos if known is None else known.limit_nanos))
            window = closed
        return found[::-1]

    async def _unused(self, budget: Budget, closed: Window, *, limit_nanos: int) -> int:
        into_closed = (await self._carries.read(budget, from_ms=closed.starts_at_ms)).get(closed.starts_at_ms)
        closed_at_ms = closed.resets_at_ms or 0
        limit_nanos += 0 if into_closed is None else into_closed.carried_nanos
        limit_nanos += await self._carries.topped_up(budget.budget_id, closed_at_ms=closed_at_ms)
        spent_nanos = await self._ledger.spent(
            tenant_id=budget.tenant_id,
            subject_kind=budget.subject_kind,
            subject=budget.subject,
            from_ms=closed.starts_at_ms,
            until_ms=closed.resets_at_ms,
        )
        # The counter knows what is not in the ledger yet, and what calls that still run may cost.
        ((counted_nanos, held_nanos),) = await self._counters.read_counters(
            budget.tenant_id, [counter_name(budget.spec(), closed)]
        )
        return unused_nanos(
            limit_nanos=min(limit_nanos, COUNTER_NANOS_MAX),
            spent_nanos=max(spent_nanos, counted_nanos + held_nanos),
            cap_nanos=budget.rollover_cap_nanos or 0,
        )


def _is_late(window: Window, *, oldest_held_ms: int | None, now_ms: int) -> bool:
    """Whether calls have ended that were admitted before the window began, while that still counts."""
    late = oldest_held_ms is not None and oldest_held_ms < window.starts_at_ms
    return late and now_ms - window.starts_at_ms < LATE_S * 1000
