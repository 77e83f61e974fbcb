from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core import attempt_counts as module
from budgetguard.core.attempt_counts import (
    TOLD_KEPT_MS,
    UNTOLD_KEPT_MS,
    Gathering,
    RefusalShard,
    forget_refusals,
    refuse,
)
from budgetguard.core.attempts import MINUTE_MS as A_MINUTE_MS
from budgetguard.core.attempts import ROWS_A_MINUTE
from budgetguard.core.reasons import Reason
from tests.plugins.attempts import MINUTE_MS, a_report, a_tally, an_attempt

# When what was told in the minute is safe.
SAFE_MS = MINUTE_MS + TOLD_KEPT_MS
RATE, BUDGET = Reason.RATE_LIMIT_EXCEEDED, Reason.BUDGET_EXCEEDED


@pytest.fixture
def gathering():
    return Gathering("p")


def add(gathering, times=1, *, reason=BUDGET, key_id="k", at_ms=MINUTE_MS) -> list[bool]:
    return [
        gathering.add(
            reason,
            tenant_id="acme",
            key_id=key_id,
            refused_at_ms=at_ms,
            make=lambda: an_attempt(reason=reason, key_id=key_id, refused_at_ms=at_ms),
        )
        for _ in range(times)
    ]


def test_the_first_ten_are_kept_and_all_are_counted(gathering):
    add(gathering, 25)
    (report,) = gathering.reports()
    assert (report.count, len(report.attempts), report.first_number) == (25, 10, 1)
    gathering.told(report, now_ms=MINUTE_MS)
    assert gathering.reports() == []
    add(gathering, 3)
    (report,) = gathering.reports()
    assert (report.count, report.attempts) == (28, ())


def test_keys_reasons_and_minutes_are_counted_apart(gathering):
    add(gathering, 11)
    add(gathering, 12, reason=RATE)
    add(gathering, 13, key_id="other")
    add(gathering, 14, at_ms=MINUTE_MS + A_MINUTE_MS)
    reports = gathering.reports()
    assert [(report.count, len(report.attempts)) for report in reports] == [(11, 10), (12, 10), (13, 10), (14, 10)]
    assert len({report.tally.source for report in reports}) == 4


def test_what_comes_while_a_report_is_on_its_way_is_told_next(gathering):
    add(gathering, 4)
    (report,) = gathering.reports()
    add(gathering, 9)
    gathering.told(report, now_ms=MINUTE_MS)
    (report,) = gathering.reports()
    assert (report.count, len(report.attempts), report.first_number) == (13, 6, 5)
    assert gathering.untold() == 9


def test_a_report_that_may_not_have_arrived_is_told_again(gathering):
    add(gathering, 2)
    first = gathering.reports()
    assert gathering.reports() == first


def test_a_minute_that_is_over_and_told_is_forgotten_and_a_late_refusal_begins_another_counter(gathering):
    add(gathering, 2)
    (report,) = gathering.reports()
    gathering.told(report, now_ms=MINUTE_MS)
    assert gathering.forget(MINUTE_MS + A_MINUTE_MS - 1, same_until_ms=SAFE_MS) == 0
    add(gathering)
    (same,) = gathering.reports()
    assert same.tally == report.tally
    gathering.told(same, now_ms=MINUTE_MS)
    assert gathering.forget(MINUTE_MS + A_MINUTE_MS, same_until_ms=SAFE_MS) == 0
    add(gathering)
    (other,) = gathering.reports()
    assert (other.count, other.first_number) == (1, 1)
    assert other.tally.source != report.tally.source


def test_what_redis_may_have_lost_is_told_again_until_it_is_safe(gathering):
    add(gathering, 12)
    (report,) = gathering.reports()
    assert gathering.tell_again() == 0, "nobody has it yet"
    gathering.told(report, now_ms=MINUTE_MS + 5)
    assert gathering.forget(MINUTE_MS + 2 * A_MINUTE_MS, same_until_ms=SAFE_MS + 4) == 0
    assert (gathering.tell_again(), gathering.untold()) == (1, 0)
    (again,) = gathering.reports()
    assert (again.tally, again.count, again.attempts) == (report.tally, 12, ())
    # Not gone while it is on its way, however long ago it was told first.
    assert gathering.forget(MINUTE_MS + 2 * A_MINUTE_MS, same_until_ms=SAFE_MS + 99) == 0
    assert gathering.reports() == [again]
    gathering.told(again, now_ms=MINUTE_MS + 7)
    assert gathering.reports() == []
    assert gathering.forget(MINUTE_MS + 2 * A_MINUTE_MS, same_until_ms=SAFE_MS + 6) == 0
    assert gathering.tell_again() == 1
    gathering.told(again, now_ms=MINUTE_MS + 7)
    assert gathering.forget(MINUTE_MS + 2 * A_MINUTE_MS, same_until_ms=SAFE_MS + 7) == 0
    assert gathering.tell_again() == 0


def test_what_cannot_be_told_again_for_too_long_is_let_go_and_not_said_to_be_untold(gathering):
    add(gathering, 3)
    (report,) = gathering.reports()
    gathering.told(report, now_ms=MINUTE_MS)
    gathering.tell_again()
    add(gathering, 1)
    assert gathering.forget(MINUTE_MS + UNTOLD_KEPT_MS + 1, same_until_ms=0) == 1
    assert gathering.reports() == []


def test_what_waits_for_too_long_is_dropped_and_said(gathering):
    add(gathering, 5)
    assert gathering.forget(MINUTE_MS + UNTOLD_KEPT_MS, same_until_ms=SAFE_MS) == 0
    assert gathering.untold() == 5
    assert gathering.forget(MINUTE_MS + UNTOLD_KEPT_MS + 1, same_until_ms=SAFE_MS) == 5
    assert (gathering.reports(), gathering.untold()) == ([], 0)


def test_both_bounds_hold(gathering, monkeypatch):
    monkeypatch.setattr(module, "GROUPS_MAX", 2)
    monkeypatch.setattr(module, "WAITING_MAX", 3)
    assert add(gathering, 2) == [True, True]
    assert add(gathering, 2, reason=RATE) == [True, True]
    assert add(gathering, key_id="other") == [False]
    assert [(report.count, len(report.attempts)) for report in gathering.reports()] == [(2, 2), (2, 1)]
    for report in gathering.reports():
        gathering.told(report, now_ms=MINUTE_MS)
    add(gathering, 1)
    assert [len(report.attempts) for report in gathering.reports()] == [1], "there is room again"
    gathering.forget(MINUTE_MS + 2 * UNTOLD_KEPT_MS, same_until_ms=SAFE_MS)
    add(gathering, 9)
    assert [len(report.attempts) for report in gathering.reports()] == [3]


SPREAD = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from([RATE, BUDGET])), max_size=80)


@given(SPREAD, st.data())
def test_a_redis_that_loses_everything_between_two_reports_ends_with_every_count(refusals, data):
    shard, process = RefusalShard(), Gathering("p")
    for _, minute, reason in refusals:
        add(process, reason=reason, at_ms=MINUTE_MS + minute * A_MINUTE_MS)
        if data.draw(st.booleans()):
            for report in process.reports():
                refuse(shard, report, rows_max=999, tallies_max=999)
                process.told(report, now_ms=MINUTE_MS)
            process.forget(MINUTE_MS + A_MINUTE_MS, same_until_ms=SAFE_MS - 1)
        if data.draw(st.booleans()):
            shard = RefusalShard()
            process.tell_again()
    for report in process.reports():
        refuse(shard, report, rows_max=999, tallies_max=999)
    assert sum(shard.tallies.values()) == len(refusals)


@given(SPREAD, st.data())
def test_any_number_of_processes_keep_ten_rows_and_count_all(refusals, data):
    shard = RefusalShard()
    processes = [Gathering(str(number)) for number in range(3)]
    for process, minute, reason in refusals:
        add(processes[process], reason=reason, at_ms=MINUTE_MS + minute * A_MINUTE_MS)
        if data.draw(st.booleans()):
            for report in processes[process].reports():
                assert refuse(shard, report, rows_max=999, tallies_max=999)
                if data.draw(st.booleans()):  # else the answer was lost
                    processes[process].told(report, now_ms=MINUTE_MS)
    for process in processes:
        for report in process.reports():
            refuse(shard, report, rows_max=999, tallies_max=999)
    counts = Counter((minute, reason) for _, minute, reason in refusals)
    counted, rows = Counter(), Counter()
    for tally, number in shard.tallies.items():
        counted[(tally.minute_ms - MINUTE_MS) // A_MINUTE_MS, tally.reason] += number
    for row in shard.stream:
        rows[(row.attempt.minute_ms - MINUTE_MS) // A_MINUTE_MS, row.attempt.reason] += 1
    assert counted == counts
    assert rows == {group: min(ROWS_A_MINUTE, number) for group, number in counts.items()}
    assert len({(row.attempt.minute_ms, row.attempt.reason, row.number) for row in shard.stream}) == len(shard.stream)


def test_a_full_stream_keeps_no_row_and_counts_and_full_tallies_take_no_other_one():
    shard = RefusalShard()
    room = {"rows_max": 1, "tallies_max": 1}
    assert refuse(shard, a_report(2, an_attempt("a"), an_attempt("b")), **room)
    assert [row.attempt.operation_id for row in shard.stream] == ["a"]
    assert not refuse(shard, a_report(1, source="q.1"), **room)
    assert refuse(shard, a_report(3), **room)
    assert shard.tallies == {a_tally(): 3}


def test_a_lower_count_that_comes_late_changes_nothing():
    shard = RefusalShard()
    for number in (5, 3):
        refuse(shard, a_report(number), rows_max=9, tallies_max=9)
    assert shard.tallies == {a_tally(): 5}


def test_a_count_that_rose_since_it_was_read_stays():
    shard = RefusalShard()
    refuse(shard, a_report(5, an_attempt("a"), an_attempt("b")), rows_max=9, tallies_max=9)
    forget_refusals(shard, rows=1, tallies={a_tally(): 4})
    assert (shard.tallies, [row.number for row in shard.stream]) == ({a_tally(): 5}, [2])
    forget_refusals(shard, rows=0, tallies={a_tally(): 5, a_tally(source="gone"): 1})
    assert shard.tallies == {}
