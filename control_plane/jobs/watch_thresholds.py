"""Records when a budget's spent money crosses a threshold: one event a window, subject and threshold, exactly."""

import logging
from collections.abc import Callable

from budgetguard.adapters.postgres.budget_events import BudgetEventRepository
from budgetguard.adapters.postgres.ledger import LedgerRepository
from budgetguard.adapters.postgres.ledger_activity import LedgerActivity
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core.counter import counter_name
from budgetguard.core.entities import Budget, Crossing
from budgetguard.core.errors import DependencyUnavailableError
from budgetguard.core.limits import crossed_bps, limit_nanos
from budgetguard.core.snapshot import WindowKind
from budgetguard.core.window import Window, bounds

logger = logging.getLogger(__name__)

# A call that was admitted in a window may end, and cross a threshold of it, a day after it closed.
LATE_MS = 25 * 3_600_000
# Tenants whose budgets were changed, in one query.
PAGE = 500
# Changes become visible up to a transaction's length later.
OVERLAP_S = 60.0


class WatchThresholds:
    """Looks at the tenants that have spent, or were changed, since the last look. Several may run at a time."""

    name = "watch_thresholds"
    interval_s = 5.0

    def __init__(
        self,
        *,
        events: BudgetEventRepository,
        tenants: TenantRepository,
        ledger: LedgerRepository,
        activity: LedgerActivity,
        counters: Counters,
        now_ms: Callable[[], int],
    ) -> None:
        self._events = events
        self._tenants = tenants
        self._ledger = ledger
        self._activity = activity
        self._counters = counters
        self._now_ms = now_ms
        self._looked_at_ms: int | None = None
        # Tenants whose last look failed.
        self._again: set[str] = set()

    async def run_once(self) -> bool:
        """Look once.

        Raises:
            DependencyUnavailableError: some tenants could not be looked at; the others were.
        """
        since_ms = self._looked_at_ms
        activity = await self._activity.since(since_ms, first_look_s=LATE_MS // 1000)
        active_since_ms = activity.until_ms - LATE_MS if since_ms is None else since_ms
        wanted = {*activity.oldest_held_ms, *await self._changed(active_since_ms, activity.until_ms), *self._again}
        failed: dict[str, DependencyUnavailableError] = {}
        recorded = 0
        for tenant_id in sorted(wanted):
            # A failed look is made up for as if it were the first one.
            since = activity.until_ms - LATE_MS if tenant_id in self._again else active_since_ms
            try:
                recorded += await self._look_at(tenant_id, active_since_ms=since)
            except DependencyUnavailableError as error:
                failed[tenant_id] = error
        self._looked_at_ms, self._again = activity.until_ms, set(failed)
        if recorded:
            logger.info("job=%s tenants=%d events=%d", self.name, len(wanted), recorded)
        if failed:
            raise next(iter(failed.values()))
        return False

    async def _changed(self, since_ms: int, until_ms: int) -> set[str]:
        """List the tenants that were changed: a lower limit may be crossed without a call."""
        within_s = (until_ms - since_ms) / 1000 + OVERLAP_S
        changed: set[str] = set()
        after = ""
        while page := await self._tenants.versions(after=after, limit=PAGE, changed_within_s=within_s):
            changed.update(tenant_id for tenant_id, _ in page)
            after = page[-1][0]
        return changed

    async def _look_at(self, tenant_id: str, *, active_since_ms: int) -> int:
        crossings: list[Crossing] = []
        watched = [
            (budget, window)
            for budget in await self._events.budgets(tenant_id)
            # Until its counters have the past, nobody can say.
            if not budget.seeding
            for window in self._windows(budget)
        ]
        counted = [one for one in watched if not one[0].each and one[0].window is not WindowKind.ROLLING]
        names = [counter_name(budget.spec(), window) for budget, window in counted]
        rows = await self._counters.read_counters(tenant_id, names) if names else []
        for (budget, window), (spent_nanos, _) in zip(counted, rows, strict=True):
            crossings += self._crossings(budget, window, {budget.subject: spent_nanos})
        for budget, window in watched:
            if budget.each or budget.window is WindowKind.ROLLING:
                spent = await self._in_ledger(budget, window, active_since_ms=active_since_ms)
                crossings += self._crossings(budget, window, spent)
        return await self._events.record(crossings) if crossings else 0

    def _windows(self, budget: Budget) -> list[Window]:
        """Return the open window, and the one before while calls of it may still end."""
        spec, now_ms = budget.spec(), self._now_ms()
        windows = []
        for moment_ms in (now_ms, now_ms - LATE_MS):
            window = bounds(spec, moment_ms)
            if window is not None and window not in windows:
                windows.append(window)
        # What rolls is one window: the one that ends now.
        return windows[:1] if budget.window is WindowKind.ROLLING else windows

    async def _in_ledger(self, budget: Budget, window: Window, *, active_since_ms: int) -> dict[str, int]:
        """Sum by the ledger what no counter tells by its name: a template's subjects, and a window that rolls."""
        if budget.each:
            return await self._activity.spent_by_subject(
                tenant_id=budget.tenant_id,
                kind=budget.subject_kind,
                from_ms=window.starts_at_ms,
                until_ms=window.resets_at_ms,
                active_since_ms=active_since_ms,
            )
        spent_nanos = await self._ledger.spent(
            tenant_id=budget.tenant_id,
            subject_kind=budget.subject_kind,
            subject=budget.subject,
            from_ms=window.starts_at_ms,
            until_ms=None,
        )
        return {budget.subject: spent_nanos}

    def _crossings(self, budget: Budget, window: Window, spent: dict[str, int]) -> list[Crossing]:
        now_ms = self._now_ms()
        # Of a closed window, the limit that it had last.
        seen_at_ms = now_ms if window.resets_at_ms is None else min(now_ms, window.resets_at_ms - 1)
        limit = limit_nanos(budget.spec(), window, seen_at_ms)
        starts_at_ms, resets_at_ms = window
        if budget.rolling_ms is not None:
            # One that rolls never begins anew: it tells a crossing once in each multiple of its period.
            starts_at_ms = now_ms // budget.rolling_ms * budget.rolling_ms
            resets_at_ms = starts_at_ms + budget.rolling_ms
        return [
            Crossing(
                budget=budget,
                subject=subject,
                threshold_bps=bps,
                spent_nanos=spent_nanos,
                limit_nanos=limit,
                window_starts_at_ms=starts_at_ms,
                window_resets_at_ms=resets_at_ms,
            )
            for subject, spent_nanos in spent.items()
            for bps in crossed_bps(budget.threshold_bps, limit_nanos=limit, spent_nanos=spent_nanos)
        ]
