from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.snapshot import WindowKind
from budgetguard.core.window import Window, bounds, buckets_of
from tests.plugins.redis_calls import a_budget

# Zones whose midnight is skipped or comes twice, one that once skipped a whole day, and the ends of the map.
ZONES = [
    "UTC",
    "America/New_York",
    "Africa/Cairo",
    "America/Havana",
    "Pacific/Apia",
    "Asia/Kathmandu",
    "America/Asuncion",
    "America/St_Johns",
    "Asia/Beirut",
    "Pacific/Kiritimati",
    "Etc/GMT+12",
]
CALENDAR = [WindowKind.DAY, WindowKind.WEEK, WindowKind.MONTH, WindowKind.QUARTER, WindowKind.YEAR]
ANCHOR_DAYS = {WindowKind.DAY: 1, WindowKind.WEEK: 7}


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 1000


@pytest.mark.parametrize(
    ("window", "zone", "now", "starts", "resets"),
    [
        ("DAY", "UTC", "2026-02-28T23:59:59Z", "2026-02-28T00:00Z", "2026-03-01T00:00Z"),
        ("DAY", "UTC", "2026-03-01T00:00:00Z", "2026-03-01T00:00Z", "2026-03-02T00:00Z"),
        ("WEEK", "UTC", "2026-11-29T12:00Z", "2026-11-23T00:00Z", "2026-11-30T00:00Z"),  # a Sunday
        ("WEEK", "UTC", "2027-01-01T12:00Z", "2026-12-28T00:00Z", "2027-01-04T00:00Z"),
        ("MONTH", "UTC", "2028-02-29T12:00Z", "2028-02-01T00:00Z", "2028-03-01T00:00Z"),
        ("MONTH", "UTC", "2026-12-31T23:59:59Z", "2026-12-01T00:00Z", "2027-01-01T00:00Z"),
        ("DAY", "America/New_York", "2026-03-08T12:00Z", "2026-03-08T05:00Z", "2026-03-09T04:00Z"),  # 23 hours
        ("DAY", "America/New_York", "2026-11-01T12:00Z", "2026-11-01T04:00Z", "2026-11-02T05:00Z"),  # 25 hours
        ("DAY", "Africa/Cairo", "2026-04-24T12:00Z", "2026-04-23T22:00Z", "2026-04-24T21:00Z"),  # midnight is skipped
        ("MONTH", "Asia/Kathmandu", "2026-05-31T18:14:59Z", "2026-04-30T18:15Z", "2026-05-31T18:15Z"),
    ],
)
def test_a_calendar_window_begins_at_the_first_instant_of_a_date(window, zone, now, starts, resets):
    assert bounds(a_budget(window=WindowKind(window), zone=zone), ms(now)) == (ms(starts), ms(resets))


@pytest.mark.parametrize(
    ("window", "day", "month", "now", "starts", "resets"),
    [
        ("WEEK", 7, 1, "2026-11-29T00:00Z", "2026-11-29T00:00Z", "2026-12-06T00:00Z"),  # from Sunday
        ("WEEK", 7, 1, "2026-11-28T23:59Z", "2026-11-22T00:00Z", "2026-11-29T00:00Z"),
        ("MONTH", 15, 1, "2026-03-14T12:00Z", "2026-02-15T00:00Z", "2026-03-15T00:00Z"),
        ("MONTH", 15, 1, "2026-01-03T12:00Z", "2025-12-15T00:00Z", "2026-01-15T00:00Z"),
        ("MONTH", 31, 1, "2026-02-27T12:00Z", "2026-01-31T00:00Z", "2026-02-28T00:00Z"),  # February ends before
        ("MONTH", 31, 1, "2026-02-28T00:00Z", "2026-02-28T00:00Z", "2026-03-31T00:00Z"),
        ("MONTH", 31, 1, "2026-04-30T12:00Z", "2026-04-30T00:00Z", "2026-05-31T00:00Z"),
        ("MONTH", 30, 1, "2028-02-29T12:00Z", "2028-02-29T00:00Z", "2028-03-30T00:00Z"),  # a leap day
        ("MONTH", 29, 1, "2027-03-01T12:00Z", "2027-02-28T00:00Z", "2027-03-29T00:00Z"),
        ("QUARTER", 1, 1, "2026-03-31T23:59Z", "2026-01-01T00:00Z", "2026-04-01T00:00Z"),
        ("QUARTER", 1, 1, "2026-12-31T23:59Z", "2026-10-01T00:00Z", "2027-01-01T00:00Z"),
        ("QUARTER", 1, 2, "2026-01-31T12:00Z", "2025-11-01T00:00Z", "2026-02-01T00:00Z"),
        ("QUARTER", 1, 5, "2026-01-31T12:00Z", "2025-11-01T00:00Z", "2026-02-01T00:00Z"),  # the same quarters
        ("QUARTER", 31, 2, "2026-02-28T12:00Z", "2026-02-28T00:00Z", "2026-05-31T00:00Z"),
        ("QUARTER", 31, 3, "2026-06-29T12:00Z", "2026-03-31T00:00Z", "2026-06-30T00:00Z"),
        ("YEAR", 1, 1, "2026-12-31T23:59Z", "2026-01-01T00:00Z", "2027-01-01T00:00Z"),
        ("YEAR", 6, 4, "2026-04-05T12:00Z", "2025-04-06T00:00Z", "2026-04-06T00:00Z"),  # Britain's tax year
        ("YEAR", 6, 4, "2026-04-06T00:00Z", "2026-04-06T00:00Z", "2027-04-06T00:00Z"),
        ("YEAR", 29, 2, "2027-02-28T12:00Z", "2027-02-28T00:00Z", "2028-02-29T00:00Z"),  # into a leap year
        ("YEAR", 29, 2, "2028-02-28T12:00Z", "2027-02-28T00:00Z", "2028-02-29T00:00Z"),
    ],
)
def test_an_anchor_moves_the_first_day(window, day, month, now, starts, resets):
    spec = a_budget(window=WindowKind(window), anchor_day=day, anchor_month=month)
    assert bounds(spec, ms(now)) == (ms(starts), ms(resets))


@pytest.mark.parametrize(
    ("zone", "now", "starts", "resets"),
    [
        ("Pacific/Kiritimati", "2026-12-31T10:00Z", "2026-12-31T10:00Z", "2027-01-31T10:00Z"),  # +14: first of all
        ("Pacific/Kiritimati", "2026-12-31T09:59Z", "2026-11-30T10:00Z", "2026-12-31T10:00Z"),
        ("Etc/GMT+12", "2027-01-01T11:59Z", "2026-12-01T12:00Z", "2027-01-01T12:00Z"),  # -12: last of all
        ("Etc/GMT+12", "2027-01-01T12:00Z", "2027-01-01T12:00Z", "2027-02-01T12:00Z"),
        ("Africa/Cairo", "2026-04-24T12:00Z", "2026-03-31T22:00Z", "2026-04-30T21:00Z"),
    ],
)
def test_a_month_begins_where_it_is_counted(zone, now, starts, resets):
    assert bounds(a_budget(window=WindowKind.MONTH, zone=zone), ms(now)) == (ms(starts), ms(resets))


def test_an_anchor_on_a_skipped_midnight_begins_with_the_jump():
    # Cairo's clocks went from 00:00 to 01:00 on that day.
    spec = a_budget(window=WindowKind.MONTH, zone="Africa/Cairo", anchor_day=24)
    assert bounds(spec, ms("2026-04-24T12:00Z")).starts_at_ms == ms("2026-04-23T22:00Z")


def test_another_zone_on_the_31st_is_another_window_and_covers_the_moment():
    # The same moment is the 31st in one zone and the 1st in another: the counter is another one, seeded anew.
    now_ms = ms("2026-08-31T23:30Z")
    old = bounds(a_budget(window=WindowKind.MONTH, zone="UTC"), now_ms)
    new = bounds(a_budget(window=WindowKind.MONTH, zone="Pacific/Kiritimati"), now_ms)
    assert old == (ms("2026-08-01T00:00Z"), ms("2026-09-01T00:00Z"))
    assert new == (ms("2026-08-31T10:00Z"), ms("2026-09-30T10:00Z"))
    behind = bounds(a_budget(window=WindowKind.MONTH, zone="Etc/GMT+12", anchor_day=31), now_ms)
    assert behind == (ms("2026-08-31T12:00Z"), ms("2026-09-30T12:00Z"))


@st.composite
def a_moving_budget(draw):
    kind = draw(st.sampled_from(CALENDAR))
    return a_budget(
        window=kind,
        zone=draw(st.sampled_from(ZONES)),
        anchor_day=draw(st.integers(1, ANCHOR_DAYS.get(kind, 31))),
        anchor_month=draw(st.integers(1, 12)),
    )


# How long a window may be: a change of clocks, and one skipped day, included.
LENGTHS = {"DAY": (0.9, 1.1), "WEEK": (5.9, 7.1), "MONTH": (26.9, 31.1), "QUARTER": (87, 93), "YEAR": (363, 367)}


@given(spec=a_moving_budget(), now_ms=st.integers(ms("2005-01-01T00:00Z"), ms("2037-01-01T00:00Z")))
def test_windows_follow_one_another_and_are_as_long_as_they_are_called(spec, now_ms):
    window = bounds(spec, now_ms)
    for _ in range(5):
        following = bounds(spec, window.resets_at_ms)
        assert following.starts_at_ms == window.resets_at_ms
        assert bounds(spec, following.starts_at_ms - 1) == window
        shortest, longest = LENGTHS[spec.window]
        days = (following.resets_at_ms - following.starts_at_ms) / 86_400_000
        # Samoa has no 30 December 2011: a DAY there that began never was.
        assert shortest <= days <= longest or spec.zone == "Pacific/Apia", (following, days)
        window = following


def rolling(rolling_ms):
    return a_budget(window=WindowKind.ROLLING, rolling_ms=rolling_ms)


@pytest.mark.parametrize(
    ("rolling_ms", "width_ms", "number"),
    [
        (60_000, 1_000, 61),
        (3_600_000, 60_000, 61),
        (3_600_001, 9_837, 367),
        (86_400_000, 236_066, 367),
        (366 * 86_400_000, 86_400_000, 367),
    ],
)
def test_a_rolling_window_is_cut_into_few_buckets(rolling_ms, width_ms, number):
    assert buckets_of(rolling(rolling_ms)) == (width_ms, number)


@given(
    rolling_ms=st.integers(60_000, 366 * 86_400_000),
    now_ms=st.integers(10**12, 2 * 10**12),
    age_ms=st.integers(0, 10**11),
)
def test_money_leaves_a_rolling_window_soon_after_its_time_and_never_before(rolling_ms, now_ms, age_ms):
    spec = rolling(rolling_ms)
    buckets = buckets_of(spec)
    window = bounds(spec, now_ms)
    assert window.resets_at_ms is None
    assert window.starts_at_ms % buckets.width_ms == 0
    spent_at_ms = now_ms - age_ms
    inside = spent_at_ms >= window.starts_at_ms
    if age_ms <= rolling_ms:
        assert inside
    if age_ms >= rolling_ms + 2 * buckets.width_ms:
        assert not inside
    assert buckets.number <= 368
    # It only ever moves on.
    assert bounds(spec, now_ms + 1).starts_at_ms >= window.starts_at_ms


@given(spec=a_moving_budget(), now_ms=st.integers(ms("2005-01-01T00:00Z"), ms("2037-01-01T00:00Z")))
def test_calendar_windows_contain_their_moment_and_leave_no_gap(spec, now_ms):
    starts_at_ms, resets_at_ms = bounds(spec, now_ms)
    assert starts_at_ms <= now_ms < resets_at_ms
    assert bounds(spec, starts_at_ms) == bounds(spec, resets_at_ms - 1) == (starts_at_ms, resets_at_ms)
    assert bounds(spec, resets_at_ms).starts_at_ms == resets_at_ms


def test_every_hour_around_a_change_of_clocks_is_in_one_window():
    # Havana's clocks go back at 01:00, so 00:30 comes twice.
    spec = a_budget(window=WindowKind.DAY, zone="America/Havana")
    start = datetime(2026, 10, 30, tzinfo=UTC)
    for minutes in range(0, 4 * 24 * 60, 10):
        now_ms = int((start + timedelta(minutes=minutes)).timestamp()) * 1000
        found = bounds(spec, now_ms)
        assert found.starts_at_ms <= now_ms < found.resets_at_ms


def test_a_date_that_returns_after_midnight_stays_in_the_window_it_was_in():
    # Newfoundland's clocks went back at 00:01, to 23:01 of the day before.
    zone = "America/St_Johns"
    spec = a_budget(window=WindowKind.DAY, zone=zone)
    midnight = int(datetime(2009, 11, 1, tzinfo=ZoneInfo(zone)).timestamp()) * 1000
    again = midnight + 10 * 60_000
    assert datetime.fromtimestamp(again // 1000, ZoneInfo(zone)).day == 31
    assert bounds(spec, again) == bounds(spec, midnight)
    assert bounds(spec, midnight).starts_at_ms == midnight


def test_a_lifetime_never_resets():
    assert bounds(a_budget(window=WindowKind.LIFETIME), 5) == Window(0, None)


@pytest.mark.parametrize(
    ("starts", "ends", "now", "expected"),
    [
        (100, 200, 99, None),
        (100, 200, 100, (100, 200)),
        (100, 200, 199, (100, 200)),
        (100, 200, 200, None),
        (None, 200, 5, (0, 200)),
        (100, None, 5000, (100, None)),
    ],
)
def test_fixed_dates_apply_only_between_them(starts, ends, now, expected):
    assert bounds(a_budget(window=WindowKind.FIXED, starts_at_ms=starts, ends_at_ms=ends), now) == expected


def test_an_unknown_zone_is_an_error():
    with pytest.raises(ZoneInfoNotFoundError):
        bounds(a_budget(window=WindowKind.DAY, zone="Mars/Olympus"), 0)
