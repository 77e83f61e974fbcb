"""Moves refused calls and their counts from Redis to Postgres: forgotten there after the commit.

Rows are known by their number and counts only rise, so what is moved twice changes nothing: it takes no consumer group,
and any number of workers.
"""

import logging
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter

from budgetguard.adapters.postgres.refusals import Count, DeadRefusal, RefusalRepository, Row
from budgetguard.adapters.redis.keys import SHARDS
from budgetguard.adapters.redis.refusals import Refusals, Waiting, tally_of
from budgetguard.core.attempts import RefusedCall
from budgetguard.core.events import MalformedEvent

logger = logging.getLogger(__name__)

# Of each shard in one run, which is one transaction.
ROWS_COUNT = 100
COUNTS_COUNT = 500


class DrainRefusalsMetrics:
    """What cannot be recorded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.dead = Counter(
            "budgetguard_dead_refusals", "Refused calls and counts that could not be recorded.", registry=registry
        )


class DrainRefusals:
    """One worker."""

    name = "drain_refusals"
    interval_s = 1.0

    def __init__(
        self,
        refusals: Refusals,
        repository: RefusalRepository,
        *,
        metrics: DrainRefusalsMetrics,
        shards: Sequence[int] = range(SHARDS),
    ) -> None:
        self._refusals = refusals
        self._repository = repository
        self._metrics = metrics
        self._shards = shards

    async def run_once(self) -> bool:
        """Drain what is there; says whether there may be more."""
        waiting = await self._refusals.waiting(self._shards, rows=ROWS_COUNT, counts=COUNTS_COUNT)
        if not waiting:
            return False
        rows, counts, dead = _sorted_out(waiting)
        number = await self._repository.record(rows, counts, dead=dead)
        if number:
            self._metrics.dead.inc(number)
            logger.error("alarm=dead_refusals count=%d: see dead_refusals", number)
        for of_shard in waiting:
            await self._refusals.forget(of_shard)
        return any(of_shard.more for of_shard in waiting)


def _sorted_out(waiting: Sequence[Waiting]) -> tuple[list[Row], list[Count], list[DeadRefusal]]:
    rows: list[Row] = []
    counts: list[Count] = []
    dead: list[DeadRefusal] = []
    for of_shard in waiting:
        shard = of_shard.shard
        for entry, row in of_shard.rows.items():
            if isinstance(row, RefusedCall):
                rows.append((shard, entry, row))
            else:
                dead.append(_dead(shard, entry, row))
        for name, value in of_shard.counts.items():
            count = tally_of(name, value)
            if isinstance(count, MalformedEvent):
                dead.append(_dead(shard, name, count))
            else:
                counts.append((shard, name, count))
    return rows, counts, dead


def _dead(shard: int, entry: str, event: MalformedEvent) -> DeadRefusal:
    return DeadRefusal(shard=shard, entry=entry, fields=event.fields, error="malformed")
