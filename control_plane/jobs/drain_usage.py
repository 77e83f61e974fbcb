"""Moves usage events from Redis to the ledger: acknowledged after the commit, so none is lost and none counts twice."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client import Counter as CounterMetric

from budgetguard.adapters.postgres.ledger import DeadEvent, Delivery, LedgerRepository
from budgetguard.adapters.redis.events import UsageEvents
from budgetguard.adapters.redis.keys import SHARDS
from budgetguard.core.events import MalformedEvent, UsageEvent

logger = logging.getLogger(__name__)

Entry: TypeAlias = tuple[int, str, UsageEvent | MalformedEvent]

# Of each shard in one read; the read covers all shards.
READ_COUNT = 100
# Rows of one transaction.
COMMIT_COUNT = 1_000

# What another worker took this long ago without acknowledging it, it will hardly acknowledge: it was killed. Should it
# live after all, the ledger takes each event once.
CLAIM_IDLE_MS = 10_000
CLAIM_EVERY_S = 5.0


class DrainMetrics:
    """What went into the ledger."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rows = CounterMetric("budgetguard_ledger_rows", "Rows added to the usage ledger.", registry=registry)
        self.dead = CounterMetric(
            "budgetguard_dead_events", "Usage events that could not become rows.", registry=registry
        )


class LedgerWriter:
    """Takes entries of the streams to their end: committed, acknowledged, trimmed."""

    def __init__(self, events: UsageEvents, ledger: LedgerRepository, *, metrics: DrainMetrics) -> None:
        self.events = events
        self._ledger = ledger
        self._metrics = metrics

    async def write(self, entries: Sequence[Entry]) -> None:
        """Commit entries to the ledger, then acknowledge them; done again it changes nothing.

        Raises:
            DependencyUnavailableError, CountersUnavailableError: some are still pending.
        """
        for start in range(0, len(entries), COMMIT_COUNT):
            await self._write(entries[start : start + COMMIT_COUNT])

    async def _write(self, entries: Sequence[Entry]) -> None:
        deliveries: list[Delivery] = []
        dead: list[DeadEvent] = []
        for shard, event_id, event in entries:
            if isinstance(event, UsageEvent):
                deliveries.append((shard, event_id, event))
            else:
                dead.append(DeadEvent(shard=shard, event_id=event_id, fields=event.fields, error="malformed"))
        inserted = await self._ledger.insert_events(deliveries, dead=dead)
        self._metrics.rows.inc(inserted.rows)
        if inserted.dead:
            self._metrics.dead.inc(inserted.dead)
            logger.error(
                "alarm=dead_events count=%d: usage that is in no ledger row; see DeadEventService", inserted.dead
            )
        shards = sorted({shard for shard, _, _ in entries})
        for shard in shards:
            await self.events.ack(shard, [event_id for owner, event_id, _ in entries if owner == shard])
        for shard in shards:
            await self.events.trim(shard)


class DrainUsage:
    """One worker. Any number may run, each with a ``consumer`` name that was never used before."""

    name = "drain_usage"
    # Long enough that busy seconds become a few transactions (one a call costs Postgres and Redis more than the call
    # itself), short enough that a person who looks after a call finds its row.
    interval_s = 0.25

    def __init__(
        self,
        writer: LedgerWriter,
        *,
        consumer: str,
        shards: Sequence[int] = range(SHARDS),
        claim_idle_ms: int = CLAIM_IDLE_MS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writer = writer
        self._consumer = consumer
        self._shards = shards
        self._claim_idle_ms = claim_idle_ms
        self._clock = clock
        self._claimed_at: float | None = None
        # Whether we may have taken entries that we did not acknowledge.
        self._interrupted = False

    async def run_once(self) -> bool:
        """Drain what is there; says whether there may be more."""
        entries, more = await self._take()
        if entries:
            self._interrupted = True
            await self._writer.write(entries)
            self._interrupted = False
        return more

    async def _take(self) -> tuple[list[Entry], bool]:
        """Take entries, and say whether others may wait: what was left behind goes first, and a full read is a part."""
        events = self._writer.events
        if self._interrupted:
            entries = await events.read(self._shards, consumer=self._consumer, count=READ_COUNT, pending=True)
            if entries:
                return entries, True
            self._interrupted = False
        now = self._clock()
        if self._claimed_at is None or now - self._claimed_at >= CLAIM_EVERY_S:
            entries = await events.claim(
                self._shards, consumer=self._consumer, idle_ms=self._claim_idle_ms, count=READ_COUNT
            )
            if entries:
                logger.warning(
                    "job=%s claimed=%d: another worker died before it had written them", self.name, len(entries)
                )
                return entries, True
            self._claimed_at = now
        # A cancelled or timed-out read may have taken entries that nobody has seen yet.
        self._interrupted = True
        entries = await events.read(self._shards, consumer=self._consumer, count=READ_COUNT)
        self._interrupted = False
        by_shard = Counter(shard for shard, _, _ in entries)
        return entries, max(by_shard.values(), default=0) >= READ_COUNT
