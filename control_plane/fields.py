"""The fields of administrators' requests: checked, and read into plain values."""

import re
from collections.abc import Collection
from datetime import UTC, date, datetime, timedelta, tzinfo

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from budgetguard.core.errors import InvalidError
from budgetguard.core.moments import EARLIEST_MS, LATEST_MS
from budgetguard.core.money import parse_usd
from budgetguard.v1 import correction_pb2, refusal_pb2, usage_pb2

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EXPECTED_INSTANT = (
    "expected an ISO date (2026-01-31) or a time in RFC 3339 with its zone (2026-01-31T12:00:00Z; a + is %2B in a URL)"
)
_EXPECTED_YEARS = "expected a time in the years 1970 to 9999"


def milliseconds(moment: Timestamp, *, field: str) -> int:
    """Read a Timestamp, down to whole milliseconds.

    Raises:
        InvalidError: outside the years 1970 to 9999, or its nanos are not.
    """
    if not 0 <= moment.nanos < 10**9:
        raise InvalidError(field, f"{_EXPECTED_YEARS}, with nanos of 0 to 999999999")
    return _in_range(moment.seconds * 1000 + moment.nanos // 10**6, field=field)


def instant(text: str, *, field: str, whole_day: bool = False, zone: tzinfo = UTC) -> int:
    """Read an ISO date or an RFC 3339 time as Unix milliseconds. ``whole_day``: a date means its end, exclusive.

    A date begins at midnight in ``zone``.

    Raises:
        InvalidError: it is neither, or outside the years 1970 to 9999.
    """
    try:
        if _DATE.fullmatch(text):
            day = date.fromisoformat(text) + timedelta(days=whole_day)
            moment = datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)
        else:
            moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError(text)
    except ValueError:
        raise InvalidError(field, _EXPECTED_INSTANT) from None
    except OverflowError:
        # At the calendar's ends: a last day has no end there, and other zones have other years.
        raise InvalidError(field, _EXPECTED_YEARS) from None
    return _in_range((moment - _EPOCH) // timedelta(milliseconds=1), field=field)


def _in_range(moment_ms: int, *, field: str) -> int:
    if not EARLIEST_MS <= moment_ms <= LATEST_MS:
        raise InvalidError(field, _EXPECTED_YEARS)
    return moment_ms


def instants_between(
    request: usage_pb2.ListLedgerRowsRequest
    | usage_pb2.SumUsageRequest
    | correction_pb2.CorrectOperationsRequest
    | refusal_pb2.ListRefusalsRequest
    | refusal_pb2.CountRefusalsRequest,
) -> tuple[int | None, int | None]:
    """Read between which times a request asks; ``None`` where it does not say.

    Raises:
        InvalidError: one of them is none, or there is no time between them.
    """
    # "from" is a word of Python's own.
    since = str(getattr(request, "from"))
    from_ms = instant(since, field="from") if since else None
    until_ms = instant(request.until, field="until") if request.until else None
    if from_ms is not None and until_ms is not None and from_ms >= until_ms:
        raise InvalidError("from", "expected a time before until, which is not part of the span itself")
    return from_ms, until_ms


def duration_milliseconds(duration: Duration, *, field: str) -> int:
    """Read a Duration that is whole milliseconds.

    Raises:
        InvalidError: it is finer, or its parts do not belong together.
    """
    rest_ms, finer = divmod(duration.nanos, 10**6)
    if finer or not 0 <= duration.nanos < 10**9:
        raise InvalidError(field, "expected a duration of whole milliseconds")
    return duration.seconds * 1000 + rest_ms


def dollars(text: str, *, field: str) -> int:
    """Read an amount in dollars into nanos, exactly.

    Raises:
        InvalidError: it is none.
    """
    try:
        return parse_usd(text)
    except ValueError as error:
        raise InvalidError(field, str(error)) from None


def etag_version(etag: str) -> int | None:
    """Read an etag; ``None`` when none is given, -1 (which no version is) for what we never gave out."""
    if not etag:
        return None
    text = etag.strip('"')
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else -1


def named_fields(request: Message, allowed: Collection[str]) -> set[str]:
    """Return which of the ``allowed`` fields an update sets: those of its mask, else those that are given.

    Raises:
        InvalidError: the mask names another field, or nothing is to be set.
    """
    paths: list[str] = list(request.update_mask.paths)  # type: ignore[attr-defined] # every update has one
    given = {field.name for field, _ in request.ListFields()}
    controls = {"etag", "request_id"}
    named = set(paths) - controls if paths else given & set(allowed)
    unknown = sorted(named - set(allowed))
    expected = f"expected one or more of {', '.join(allowed)}"
    if unknown:
        raise InvalidError("update_mask", f"{expected}, got {unknown[0][:40]!r}")
    if not named:
        raise InvalidError("update_mask", f"{expected}, got none")
    return named
