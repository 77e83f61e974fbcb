"""Rolling counters, and the limits and templates that are counted beside budgets."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.budget import Refusal, Reserve, Reserved, ReserveRefused
from budgetguard.core.counter import IDLE_KEPT_MS, calls_counter_name, counter_name, read_name, tokens_counter_name
from budgetguard.core.counting import Counter, as_of, has_left, move
from budgetguard.core.extension import Extended, Extension
from budgetguard.core.money import COUNTER_NANOS_MAX
from budgetguard.core.operation import End
from budgetguard.core.reserving import reserve
from budgetguard.core.shard import Shard, correct_counter, expire, extend, publish, settle, write_counter
from budgetguard.core.snapshot import SubjectKind, WindowKind
from budgetguard.core.usage import Usage
from budgetguard.core.window import bounds
from tests.plugins.redis_calls import KEY_ID, NOW_MS, a_budget, a_key, a_reserve, a_settlement, a_tenant, the_handoff

MINUTE = {"window": WindowKind.ROLLING, "rolling_ms": 60_000}
SECOND = NOW_MS // 1000
EACH_SESSION = {"subject_kind": SubjectKind.SESSION, "each": True}


def a_shard() -> Shard:
    shard = Shard(epoch="run")
    publish(shard, ("acme",), 1)
    publish(shard, ("acme", KEY_ID), 1)
    return shard


def ask(shard, tenant, *, number=1, now_ms=NOW_MS, key=None, session_id="", **changes) -> Reserved | ReserveRefused:
    counts = {name: changes.pop(name) for name in ("input_tokens", "choices") if name in changes}
    request = a_reserve(tenant, operation_id=f"op-{number}", now_ms=now_ms, key=key, **changes)
    request = replace(request, facts=replace(request.facts, session_id=session_id), **counts)
    answer = reserve(shard, request, run_id="run", redis_ms=now_ms)
    if isinstance(answer, Reserved):
        ASKED[number] = (request, answer)
    return answer


ASKED: dict[int, tuple[Reserve, Reserved]] = {}


def end(shard, amount_nanos, *, number=1, now_ms=NOW_MS, kind=End.CONFIRMED, usage=None):
    settlement = a_settlement(the_handoff(*ASKED[number]), amount_nanos, kind, usage=usage)
    return settle(shard, settlement, now_ms=now_ms, run_id="run")


def rolling(shard) -> Counter:
    (counter,) = (counter for (_, name), counter in shard.counters.items() if ":~" in name)
    return counter


def test_money_leaves_a_rolling_budget_when_its_bucket_is_wholly_past():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 150, **MINUTE))
    assert ask(shard, tenant).hold_nanos == 100
    end(shard, 90)
    late = ask(shard, tenant, number=2, now_ms=NOW_MS + 60_999)
    assert (late.kind, late.spent, late.resets_at_ms) == (Refusal.BUDGET, 90, NOW_MS + 61_000)
    assert ask(shard, tenant, number=3, now_ms=NOW_MS + 61_000).hold_nanos == 100
    assert rolling(shard) == Counter(0, 100, first=SECOND + 61, last=SECOND + 61, buckets={SECOND + 61: (0, 100)})


def test_a_refusal_of_a_rolling_budget_tells_when_enough_has_left():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 300, **MINUTE))
    for number, at in enumerate((0, 10_000, 20_000)):
        ask(shard, tenant, number=number, now_ms=NOW_MS + at)
        end(shard, 100, number=number)
    refused = ask(shard, tenant, number=9, now_ms=NOW_MS + 30_000, input_nanos=150)
    assert refused.resets_at_ms == NOW_MS + 71_000  # two of the three must have left
    never = ask(shard, tenant, number=9, now_ms=NOW_MS + 30_000, input_nanos=301)
    assert never.resets_at_ms == NOW_MS + 91_000  # then all of that minute has left, and it is still too small


def test_what_ends_after_its_bucket_has_left_moves_nothing():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 1000, **MINUTE))
    ask(shard, tenant)
    ask(shard, tenant, number=2, now_ms=NOW_MS + 30_000)
    ask(shard, tenant, number=3, now_ms=NOW_MS + 70_000)
    before = replace(rolling(shard), buckets=dict(rolling(shard).buckets))
    assert before.held == 200
    # It left with its live hold, so growing passes no limit.
    grown = Extension(tenant_id="acme", operation_id="op-1", counters=(), hold_nanos=5000)
    assert extend(shard, grown, run_id="run") == Extended(hold_nanos=5000)
    end(shard, 100, now_ms=NOW_MS + 70_000)
    assert rolling(shard) == before
    end(shard, 100, number=2, now_ms=NOW_MS + 70_000)
    assert (rolling(shard).spent, rolling(shard).held) == (100, 100)


def test_a_caller_whose_clock_is_behind_counts_where_it_belongs_or_nowhere():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 1000, **MINUTE))
    ask(shard, tenant, now_ms=NOW_MS + 30_000)
    ask(shard, tenant, number=2)
    assert (rolling(shard).first, rolling(shard).last) == (SECOND, SECOND + 30)
    ask(shard, tenant, number=3, now_ms=NOW_MS - 60_000)
    assert rolling(shard).held == 200


@given(
    amounts=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 100), st.integers(0, 100)), max_size=20),
    later=st.integers(0, 200),
)
def test_a_rolling_counter_is_the_sum_of_its_live_buckets(amounts, later):
    spec = a_budget("b1", **MINUTE)
    counter, at = Counter(), 0
    for step, spent, held in amounts:
        at += step
        name = read_name(counter_name(spec, bounds(spec, (SECOND + at) * 1000)))
        counter = as_of(counter, name)
        assert not has_left(counter, name)
        move(counter, name, spent=spent, held=held)
    seen = as_of(counter, read_name(counter_name(spec, bounds(spec, (SECOND + at + later) * 1000))))
    live = [amounts for bucket, amounts in counter.buckets.items() if bucket > SECOND + at + later - 61]
    assert (seen.spent, seen.held) == (sum(spent for spent, _ in live), sum(held for _, held in live))


def test_a_full_counter_stays_at_its_end():
    name = read_name("b1:1:0:")
    counter = Counter(COUNTER_NANOS_MAX - 5, 0)
    move(counter, name, spent=9, held=0)
    assert counter.spent == COUNTER_NANOS_MAX


def test_tokens_a_minute_are_held_then_trued_up_and_clamp_a_call():
    shard, tenant = a_shard(), a_tenant(tokens_per_minute=1000)
    bound = {"input_tokens": 100, "output_tokens": 400, "output_tokens_min": 16, "choices": 2}
    first = ask(shard, tenant, **bound)
    assert (first.output_tokens, first.tokens_limit, first.tokens_remaining) == (400, 1000, 100)
    assert first.tokens_reset_seconds == 61
    refused = ask(shard, tenant, number=2, **bound)
    assert (refused.kind, refused.limit, refused.needed) == (Refusal.TOKENS, 1000, 132)
    assert (refused.scope, refused.retry_after_ms) == (SubjectKind.TENANT, 61_000)
    end(shard, 50, usage=Usage(input_tokens=90, output_tokens=310))
    clamped = ask(shard, tenant, number=3, **bound)
    assert (clamped.output_tokens, clamped.tokens_remaining) == (250, 0)
    # What nobody reported stays as it was held, a release gives back all.
    end(shard, 0, number=3, kind=End.RELEASED)
    assert ask(shard, tenant, number=4, **bound).output_tokens == 250
    shard.leases[("acme", "op-4")] = 0
    assert expire(shard, tenant_id="acme", operation_id="op-4", now_ms=NOW_MS, run_id="run")
    assert shard.counters[("acme", read_name(tokens_counter_name("", NOW_MS)).key)].spent == 1000


def test_the_tighter_of_two_token_limits_is_told_and_each_refuses():
    shard, tenant = a_shard(), a_tenant(tokens_per_minute=1000)
    told = ask(shard, tenant, key=a_key(tokens_per_minute=50), input_tokens=30)
    assert (told.tokens_limit, told.tokens_remaining) == (50, 20)
    assert ask(shard, tenant, number=2, key=a_key(tokens_per_minute=50), input_tokens=30).scope is SubjectKind.API_KEY


def test_a_stream_that_tops_up_counts_its_tokens_whatever_their_limit():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 10_000), tokens_per_minute=100, concurrent_calls=3)
    ask(shard, tenant, input_tokens=90)
    grown = Extension(tenant_id="acme", operation_id="op-1", counters=(), hold_nanos=500, hold_tokens=290)
    assert extend(shard, grown, run_id="run") == Extended(hold_nanos=500)
    assert [counter.held for counter in shard.counters.values()] == [1, 290, 500]


def test_concurrent_calls_are_those_under_way():
    shard, tenant = a_shard(), a_tenant(concurrent_calls=2)
    assert isinstance(ask(shard, tenant, number=1), Reserved)
    assert isinstance(ask(shard, tenant, number=2), Reserved)
    refused = ask(shard, tenant, number=3)
    assert (refused.kind, refused.scope, refused.limit) == (Refusal.CALLS, SubjectKind.TENANT, 2)
    end(shard, 5)
    assert isinstance(ask(shard, tenant, number=3), Reserved)
    # Its end is corrected later: it is not under way a second time.
    end(shard, 7, kind=End.CORRECTED)
    assert shard.counters[("acme", calls_counter_name(""))] == Counter(0, 2)
    lone = ask(shard, a_tenant(), number=4, key=a_key(concurrent_calls=1))
    assert lone.counters == (calls_counter_name(KEY_ID),)


def test_each_subject_of_a_template_has_its_own_counter_up_to_their_number():
    shard = a_shard()
    tenant = a_tenant(a_budget("b1", 150, subjects_max=2, **EACH_SESSION))
    assert ask(shard, tenant).counters == ()  # no session, nothing to count it for
    assert ask(shard, tenant, number=2, session_id="s1").counters == ("b1:1:0::s1",)
    again = ask(shard, tenant, number=6, session_id="s1", input_nanos=10, now_ms=NOW_MS + 5)
    assert isinstance(again, Reserved)
    refused = ask(shard, tenant, number=3, session_id="s1")
    assert (refused.kind, refused.subject, refused.scope) == (Refusal.BUDGET, "s1", SubjectKind.SESSION)
    assert isinstance(ask(shard, tenant, number=3, session_id="s2"), Reserved)
    full = ask(shard, tenant, number=4, session_id="s3")
    assert (full.kind, full.budget_id, full.subject, full.subjects_max) == (Refusal.SUBJECTS, "b1", "s3", 2)
    # One that was not seen for long makes room.
    later = NOW_MS + IDLE_KEPT_MS + 6
    assert isinstance(ask(shard, tenant, number=4, session_id="s3", now_ms=later), Reserved)
    assert shard.subjects == {("acme", "b1:1:0:"): {"s3": later}}


@pytest.mark.parametrize("window", [{"window": WindowKind.DAY}, MINUTE])
def test_subjects_of_a_window_count_as_long_as_it_lasts(window):
    shard = a_shard()
    tenant = a_tenant(a_budget("b1", 150, subjects_max=1, **EACH_SESSION, **window))
    ask(shard, tenant, session_id="s1")
    assert ask(shard, tenant, number=2, session_id="s2", now_ms=NOW_MS + 60_000).kind is Refusal.SUBJECTS
    admitted = ask(shard, tenant, number=2, session_id="s2", now_ms=NOW_MS + 61_001)
    assert isinstance(admitted, Reserved) == (window is MINUTE)


def test_a_seeding_budget_counts_and_does_not_refuse_and_its_seed_is_held():
    shard = a_shard()
    ask(shard, a_tenant(a_budget("b1", 50, seeding=True)))
    assert shard.counters[("acme", "b1:1:0:")].held == 100
    assert correct_counter(shard, tenant_id="acme", counter="b1:1:0:", deltas=30, seed=400, run_id="run")
    assert shard.counters[("acme", "b1:1:0:")] == Counter(30, 100, 400)
    refused = ask(shard, a_tenant(a_budget("b1", 600)), number=2)
    assert (refused.spent, refused.held) == (30, 500)
    assert not correct_counter(shard, tenant_id="acme", counter="b1:1:0:", deltas=1, seed=0, run_id="another")


def test_a_rolling_counter_is_corrected_and_written_bucket_by_bucket():
    shard, name = a_shard(), f"b1:1:~1000x61:{SECOND}"
    deltas = {SECOND - 70: 5, SECOND - 60: 7, SECOND: 11}
    assert correct_counter(shard, tenant_id="acme", counter=name, deltas=deltas, seed=1, run_id="run")
    expected = Counter(18, 0, 1, SECOND - 60, SECOND, {SECOND - 60: (7, 0), SECOND: (11, 0)})
    assert rolling(shard) == expected
    shard.epoch = "opening"
    rolling(shard).buckets[SECOND - 1] = (3, 4)
    spent = {SECOND - 61: 9, SECOND - 2: 2}
    assert write_counter(shard, tenant_id="acme", counter=name, spent=spent, opening="opening")
    assert rolling(shard).buckets == {SECOND - 60: (0, 0), SECOND - 2: (2, 0), SECOND - 1: (0, 4), SECOND: (0, 0)}
    assert rolling(shard).spent == 2
