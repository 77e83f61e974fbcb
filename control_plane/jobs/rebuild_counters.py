"""Signs the counters off for the Redis process that runs, after it has compared them with the ledger.

A Redis that was restarted with its data has every event that the ledger has, and more: its counters are right. One
that is empty, older or another has a stream that ends before what the ledger has: its counters are written anew.

What is right is opened first. The rest is rebuilt shard by shard: one whose rebuild fails stays closed, no other does.

All of a run is one opening of the closed shards. What Redis loses meanwhile takes the opening's name with it; then
nothing more is written or opened, and another run begins with what is left.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from uuid import uuid4

from budgetguard.adapters.postgres.ledger import LastWord, LedgerRepository
from budgetguard.adapters.postgres.ledger_activity import HELD_BEFORE_S
from budgetguard.adapters.postgres.ledger_sums import LedgerSums
from budgetguard.adapters.postgres.pool import Database
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.adapters.redis.epoch import Epoch, Opening
from budgetguard.adapters.redis.keys import SHARDS, shard_of
from budgetguard.adapters.redis.reconciling import CounterBook
from budgetguard.core.budget import RememberedEnd, applied_budgets
from budgetguard.core.counter import counter_name
from budgetguard.core.operation import ENDED_KEPT_MS
from budgetguard.core.shard import SignOff
from budgetguard.core.snapshot import BudgetSpec, Status, TenantSnapshot
from budgetguard.core.window import Window
from control_plane.jobs.drain_usage import READ_COUNT, LedgerWriter
from control_plane.jobs.publish_snapshots import PAGE, SnapshotPublisher
from control_plane.jobs.turns import Turns
from control_plane.reconciler import counted, lately, windows_around

logger = logging.getLogger(__name__)

# What was recorded before that Redis remembers no more, whichever Redis it is: markers are kept so long, and each was
# written before its row. The margin is for clocks.
REMEMBERED_MS = ENDED_KEPT_MS + 60_000
HELD_BEFORE_MS = HELD_BEFORE_S * 1000
# A query of the ledger may take so long. Until it is done no call of its tenant is admitted, so there is nothing to be
# gained by giving up; but the shards behind it wait.
SUM_SECONDS = 120.0
# Markers written at the same time.
CONCURRENT = 32


class OpeningLostError(RuntimeError):
    """Redis was restarted or emptied since the opening began, or another worker began one: the next run looks anew."""


class _TenantNotRebuiltError(RuntimeError):
    """Says whose counters could not be written; its cause says why."""


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
        book: CounterBook,
        publisher: SnapshotPublisher,
        writer: LedgerWriter,
        now_ms: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        sum_seconds: float = SUM_SECONDS,
    ) -> None:
        self._database = database
        self._tenants = tenants
        self._ledger = ledger
        self._sums = sums
        self._epoch = epoch
        self._book = book
        self._publisher = publisher
        self._writer = writer
        self._now_ms = now_ms
        self._sum_seconds = sum_seconds
        self._turns = Turns[int](job=self.name, what="shard", clock=clock)

    async def run_once(self) -> bool:
        """Sign off what is not; nothing to do is the rule, and costs two trips to Redis.

        Raises:
            DependencyUnavailableError, CountersUnavailableError, RuntimeError: what is left stays closed until a later
                run.
        """
        # Read first: if Redis is restarted from here on, the sign-offs below open nothing.
        run_id = await self._epoch.run_id()
        if not await self._due(run_id):
            return False
        async with self._database.exclusive(self.name) as alone:
            if alone:
                try:
                    await self._open(run_id)
                except OpeningLostError:
                    logger.warning("job=%s run_id=%s: Redis lost data meanwhile, beginning again", self.name, run_id)
        return False

    async def _due(self, run_id: str) -> list[int]:
        """List the shards that are closed, but for those whose rebuild has just failed."""
        signed_off = await self._epoch.signed_off(range(SHARDS))
        return self._turns.due(shard for shard, signed in signed_off.items() if signed != run_id)

    async def _open(self, run_id: str) -> None:
        due = await self._due(run_id)
        for fault in await self._epoch.faults():
            logger.error("alarm=redis_settings fault=%r", fault)
        opening = await self._epoch.begin_opening(due, run_id)
        # Before any call is admitted: what it may spend, and which keys are revoked.
        published = await self._publisher.sweep()
        await self._epoch.mark_incarnation()
        behind = await self._sign_off_whole(due, opening)
        logger.info("job=%s run_id=%s signed_off=%d published=%d", self.name, run_id, len(due) - len(behind), published)
        await self._rebuild(behind, opening)

    async def _sign_off_whole(self, shards: Sequence[int], opening: Opening) -> list[int]:
        """Sign off the shards that have all that the ledger has; returns the others.

        What the ledger has is read here, at the last moment: another worker may just have written what it had taken
        from the Redis of before.
        """
        positions = await self._ledger.positions()
        behind = []
        for shard in shards:
            answer = await self._epoch.sign_off(opening, shard, position=positions.get(shard, (0, 0)))
            if answer is SignOff.LOST:
                raise OpeningLostError
            if answer is SignOff.BEHIND:
                behind.append(shard)
        return behind

    async def _rebuild(self, shards: Sequence[int], opening: Opening) -> None:
        """Rebuild and open one shard after the other."""
        if not shards:
            return
        logger.warning(
            "job=%s run_id=%s rebuilding=%d: Redis lost usage that the ledger has",
            *(self.name, opening.run_id, len(shards)),
        )
        tenants = await self._tenants_of(shards)
        self._turns.begin()
        for shard in shards:
            if await self._epoch.run_id() != opening.run_id:
                raise OpeningLostError  # that it would be told so at the end is no reason to do the work
            with self._turns.apart(shard, but=OpeningLostError):
                written = await self._rebuild_shard(shard, tenants[shard], opening)
                logger.info("job=%s shard=%d counters=%d", self.name, shard, written)

    async def _tenants_of(self, shards: Collection[int]) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {shard: [] for shard in shards}
        after = ""
        while page := await self._tenants.versions(after=after, limit=PAGE):
            for tenant_id, _ in page:
                if shard_of(tenant_id) in found:
                    found[shard_of(tenant_id)].append(tenant_id)
            after = page[-1][0]
        return found

    async def _rebuild_shard(self, shard: int, tenant_ids: Sequence[str], opening: Opening) -> int:
        """Write the counters of a shard's tenants and open it; returns how many.

        The first tenant that fails leaves the shard closed, and as lost as it looks.
        """
        # Nothing is written to its stream now: what is left in it goes to the ledger first.
        await self._drain(shard)
        position = await self._sums.position(shard)
        written = 0
        for tenant_id in tenant_ids:
            try:
                written += await self._rebuild_tenant(tenant_id, opening)
            except OpeningLostError:
                raise
            except Exception as error:
                raise _TenantNotRebuiltError(f"tenant {tenant_id}: {error!r}") from error
        if await self._sums.position(shard) > position:
            raise RuntimeError("the ledger was given usage of an earlier Redis meanwhile")
        # From here on a sum of the ledger "up to an event" has all that the counters were just given.
        if await self._epoch.sign_off(opening, shard, position=position, rebuilt=True) is SignOff.LOST:
            raise OpeningLostError
        return written

    async def _drain(self, shard: int) -> None:
        """Take over every event, also those that other workers hold: the ledger takes each once."""
        events, consumer = self._writer.events, f"rebuild-{uuid4()}"
        while entries := await events.claim([shard], consumer=consumer, idle_ms=0, count=READ_COUNT):
            await self._writer.write(entries)
        while entries := await events.read([shard], consumer=consumer, count=READ_COUNT):
            await self._writer.write(entries)

    async def _rebuild_tenant(self, tenant_id: str, opening: Opening) -> int:
        """Bring a tenant's counters and operations to what the ledger has; returns how many counters."""
        snapshot = await self._tenants.snapshot(tenant_id)
        if snapshot.status is Status.DELETED:
            return 0
        now_ms = self._now_ms()
        written = 0
        for spec in snapshot.budgets:
            for window in windows_around(spec, now_ms):
                written += await self._write_counters(tenant_id, spec, window, opening, now_ms)
        await self._remember_ends(snapshot, opening, now_ms)
        return written

    async def _write_counters(
        self, tenant_id: str, spec: BudgetSpec, window: Window, opening: Opening, now_ms: int
    ) -> int:
        """Write the counters that a budget has in a window: of a template, each subject's that has spent lately."""
        within_s = self._sum_seconds
        sums = await self._sums.spent(tenant_id, spec, window, within_s=within_s)
        # The budget itself also at nothing.
        subjects = {""}
        if spec.each:
            recent = await self._sums.spent(tenant_id, spec, lately(window, now_ms), within_s=within_s)
            subjects = {subject for subject, _ in recent}
        for subject in subjects:
            of_subject = {bucket: nanos for (whose, bucket), nanos in sums.items() if whose == subject}
            name = counter_name(spec, window, subject)
            if not await self._epoch.write_counter(opening, tenant_id, name, counted(of_subject), now_ms=now_ms):
                raise OpeningLostError
        return len(subjects)

    async def _remember_ends(self, snapshot: TenantSnapshot, opening: Opening, now_ms: int) -> None:
        """Write the ends that may be sent again, and drop the holds, of whatever age, whose end the ledger has."""
        holds = await self._book.live_holds(snapshot.tenant_id)
        held_at_ms = {hold.facts.operation_id: hold.facts.held_at_ms for hold in holds}
        words = await self._ledger.last_words(
            snapshot.tenant_id,
            held_from_ms=now_ms - HELD_BEFORE_MS,
            recorded_from_ms=now_ms - REMEMBERED_MS,
            operation_ids=held_at_ms,
            within_s=self._sum_seconds,
        )
        # An operation is its id and when it was admitted: another one's end is none of this hold.
        ends = [w for w in words if held_at_ms.get(w.facts.operation_id, w.facts.held_at_ms) == w.facts.held_at_ms]
        for start in range(0, len(ends), CONCURRENT):
            chunk = ends[start : start + CONCURRENT]
            written = await asyncio.gather(
                *(self._epoch.remember_ended(opening, _remembered(snapshot, word)) for word in chunk)
            )
            if not all(written):
                raise OpeningLostError


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
