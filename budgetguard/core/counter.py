"""The names of counters. A name says all that a script must know: what is counted, for whom, in which window or bucket.

Names are kept by holds, handed over to ext_proc and told to the ledger, so that whatever changes meanwhile, an
operation ends where it was counted at admission.

    <budget id>:<spec version>:<start ms>:<reset ms, or empty>[:<subject>]       a calendar, fixed or lifetime window
    <budget id>:<spec version>:~<bucket ms>x<buckets>:<bucket>[:<subject>]       a rolling window
    ~tokens:0:~1000x61:<second>:<API key id, or empty>                           tokens a minute
    ~calls:0:0::<API key id, or empty>                                           calls under way
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from urllib.parse import quote, unquote

from budgetguard.core.snapshot import BudgetSpec, WindowKind
from budgetguard.core.window import CLOSED_KEPT_MS, Buckets, Window, buckets_of

# The counter of a lifetime template ("each session") is kept this long after its subject's last call.
IDLE_KEPT_MS = 90 * 24 * 3_600_000

TOKENS = "~tokens"
CALLS = "~calls"
_MINUTE = Buckets(1000, 61)
_ROLLING = "~"


class Unit(StrEnum):
    """What a counter counts."""

    NANOS = "n"
    TOKENS = "t"
    CALLS = "c"


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterName:
    """A name, read. ``key`` is the part that names the counter itself; a rolling one's ``bucket`` is beside it.

    ``subject`` is ``None`` where the counter is not one of a template's.
    """

    key: str
    unit: Unit
    budget_id: str
    spec_version: int
    resets_at_ms: int | None
    buckets: Buckets | None
    bucket: int | None
    subject: str | None

    @property
    def slides(self) -> bool:
        """Whether it is kept longer with each use."""
        return self.bucket is not None or (self.subject is not None and self.resets_at_ms is None)

    def kept_until_ms(self, now_ms: int) -> int | None:
        """Say when it may be forgotten, if it is used now for the last time; ``None``: never."""
        if self.unit is Unit.CALLS:
            return None
        if self.bucket is not None and self.buckets is not None:
            return (self.bucket + self.buckets.number + 1) * self.buckets.width_ms + CLOSED_KEPT_MS
        if self.resets_at_ms is not None:
            return self.resets_at_ms + CLOSED_KEPT_MS
        return None if self.subject is None else now_ms + IDLE_KEPT_MS


def counter_name(spec: BudgetSpec, window: Window, subject: str = "") -> str:
    """Name the counter of a budget in a window; ``subject`` is whose it is, of a template."""
    of_subject = f":{quote(subject, safe='')}" if spec.each else ""
    if spec.window is WindowKind.ROLLING:
        width_ms, number = buckets_of(spec)
        bucket = window.starts_at_ms // width_ms + number - 1
        return f"{spec.budget_id}:{spec.spec_version}:{_ROLLING}{width_ms}x{number}:{bucket}{of_subject}"
    resets_at = "" if window.resets_at_ms is None else window.resets_at_ms
    return f"{spec.budget_id}:{spec.spec_version}:{window.starts_at_ms}:{resets_at}{of_subject}"


def tokens_counter_name(key_id: str, now_ms: int) -> str:
    """Name the counter of tokens a minute, of an API key or, with an empty id, of its tenant."""
    width_ms, number = _MINUTE
    return f"{TOKENS}:0:{_ROLLING}{width_ms}x{number}:{now_ms // width_ms}:{key_id}"


def calls_counter_name(key_id: str) -> str:
    """Name the counter of calls under way, of an API key or, with an empty id, of its tenant."""
    return f"{CALLS}:0:0::{key_id}"


@lru_cache(maxsize=65_536)  # the same few budgets and windows with every call
def read_name(name: str) -> CounterName:
    """Read a name.

    Raises:
        ValueError: it is none.
    """
    budget_id, version, shape, place, *subject = name.split(":")
    unit = {TOKENS: Unit.TOKENS, CALLS: Unit.CALLS}.get(budget_id, Unit.NANOS)
    tail = "".join(f":{part}" for part in subject)
    buckets = bucket = None
    if shape.startswith(_ROLLING):
        width_ms, _, number = shape[1:].partition("x")
        buckets, bucket = Buckets(int(width_ms), int(number)), int(place)
        key = f"{budget_id}:{version}:{shape}:{tail}"
    else:
        key = name
    return CounterName(
        key=key,
        unit=unit,
        budget_id=budget_id,
        spec_version=int(version),
        resets_at_ms=int(place) if place and bucket is None else None,
        buckets=buckets,
        bucket=bucket,
        subject=unquote(subject[0]) if subject else None,
    )


def template_of(name: CounterName) -> str:
    """Name a template's counters of one window together: the counter's key without its subject."""
    return name.key.rpartition(":")[0]


def idle_before_ms(name: CounterName, now_ms: int) -> int:
    """Say since when a subject of a template must have been seen to count as one; 0 in a window that closes."""
    if name.buckets is not None:
        return now_ms - name.buckets.number * name.buckets.width_ms
    return 0 if name.resets_at_ms is not None else now_ms - IDLE_KEPT_MS
