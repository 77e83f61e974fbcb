"""When a budget's window starts and ends. Computed from the clock each time, never cached and never reset by a job."""

from calendar import monthrange
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from budgetguard.core.snapshot import BudgetSpec, WindowKind
from budgetguard.core.zones import zone_of

# The counter of a closed window is kept this long for late settles and for whoever asks about yesterday.
CLOSED_KEPT_MS = 48 * 3_600_000

# How many months a calendar window has, of those that are made of months.
_MONTHS = {WindowKind.MONTH: 1, WindowKind.QUARTER: 3, WindowKind.YEAR: 12}

# The windows that follow one another; which of them have an anchor, and how far it goes; which are anchored in a month.
CALENDAR = frozenset({WindowKind.DAY, WindowKind.WEEK, *_MONTHS})
ANCHOR_DAY_MAX = {WindowKind.WEEK: 7, WindowKind.MONTH: 31, WindowKind.QUARTER: 31, WindowKind.YEAR: 31}
ANCHORED_MONTHS = frozenset({WindowKind.QUARTER, WindowKind.YEAR})


class Window(NamedTuple):
    """``starts_at_ms`` is inclusive, ``resets_at_ms`` exclusive; ``None`` never resets."""

    starts_at_ms: int
    resets_at_ms: int | None


def bounds(spec: BudgetSpec, now_ms: int) -> Window | None:
    """Find the window that ``now_ms`` (Unix milliseconds) is in; ``None`` when a FIXED budget does not apply then.

    Calendar windows begin at the first instant of a date in the budget's zone. A ROLLING one is what ends now: it
    begins with its oldest bucket and resets, as a whole, never.

    Raises:
        zoneinfo.ZoneInfoNotFoundError: the zone is unknown.
    """
    if spec.window is WindowKind.LIFETIME:
        return Window(0, None)
    if spec.window is WindowKind.FIXED:
        starts_at_ms = spec.starts_at_ms or 0
        over = spec.ends_at_ms is not None and now_ms >= spec.ends_at_ms
        return None if over or now_ms < starts_at_ms else Window(starts_at_ms, spec.ends_at_ms)
    if spec.window is WindowKind.ROLLING:
        rolling = buckets_of(spec)
        return Window((now_ms // rolling.width_ms - rolling.number + 1) * rolling.width_ms, None)
    zone = zone_of(spec.zone)
    # Half-open milliseconds: the integer division keeps a float's rounding out of the date.
    today = datetime.fromtimestamp(now_ms // 1000, UTC).astimezone(zone).date()
    first = _first_day(spec, today)
    following = _next_first_day(spec, first)
    # Where clocks go back over midnight a date comes twice; its first instant decides, so windows never overlap.
    if now_ms >= _start_of(following, zone):
        first, following = following, _next_first_day(spec, following)
    return Window(_start_of(first, zone), _start_of(following, zone))


class Buckets(NamedTuple):
    """How a ROLLING window is cut: ``number`` buckets of ``width_ms``, the newest of which is not over yet."""

    width_ms: int
    number: int


# Up to this length a rolling window has 60 buckets, above it about 366.
_SHORT_MS = 3_600_000
_BUCKETS_SHORT = 60
_BUCKETS_LONG = 366


def buckets_of(spec: BudgetSpec) -> Buckets:
    """Cut a ROLLING window: money leaves it bucket by bucket, never before it is ``rolling_ms`` old."""
    rolling_ms = spec.rolling_ms or 0
    wanted = _BUCKETS_SHORT if rolling_ms <= _SHORT_MS else _BUCKETS_LONG
    width_ms = max(-(-rolling_ms // wanted), 1)
    # One more than fit: the newest bucket has only begun.
    return Buckets(width_ms, -(-rolling_ms // width_ms) + 1)


def _first_day(spec: BudgetSpec, day: date) -> date:
    """Return the newest first day of a window that is not after ``day``."""
    if spec.window is WindowKind.DAY:
        return day
    if spec.window is WindowKind.WEEK:
        return day - timedelta(days=(day.isoweekday() - spec.anchor_day) % 7)
    length = _MONTHS[spec.window]
    months = day.year * 12 + day.month - 1
    first = months - (months - (spec.anchor_month - 1)) % length
    anchored = _anchored(first, spec.anchor_day)
    return anchored if anchored <= day else _anchored(first - length, spec.anchor_day)


def _next_first_day(spec: BudgetSpec, first: date) -> date:
    if spec.window is WindowKind.DAY:
        return first + timedelta(days=1)
    if spec.window is WindowKind.WEEK:
        return first + timedelta(days=7)
    return _anchored(first.year * 12 + first.month - 1 + _MONTHS[spec.window], spec.anchor_day)


def _anchored(months: int, anchor_day: int) -> date:
    """Return a month's anchor day; ``months`` counts months since year 0. A short month ends before the anchor."""
    year, month = divmod(months, 12)
    return date(year, month + 1, min(anchor_day, monthrange(year, month + 1)[1]))


def _start_of(day: date, zone: ZoneInfo) -> int:
    # In a gap (clocks go forward over midnight) fold=0 reads the offset before it: the instant of the jump, as meant.
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()) * 1000
