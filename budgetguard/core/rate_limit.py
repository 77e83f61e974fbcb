"""Requests a minute: a sliding window of 60 one-second buckets beside their sum. The reference of the script's part."""

from dataclasses import dataclass, field

WINDOW_SECONDS = 60


@dataclass(slots=True)
class Minute:
    """Requests by the second they were counted in. ``first`` is at or before the oldest, ``last`` is the newest."""

    total: int = 0
    first: int = 0
    last: int = 0
    counts: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Look:
    """The window as of one moment: ``second`` is the bucket that a request would count into."""

    second: int
    first: int
    total: int


def look(minute: Minute, now_ms: int) -> Look:
    """Sum the buckets that are not wholly past. A clock that is behind counts into the newest second."""
    second = max(now_ms // 1000, minute.last)
    live_from = second - WINDOW_SECONDS + 1
    if minute.last < live_from:
        return Look(second=second, first=second, total=0)
    total = sum(count for at, count in minute.counts.items() if at >= live_from)
    return Look(second=second, first=max(minute.first, live_from), total=total)


def retry_after_ms(minute: Minute, *, limit: int, now_ms: int) -> int:
    """Say when enough buckets have left for one more request; ``limit`` (at least 1) is reached now."""
    seen = look(minute, now_ms)
    total = seen.total
    leaving = min(
        at
        for at in range(seen.first, seen.second + 1)
        if total - sum(count for other, count in minute.counts.items() if seen.first <= other <= at) < limit
    )
    return (leaving + WINDOW_SECONDS) * 1000 - now_ms


def reset_seconds(seen: Look, now_ms: int) -> int:
    """Say in how many whole seconds the window is empty, if nothing else comes."""
    return -(-((seen.second + WINDOW_SECONDS) * 1000 - now_ms) // 1000)


def count(minute: Minute, seen: Look) -> None:
    """Count one request that was admitted, and drop what is past."""
    minute.counts = {at: n for at, n in minute.counts.items() if at >= seen.first}
    minute.counts[seen.second] = minute.counts.get(seen.second, 0) + 1
    minute.total, minute.first, minute.last = seen.total + 1, seen.first, seen.second
