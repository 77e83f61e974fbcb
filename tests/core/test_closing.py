from dataclasses import replace

from budgetguard.core.budget import AppliedLimit
from budgetguard.core.closing import budget_exhausted, counters_unavailable
from budgetguard.core.counter import Unit
from budgetguard.core.extension import CounterLimit, ExtensionRefused
from budgetguard.core.moments import rfc3339
from budgetguard.core.reasons import Reason
from budgetguard.core.snapshot import SubjectKind

LIMIT = CounterLimit(
    limit_nanos=10**9,
    budget_id="b1",
    scope=SubjectKind.END_USER,
    starts_at_ms=1_764_547_200_000,
    subject="jo at home",
)
REFUSED = ExtensionRefused(
    limit=LIMIT,
    resets_at_ms=1_767_225_600_000,
    spent_nanos=6 * 10**8,
    held_nanos=3 * 10**8,
    needed_nanos=2 * 10**8,
    room_nanos=10**8,
)


def test_a_stream_that_is_ended_names_its_budget_with_all_numbers():
    closing = budget_exhausted(REFUSED, hold_nanos=10**8)
    assert closing.deny.reason is Reason.BUDGET_EXCEEDED
    assert closing.deny.facts == {
        "budget_id": "b1",
        "limit_usd": "1",
        "spent_usd": "0.6",
        "held_usd": "0.3",
        "needed_usd": "0.2",
        "resets_at": "2026-01-01T00:00:00Z",
        "retryable": True,
        "subject_kind": "END_USER",
        "subject": "jo at home",
        "window_starts_at": "2025-12-01T00:00:00Z",
    }
    assert closing.deny.message.startswith("Budget b1 of jo at home is exhausted, so this stream was ended: ")
    assert "It resets at 2026-01-01T00:00:00Z." in closing.deny.message
    assert closing.detail == "stream closed: budget b1 is exhausted"


def test_a_moment_is_spelled_to_the_second_or_to_the_millisecond():
    assert [rfc3339(moment_ms) for moment_ms in (0, 1)] == ["1970-01-01T00:00:00Z", "1970-01-01T00:00:00.001Z"]


def test_a_window_without_an_end_has_no_reset():
    closing = budget_exhausted(replace(REFUSED, resets_at_ms=None, spent_nanos=9 * 10**8), hold_nanos=10**8)
    assert (closing.deny.facts["resets_at"], closing.deny.facts["retryable"]) == (None, False)
    assert "resets" not in closing.deny.message


def test_what_the_stream_itself_holds_does_not_come_back():
    """Were it asked again, it would have been charged: only what others hold may come back, or another window come."""
    lifetime = replace(REFUSED, resets_at_ms=None)
    assert budget_exhausted(lifetime, hold_nanos=2 * 10**8).deny.facts["retryable"] is True
    assert budget_exhausted(lifetime, hold_nanos=2 * 10**8 + 1).deny.facts["retryable"] is False
    assert budget_exhausted(REFUSED, hold_nanos=8 * 10**8).deny.facts["retryable"] is True
    assert budget_exhausted(REFUSED, hold_nanos=8 * 10**8 + 1).deny.facts["retryable"] is False


def test_whose_a_limit_is_is_kept_as_one_line():
    applied = AppliedLimit(
        counter="b1:1:0:",
        unit=Unit.NANOS,
        limit=10**9,
        budget_id="b1",
        scope=SubjectKind.END_USER,
        subject="jo at home",
        starts_at_ms=1_764_547_200_000,
    )
    assert CounterLimit.read(10**9, applied.whose) == LIMIT


def test_a_stream_that_nobody_can_hold_for_says_so():
    closing = counters_unavailable(Reason.COUNTERS_UNAVAILABLE)
    assert closing.deny.reason is Reason.COUNTERS_UNAVAILABLE
    assert closing.detail == "stream closed: no top-up, COUNTERS_UNAVAILABLE"
