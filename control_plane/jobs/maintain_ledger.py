"""Keeps the ledger's partitions ahead of time, and drops what is old."""

import logging

from budgetguard.adapters.postgres.maintenance import MaintenanceRepository
from budgetguard.adapters.postgres.refusals import RefusalRepository
from control_plane.jobs.watch_alarms import AlarmMetrics

logger = logging.getLogger(__name__)


class MaintainLedger:
    """Partitions for the months to come; one that cannot be made is an alarm. Old refusals are dropped."""

    name = "maintain_ledger"
    interval_s = 600.0

    def __init__(
        self,
        maintenance: MaintenanceRepository,
        refusals: RefusalRepository,
        *,
        metrics: AlarmMetrics,
    ) -> None:
        self._maintenance = maintenance
        self._refusals = refusals
        self._metrics = metrics

    async def run_once(self) -> bool:
        """Look once; says whether there is more to drop."""
        outcomes = await self._maintenance.make_partitions()
        made = [month for month, outcome in outcomes.items() if outcome == "made"]
        blocked = [month for month, outcome in outcomes.items() if outcome == "blocked"]
        if made:
            logger.info("job=%s partitions_made=%s", self.name, ",".join(made))
        self._metrics.alarms.labels(kind="blocked_partitions").set(len(blocked))
        if blocked:
            logger.error("alarm=blocked_partitions count=%d months=%s", len(blocked), ",".join(blocked))
        forgotten = await self._maintenance.forget_request_ids()
        if forgotten:
            logger.info("job=%s request_ids_forgotten=%d", self.name, forgotten)
        refusals = await self._refusals.forget()
        if refusals:
            logger.info("job=%s refusals_forgotten=%d", self.name, refusals)
        return refusals > 0
