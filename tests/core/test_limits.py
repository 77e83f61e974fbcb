import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.limits import carried_nanos, crossed_bps, limit_nanos, topped_up_nanos, unused_nanos
from budgetguard.core.money import COUNTER_NANOS_MAX
from budgetguard.core.snapshot import Mode, TopUp
from budgetguard.core.window import Window
from tests.plugins.redis_calls import NOW_MS, a_budget, a_reserve, a_tenant

WINDOW = Window(1_000, 2_000)


def test_a_limit_without_anything_is_the_limit():
    assert limit_nanos(a_budget(limit_nanos=70), WINDOW, 1_500) == 70


@pytest.mark.parametrize(("into", "expected"), [(1_000, 75), (999, 70), (2_000, 70), (None, 70)])
def test_carried_money_belongs_to_one_window(into, expected):
    spec = a_budget(limit_nanos=70, carried_nanos=5, carried_into_ms=into)
    assert limit_nanos(spec, WINDOW, 1_500) == expected
    assert carried_nanos(spec, WINDOW) == expected - 70


@pytest.mark.parametrize(
    ("starts", "expires", "now", "applies"),
    [
        (1_000, 2_000, 999, False),
        (1_000, 2_000, 1_000, True),
        (1_000, 2_000, 1_999, True),
        (1_000, 2_000, 2_000, False),
        (1_000, None, 10**15, True),
    ],
)
def test_a_top_up_applies_from_its_start_until_it_expires(starts, expires, now, applies):
    spec = a_budget(limit_nanos=70, top_ups=(TopUp(amount_nanos=9, starts_at_ms=starts, expires_at_ms=expires),))
    assert topped_up_nanos(spec, now) == (9 if applies else 0)
    assert limit_nanos(spec, WINDOW, now) == (79 if applies else 70)


def test_several_top_ups_add_up_and_never_pass_what_a_counter_holds():
    top_ups = tuple(TopUp(amount_nanos=amount, starts_at_ms=0) for amount in (1, 2, 4))
    assert limit_nanos(a_budget(limit_nanos=70, top_ups=top_ups), WINDOW, 5) == 77
    assert limit_nanos(a_budget(limit_nanos=COUNTER_NANOS_MAX, top_ups=top_ups), WINDOW, 5) == COUNTER_NANOS_MAX


def test_a_reservation_is_decided_by_the_whole_limit():
    spec = a_budget(
        limit_nanos=70,
        carried_nanos=5,
        carried_into_ms=0,
        top_ups=(
            TopUp(amount_nanos=9, starts_at_ms=NOW_MS, expires_at_ms=NOW_MS + 1),
            TopUp(amount_nanos=100, starts_at_ms=NOW_MS + 1),
        ),
    )
    (applied,) = a_reserve(a_tenant(spec)).budgets()
    assert applied.limit == 84
    (later,) = a_reserve(a_tenant(spec), now_ms=NOW_MS + 1).budgets()
    assert later.limit == 175
    (observed,) = a_reserve(a_tenant(a_budget(limit_nanos=1, mode=Mode.OBSERVE))).budgets()
    assert observed.limit == COUNTER_NANOS_MAX


@pytest.mark.parametrize(
    ("limit", "spent", "cap", "unused"), [(100, 30, 1_000, 70), (100, 30, 50, 50), (100, 130, 50, 0), (100, 0, 0, 0)]
)
def test_what_is_unused_goes_on_up_to_the_cap_and_a_debt_does_not(limit, spent, cap, unused):
    assert unused_nanos(limit_nanos=limit, spent_nanos=spent, cap_nanos=cap) == unused


@pytest.mark.parametrize(
    ("spent", "crossed"),
    [(0, ()), (-5, ()), (499, ()), (500, (5_000,)), (799, (5_000,)), (800, (5_000, 8_000)), (1_500, (5_000, 8_000))],
)
def test_thresholds_are_crossed_at_exactly_their_part(spent, crossed):
    assert crossed_bps((5_000, 8_000, 20_000), limit_nanos=1_000, spent_nanos=spent) == crossed


@given(limit=st.integers(0, COUNTER_NANOS_MAX), spent=st.integers(1, COUNTER_NANOS_MAX), bps=st.integers(1, 100_000))
def test_a_threshold_is_exact_at_any_size(limit, spent, bps):
    crossed = bool(crossed_bps((bps,), limit_nanos=limit, spent_nanos=spent))
    assert crossed is (spent >= -(-limit * bps // 10_000))
