import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.counter import (
    IDLE_KEPT_MS,
    Unit,
    calls_counter_name,
    counter_name,
    read_name,
    tokens_counter_name,
)
from budgetguard.core.snapshot import SubjectKind, WindowKind
from budgetguard.core.window import CLOSED_KEPT_MS, Window, bounds, buckets_of
from tests.plugins.redis_calls import KEY_ID, NOW_MS, a_budget

EACH = {"subject_kind": SubjectKind.SESSION, "each": True}


def test_a_counter_is_named_by_budget_specification_and_window():
    spec = a_budget("b-1", spec_version=7)
    assert counter_name(spec, Window(100, 200)) == "b-1:7:100:200"
    assert counter_name(spec, Window(0, None)) == "b-1:7:0:"


def test_a_templates_counter_is_named_by_its_subject_too():
    name = counter_name(a_budget("b1", **EACH), Window(100, 200), "a:b\n~c")
    assert name == "b1:1:100:200:a%3Ab%0A~c"
    assert (read_name(name).subject, read_name(name).key) == ("a:b\n~c", name)


def test_a_rolling_counter_is_the_same_one_in_every_bucket():
    spec = a_budget("b1", window=WindowKind.ROLLING, rolling_ms=3_600_000)
    names = [read_name(counter_name(spec, bounds(spec, now_ms))) for now_ms in (NOW_MS, NOW_MS + 60_000)]
    assert {name.key for name in names} == {"b1:1:~60000x61:"}
    assert [name.bucket for name in names] == [NOW_MS // 60_000, NOW_MS // 60_000 + 1]
    assert names[0].buckets == buckets_of(spec) == (60_000, 61)
    assert names[0].slides
    # Its newest bucket is past after 61 of them; a little later nobody asks for it.
    assert names[0].kept_until_ms(0) == (NOW_MS // 60_000 + 62) * 60_000 + CLOSED_KEPT_MS


def test_how_long_a_counter_is_kept():
    def kept(name):
        return read_name(name).kept_until_ms(NOW_MS), read_name(name).slides

    assert kept("b1:7:100:200") == (200 + 48 * 3_600_000, False)
    assert kept("b1:7:100:200:u1") == (200 + CLOSED_KEPT_MS, False)
    assert kept("b1:7:0:") == (None, False)
    assert kept("b1:7:0::u1") == (NOW_MS + IDLE_KEPT_MS, True)
    assert kept(calls_counter_name(KEY_ID))[0] is None


def test_limits_have_counters_of_their_own_units():
    assert [read_name(tokens_counter_name(key_id, NOW_MS)).unit for key_id in ("", KEY_ID)] == [Unit.TOKENS] * 2
    assert read_name(calls_counter_name("")).unit is Unit.CALLS
    assert len({read_name(name("")).key for name in (calls_counter_name, lambda k: tokens_counter_name(k, 5))}) == 2
    assert read_name("b1:7:0:").unit is Unit.NANOS


@given(subject=st.text(min_size=1), window=st.sampled_from(WindowKind), now_ms=st.integers(10**12, 2 * 10**12))
def test_a_name_is_read_as_it_was_made(subject, window, now_ms):
    spec = a_budget("b1", window=window, rolling_ms=60_000, spec_version=3, **EACH)
    found = bounds(spec, now_ms)
    name = read_name(counter_name(spec, found, subject.encode(errors="replace").decode()))
    assert (name.budget_id, name.spec_version) == ("b1", 3)
    assert name.subject == subject.encode(errors="replace").decode()
    assert name.resets_at_ms == found.resets_at_ms


@pytest.mark.parametrize("name", ["", "b1", "b1:x:0:", "b1:1:~5:3"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match=r"unpack|invalid"):
        read_name(name)
