"""What ext_proc tells Prometheus: how calls ended, and what Redis did not take yet."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from budgetguard.core.operation import End
from ext_proc.spool import Waiting

# Why a settlement was lost.
SPOOL_FULL = "spool_full"
DISK_FAILED = "disk_failed"


class SettlementMetrics:
    """Counts settlements on their way, and shows the spool as it is when it is looked at."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        settled = Counter("budgetguard_settlements", "Ends of calls, to be settled.", ("end",), registry=registry)
        # Every series is there from the start, so that its first rise is one.
        self._by_end = {end: settled.labels(end.value) for end in End}
        self._spooled = Counter(
            "budgetguard_settlements_spooled",
            "Settlements written to the spool: Redis did not take them, or came back without them.",
            registry=registry,
        )
        self._delivered = Counter(
            "budgetguard_settlements_delivered", "Settlements that Redis took from the spool.", registry=registry
        )
        self._damaged = Counter(
            "budgetguard_spool_damaged_lines",
            "Lines of the spool that cannot be read, and are kept beside it: their holds expire, at the whole hold.",
            registry=registry,
        )
        lost = Counter(
            "budgetguard_settlements_lost",
            "Settlements that neither Redis nor the spool took: their holds expire, at the whole hold.",
            ("why",),
            registry=registry,
        )
        self._lost = {why: lost.labels(why) for why in (SPOOL_FULL, DISK_FAILED)}

    def watch(
        self,
        *,
        waiting: Callable[[], Waiting],
        bytes_max: int,
        redis_answers: Callable[[], bool],
        now_ms: Callable[[], int],
    ) -> None:
        """Show what is asked for at each scrape, from a thread of its own."""

        def oldest_age_seconds() -> float:
            ended_at_ms = waiting().oldest_ended_at_ms
            return 0.0 if ended_at_ms is None else max(0, now_ms() - ended_at_ms) / 1000

        def gauge(name: str, told: str, read: Callable[[], float]) -> None:
            Gauge(name, told, registry=self._registry).set_function(read)

        gauge("budgetguard_spool_settlements", "Settlements that wait on disk.", lambda: waiting().settlements)
        gauge("budgetguard_spool_bytes", "Bytes that wait on disk.", lambda: waiting().size_bytes)
        gauge("budgetguard_spool_bytes_max", "At so many bytes the spool is full.", lambda: bytes_max)
        gauge(
            "budgetguard_spool_oldest_age_seconds",
            "How long ago the first call ended of those that wait; 0 when none does.",
            oldest_age_seconds,
        )
        gauge("budgetguard_redis_answers", "1 while Redis takes settlements, 0 while it does not.", redis_answers)

    def ended(self, end: End) -> None:
        """Count a call's end."""
        self._by_end[end].inc()

    def spooled(self, settlements: int) -> None:
        """Count what the disk has taken."""
        self._spooled.inc(settlements)

    def delivered(self, settlements: int) -> None:
        """Count what Redis has taken from the disk."""
        self._delivered.inc(settlements)

    def damaged(self, lines: int) -> None:
        """Count what was on disk and cannot be read."""
        self._damaged.inc(lines)

    def lost(self, settlements: int, *, why: str) -> None:
        """Count what nobody has taken."""
        self._lost[why].inc(settlements)
