"""Reads what requests say of budgets into drafts and changes. What cannot be is refused by the name of its field."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from budgetguard.core.entities import (
    SUBJECT_FIELDS,
    SUBJECTS_MAX_DEFAULT,
    THRESHOLD_BPS_DEFAULT,
    BudgetChanges,
    BudgetDraft,
)
from budgetguard.core.errors import FieldViolation, InvalidError
from budgetguard.core.snapshot import Mode, SubjectKind, WindowKind
from budgetguard.core.zones import ZONE_EXPECTED, zone_of
from budgetguard.v1 import budget_pb2
from control_plane.fields import dollars, duration_milliseconds, instant, named_fields
from control_plane.messages import EACHES_BACK, MODES_BACK, WINDOWS

# Everything that describes a budget has the same fields.
Description: TypeAlias = budget_pb2.BudgetSpec | budget_pb2.CreateBudgetRequest

DEFAULT_ZONE = "UTC"
_EXPECTED_PERIOD = "expected daily, weekly, monthly, quarterly, yearly, rolling, custom or lifetime"

# What an update may set; the subject of a budget never changes.
_CHANGEABLE = (
    "amount_usd",
    "period",
    "start_date",
    "end_date",
    "mode",
    "subjects_max",
    "time_zone",
    "anchor_day",
    "anchor_month",
    "rolling_period",
    "rollover_cap_usd",
    "threshold_bps",
)


def budget_drafts(specs: Sequence[budget_pb2.BudgetSpec], *, new_id: Callable[[], str]) -> list[BudgetDraft]:
    """Read several budgets.

    Raises:
        InvalidError: names the first wrong field with its place.
    """
    drafts = []
    for index, spec in enumerate(specs):
        try:
            drafts.append(budget_draft(spec, budget_id=new_id()))
        except InvalidError as error:
            placed = [FieldViolation(f"budgets[{index}].{v.field}", v.expected) for v in error.violations]
            raise InvalidError.of(tuple(placed)) from None
    return drafts


def budget_draft(spec: Description, *, budget_id: str) -> BudgetDraft:
    """Read one budget.

    Raises:
        InvalidError: names the wrong field.
    """
    window = _window(spec.period)
    if not spec.amount_usd:
        raise InvalidError("amount_usd", "expected US dollars as a decimal number, got none")
    kind, subject = _subject(spec)
    zone = spec.time_zone or DEFAULT_ZONE
    starts_at_ms, ends_at_ms = _dates(window, spec.start_date, spec.end_date, zone=zone)
    return BudgetDraft(
        budget_id=budget_id,
        subject_kind=kind,
        subject=subject,
        each=bool(spec.each),
        subjects_max=spec.subjects_max or SUBJECTS_MAX_DEFAULT,
        window=window,
        zone=zone,
        limit_nanos=dollars(spec.amount_usd, field="amount_usd"),
        mode=_mode(spec.mode) if spec.mode else Mode.ENFORCE,
        starts_at_ms=starts_at_ms,
        ends_at_ms=ends_at_ms,
        anchor_day=spec.anchor_day or 1,
        anchor_month=spec.anchor_month or 1,
        rolling_ms=_rolling_ms(spec),
        rollover_cap_nanos=_rollover_cap_nanos(spec),
        threshold_bps=_thresholds(spec.threshold_bps),
    )


def names_a_day(request: budget_pb2.UpdateBudgetRequest) -> bool:
    """Whether a change has dates, which are days of the budget's own zone if it names no other."""
    return bool(request.start_date or request.end_date)


def budget_changes(request: budget_pb2.UpdateBudgetRequest, *, zone: str) -> BudgetChanges:
    """Read a change. ``zone`` is the budget's own, where it is needed; see ``names_a_day``.

    Raises:
        InvalidError: names the wrong field.
    """
    named = named_fields(request, _CHANGEABLE)
    changes = BudgetChanges()
    if "amount_usd" in named:
        changes["limit_nanos"] = dollars(request.amount_usd, field="amount_usd")
    if "mode" in named:
        changes["mode"] = _mode(request.mode)
    if "subjects_max" in named:
        changes["subjects_max"] = request.subjects_max or SUBJECTS_MAX_DEFAULT
    if "rollover_cap_usd" in named:
        changes["rollover_cap_nanos"] = _rollover_cap_nanos(request)
    if "threshold_bps" in named:
        changes["threshold_bps"] = _thresholds(request.threshold_bps)
    return {**changes, **_window_changes(request, named, zone=zone)}


def _window_changes(request: budget_pb2.UpdateBudgetRequest, named: Collection[str], *, zone: str) -> BudgetChanges:
    changes = BudgetChanges()
    if "time_zone" in named:
        zone = changes["zone"] = request.time_zone or DEFAULT_ZONE
    if "anchor_day" in named:
        changes["anchor_day"] = request.anchor_day or 1
    if "anchor_month" in named:
        changes["anchor_month"] = request.anchor_month or 1
    if "rolling_period" in named:
        changes["rolling_ms"] = _rolling_ms(request)
    if "period" in named:
        window = changes["window"] = _window(request.period)
        changes["starts_at_ms"], changes["ends_at_ms"] = _dates(window, request.start_date, request.end_date, zone=zone)
        return changes
    # Without a period these are the new dates of a custom one; the repository refuses them on any other.
    if "start_date" in named:
        changes["starts_at_ms"] = _day(request.start_date, field="start_date", zone=zone)
    if "end_date" in named:
        changes["ends_at_ms"] = _day(request.end_date, field="end_date", zone=zone, is_last=True)
    return changes


def _window(period: budget_pb2.Budget.Period.ValueType) -> WindowKind:
    window = WINDOWS.get(period)
    if window is None:
        raise InvalidError("period", _EXPECTED_PERIOD)
    return window


def _subject(spec: Description) -> tuple[SubjectKind, str]:
    """Find the one subject; none is the tenant. Of a template the kind, without a name."""
    given = [(kind, field, getattr(spec, field)) for kind, field in SUBJECT_FIELDS.items() if getattr(spec, field)]
    if len(given) + bool(spec.each) > 1:
        second = given[1][1] if len(given) > 1 else given[0][1]
        raise InvalidError(second, f"expected at most one of {', '.join(SUBJECT_FIELDS.values())} and each")
    if spec.each:
        if spec.each not in EACHES_BACK:
            raise InvalidError("each", "expected EACH_ and API_KEY, TAG, SESSION, END_USER, MODEL or PROVIDER")
        return EACHES_BACK[spec.each], ""
    if not given:
        return SubjectKind.TENANT, ""
    ((kind, _, subject),) = given
    return kind, subject


def _mode(number: budget_pb2.Budget.Mode.ValueType) -> Mode:
    mode = MODES_BACK.get(number)
    if mode is None:
        raise InvalidError("mode", "expected ENFORCE or OBSERVE")
    return mode


def _zone(name: str) -> ZoneInfo:
    try:
        return zone_of(name)
    except ZoneInfoNotFoundError:
        raise InvalidError("time_zone", f"expected {ZONE_EXPECTED}") from None


def _dates(window: WindowKind, start_date: str, end_date: str, *, zone: str) -> tuple[int | None, int | None]:
    if window is not WindowKind.FIXED:
        for field, text in (("start_date", start_date), ("end_date", end_date)):
            if text:
                raise InvalidError(field, "expected none: only a custom period has dates")
        return None, None
    for field, text in (("start_date", start_date), ("end_date", end_date)):
        if not text:
            raise InvalidError(field, "expected a date, since the period is custom")
    starts_at_ms = instant(start_date, field="start_date", zone=_zone(zone))
    ends_at_ms = instant(end_date, field="end_date", whole_day=True, zone=_zone(zone))
    if ends_at_ms <= starts_at_ms:
        raise InvalidError("end_date", "expected it not to be before start_date")
    return starts_at_ms, ends_at_ms


def _day(text: str, *, field: str, zone: str, is_last: bool = False) -> int:
    if not text:
        raise InvalidError(field, "expected a date: a custom period has both, and with another period they are dropped")
    return instant(text, field=field, whole_day=is_last, zone=_zone(zone))


def _rolling_ms(spec: Description | budget_pb2.UpdateBudgetRequest) -> int | None:
    if not spec.HasField("rolling_period"):
        return None
    return duration_milliseconds(spec.rolling_period, field="rolling_period")


def _rollover_cap_nanos(spec: Description | budget_pb2.UpdateBudgetRequest) -> int | None:
    return dollars(spec.rollover_cap_usd, field="rollover_cap_usd") if spec.rollover_cap_usd else None


def _thresholds(given: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(given))) or THRESHOLD_BPS_DEFAULT
