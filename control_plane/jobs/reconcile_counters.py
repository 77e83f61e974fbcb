"""Compares counters with the ledger: at once where they lack their past, soon where money moves or is refused.

Everybody else is looked at in turn, so that a counter which is wrong is not wrong until somebody spends. A tenant that
cannot be compared, as when its sums take too long, keeps no other waiting.
"""

import logging
import time
from collections.abc import Callable, Iterable

from budgetguard.adapters.postgres.budgets import BudgetRepository
from budgetguard.adapters.postgres.ledger_activity import LedgerActivity
from budgetguard.adapters.postgres.refusals import RefusalRepository
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.core.reasons import Reason
from control_plane.jobs.publish_snapshots import SnapshotPublisher
from control_plane.jobs.turns import Turns
from control_plane.reconciler import Reconciler

logger = logging.getLogger(__name__)

# Tenants with new ledger rows are compared this often, and those that were told that a budget is exhausted.
COMPARE_EVERY_S = 60.0
# A refusal is told by its minute, and reaches Postgres about a second later.
REFUSED_WITHIN_S = COMPARE_EVERY_S + 120.0
# All tenants in turn: so many at a look, and not more often than this.
SWEEP_COUNT = 5
SWEEP_EVERY_S = 600.0
# While older calls are under way, what they hold is computed anew all the time, but a comparison that takes long is not
# made all the time: after it there is a pause of so many times its length.
PAUSE_TIMES = 10
# The first look of a process: what an earlier one has left behind is of calls, and no call is longer.
FIRST_LOOK_S = 25 * 3600


class ReconcileCounters:
    """Several may run: a tenant is compared by one of them at a time. ``waiting`` is the set that publishers fill."""

    name = "reconcile_counters"
    interval_s = 0.5

    def __init__(
        self,
        *,
        budgets: BudgetRepository,
        tenants: TenantRepository,
        activity: LedgerActivity,
        refusals: RefusalRepository,
        reconciler: Reconciler,
        publisher: SnapshotPublisher,
        waiting: set[str],
        clock: Callable[[], float] = time.monotonic,
        compare_every_s: float = COMPARE_EVERY_S,
        sweep_every_s: float = SWEEP_EVERY_S,
    ) -> None:
        self._budgets = budgets
        self._tenants = tenants
        self._activity = activity
        self._refusals = refusals
        self._reconciler = reconciler
        self._publisher = publisher
        self._waiting = waiting
        self._clock = clock
        self._compare_every_s = compare_every_s
        self._compared_at: float | None = None
        self._looked_until_ms: int | None = None
        self._sweep_every_s = sweep_every_s
        self._swept_at: float | None = None
        # The tenant up to which this turn has come; ``None``: it is through.
        self._swept_until: str | None = None
        self._turns = Turns[str](job=self.name, what="tenant", clock=clock)
        # Tenants to compare again, and when (by the clock) at the soonest: calls that some counter does not count are
        # under way, or the last look failed.
        self._again: dict[str, float] = {}

    async def run_once(self) -> bool:
        """Compare what is due.

        Raises:
            DependencyUnavailableError, CountersUnavailableError: several failed in a row, or nobody could be asked what
                is due. What is left is compared the next time.
        """
        drifted = 0
        self._turns.begin()
        seeding = set(await self._budgets.seeding_tenants())
        self._add(seeding | self._waiting)
        self._waiting.clear()
        for tenant_id in self._turns.due(seeding):
            with self._turns.apart(tenant_id):
                await self._publisher.give_past(tenant_id)
                drifted += await self._compare(tenant_id)
        now = self._clock()
        if self._compared_at is None or now - self._compared_at >= self._compare_every_s:
            activity = await self._activity.since(self._looked_until_ms, first_look_s=FIRST_LOOK_S)
            self._add(activity.oldest_held_ms)
            self._add(await self._refusals.tenants(Reason.BUDGET_EXCEEDED, within_s=REFUSED_WITHIN_S))
            self._looked_until_ms, self._compared_at = activity.until_ms, now
        self._add(await self._next_of_all(now))
        again = {tenant_id for tenant_id, at in self._again.items() if at <= now}
        for tenant_id in self._turns.due(again - seeding):
            with self._turns.apart(tenant_id):
                drifted += await self._compare(tenant_id)
        if drifted:
            logger.warning("job=%s corrected=%d", self.name, drifted)
        return False

    def _add(self, tenant_ids: Iterable[str]) -> None:
        for tenant_id in tenant_ids:
            self._again.setdefault(tenant_id, 0.0)

    async def _compare(self, tenant_id: str) -> int:
        """Compare one; returns how many of its counters were wrong."""
        began = self._clock()
        comparison = await self._reconciler.compare(tenant_id)
        ended = self._clock()
        if comparison.complete and not comparison.waiting:
            self._again.pop(tenant_id, None)
        else:
            self._again[tenant_id] = ended + PAUSE_TIMES * (ended - began)
        return comparison.drifted

    async def _next_of_all(self, now: float) -> set[str]:
        """Take the next tenants of all; those after the last one are the first again, but not too soon."""
        if self._swept_until is None:
            if self._swept_at is not None and now - self._swept_at < self._sweep_every_s:
                return set()
            self._swept_at, self._swept_until = now, ""
        page = await self._tenants.versions(after=self._swept_until, limit=SWEEP_COUNT)
        self._swept_until = page[-1][0] if len(page) == SWEEP_COUNT else None
        return {tenant_id for tenant_id, _ in page}
