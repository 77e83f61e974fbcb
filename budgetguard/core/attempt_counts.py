"""Counts refused attempts: the first ten a minute, key and reason are kept, all of them are counted.

Each counter has one writer, its ``source``, and only rises. So whoever is told a count twice, late or out of order
keeps the largest and is right; nothing on the way has to be remembered. A Redis that was lost is told its last counts
again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from budgetguard.core.attempts import ROWS_A_MINUTE, Attempt, RefusedCall, minute_of
from budgetguard.core.reasons import Reason

# Counters in one process: a minute's keys and reasons, some more while Redis is away.
GROUPS_MAX = 10_000
# Attempts that wait to be told, at about 1 KB each.
WAITING_MAX = 1_000
# What could not be told for so long is given up.
UNTOLD_KEPT_MS = 10 * 60_000
# A count that was taken can be told again for so long: Redis may come back without it, or be lost before it is drained.
TOLD_KEPT_MS = 10_000
# A shard's attempts and counts on their way to Postgres. Above, attempts are only counted and counts are not taken.
ROWS_WAITING_MAX = 2_000
TALLIES_WAITING_MAX = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Whose refusals are counted, of which reason and minute, and by which counter (``source``, used by no other)."""

    tenant_id: str
    key_id: str
    reason: Reason
    minute_ms: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a counter stands at, and attempts that it has not told yet; the first of them is its ``first_number``-th."""

    tally: Tally
    count: int
    attempts: tuple[Attempt, ...] = ()
    first_number: int = 1


@dataclass(slots=True)
class _Group:
    tally: Tally
    count: int = 0
    told: int = 0
    told_at_ms: int = 0
    # Whether Redis may have lost what it was told.
    again: bool = False
    # Attempts that were told, and those that wait.
    taken: int = 0
    waiting: list[Attempt] = field(default_factory=list)

    def is_safe(self, same_until_ms: int) -> bool:
        """Whether it was told, so long before that it need not be told again."""
        return self.told == self.count and not self.again and self.told_at_ms + TOLD_KEPT_MS <= same_until_ms


class Gathering:
    """The counters of one process, ``source``: a name that no other process has had."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._serial = count(1)
        self._groups: dict[tuple[str, str, Reason, int], _Group] = {}
        self._waiting = 0

    def add(
        self, reason: Reason, *, tenant_id: str, key_id: str, refused_at_ms: int, make: Callable[[], Attempt]
    ) -> bool:
        """Count one refusal; ``make`` is asked for it when it is kept. ``False``: too many counters, it is dropped."""
        minute_ms = minute_of(refused_at_ms)
        identity = (tenant_id, key_id, reason, minute_ms)
        group = self._groups.get(identity)
        if group is None:
            if len(self._groups) >= GROUPS_MAX:
                return False
            # Not the process alone: after `forget`, a late refusal of the same minute begins another counter.
            source = f"{self._source}.{next(self._serial)}"
            tally = Tally(tenant_id=tenant_id, key_id=key_id, reason=reason, minute_ms=minute_ms, source=source)
            group = self._groups[identity] = _Group(tally)
        group.count += 1
        if group.taken + len(group.waiting) < ROWS_A_MINUTE and self._waiting < WAITING_MAX:
            group.waiting.append(make())
            self._waiting += 1
        return True

    def reports(self) -> list[Report]:
        """List what was not told yet, or has to be told again."""
        return [
            Report(tally=group.tally, count=group.count, attempts=tuple(group.waiting), first_number=group.taken + 1)
            for group in self._groups.values()
            if group.count > group.told or group.again
        ]

    def told(self, report: Report, *, now_ms: int) -> None:
        """Take note that a report of ours has arrived."""
        tally = report.tally
        group = self._groups[tally.tenant_id, tally.key_id, tally.reason, tally.minute_ms]
        group.told, group.told_at_ms, group.again = report.count, now_ms, False
        group.taken += len(report.attempts)
        del group.waiting[: len(report.attempts)]
        self._waiting -= len(report.attempts)

    def tell_again(self) -> int:
        """Tell what counters stand at again, as Redis may have lost it; attempts that it took are gone then.

        Answers how many counters there are.
        """
        told = [group for group in self._groups.values() if group.told]
        for group in told:
            group.again = True
        return len(told)

    def untold(self) -> int:
        """Count the refusals that were not told yet."""
        return sum(group.count - group.told for group in self._groups.values())

    def forget(self, now_ms: int, *, same_until_ms: int) -> int:
        """Drop the counters of minutes that are over, once told, and those that wait for too long.

        ``same_until_ms``: until then Redis is known to have lost nothing, so what it was told ``TOLD_KEPT_MS`` before
        is safe. Answers how many refusals were dropped that nobody was told of.
        """
        over = [
            (identity, group)
            for identity, group in self._groups.items()
            if group.tally.minute_ms < minute_of(now_ms)
            and (group.is_safe(same_until_ms) or group.tally.minute_ms < now_ms - UNTOLD_KEPT_MS)
        ]
        for identity, group in over:
            del self._groups[identity]
            self._waiting -= len(group.waiting)
        return sum(group.count - group.told for _, group in over)


@dataclass(slots=True)
class RefusalShard:
    """What Redis keeps of a shard's refusals. ``rows`` numbers the rows of a tenant's minute, key and reason.

    ``seen`` is the number of the last attempt of each counter; both are forgotten when nothing can come any more.
    """

    rows: dict[tuple[str, str, Reason, int], int] = field(default_factory=dict)
    seen: dict[Tally, int] = field(default_factory=dict)
    tallies: dict[Tally, int] = field(default_factory=dict)
    stream: list[RefusedCall] = field(default_factory=list)


def refuse(shard: RefusalShard, report: Report, *, rows_max: int, tallies_max: int) -> bool:
    """Take a report, the same one again without effect; ``False``: no room. The reference of ``refuse.lua``."""
    tally = report.tally
    if tally not in shard.tallies and len(shard.tallies) >= tallies_max:
        return False
    shard.tallies[tally] = max(report.count, shard.tallies.get(tally, 0))
    group = (tally.tenant_id, tally.key_id, tally.reason, tally.minute_ms)
    for number, attempt in enumerate(report.attempts, report.first_number):
        if number <= shard.seen.get(tally, 0):
            continue
        shard.seen[tally] = number
        row = shard.rows.get(group, 0) + 1
        if row <= ROWS_A_MINUTE and len(shard.stream) < rows_max:
            shard.rows[group] = row
            shard.stream.append(RefusedCall(attempt=attempt, number=row))
    return True


def forget_refusals(shard: RefusalShard, *, rows: int, tallies: dict[Tally, int]) -> None:
    """Drop what Postgres has: the oldest rows, and each count unless it has risen meanwhile."""
    del shard.stream[:rows]
    for tally, number in tallies.items():
        if shard.tallies.get(tally) == number:
            del shard.tallies[tally]
