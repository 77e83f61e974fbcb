"""A hold that grows: what `extend` promises. The script is held against it in tests/adapters."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from budgetguard.core.budget import NotReady, Reserved
from budgetguard.core.counting import Counter
from budgetguard.core.extension import CounterLimit, Extended, Extension, ExtensionRefused, NoHold
from budgetguard.core.money import CALL_NANOS_MAX, COUNTER_NANOS_MAX
from budgetguard.core.operation import LEASE_MS, End
from budgetguard.core.reserving import reserve
from budgetguard.core.shard import Shard, expire, extend, publish, settle
from budgetguard.core.snapshot import Mode
from tests.plugins.redis_calls import (
    KEY_ID,
    NOW_MS,
    a_budget,
    a_handoff,
    a_reserve,
    a_settlement,
    a_tenant,
    the_facts,
    the_handoff,
)

B1, B2 = ("acme", "b1:1:0:"), ("acme", "b2:1:0:")


def a_shard() -> Shard:
    shard = Shard(epoch="run")
    publish(shard, ("acme",), 1)
    publish(shard, ("acme", KEY_ID), 1)
    return shard


def hold(shard, *budgets, nanos=100, operation_id="op-1") -> Reserved:
    request = a_reserve(a_tenant(*budgets), operation_id=operation_id, input_nanos=nanos)
    reserved = reserve(shard, request, run_id="run", redis_ms=NOW_MS)
    assert isinstance(reserved, Reserved)
    return reserved


def grow(shard, hold_nanos, *, force=False, operation_id="op-1", run_id="run"):
    extension = Extension(tenant_id="acme", operation_id=operation_id, counters=(), hold_nanos=hold_nanos, force=force)
    return extend(shard, extension, run_id=run_id)


def test_a_hold_grows_in_every_counter_and_only_once():
    shard = a_shard()
    hold(shard, a_budget("b1", 1000), a_budget("b2", 500))
    for asked, hold_nanos in ((250, 250), (250, 250), (100, 250), (500, 500)):
        assert grow(shard, asked) == Extended(hold_nanos=hold_nanos)
        assert [counter.held for counter in shard.counters.values()] == [hold_nanos, hold_nanos]
    assert shard.leases == {("acme", "op-1"): NOW_MS + LEASE_MS}
    ended = settle(shard, a_settlement(a_handoff(the_facts()), 420), now_ms=NOW_MS, run_id="run")
    assert ended.amount_nanos == 420
    assert shard.counters == {B1: Counter(420, 0), B2: Counter(420, 0)}
    assert shard.events[0].hold_nanos == 500


def test_the_first_budget_without_room_is_named_with_its_numbers_and_nothing_grows():
    shard = a_shard()
    hold(shard, a_budget("b0", 1000), a_budget("b1", 400), a_budget("b2", 300))
    shard.counters[B1].spent = 150
    assert grow(shard, 300) == ExtensionRefused(
        limit=CounterLimit(limit_nanos=400, budget_id="b1"),
        resets_at_ms=None,
        spent_nanos=150,
        held_nanos=100,
        needed_nanos=200,
        room_nanos=150,
    )
    assert [counter.held for counter in shard.counters.values()] == [100, 100, 100]
    assert grow(shard, 250) == Extended(hold_nanos=250)
    shard.counters[B2].spent = 10**6
    assert grow(shard, 251).room_nanos == -1


def test_admission_time_decides_the_limit():
    shard = a_shard()
    hold(shard, a_budget("b1", 1000))
    hold(shard, a_budget("b1", 200), operation_id="op-2", nanos=50)
    assert grow(shard, 300) == Extended(hold_nanos=300)
    assert grow(shard, 51, operation_id="op-2").limit.limit_nanos == 200


def test_an_observed_budget_refuses_nothing():
    shard = a_shard()
    hold(shard, a_budget("b1", 1, mode=Mode.OBSERVE))
    assert grow(shard, 10**9) == Extended(hold_nanos=10**9)


def test_what_is_forced_is_held_beyond_the_limit_but_never_beyond_the_counter():
    shard = a_shard()
    hold(shard, a_budget("b1", 100))
    assert isinstance(grow(shard, 101), ExtensionRefused)
    assert grow(shard, 5000, force=True) == Extended(hold_nanos=5000)
    assert shard.counters == {B1: Counter(0, 5000)}
    shard.counters[B1].spent = COUNTER_NANOS_MAX - 5000
    assert grow(shard, 5001, force=True).room_nanos == 0


def test_only_a_live_hold_grows():
    shard = a_shard()
    assert grow(shard, 5) == NoHold()
    reserved = hold(shard, a_budget("b1", 1000))
    assert grow(shard, 200, run_id="another") == NotReady()
    expire(shard, tenant_id="acme", operation_id="op-1", now_ms=NOW_MS + LEASE_MS, run_id="run")
    assert grow(shard, 200) == NoHold()
    assert shard.counters == {B1: Counter(reserved.hold_nanos, 0)}


def test_without_budgets_a_hold_grows_freely():
    shard = a_shard()
    hold(shard)
    assert grow(shard, CALL_NANOS_MAX) == Extended(hold_nanos=CALL_NANOS_MAX)


@pytest.mark.parametrize("hold_nanos", [-1, CALL_NANOS_MAX + 1])
def test_a_hold_has_bounds(hold_nanos):
    with pytest.raises(ValueError, match="a hold of 0 to"):
        Extension(tenant_id="acme", operation_id="op-1", counters=(), hold_nanos=hold_nanos)


LIMITS = {"b1": 1000, "b2": 3000}


class Growing(RuleBasedStateMachine):
    """Whatever happens in whatever order: the sum of what is held and spent within holds never passes a limit."""

    def __init__(self):
        super().__init__()
        self.shard = a_shard()
        self.tenant = a_tenant(*(a_budget(name, limit) for name, limit in LIMITS.items()))
        self.told = {}

    @rule(number=st.integers(0, 9), input_nanos=st.integers(1, 400))
    def reserve(self, number, input_nanos):
        request = a_reserve(self.tenant, operation_id=f"op-{number}", input_nanos=input_nanos)
        answer = reserve(self.shard, request, run_id="run", redis_ms=NOW_MS)
        if isinstance(answer, Reserved):
            self.told[number] = (request, answer)

    @rule(number=st.integers(0, 9), hold_nanos=st.integers(0, 3000))
    def extend(self, number, hold_nanos):
        answer = grow(self.shard, hold_nanos, operation_id=f"op-{number}")
        if isinstance(answer, ExtensionRefused):
            known = self.shard.operations[("acme", f"op-{number}")]
            # What is refused has no room, and what is said to have room gets it.
            assert answer.room_nanos < answer.needed_nanos
            if answer.room_nanos > 0:
                wanted = known.hold_nanos + answer.room_nanos
                assert grow(self.shard, wanted, operation_id=f"op-{number}") == Extended(hold_nanos=wanted)

    @precondition(lambda self: self.told)
    @rule(data=st.data(), part=st.integers(0, 10))
    def settle(self, data, part):
        request, told = self.told[data.draw(st.sampled_from(sorted(self.told)))]
        held = self.shard.operations[("acme", request.facts.operation_id)].hold_nanos
        settlement = a_settlement(the_handoff(request, told), held * part // 10, End.ESTIMATED)
        settle(self.shard, settlement, now_ms=NOW_MS, run_id="run")

    @invariant()
    def no_limit_is_passed_and_held_is_the_sum_of_the_holds(self):
        live = [operation for operation in self.shard.operations.values() if operation.end is None]
        for (_, name), counter in self.shard.counters.items():
            assert counter.held == sum(operation.hold_nanos for operation in live if name in operation.counters)
            assert counter.spent + counter.held <= LIMITS[name.partition(":")[0]]


TestGrowing = Growing.TestCase
TestGrowing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
