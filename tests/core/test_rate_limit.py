from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.rate_limit import Minute, count, look, reset_seconds, retry_after_ms

STEPS_MS = st.lists(st.one_of(st.integers(0, 3000), st.integers(0, 130_000)), max_size=80)


def admit(minute: Minute, limit: int, now_ms: int) -> bool:
    seen = look(minute, now_ms)
    if seen.total >= limit:
        return False
    count(minute, seen)
    return True


@given(steps=STEPS_MS, limit=st.integers(1, 5))
def test_no_60_seconds_admit_more_than_the_limit_and_nothing_below_it_is_refused(steps, limit):
    minute, admitted, now_ms = Minute(), [], 1_000_000
    for step in steps:
        now_ms += step
        in_window = [at for at in admitted if at > now_ms // 1000 - 60]
        assert admit(minute, limit, now_ms) == (len(in_window) < limit)
        if len(in_window) < limit:
            admitted.append(now_ms // 1000)


@given(steps=STEPS_MS, limit=st.integers(1, 5))
def test_a_refused_caller_that_waits_as_told_is_admitted_and_not_a_second_sooner(steps, limit):
    minute, now_ms = Minute(), 1_000_000
    for step in steps:
        now_ms += step
        if not admit(minute, limit, now_ms):
            wait_ms = retry_after_ms(minute, limit=limit, now_ms=now_ms)
            assert 0 < wait_ms <= 60_000
            assert look(minute, now_ms + wait_ms).total < limit
            assert look(minute, now_ms + wait_ms - 1).total >= limit


def test_a_lowered_limit_waits_for_as_many_requests_as_are_too_many():
    minute = Minute()
    for second in (10, 20, 30):
        assert admit(minute, 3, second * 1000)
    assert retry_after_ms(minute, limit=1, now_ms=31_000) == (30 + 60 - 31) * 1000
    assert retry_after_ms(minute, limit=3, now_ms=31_000) == (10 + 60 - 31) * 1000


def test_a_clock_that_is_behind_counts_into_the_newest_second():
    minute = Minute()
    assert admit(minute, 2, 100_000)
    assert admit(minute, 2, 95_000)
    assert minute.counts == {100: 2}
    assert not admit(minute, 2, 159_999)
    assert admit(minute, 2, 160_000)


def test_buckets_that_are_past_are_dropped():
    minute = Minute()
    for now_ms in (0, 30_000, 61_000):
        assert admit(minute, 10, now_ms)
    assert (minute.counts, minute.total, minute.first, minute.last) == ({30: 1, 61: 1}, 2, 2, 61)


def test_the_window_is_empty_when_its_newest_second_has_left():
    assert reset_seconds(look(Minute(), 100_000), 100_000) == 60
    assert reset_seconds(look(Minute(), 100_001), 100_001) == 60
    assert reset_seconds(look(Minute(), 100_999), 100_999) == 60
