"""Signs the counters off for the Redis process that runs, after it has compared them with the ledger.

A Redis that was restarted with its data has every event that the ledger has, and more: its counters are right. One
that is empty, older or another has a stream that ends before what the ledger has: its counters are written anew.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from uuid import uuid4

from budgetguard.adapters.postgres.ledger import LastWord, LedgerRepository
from budgetguard.adapters.postgres.ledger_sums import LedgerSums
from budgetguard.adapters.postgres.pool import Database
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.adapters.redis.epoch import Epoch
from budgetguard.adapters.redis.keys import SHARDS, shard_of
from budgetguard.core.budget import RememberedEnd, applied_budgets
from budgetguard.core.counter import counter_name
from budgetguard.core.events import entry_order
from budgetguard.core.operation import ENDED_KEPT_MS
from budgetguard.core.snapshot import Status, TenantSnapshot
from control_plane.jobs.drain_usage import READ_COUNT, LedgerWriter
from control_plane.jobs.publish_snapshots import PAGE, SnapshotPublisher
from control_plane.reconciler import counted, lately, windows_around

logger = logging.getLogger(__name__)

# Ends of this age may still be sent again (a spool, a settle kept for its replay); the margin is for clocks.
REMEMBERED_MS = ENDED_KEPT_MS + 60_000
# No call is longer, so what ended lately was held since then.
CALL_MS_MAX = 24 * 3_600_000
# Markers written at the same time.
CONCURRENT = 32


class RebuildCounters:
    """Makes every shard ready, and ready again when Redis is another."""

    name = "rebuild_counters"
    interval_s = 1.0

    def __init__(
        self,
        *,
        database: Database,
        tenants: TenantRepository,
        ledger: LedgerRepository,
        sums: LedgerSums,
        epoch: Epoch,
        publisher: SnapshotPublisher,
        writer: LedgerWriter,
        now_ms: Callable[[], int],
    ) -> None:
        self._database = database
        self._tenants = tenants
        self._ledger = ledger
        self._sums = sums
        self._epoch = epoch
        self._publisher = publisher
        self._writer = writer
        self._now_ms = now_ms

    async def run_once(self) -> bool:
        """Sign off what is not; nothing to do is the rule, and costs two trips to Redis."""
        # Read first: if Redis is restarted from here on, the sign-off below opens nothing.
        run_id = await self._epoch.run_id()
        if not await self._not_ready(run_id):
            return False
        async with self._database.exclusive(self.name) as alone:
            if not alone:
                return False
            not_ready = await self._not_ready(run_id)
            positions = await self._ledger.positions()
            behind = [shard for shard in not_ready if not await self._has_all(shard, positions)]
            if behind:
                logger.warning(
                    "job=%s run_id=%s rebuilding=%d: Redis lost usage that the ledger has",
                    self.name,
                    run_id,
                    len(behind),
                )
                await self._rebuild(behind, positions)
            for fault in await self._epoch.faults():
                logger.error("alarm=redis_settings fault=%r", fault)
            # Before any call is admitted: what it may spend, and which keys are revoked.
            published = await self._publisher.sweep()
            await self._epoch.mark_incarnation()
            for shard in not_ready:
                await self._epoch.sign_off(shard, run_id)
            logger.info(
                "job=%s run_id=%s signed_off=%d rebuilt=%d published=%d",
                *(self.name, run_id, len(not_ready), len(behind), published),
            )
        return False

    async def _not_ready(self, run_id: str) -> list[int]:
        signed_off = await self._epoch.signed_off(range(SHARDS))
        return [shard for shard, signed in signed_off.items() if signed != run_id]

    async def _has_all(self, shard: int, positions: Mapping[int, tuple[int, int]]) -> bool:
        if shard not in positions:
            return True
        return entry_order(await self._epoch.stream_last_id(shard)) >= positions[shard]

    async def _rebuild(self, shards: Sequence[int], positions: Mapping[int, tuple[int, int]]) -> None:
        for shard in shards:
            await self._epoch.begin_rebuild(shard)
        # From here on nothing is written to these streams: what is left in them goes to the ledger first.
        await self._drain(shards)
        wanted = set(shards)
        by_shard: dict[int, int] = defaultdict(int)
        after = ""
        while page := await self._tenants.versions(after=after, limit=PAGE):
            for tenant_id, _ in page:
                if shard_of(tenant_id) in wanted:
                    by_shard[shard_of(tenant_id)] += await self._rebuild_tenant(tenant_id)
            after = page[-1][0]
        # Last of all: until then a shard looks as lost as it is. From then on a sum of the ledger "up to an event" has
        # all that the counters were just given.
        for shard in shards:
            await self._writer.events.continue_after(shard, positions[shard])
        for shard, written in sorted(by_shard.items()):
            logger.info("job=%s shard=%d counters=%d", self.name, shard, written)

    async def _drain(self, shards: Sequence[int]) -> None:
        """Take over every event, also those that other workers hold: the ledger takes each once."""
        events, consumer = self._writer.events, f"rebuild-{uuid4()}"
        while entries := await events.claim(shards, consumer=consumer, idle_ms=0, count=READ_COUNT):
            await self._writer.write(entries)
        while entries := await events.read(shards, consumer=consumer, count=READ_COUNT):
            await self._writer.write(entries)

    async def _rebuild_tenant(self, tenant_id: str) -> int:
        """Write a tenant's counters of the windows that are open, and the ends that may be sent again."""
        snapshot = await self._tenants.snapshot(tenant_id)
        if snapshot.status is Status.DELETED:
            return 0
        written, now_ms = 0, self._now_ms()
        for spec in snapshot.budgets:
            for window in windows_around(spec, now_ms):
                sums = await self._sums.spent(tenant_id, spec, window)
                # Of a template, each subject that has spent lately; else the budget itself, also at nothing.
                recent = (
                    await self._sums.spent(tenant_id, spec, lately(window, now_ms)) if spec.each else {("", None): 0}
                )
                for subject in {subject for subject, _ in recent}:
                    of_subject = {bucket: nanos for (whose, bucket), nanos in sums.items() if whose == subject}
                    name = counter_name(spec, window, subject)
                    if not await self._epoch.write_counter(tenant_id, name, counted(of_subject), now_ms=now_ms):
                        raise RuntimeError(f"shard {shard_of(tenant_id)} was signed off while it was rebuilt")
                    written += 1
        words = await self._ledger.last_words(
            tenant_id, held_from_ms=now_ms - CALL_MS_MAX, ended_from_ms=now_ms - REMEMBERED_MS
        )
        for start in range(0, len(words), CONCURRENT):
            chunk = words[start : start + CONCURRENT]
            await asyncio.gather(*(self._epoch.remember_ended(_remembered(snapshot, word)) for word in chunk))
        return written


def _remembered(snapshot: TenantSnapshot, word: LastWord) -> RememberedEnd:
    """Say where an operation was counted: in the budgets of today, in the windows that it was admitted in."""
    counters = [limit.counter for limit in applied_budgets(snapshot, word.facts, word.facts.held_at_ms)]
    return RememberedEnd(
        tenant_id=snapshot.tenant_id,
        operation_id=word.facts.operation_id,
        end=word.end,
        amount_nanos=word.amount_nanos,
        hold_nanos=word.hold_nanos,
        sequence=word.sequence,
        counters=tuple(counters),
    )
