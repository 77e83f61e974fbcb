"""Which budgets there can be."""

from budgetguard.core.context import TEXT_CHARS_MAX, is_context_text
from budgetguard.core.entities import (
    ROLLING_MS_MAX,
    ROLLING_MS_MIN,
    SUBJECT_CHARACTERS_MAX,
    SUBJECT_FIELDS,
    SUBJECTS_MAX,
    SUBJECTS_MAX_DEFAULT,
    THRESHOLD_BPS_MAX,
    THRESHOLDS_MAX,
    BudgetDraft,
)
from budgetguard.core.errors import FieldViolation, InvalidError
from budgetguard.core.money import COUNTER_NANOS_MAX, format_usd
from budgetguard.core.snapshot import SubjectKind, WindowKind
from budgetguard.core.window import ANCHOR_DAY_MAX, ANCHORED_MONTHS, CALENDAR
from budgetguard.core.zones import ZONE_EXPECTED, zone_names

_EXPECTED_USD = f"expected US dollars, 0 to {format_usd(COUNTER_NANOS_MAX)}"


def check_draft(draft: BudgetDraft, *, path: str = "") -> None:
    """Refuse what cannot be a budget.

    Raises:
        InvalidError: names the field, after its ``path``.
    """
    try:
        _check(draft)
    except InvalidError as error:
        placed = [FieldViolation(f"{path}{v.field}", v.expected) for v in error.violations]
        raise InvalidError.of(tuple(placed)) from None


def _check(draft: BudgetDraft) -> None:
    if not 0 <= draft.limit_nanos <= COUNTER_NANOS_MAX:
        raise InvalidError("limit_nanos", _EXPECTED_USD)
    _check_subject(draft)
    _check_window(draft)
    cap_nanos = draft.rollover_cap_nanos
    if cap_nanos is not None and (draft.each or draft.window not in CALENDAR):
        raise InvalidError("rollover_cap_nanos", "expected none: only a calendar window of one subject is carried over")
    if cap_nanos is not None and not 0 <= cap_nanos <= COUNTER_NANOS_MAX:
        raise InvalidError("rollover_cap_nanos", _EXPECTED_USD)
    thresholds = draft.threshold_bps
    if not all(0 < bps <= THRESHOLD_BPS_MAX for bps in thresholds) or len(thresholds) > THRESHOLDS_MAX:
        raise InvalidError("threshold_bps", f"expected at most {THRESHOLDS_MAX} numbers of 1 to {THRESHOLD_BPS_MAX}")
    if list(thresholds) != sorted(set(thresholds)):
        raise InvalidError("threshold_bps", "expected each once, in rising order")


def _check_subject(draft: BudgetDraft) -> None:
    if draft.each and (draft.subject_kind is SubjectKind.TENANT or draft.subject):
        raise InvalidError("each", "expected a template to be for every subject of a kind, and for none by name")
    unnamed = draft.each or draft.subject_kind is SubjectKind.TENANT
    if unnamed != (draft.subject == ""):
        raise InvalidError("subject", "expected a subject's id, and nothing for TENANT and templates")
    if draft.subject:
        _check_subject_s_name(draft.subject_kind, draft.subject)
    if not draft.each and draft.subjects_max != SUBJECTS_MAX_DEFAULT:
        raise InvalidError("subjects_max", "expected none: only a template has many subjects")
    if not 0 < draft.subjects_max <= SUBJECTS_MAX:
        raise InvalidError("subjects_max", f"expected 1 to {SUBJECTS_MAX}")


def _check_subject_s_name(kind: SubjectKind, subject: str) -> None:
    """Hold a name against what calls can say of themselves: any other would limit nothing."""
    field = SUBJECT_FIELDS[kind]
    if kind in (SubjectKind.SESSION, SubjectKind.END_USER):
        # A header's value comes without the spaces around it.
        if subject != subject.strip() or not is_context_text(subject):
            expected = f"at most {TEXT_CHARS_MAX} characters, none of them a control character, no space around them"
            raise InvalidError(field, f"expected {expected}")
    elif len(subject) > SUBJECT_CHARACTERS_MAX or not subject.isprintable():
        raise InvalidError(field, f"expected at most {SUBJECT_CHARACTERS_MAX} printable characters")


def _check_window(draft: BudgetDraft) -> None:
    if draft.zone not in zone_names():
        raise InvalidError("zone", f"expected {ZONE_EXPECTED}")
    dates = (draft.starts_at_ms, draft.ends_at_ms)
    if draft.window is WindowKind.FIXED:
        if draft.starts_at_ms is None or draft.ends_at_ms is None or draft.starts_at_ms >= draft.ends_at_ms:
            raise InvalidError("ends_at_ms", "expected a FIXED window to start, and to end after that")
    elif dates != (None, None):
        raise InvalidError("starts_at_ms", "expected dates for a FIXED window only")
    if draft.window is WindowKind.ROLLING:
        if draft.rolling_ms is None or not ROLLING_MS_MIN <= draft.rolling_ms <= ROLLING_MS_MAX:
            raise InvalidError("rolling_ms", "expected a rolling window to look back 1 minute to 366 days")
    elif draft.rolling_ms is not None:
        raise InvalidError("rolling_ms", "expected none: only a rolling window has it")
    day_max = ANCHOR_DAY_MAX.get(draft.window, 1)
    if not 1 <= draft.anchor_day <= day_max:
        expected = f"1 to {day_max}" if day_max > 1 else "none: such a window has no anchor"
        raise InvalidError("anchor_day", f"expected {expected}")
    anchored = draft.window in ANCHORED_MONTHS
    if not 1 <= draft.anchor_month <= (12 if anchored else 1):
        expected = "1 to 12" if anchored else "none: only a quarter or a year begins in a month of its own"
        raise InvalidError("anchor_month", f"expected {expected}")
