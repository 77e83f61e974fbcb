"""Says within seconds when something is where it should not be, and when it no longer is."""

import logging

from prometheus_client import CollectorRegistry, Gauge

from budgetguard.adapters.postgres.ledger import LedgerRepository

logger = logging.getLogger(__name__)


class AlarmMetrics:
    """What should always be 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.alarms = Gauge(
            "budgetguard_ledger_alarms", "What should always be 0, by kind.", ["kind"], registry=registry
        )


class WatchAlarms:
    """Rows without a partition of their own, and dead events, are alarms. What is counted is few, or none."""

    name = "watch_alarms"
    interval_s = 5.0

    def __init__(self, ledger: LedgerRepository, *, metrics: AlarmMetrics) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._logged: dict[str, int] = {}

    async def run_once(self) -> bool:
        """Look once; never more to do at once."""
        counted = await self._ledger.alarms()
        for kind, number in counted.items():
            self._metrics.alarms.labels(kind=kind).set(number)
            # The gauge says that one stands; the log when it changed, not every few seconds.
            if number and number != self._logged.get(kind):
                logger.error("alarm=%s count=%d", kind, number)
        self._logged = counted
        return False
