from dataclasses import replace

from budgetguard.core.closing import budget_exhausted, counters_unavailable
from budgetguard.core.extension import ExtensionRefused
from budgetguard.core.moments import rfc3339
from budgetguard.core.reasons import Reason

REFUSED = ExtensionRefused(
    budget_id="b1",
    counter="b1:1:1764547200000:1767225600000",
    limit_nanos=10**9,
    spent_nanos=6 * 10**8,
    held_nanos=3 * 10**8,
    needed_nanos=2 * 10**8,
    room_nanos=10**8,
)


def test_a_stream_that_is_ended_names_its_budget_with_all_numbers():
    closing = budget_exhausted(REFUSED)
    assert closing.deny.reason is Reason.BUDGET_EXCEEDED
    assert closing.deny.facts == {
        "budget_id": "b1",
        "limit_usd": "1",
        "spent_usd": "0.6",
        "held_usd": "0.3",
        "needed_usd": "0.2",
        "resets_at": "2026-01-01T00:00:00Z",
        "retryable": True,
    }
    assert "It resets at 2026-01-01T00:00:00Z." in closing.deny.message
    assert closing.detail == "stream closed: budget b1 is exhausted"


def test_a_moment_is_spelled_to_the_second_or_to_the_millisecond():
    assert [rfc3339(moment_ms) for moment_ms in (0, 1)] == ["1970-01-01T00:00:00Z", "1970-01-01T00:00:00.001Z"]


def test_a_window_without_an_end_has_no_reset():
    closing = budget_exhausted(replace(REFUSED, counter="b1:1:0:", spent_nanos=9 * 10**8))
    assert (closing.deny.facts["resets_at"], closing.deny.facts["retryable"]) == (None, False)
    assert "resets" not in closing.deny.message


def test_a_stream_that_nobody_can_hold_for_says_so():
    closing = counters_unavailable(Reason.COUNTERS_UNAVAILABLE)
    assert closing.deny.reason is Reason.COUNTERS_UNAVAILABLE
    assert closing.detail == "stream closed: no top-up, COUNTERS_UNAVAILABLE"
