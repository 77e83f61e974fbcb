"""Keeps the ledger's partitions ahead of time, and says when something is where it should not be."""

import logging

from prometheus_client import CollectorRegistry, Gauge

from budgetguard.adapters.postgres.ledger import LedgerRepository
from budgetguard.adapters.postgres.maintenance import MaintenanceRepository
from budgetguard.adapters.postgres.refusals import RefusalRepository

logger = logging.getLogger(__name__)


class AlarmMetrics:
    """What should always be 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.alarms = Gauge(
            "budgetguard_ledger_alarms", "What should always be 0, by kind.", ["kind"], registry=registry
        )


class MaintainLedger:
    """Partitions for the months to come; rows without one, and dead events, are alarms. Old refusals are dropped."""

    name = "maintain_ledger"
    interval_s = 600.0

    def __init__(
        self,
        maintenance: MaintenanceRepository,
        ledger: LedgerRepository,
        refusals: RefusalRepository,
        *,
        metrics: AlarmMetrics,
    ) -> None:
        self._maintenance = maintenance
        self._ledger = ledger
        self._refusals = refusals
        self._metrics = metrics

    async def run_once(self) -> bool:
        """Look once; says whether there is more to drop."""
        outcomes = await self._maintenance.make_partitions()
        made = [month for month, outcome in outcomes.items() if outcome == "made"]
        blocked = [month for month, outcome in outcomes.items() if outcome == "blocked"]
        if made:
            logger.info("job=%s partitions_made=%s", self.name, ",".join(made))
        alarms = {"blocked_partitions": len(blocked), **await self._ledger.alarms()}
        for kind, number in alarms.items():
            self._metrics.alarms.labels(kind=kind).set(number)
            if number:
                logger.error("alarm=%s count=%d months=%s", kind, number, ",".join(blocked) or "-")
        forgotten = await self._maintenance.forget_request_ids()
        if forgotten:
            logger.info("job=%s request_ids_forgotten=%d", self.name, forgotten)
        refusals = await self._refusals.forget()
        if refusals:
            logger.info("job=%s refusals_forgotten=%d", self.name, refusals)
        return refusals > 0
