"""Compares counters with the ledger: at once where they lack their past, and now and then wherever money moves."""

import logging
import time
from collections.abc import Callable

from budgetguard.adapters.postgres.budgets import BudgetRepository
from budgetguard.adapters.postgres.ledger_activity import LedgerActivity
from control_plane.jobs.publish_snapshots import SnapshotPublisher
from control_plane.reconciler import Reconciler

logger = logging.getLogger(__name__)

# Tenants with new ledger rows are compared this often.
COMPARE_EVERY_S = 60.0
# The first look of a process: what an earlier one has left behind is of calls, and no call is longer.
FIRST_LOOK_S = 25 * 3600


class ReconcileCounters:
    """Several may run: a tenant is compared by one of them at a time."""

    name = "reconcile_counters"
    interval_s = 0.5

    def __init__(
        self,
        *,
        budgets: BudgetRepository,
        activity: LedgerActivity,
        reconciler: Reconciler,
        publisher: SnapshotPublisher,
        clock: Callable[[], float] = time.monotonic,
        compare_every_s: float = COMPARE_EVERY_S,
    ) -> None:
        self._budgets = budgets
        self._activity = activity
        self._reconciler = reconciler
        self._publisher = publisher
        self._clock = clock
        self._compare_every_s = compare_every_s
        self._compared_at: float | None = None
        self._looked_until_ms: int | None = None
        # Tenants to compare again: calls that some counter does not count are under way, or the last look failed.
        self._again: set[str] = set()

    async def run_once(self) -> bool:
        """Compare what is due.

        Raises:
            DependencyUnavailableError, CountersUnavailableError: what is left is compared the next time.
        """
        for tenant_id in await self._budgets.seeding_tenants():
            self._again.add(tenant_id)
            await self._publisher.give_past(tenant_id)
        now = self._clock()
        if self._compared_at is None or now - self._compared_at >= self._compare_every_s:
            activity = await self._activity.since(self._looked_until_ms, first_look_s=FIRST_LOOK_S)
            self._again |= set(activity.oldest_held_ms)
            self._looked_until_ms, self._compared_at = activity.until_ms, now
        drifted = 0
        for tenant_id in sorted(self._again):
            comparison = await self._reconciler.compare(tenant_id)
            drifted += comparison.drifted
            if comparison.complete and not comparison.waiting:
                self._again.discard(tenant_id)
        if drifted:
            logger.warning("job=%s corrected=%d", self.name, drifted)
        return False
