"""The reference of the scripts: what each transition promises. The scripts are held against it in tests/adapters."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from budgetguard.core.budget import FORGOTTEN_CHARGED_MS, NotReady, Refusal, RememberedEnd, ReserveRefused, Settled
from budgetguard.core.counting import Counter
from budgetguard.core.money import CALL_NANOS_MAX, COUNTER_NANOS_MAX
from budgetguard.core.operation import LEASE_MS, End
from budgetguard.core.reserving import reserve
from budgetguard.core.shard import (
    Shard,
    SignOff,
    expire,
    load_records,
    publish,
    remember_ended,
    renew,
    settle,
    sign_off,
    write_counter,
)
from budgetguard.core.snapshot import Mode, SubjectKind, WindowKind
from tests.plugins.redis_calls import (
    KEY_ID,
    NOW_MS,
    a_budget,
    a_handoff,
    a_key,
    a_reserve,
    a_settlement,
    a_tenant,
    the_facts,
    the_handoff,
)

B1 = ("acme", "b1:1:0:")


def a_shard(*, tenant_version=1, key_version=1) -> Shard:
    shard = Shard(epoch="run")
    publish(shard, ("acme",), tenant_version)
    publish(shard, ("acme", KEY_ID), key_version)
    return shard


def ask(shard, tenant, *, redis_ms=NOW_MS, run_id="run", backlog_max=10, **changes):
    return reserve(shard, a_reserve(tenant, **changes), run_id=run_id, redis_ms=redis_ms, backlog_max=backlog_max)


def end(shard, request, reserved, amount_nanos, kind=End.CONFIRMED, *, now_ms=NOW_MS):
    settlement = a_settlement(the_handoff(request, reserved), amount_nanos, kind)
    return settle(shard, settlement, now_ms=now_ms, run_id="run")


def test_only_newer_records_are_stored():
    shard = Shard()
    assert [publish(shard, ("acme",), version) for version in (2, 2, 1, 3)] == [True, False, False, True]
    assert shard.records == {("acme",): 3}


def test_records_are_known_only_where_all_of_them_are():
    shard = a_shard(tenant_version=2, key_version=3)

    def load(key_id=KEY_ID, run_id="run"):
        return load_records(shard, tenant_id="acme", key_id=key_id, run_id=run_id)

    assert load() == (2, 3)
    assert load(key_id="none") == (None, None)
    assert load(run_id="another") == load(key_id="none", run_id="another") == NotReady()
    del shard.records[("acme",)]
    assert load() == (None, 3)


def test_a_hold_takes_money_from_every_budget_and_tells_the_tightest():
    shard = a_shard()
    tenant = a_tenant(a_budget("b1", 1000), a_budget("b2", 500), a_budget("b3", 1, mode=Mode.OBSERVE))
    reserved = ask(shard, tenant)
    assert reserved.counters == ("b1:1:0:", "b2:1:0:", "b3:1:0:")
    assert (reserved.hold_nanos, reserved.budget_remaining_nanos, reserved.tightest_budget_id) == (100, 400, "b2")
    assert [counter.held for counter in shard.counters.values()] == [100, 100, 100]
    assert shard.leases == {("acme", "op-1"): NOW_MS + LEASE_MS}


def test_without_budgets_and_limits_nothing_is_told():
    reserved = ask(a_shard(), a_tenant())
    assert (reserved.requests_limit, reserved.budget_remaining_nanos, reserved.tightest_budget_id) == (None, None, None)


def test_the_first_budget_that_is_too_small_is_named_with_its_numbers_and_nothing_is_held():
    shard = a_shard()
    shard.counters[B1] = Counter(spent=850, held=51)
    tenant = a_tenant(a_budget("b0", 5000), a_budget("b1", 1000), a_budget("b2", 1))
    refused = ask(shard, tenant)
    assert refused == ReserveRefused(
        kind=Refusal.BUDGET,
        budget_id="b1",
        scope=SubjectKind.TENANT,
        limit=1000,
        spent=850,
        held=51,
        needed=100,
        starts_at_ms=0,
    )
    assert shard.counters == {B1: Counter(850, 51)}
    assert shard.operations == shard.leases == {}


def test_an_observed_budget_refuses_only_what_its_counter_cannot_count():
    shard = a_shard()
    tenant = a_tenant(a_budget("b1", 1, mode=Mode.OBSERVE))
    shard.counters[B1] = Counter(spent=COUNTER_NANOS_MAX - 100)
    assert ask(shard, tenant).hold_nanos == 100
    refused = ask(shard, tenant, operation_id="op-2")
    assert (refused.kind, refused.limit) == (Refusal.BUDGET, COUNTER_NANOS_MAX)


def test_a_counter_below_zero_is_no_credit():
    shard = a_shard()
    shard.counters[B1] = Counter(spent=-1000, held=-1000)
    assert ask(shard, a_tenant(a_budget("b1", 99))).kind is Refusal.BUDGET


def test_a_correction_is_corrected_by_who_saw_it_and_only_once():
    shard = a_shard()
    request = a_reserve(a_tenant(a_budget("b1", 1000)))
    handoff = the_handoff(request, reserve(shard, request, run_id="run", redis_ms=NOW_MS))

    def correct(amount_nanos, replaces):
        settlement = a_settlement(handoff, amount_nanos, End.CORRECTED, replaces=replaces)
        return settle(shard, settlement, now_ms=NOW_MS, run_id="run")

    settle(shard, a_settlement(handoff, 70), now_ms=NOW_MS, run_id="run")
    assert correct(40, 1) == Settled(end=End.CORRECTED, amount_nanos=40, sequence=2)
    assert correct(40, 1).sequence == 2
    assert correct(10, 1) == Settled(end=End.CORRECTED, amount_nanos=40, sequence=2)
    assert correct(10, 2) == Settled(end=End.CORRECTED, amount_nanos=10, sequence=3)
    assert correct(10, 2).sequence == 3
    assert shard.counters[B1].spent == 10


def test_a_correction_undoes_nothing_that_became_known_since_it_was_decided():
    shard = a_shard()
    request = a_reserve(a_tenant(a_budget("b1", 1000)))
    handoff = the_handoff(request, reserve(shard, request, run_id="run", redis_ms=NOW_MS))
    expire(shard, tenant_id="acme", operation_id="op-1", now_ms=NOW_MS + LEASE_MS, run_id="run")
    settle(shard, a_settlement(handoff, 70), now_ms=NOW_MS, run_id="run")
    # Decided upon the row of the expiry: "all that expired cost nothing".
    decided = a_settlement(handoff, 0, End.CORRECTED, replaces=1)
    assert settle(shard, decided, now_ms=NOW_MS, run_id="run").end is End.CONFIRMED
    assert shard.counters[B1].spent == 70


def test_a_correction_of_a_forgotten_operation_continues_its_rows():
    shard = a_shard()
    forgotten = a_settlement(a_handoff(the_facts()), 5, End.CORRECTED, replaces=2)
    assert settle(shard, forgotten, now_ms=NOW_MS, run_id="run").sequence == 3
    with pytest.raises(ValueError, match="only a correction"):
        a_settlement(a_handoff(the_facts()), 5, replaces=2)


def test_refusals_come_in_their_fixed_order():
    tenant = a_tenant(a_budget("b1", 1), version=2, requests_per_minute=1)
    key = a_key(version=2, requests_per_minute=1)
    shard = Shard()

    def refused(**changes):
        answer = ask(shard, tenant, key=key, redis_ms=NOW_MS + 1001, backlog_max=0, **changes)
        return answer.kind, answer.scope

    assert refused() == (Refusal.NOT_READY, None)
    shard.epoch = "run"
    assert refused() == (Refusal.TOO_LATE, None)

    def refused_in_time(**changes):
        answer = ask(shard, tenant, key=key, redis_ms=NOW_MS + 1000, **changes)
        return answer.kind, answer.scope

    settle(shard, a_settlement(a_handoff(the_facts()), 0), now_ms=NOW_MS, run_id="run")
    assert refused_in_time() == (Refusal.REPLAYED, None)
    shard.operations.clear()
    assert refused_in_time() == (Refusal.NOT_READY, None)
    publish(shard, ("acme",), 1)
    assert refused_in_time() == (Refusal.STALE, SubjectKind.TENANT)
    publish(shard, ("acme",), 2)
    assert refused_in_time() == (Refusal.STALE, SubjectKind.API_KEY)
    publish(shard, ("acme", KEY_ID), 2)
    assert refused_in_time(backlog_max=1) == (Refusal.BACKLOG_FULL, None)
    admitted = ask(shard, a_tenant(version=2, requests_per_minute=1), key=key)
    assert (admitted.requests_limit, admitted.requests_remaining, admitted.requests_reset_seconds) == (1, 0, 60)
    assert refused_in_time(operation_id="op-2") == (Refusal.RATE, SubjectKind.TENANT)
    tenant = a_tenant(a_budget("b1", 1), version=2)
    assert refused_in_time(operation_id="op-2") == (Refusal.RATE, SubjectKind.API_KEY)
    key = a_key(version=2)
    assert refused_in_time(operation_id="op-2") == (Refusal.BUDGET, SubjectKind.TENANT)


def test_a_refused_call_does_not_count_as_a_request():
    shard = a_shard()
    tenant = a_tenant(a_budget("b1", 1), requests_per_minute=1)
    assert ask(shard, tenant).kind is Refusal.BUDGET
    assert ask(shard, a_tenant(requests_per_minute=1)).requests_remaining == 0
    refused = ask(shard, a_tenant(requests_per_minute=1), operation_id="op-2")
    assert (refused.limit, refused.retry_after_ms) == (1, 60_000)


def test_the_tighter_of_two_request_limits_is_told():
    told = ask(a_shard(), a_tenant(requests_per_minute=9), key=a_key(requests_per_minute=5))
    assert (told.requests_limit, told.requests_remaining) == (5, 4)


def test_the_same_question_while_held_gets_the_same_answer_and_another_one_is_a_replay():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 1000))
    told = ask(shard, tenant)
    assert ask(shard, tenant) == told
    assert shard.counters[B1].held == 100
    assert ask(shard, tenant, input_nanos=99).kind is Refusal.REPLAYED
    assert end(shard, a_reserve(tenant), told, 10) == Settled(end=End.CONFIRMED, amount_nanos=10, sequence=1)
    assert ask(shard, tenant).kind is Refusal.REPLAYED


def test_a_settle_charges_once_and_says_so_again():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 1000))
    told = ask(shard, tenant)
    answers = [end(shard, a_reserve(tenant), told, 150) for _ in range(3)]
    assert answers == [Settled(end=End.CONFIRMED, amount_nanos=150, sequence=1)] * 3
    assert shard.counters[B1] == Counter(150, 0)
    assert len(shard.events) == 1
    assert (shard.events[0].delta_nanos, shard.events[0].hold_nanos, shard.events[0].forgotten) == (150, 100, False)
    assert shard.leases == {}


def test_an_operation_goes_up_the_ranks_and_posts_the_differences():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 1000))
    request, told = a_reserve(tenant), ask(shard, tenant)
    assert expire(shard, tenant_id="acme", operation_id="op-1", now_ms=NOW_MS + LEASE_MS, run_id="run")
    assert shard.counters[B1] == Counter(100, 0)
    assert end(shard, request, told, 60, End.ESTIMATED).sequence == 2
    assert end(shard, request, told, 0, End.RELEASED).sequence == 3
    assert end(shard, request, told, 80) == Settled(end=End.RELEASED, amount_nanos=0, sequence=3)
    assert end(shard, request, told, 30, End.CORRECTED).sequence == 4
    assert shard.counters[B1] == Counter(30, 0)
    assert [event.delta_nanos for event in shard.events] == [100, -40, -60, 30]
    assert [event.amount_nanos for event in shard.events] == [100, 60, 0, 30]


def test_a_hold_expires_when_its_lease_has_run_out_and_not_before():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 1000))
    ask(shard, tenant)
    due = {"tenant_id": "acme", "operation_id": "op-1", "run_id": "run"}
    assert not expire(shard, now_ms=NOW_MS + LEASE_MS - 1, **due)
    assert renew(shard, tenant_id="acme", operation_id="op-1", now_ms=NOW_MS + 30_000)
    assert renew(shard, tenant_id="acme", operation_id="op-1", now_ms=NOW_MS)  # a late one does not shorten it
    assert not expire(shard, now_ms=NOW_MS + LEASE_MS, **due)
    assert not expire(shard, now_ms=NOW_MS + LEASE_MS * 2, **{**due, "run_id": "other"})
    assert expire(shard, now_ms=NOW_MS + LEASE_MS + 30_000, **due)
    assert not expire(shard, now_ms=NOW_MS + LEASE_MS * 9, **due)
    assert not renew(shard, tenant_id="acme", operation_id="op-1", now_ms=NOW_MS)
    assert not renew(shard, tenant_id="acme", operation_id="op-2", now_ms=NOW_MS)


def test_nothing_ends_while_the_counters_are_not_ready():
    shard = Shard(epoch="other")
    settlement = a_settlement(a_handoff(the_facts()), 5)
    assert settle(shard, settlement, now_ms=NOW_MS, run_id="run") == NotReady()
    assert shard == Shard(epoch="other")


@pytest.mark.parametrize(("age_ms", "spent"), [(FORGOTTEN_CHARGED_MS - 1, 70), (FORGOTTEN_CHARGED_MS, 0)])
def test_an_unknown_operation_is_charged_from_its_handoff_unless_it_may_have_been_forgotten(age_ms, spent):
    shard = a_shard()
    shard.counters[B1] = Counter()
    handoff = a_handoff(the_facts(), counters=("b1:1:0:",), hold_nanos=100)
    for _ in range(2):
        settle(shard, a_settlement(handoff, 50, End.ESTIMATED), now_ms=NOW_MS + age_ms, run_id="run")
    settle(shard, a_settlement(handoff, 70), now_ms=NOW_MS + age_ms, run_id="run")
    assert shard.counters[B1] == Counter(spent, 0)
    assert [(event.delta_nanos, event.forgotten) for event in shard.events] == [(50, True), (20, True)]


def test_a_release_of_a_reserve_that_is_still_on_its_way_refuses_it():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 1000))
    released = a_settlement(a_handoff(the_facts()), 0, End.RELEASED)
    assert settle(shard, released, now_ms=NOW_MS, run_id="run").end is End.RELEASED
    assert ask(shard, tenant).kind is Refusal.REPLAYED
    assert shard.counters == {}


def test_a_release_frees_what_was_held_wherever_the_caller_believes_it_is():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 1000))
    ask(shard, tenant)
    settle(shard, a_settlement(a_handoff(the_facts()), 0, End.RELEASED), now_ms=NOW_MS, run_id="run")
    assert shard.counters == {B1: Counter(0, 0)}
    assert shard.events[0].counters == ("b1:1:0:",)


def test_a_counter_that_would_overflow_stays_at_its_end():
    shard = a_shard()
    shard.counters[B1] = Counter(spent=COUNTER_NANOS_MAX - 5)
    handoff = a_handoff(the_facts(), counters=("b1:1:0:",))
    settle(shard, a_settlement(handoff, CALL_NANOS_MAX), now_ms=NOW_MS, run_id="run")
    assert shard.counters[B1].spent == COUNTER_NANOS_MAX


REMEMBERED = RememberedEnd(
    tenant_id="acme",
    operation_id="op-1",
    end=End.CONFIRMED,
    amount_nanos=40,
    hold_nanos=100,
    sequence=1,
    counters=("b1:1:0:",),
)


def test_a_rebuild_writes_spent_and_drops_holds_that_had_ended():
    shard, tenant = a_shard(), a_tenant(a_budget("b1", 1000))
    told = ask(shard, tenant)
    kept = ask(shard, tenant, operation_id="op-2")
    shard.epoch = "opening"
    assert remember_ended(shard, REMEMBERED, opening="opening")
    assert write_counter(shard, tenant_id="acme", counter="b1:1:0:", spent=40, opening="opening")
    shard.epoch = "run"
    assert shard.counters[B1] == Counter(40, kept.hold_nanos)
    assert set(shard.leases) == {("acme", "op-2")}
    assert end(shard, a_reserve(tenant), told, 40) == Settled(end=End.CONFIRMED, amount_nanos=40, sequence=1)
    assert shard.events == []


def test_a_rebuild_remembers_ends_of_operations_that_redis_has_lost_or_has_already():
    shard = Shard(epoch="opening")
    assert remember_ended(shard, REMEMBERED, opening="opening")
    once = shard.operations[("acme", "op-1")]
    assert remember_ended(shard, REMEMBERED, opening="opening")
    assert shard.operations == {("acme", "op-1"): once}


@pytest.mark.parametrize("epoch", ["run", "another opening", None])
def test_a_shard_that_is_in_use_in_another_opening_or_lost_is_not_rebuilt(epoch):
    shard = Shard(epoch=epoch)
    assert not remember_ended(shard, REMEMBERED, opening="opening")
    assert not write_counter(shard, tenant_id="acme", counter="b1:1:0:", spent=40, opening="opening")
    assert shard == Shard(epoch=epoch)


@pytest.mark.parametrize(
    ("epoch", "began_with", "newest", "rebuilt", "answer"),
    [
        ("opening", "run", (7, 1), False, SignOff.OPENED),
        ("opening", "run", (8, 0), False, SignOff.OPENED),
        ("opening", "run", (7, 0), False, SignOff.BEHIND),
        ("opening", "run", (0, 0), False, SignOff.BEHIND),
        ("opening", "run", (0, 0), True, SignOff.OPENED),
        ("opening", "run before", (8, 0), False, SignOff.LOST),
        ("opening", "run before", (0, 0), True, SignOff.LOST),
        ("another opening", "run", (8, 0), True, SignOff.LOST),
        (None, "run", (8, 0), False, SignOff.LOST),
        (None, "run", (0, 0), True, SignOff.LOST),
    ],
)
def test_a_shard_is_opened_only_with_all_that_the_ledger_has_and_in_its_opening(
    epoch, began_with, newest, rebuilt, answer
):
    shard = Shard(epoch=epoch)
    told = sign_off(
        shard,
        opening="opening",
        began_with=began_with,
        run_id="run",
        newest_event=newest,
        position=(7, 1),
        rebuilt=rebuilt,
    )
    assert told is answer
    assert shard == Shard(epoch="run" if answer is SignOff.OPENED else epoch)


class Money(RuleBasedStateMachine):
    """Whatever happens in whatever order: counters are the sums of what they are made of, and no limit is passed.

    Budgets are edited and days go by meanwhile: what counts for a call are its limits at that moment.
    """

    def __init__(self):
        super().__init__()
        self.shard, self.now_ms = a_shard(), NOW_MS
        self.tenant = a_tenant(a_budget("b1", 1000), a_budget("b2", 700, window=WindowKind.DAY))
        self.told = {}

    @rule(number=st.integers(0, 9), input_nanos=st.integers(0, 400), tokens=st.integers(0, 400))
    def reserve(self, number, input_nanos, tokens):
        request = a_reserve(
            self.tenant,
            operation_id=f"op-{number}",
            now_ms=self.now_ms,
            input_nanos=input_nanos,
            output_femtos=1_200_000,
            output_tokens=tokens,
            output_tokens_min=tokens // 4,
            eighth=number % 2 == 0,
        )
        is_new = ("acme", f"op-{number}") not in self.shard.operations
        answer = reserve(self.shard, request, run_id="run", redis_ms=self.now_ms)
        if not isinstance(answer, ReserveRefused):
            self.told[number] = (request, answer)
            # Asked again, a hold is told as it was taken, whatever was spent since.
            assert not is_new or all(left >= 0 for left in self.left_by(request))
        elif answer.kind is Refusal.BUDGET:
            assert min(self.left_by(request)) < request.hold_nanos_min

    def left_by(self, request):
        counters = [(b, self.shard.counters.get(("acme", b.counter), Counter())) for b in request.budgets()]
        return [budget.limit - counter.spent - counter.held for budget, counter in counters]

    @rule(number=st.integers(0, 1), limit_nanos=st.integers(0, 2000), counts_afresh=st.booleans())
    def edit(self, number, limit_nanos, counts_afresh):
        """Raise or lower a limit, also below what is spent; or change what is counted, which is another counter."""
        specs, before = list(self.tenant.budgets), dict(self.shard.counters)
        version = specs[number].spec_version + counts_afresh
        specs[number] = replace(specs[number], limit_nanos=limit_nanos, spec_version=version)
        self.tenant = replace(self.tenant, budgets=tuple(specs), version=self.tenant.version + 1)
        publish(self.shard, ("acme",), self.tenant.version)
        assert self.shard.counters == before

    @rule(step_ms=st.sampled_from([1, 1000, 12 * 3_600_000, 24 * 3_600_000]))
    def clock(self, step_ms):
        self.now_ms += step_ms

    @precondition(lambda self: self.told)
    @rule(data=st.data(), part=st.integers(0, 12), kind=st.sampled_from(list(End)))
    def settle(self, data, part, kind):
        request, told = self.told[data.draw(st.sampled_from(sorted(self.told)))]
        amount_nanos = 0 if kind is End.RELEASED else told.hold_nanos * part // 10
        end(self.shard, request, told, amount_nanos, kind, now_ms=self.now_ms)

    @rule(step_ms=st.sampled_from([0, 1000, LEASE_MS]))
    def expire(self, step_ms):
        self.now_ms += step_ms
        for tenant_id, operation_id in list(self.shard.leases):
            expire(self.shard, tenant_id=tenant_id, operation_id=operation_id, now_ms=self.now_ms, run_id="run")

    @invariant()
    def counters_are_sums(self):
        live = {key: operation for key, operation in self.shard.operations.items() if operation.end is None}
        assert set(live) == set(self.shard.leases)
        for (_, name), counter in self.shard.counters.items():
            assert counter.held == sum(o.hold_nanos for o in live.values() if name in o.counters)
            assert counter.spent == sum(e.delta_nanos for e in self.shard.events if name in e.counters)
        for (_, operation_id), operation in self.shard.operations.items():
            deltas = [e.delta_nanos for e in self.shard.events if e.facts.operation_id == operation_id]
            assert (sum(deltas), len(deltas)) == (operation.amount_nanos, operation.sequence)


TestMoney = Money.TestCase
TestMoney.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
