from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.money import COUNTER_NANOS_MAX, ceil_div, femtos_per_unit, format_usd, parse_usd


@pytest.mark.parametrize(
    ("text", "nanos"),
    [
        ("25.5", 25_500_000_000),
        (25.5, 25_500_000_000),
        (0.1, 100_000_000),
        (1, 1_000_000_000),
        ("0", 0),
        (" 3 ", 3_000_000_000),
        ("0.000000001", 1),
        (Decimal("1e-9"), 1),
        ("9223372036.854775807", COUNTER_NANOS_MAX),
        ("123456789.123456789", 123_456_789_123_456_789),
    ],
)
def test_dollars_are_read_exactly(text, nanos):
    assert parse_usd(text) == nanos


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0000000001", "at most 9 decimal places"),
        ("1e999999999", "decimal number"),
        ("9223372036.854775808", "at most 9223372036.854775807"),
        ("-1", "0 or more"),
        ("NaN", "decimal number"),
        ("Infinity", "decimal number"),
        (float("inf"), "decimal number"),
        ("", "decimal number"),
        ("1,5", "decimal number"),
        ("1_0", "decimal number"),
        ("\uff11", "decimal number"),
        ("1e99999", "decimal number"),
        ("1" * 80 + "." + "1" * 80, "decimal number"),
        (True, "boolean"),
    ],
)
def test_what_is_no_amount_is_told(text, expected):
    with pytest.raises(ValueError, match=expected):
        parse_usd(text)


@given(st.integers(min_value=0, max_value=COUNTER_NANOS_MAX))
def test_spelling_and_reading_are_inverse(nanos):
    assert parse_usd(format_usd(nanos)) == nanos


@pytest.mark.parametrize(
    ("nanos", "text"),
    [(0, "0"), (1, "0.000000001"), (-1_500_000_000, "-1.5"), (25_500_000_000, "25.5"), (10**10, "10")],
)
def test_dollars_are_spelled_without_trailing_zeros(nanos, text):
    assert format_usd(nanos) == text


@given(st.integers(min_value=0, max_value=10**30), st.integers(min_value=1, max_value=10**12))
def test_division_rounds_up_once(dividend, divisor):
    quotient = ceil_div(dividend, divisor)
    assert (quotient - 1) * divisor < dividend <= quotient * divisor


def test_a_price_finer_than_a_femto_rounds_up():
    assert femtos_per_unit(Decimal("0.15"), per_units=10**6) == 150_000_000
    assert femtos_per_unit(Decimal("0.0000000001"), per_units=10**6) == 1
