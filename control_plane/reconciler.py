"""Holds counters against the ledger: gives new ones their past, and corrects what has drifted.

A counter's spent is, in one step of Redis, the sum of the events up to the newest one of its stream. Once the ledger
has that event, the two are compared, under any load, and what differs is posted as a difference. That covers a counter
that was made while calls were running: of those that were admitted before it, what has ended is such a difference, and
what is still under way is kept beside it (``seed``) as held, until none is left.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client import Counter as CounterMetric

from budgetguard.adapters.postgres.audit_trail import AuditTrail
from budgetguard.adapters.postgres.ledger_sums import LedgerSums
from budgetguard.adapters.postgres.pool import Database
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.events import UsageEvents
from budgetguard.adapters.redis.keys import shard_of
from budgetguard.adapters.redis.reconciling import CounterBook, LiveHold
from budgetguard.core.budget import counted_subjects
from budgetguard.core.counter import IDLE_KEPT_MS, counter_name, read_name, template_of
from budgetguard.core.counting import Counter
from budgetguard.core.events import entry_order
from budgetguard.core.money import COUNTER_NANOS_MAX
from budgetguard.core.snapshot import BudgetSpec, Status
from budgetguard.core.window import Window, bounds

logger = logging.getLogger(__name__)

# How long a comparison waits for the ledger to have what Redis has; the drain takes a quarter of a second.
DRAIN_SECONDS = 3.0
_LOOK_EVERY_SECONDS = 0.02
# A sum of the ledger may take so long. Less than a rebuild gives it: there no call of the tenant is admitted until it
# is done, here the comparisons behind it wait, or an administrator who makes a budget (the edge gives that a minute).
SUM_SECONDS = 30.0
# How often counters are brought to a correction while others compare them.
_FOLLOW_TIMES = 20
# How often an administrator who waits asks again while somebody else compares; that takes about as long as the drain.
_PATIENT_TIMES = 100
_AGAIN_EVERY_SECONDS = 0.05

# Counters read in one step of Redis.
CHUNK = 200

# Callers decide by their own clocks: around the turn of a window both windows' counters are in use.
CLOCK_SKEW_MS = 60_000


class ReconcileMetrics:
    """What comparisons have found."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.compared = CounterMetric(
            "budgetguard_counters_compared", "Counters that were compared with the ledger.", registry=registry
        )
        self.drifted = CounterMetric(
            "budgetguard_counters_drifted", "Counters that differed from the ledger.", registry=registry
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came of comparing a tenant's counters.

    ``complete``: all of them were compared. ``waiting``: calls that some counters do not count are still under way.
    """

    complete: bool
    waiting: bool = False
    drifted: int = 0


@dataclass(slots=True)
class _Due:
    """One counter to compare: what the ledger says (by bucket if it rolls), and who holds money beside it."""

    spec: BudgetSpec
    window: Window
    subject: str
    name: str
    older: list[LiveHold] = field(default_factory=list)


class Reconciler:
    """Compares one tenant at a time. ``now_ms`` is the clock in Unix milliseconds."""

    def __init__(
        self,
        *,
        database: Database,
        sums: LedgerSums,
        audit: AuditTrail,
        counters: Counters,
        book: CounterBook,
        events: UsageEvents,
        metrics: ReconcileMetrics,
        now_ms: Callable[[], int],
        drain_seconds: float = DRAIN_SECONDS,
        sum_seconds: float = SUM_SECONDS,
    ) -> None:
        self._database = database
        self._sums = sums
        self._audit = audit
        self._counters = counters
        self._book = book
        self._events = events
        self._metrics = metrics
        self._now_ms = now_ms
        self._drain_seconds = drain_seconds
        self._sum_seconds = sum_seconds

    async def compare(
        self, tenant_id: str, *, seeding_only: bool = False, follows: bool = False, patient: bool = False
    ) -> Comparison:
        """Compare and correct the counters of a tenant's budgets, by the snapshot that calls are decided by.

        ``follows``: what differs has a reason that is known (see ``follow``), so it is no alarm.

        Incomplete when the counters are not ready, the ledger falls behind, or somebody else is comparing them, with
        ``patient`` for some seconds.

        Raises:
            DependencyUnavailableError, CountersUnavailableError: nothing is half done; compare again.
        """
        snapshot = await self._counters.load_tenant(tenant_id)
        if snapshot is None or snapshot.status is Status.DELETED:
            return Comparison(complete=snapshot is not None)
        specs = [spec for spec in snapshot.budgets if spec.seeding or not seeding_only]
        if not specs:
            return Comparison(complete=True)
        for _ in range(_PATIENT_TIMES if patient else 1):
            # Two comparisons at a time would post a difference twice.
            async with self._database.exclusive(f"reconcile {tenant_id}") as alone:
                if alone:
                    return await self._compare_specs(tenant_id, specs, follows=follows)
            # Without a connection: those who wait must not keep the one that they wait for from its work.
            await asyncio.sleep(_AGAIN_EVERY_SECONDS if patient else 0)
        return Comparison(complete=False)

    async def _compare_specs(self, tenant_id: str, specs: Sequence[BudgetSpec], *, follows: bool) -> Comparison:
        # Before the counters are read: a call that ends in between is in both, and told apart by its event.
        holds = await self._book.live_holds(tenant_id)
        dues = await self._dues(tenant_id, specs, holds)
        found = [
            await self._compare(tenant_id, dues[start : start + CHUNK], follows=follows)
            for start in range(0, len(dues), CHUNK)
        ]
        return Comparison(
            complete=all(part.complete for part in found),
            waiting=any(part.waiting for part in found),
            drifted=sum(part.drifted for part in found),
        )

    async def follow(self, tenant_id: str) -> bool:
        """Bring a tenant's counters to rows that somebody has just posted: what differs is no drift.

        A correction moves the counters that its call was counted in. One that was made since, or whose call Redis has
        forgotten, hears of it here. ``False``: not now.

        Raises:
            DependencyUnavailableError, CountersUnavailableError: the next comparison does it.
        """
        for _ in range(_FOLLOW_TIMES):
            if (await self.compare(tenant_id, follows=True)).complete:
                return True
            await asyncio.sleep(_AGAIN_EVERY_SECONDS)
        return False

    async def ledger_has_all(self, tenant_id: str) -> bool:
        """Wait until the ledger has every event that a tenant's shard has now; ``False``: it falls behind."""
        reading = await self._book.read(tenant_id, [])
        return await self._is_drained(shard_of(tenant_id), reading.event_id)

    async def _dues(self, tenant_id: str, specs: Sequence[BudgetSpec], holds: Sequence[LiveHold]) -> list[_Due]:
        dues: list[_Due] = []
        for spec in specs:
            for window in windows_around(spec, self._now_ms()):
                subjects = {""}
                if spec.each:
                    subjects = await self._subjects(tenant_id, spec, window)
                    subjects |= {s for hold in holds for s in counted_subjects(spec, hold.facts)}
                dues += [_due(spec, window, subject, holds) for subject in sorted(subjects)]
        return dues

    async def _subjects(self, tenant_id: str, spec: BudgetSpec, window: Window) -> set[str]:
        """List the subjects that a template has counters of, or should have while it gets its past."""
        template = template_of(read_name(counter_name(spec, window, "")))
        subjects = set(await self._book.subjects(tenant_id, template))
        if spec.seeding:
            recent = await self._sums.spent(tenant_id, spec, lately(window, self._now_ms()), within_s=self._sum_seconds)
            subjects |= {subject for subject, _ in recent}
        return subjects

    async def _compare(self, tenant_id: str, dues: Sequence[_Due], *, follows: bool) -> Comparison:
        shard = shard_of(tenant_id)
        # Read first, so that a stream which is whole is never behind it.
        position = await self._sums.position(shard)
        reading = await self._book.read(tenant_id, [due.name for due in dues])
        if reading.generation and entry_order(reading.event_id) < position:
            logger.error("alarm=stream_behind shard=%d event=%s: counters are not compared", shard, reading.event_id)
            return Comparison(complete=False)
        if not reading.generation or not await self._is_drained(shard, reading.event_id):
            return Comparison(complete=False)
        older = {hold.facts.operation_id for due in dues for hold in due.older}
        ended = await self._sums.ended(older, until_event=reading.event_id) if older else set()
        # Before the sum: what a retry brings meanwhile is then in the sum, or still known to be missing from it.
        frees_nothing = await self._sums.has_dead_events(tenant_id, shard=shard)
        spent = await self._spent(tenant_id, dues, reading.event_id)
        waiting, drifted = False, 0
        for due, counter in zip(dues, reading.counters, strict=True):
            seed = sum(hold.hold_nanos for hold in due.older if hold.facts.operation_id not in ended)
            deltas = _missing(due, counter, spent[due.name], frees_nothing=frees_nothing)
            waiting = waiting or seed > 0
            self._metrics.compared.inc()
            if not _moves(deltas) and seed == counter.seed:
                continue
            corrected = await self._book.correct(
                tenant_id, due.name, deltas, seed=seed, generation=reading.generation, now_ms=self._now_ms()
            )
            if not corrected:
                return Comparison(complete=False)
            # A counter that is getting its past has not drifted.
            if _moves(deltas) and not (follows or due.spec.seeding or counter.seed or seed):
                drifted += 1
                await self._tell_drift(tenant_id, due, counter, deltas)
        return Comparison(complete=True, waiting=waiting, drifted=drifted)

    async def _spent(self, tenant_id: str, dues: Sequence[_Due], until_event: str) -> dict[str, dict[int | None, int]]:
        """Sum what the ledger has up to an event, by counter and bucket; one query a budget and window."""
        spent: dict[str, dict[int | None, int]] = defaultdict(dict)
        summed: dict[tuple[str, int, Window], Mapping[tuple[str, int | None], int]] = {}
        for due in dues:
            key = (due.spec.budget_id, due.spec.spec_version, due.window)
            if key not in summed:
                summed[key] = await self._sums.spent(
                    tenant_id, due.spec, due.window, until_event=until_event, within_s=self._sum_seconds
                )
            for (subject, bucket), nanos in summed[key].items():
                if subject == due.subject:
                    spent[due.name][bucket] = nanos
        return spent

    async def _is_drained(self, shard: int, event_id: str) -> bool:
        try:
            async with asyncio.timeout(self._drain_seconds):
                while True:
                    if await self._events.drained(shard, event_id):
                        return True
                    await asyncio.sleep(_LOOK_EVERY_SECONDS)
        except TimeoutError:
            return False

    async def _tell_drift(self, tenant_id: str, due: _Due, counter: Counter, deltas: int | Mapping[int, int]) -> None:
        delta_nanos = deltas if isinstance(deltas, int) else sum(deltas.values())
        self._metrics.drifted.inc()
        logger.error(
            "alarm=counter_drift tenant=%s counter=%s spent_nanos=%d delta_nanos=%d: the ledger has it otherwise",
            *(tenant_id, due.name, counter.spent, delta_nanos),
        )
        await self._audit.write(
            actor="reconcile_counters",
            action="correct",
            kind="counter",
            resource_id=due.spec.budget_id,
            tenant_id=tenant_id,
            before={"counter": due.name, "spent_nanos": counter.spent},
            after={"counter": due.name, "spent_nanos": counter.spent + delta_nanos},
        )


def windows_around(spec: BudgetSpec, now_ms: int) -> list[Window]:
    """List the windows of a budget that calls may fall in now, by clocks that differ a little."""
    moments_ms = (now_ms - CLOCK_SKEW_MS, now_ms, now_ms + CLOCK_SKEW_MS)
    # One counter has all of a rolling window.
    found = dict.fromkeys(bounds(spec, at) for at in (moments_ms[1:2] if spec.rolling_ms is not None else moments_ms))
    return [window for window in found if window is not None]


def lately(window: Window, now_ms: int) -> Window:
    """Return the part of a window in which a template's subject must have spent to have a counter.

    Only a counter of a window that never ends is forgotten while it is idle (``core/counter.py``).
    """
    if window.resets_at_ms is not None:
        return window
    return Window(max(window.starts_at_ms, now_ms - IDLE_KEPT_MS), None)


def counted(spent: Mapping[int | None, int]) -> int | dict[int, int]:
    """Return a sum of the ledger as a counter can hold it: one number, or one for each bucket if it rolls."""
    rolling = {bucket: nanos for bucket, nanos in spent.items() if bucket is not None}
    return rolling or min(sum(spent.values()), COUNTER_NANOS_MAX)


def _due(spec: BudgetSpec, window: Window, subject: str, holds: Sequence[LiveHold]) -> _Due:
    name = counter_name(spec, window, subject)
    due = _Due(spec, window, subject, name)
    key = read_name(name).key
    for hold in holds:
        facts = hold.facts
        ends_at_ms = window.resets_at_ms
        is_in_window = window.starts_at_ms <= facts.held_at_ms and (ends_at_ms is None or facts.held_at_ms < ends_at_ms)
        if (
            is_in_window
            and subject in counted_subjects(spec, facts)
            and key not in {read_name(counter).key for counter in hold.counters}
        ):
            due.older.append(hold)
    return due


def _missing(
    due: _Due, counter: Counter, spent: Mapping[int | None, int], *, frees_nothing: bool
) -> int | dict[int, int]:
    """Say what a counter lacks. Where usage is known that is in no row, nothing may be taken from it."""

    def lacks(ledger_nanos: int, counter_nanos: int) -> int:
        delta = min(ledger_nanos, COUNTER_NANOS_MAX) - counter_nanos
        return max(delta, 0) if frees_nothing else delta

    name = read_name(due.name)
    if name.buckets is None or name.bucket is None:
        return lacks(sum(spent.values()), counter.spent)
    newest = max(name.bucket, counter.last or 0)
    live_from = newest - name.buckets.number + 1
    buckets = {bucket for bucket in (*spent, *counter.buckets) if bucket is not None and bucket >= live_from}
    deltas = {bucket: lacks(spent.get(bucket, 0), counter.buckets.get(bucket, (0, 0))[0]) for bucket in buckets}
    return {bucket: delta for bucket, delta in sorted(deltas.items()) if delta}


def _moves(deltas: int | Mapping[int, int]) -> bool:
    return bool(deltas)
