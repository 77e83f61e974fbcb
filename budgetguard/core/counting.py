"""One counter's state and how money moves in it: the reference of what ``lua/common.lua`` does.

A rolling counter keeps its sums beside the buckets that they are made of. A bucket leaves the sums when it is wholly
past, and what is still held in it leaves with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from budgetguard.core.counter import CounterName
from budgetguard.core.money import COUNTER_NANOS_MAX


@dataclass(slots=True)
class Counter:
    """What was spent and what is held, in the counter's unit.

    ``seed`` is held by calls that were admitted before the counter was there, as far as the control plane has counted.
    Of a rolling counter ``buckets`` has (spent, held) by bucket, ``first`` is at or before the oldest and ``last`` the
    newest (``None``: nothing was counted yet).
    """

    spent: int = 0
    held: int = 0
    seed: int = 0
    first: int | None = None
    last: int | None = None
    buckets: dict[int, tuple[int, int]] = field(default_factory=dict)

    def left_of(self, limit: int) -> int:
        """Return what is left of a limit. A sum below zero is damage, not credit."""
        return limit - max(self.spent, 0) - max(self.held, 0) - max(self.seed, 0)


def as_of(counter: Counter, name: CounterName) -> Counter:
    """Return the counter without what is past in the bucket that ``name`` names."""
    if name.bucket is None or name.buckets is None:
        return Counter(counter.spent, counter.held, counter.seed)
    if counter.last is None:
        return Counter(counter.spent, counter.held, counter.seed, name.bucket, name.bucket)
    newest = max(name.bucket, counter.last)
    live_from = newest - name.buckets.number + 1
    if counter.last < live_from:
        return Counter(0, 0, counter.seed, name.bucket, newest)
    past = [amounts for at, amounts in counter.buckets.items() if at < live_from]
    return Counter(
        spent=counter.spent - sum(spent for spent, _ in past),
        held=counter.held - sum(held for _, held in past),
        seed=counter.seed,
        first=min(max(counter.first or 0, live_from), name.bucket),
        last=newest,
        buckets={at: amounts for at, amounts in counter.buckets.items() if at >= live_from},
    )


def has_left(counter: Counter, name: CounterName) -> bool:
    """Whether the bucket that ``name`` names is past in ``counter``, as ``as_of`` returned it."""
    return name.bucket is not None and name.bucket < (counter.last or 0) - (name.buckets or (0, 0))[1] + 1


def move(counter: Counter, name: CounterName, *, spent: int, held: int) -> None:
    """Add to a counter that ``as_of`` returned. What was used was used: one that would overflow stays at its end."""
    spent = min(spent, COUNTER_NANOS_MAX - counter.spent)
    counter.spent += spent
    counter.held += held
    if name.bucket is not None:
        spent_before, held_before = counter.buckets.get(name.bucket, (0, 0))
        counter.buckets[name.bucket] = (spent_before + spent, held_before + held)


def frees_at_ms(counter: Counter, name: CounterName, *, limit: int, needed: int) -> int | None:
    """Say when a rolling counter has room for ``needed``, if nothing else comes; ``None`` for one that does not roll.

    What needs more than the limit is told when the counter is empty.
    """
    if name.buckets is None:
        return None
    left, leaving = counter.left_of(limit), counter.last or 0
    for at, (spent, held) in sorted(counter.buckets.items()):
        left += spent + held
        if left >= needed:
            leaving = at
            break
    return (leaving + name.buckets.number) * name.buckets.width_ms


def rewritten(counter: Counter, name: CounterName, spent: int | Mapping[int, int]) -> Counter:
    """Return a counter that ``as_of`` returned with what it has spent written anew, by bucket if it rolls.

    What is held stays.
    """
    if isinstance(spent, int):
        return Counter(spent, counter.held, counter.seed)
    live = {at: amount for at, amount in spent.items() if not has_left(counter, replace(name, bucket=at))}
    buckets = {at: (0, held) for at, (_, held) in counter.buckets.items()}
    buckets |= {at: (amount, buckets.get(at, (0, 0))[1]) for at, amount in live.items()}
    places = [*buckets, counter.last or 0]
    return Counter(sum(live.values()), counter.held, counter.seed, min(places), max(places), buckets)
