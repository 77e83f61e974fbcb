"""Refusals on their way: each script against its reference, and what a drain sees."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.refusals import NUMBERS_KEPT_MS, Refusals, tally_of
from budgetguard.core import attempt_counts as reference
from budgetguard.core.attempt_counts import RefusalShard, Report
from budgetguard.core.attempts import RefusedCall
from budgetguard.core.events import MalformedEvent
from budgetguard.core.reasons import Reason
from tests.plugins.attempts import MINUTE_MS, a_report, a_tally, an_attempt
from tests.plugins.redis_server import ALL_SHARDS

ACME, GLOBEX = keys.shard_of("acme"), keys.shard_of("globex")
# Two tenants of one shard, so that a mix-up would show; one has characters that keys must escape.
TENANTS = ["acme", next(name for i in range(9999) if keys.shard_of(name := f"t:{{{i}}}") == ACME)]
ROWS_MAX, TALLIES_MAX = 25, 12


class Scripts(RuleBasedStateMachine):
    """Random reports, told in any order and again, and drains of what was read some time before."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.redis = RedisClient(self.url, timeout_seconds=10)
        self.refusals = Refusals(self.redis, rows_max=ROWS_MAX, tallies_max=TALLIES_MAX)
        self.shard = RefusalShard()
        self.serial = 0
        self.last = None
        self.read = []

    def run(self, what):
        return self.loop.run_until_complete(what)

    @initialize()
    def empty(self):
        self.run(self.redis.command("FLUSHALL"))

    @rule(
        tenant_id=st.sampled_from(TENANTS),
        key_id=st.sampled_from(["k", "k:1"]),
        reason=st.sampled_from([Reason.BUDGET_EXCEEDED, Reason.POLICY_DENIED]),
        minute=st.integers(0, 1),
        source=st.sampled_from(["p.1", "q.1"]),
        count=st.sampled_from([1, 5, 30, 2**53]),
        attempts=st.integers(0, 10),
        first_number=st.integers(1, 10),
    )
    def tell(self, tenant_id, key_id, reason, minute, source, count, attempts, first_number):
        who = {"tenant_id": tenant_id, "key_id": key_id, "reason": reason}
        minute_ms = MINUTE_MS + 60_000 * minute
        told = []
        for _ in range(attempts):
            self.serial += 1
            told.append(an_attempt(f"op-{self.serial}", refused_at_ms=minute_ms + self.serial, **who))
        tally = a_tally(minute_ms=minute_ms, source=source, **who)
        self.last = Report(tally=tally, count=count, attempts=tuple(told), first_number=first_number)
        self.tell_again()

    @rule()
    def tell_again(self):
        if self.last is not None:
            expected = reference.refuse(self.shard, self.last, rows_max=ROWS_MAX, tallies_max=TALLIES_MAX)
            assert self.run(self.refusals.refuse(self.last)) is expected

    @rule(rows=st.integers(1, 9))
    def look(self, rows):
        self.read = self.run(self.refusals.waiting([ACME], rows=rows, counts=1000))

    @rule()
    def forget(self):
        for waiting in self.read:
            self.run(self.refusals.forget(waiting))
            tallies = dict(tally_of(name, value) for name, value in waiting.counts.items())
            reference.forget_refusals(self.shard, rows=len(waiting.rows), tallies=tallies)
        self.read = []  # what was read before is not forgotten twice: a number could be another entry's by now

    @invariant()
    def same_state(self):
        waiting = self.run(self.refusals.waiting([ACME], rows=1000, counts=1000))
        rows, counts = (waiting[0].rows, waiting[0].counts) if waiting else ({}, {})
        assert list(rows.values()) == self.shard.stream
        assert dict(tally_of(name, value) for name, value in counts.items()) == self.shard.tallies

    def teardown(self):
        self.run(self.redis.close())
        self.loop.close()


async def test_redis_answers(redis_server):
    await redis_server.wait_until_ready()


def test_each_script_does_what_its_reference_does(redis_server):
    Scripts.url = redis_server.url
    run_state_machine_as_test(
        Scripts, settings=settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)
    )


@pytest.fixture
def refusals(redis):
    return Refusals(redis)


async def test_it_needs_no_sign_off_and_numbers_leave_by_themselves(refusals, redis):
    assert await refusals.refuse(a_report(1, an_attempt()))
    left_ms = await redis.command("PTTL", keys.refusal_numbers("acme", MINUTE_MS))
    assert NUMBERS_KEPT_MS - 60_000 < left_ms <= NUMBERS_KEPT_MS
    assert await redis.command("PTTL", keys.refusals(ACME)) == -1
    assert await redis.command("PTTL", keys.refusal_counts(ACME)) == -1


async def test_when_redis_has_lost_it_the_count_is_told_whole_again(refusals, redis):
    await refusals.refuse(a_report(3, an_attempt("a")))
    await redis.command("FLUSHALL")
    await refusals.refuse(a_report(4, an_attempt("d"), first_number=4))
    (waiting,) = await refusals.waiting(ALL_SHARDS, rows=9, counts=9)
    assert [tally_of(name, value) for name, value in waiting.counts.items()] == [(a_tally(), 4)]
    assert list(waiting.rows.values()) == [RefusedCall(attempt=an_attempt("d"), number=1)]


async def test_many_processes_at_once_keep_ten(refusals):
    def reports(source):
        return [
            a_report(number, an_attempt(f"{source}-{number}"), first_number=number, source=source)
            for number in range(1, 11)
        ]

    async def tell(source):
        for report in reports(source):  # a process tells one after the other
            await refusals.refuse(report)

    await asyncio.gather(*map(tell, "pqrs"))
    (waiting,) = await refusals.waiting([ACME], rows=99, counts=99)
    assert sorted(row.number for row in waiting.rows.values()) == list(range(1, 11))
    assert Counter(waiting.counts.values()) == {"10": 4}


async def test_what_waits_is_read_in_parts_and_again_until_it_is_forgotten(refusals):
    await refusals.refuse(a_report(3, *(an_attempt(f"op-{number}") for number in range(3))))
    await refusals.refuse(a_report(1, an_attempt(tenant_id="globex"), tenant_id="globex"))
    for _ in range(2):
        waiting = {one.shard: one for one in await refusals.waiting(ALL_SHARDS, rows=2, counts=9)}
        assert {shard: (len(one.rows), one.more) for shard, one in waiting.items()} == {
            ACME: (2, True),
            GLOBEX: (1, False),
        }
    for one in waiting.values():
        await refusals.forget(one)
    (left,) = await refusals.waiting(ALL_SHARDS, rows=2, counts=9)
    assert [row.attempt.operation_id for row in left.rows.values()] == ["op-2"]
    assert left.counts == {}
    await refusals.forget(left)
    assert await refusals.waiting(ALL_SHARDS, rows=2, counts=9) == []


async def test_many_counts_are_read_in_parts(refusals):
    for number in range(700):
        await refusals.refuse(a_report(1, source=f"p.{number}"))
    seen, rounds = set(), 0
    while waiting := await refusals.waiting([ACME], rows=9, counts=100):
        rounds += 1
        seen |= waiting[0].counts.keys()
        assert len(waiting[0].counts) < 700
        await refusals.forget(waiting[0])
    assert (len(seen), rounds > 1) == (700, True)


async def test_a_count_that_rises_after_it_was_read_is_not_forgotten(refusals):
    await refusals.refuse(a_report(3))
    (waiting,) = await refusals.waiting([ACME], rows=9, counts=9)
    await refusals.refuse(a_report(4))
    await refusals.forget(waiting)
    (waiting,) = await refusals.waiting([ACME], rows=9, counts=9)
    assert list(waiting.counts.values()) == ["4"]


@pytest.mark.parametrize(
    "name",
    ["", "acme", "acme:k:NO_SUCH:60000:p.1", "acme:k:BUDGET_EXCEEDED:x:p.1", "acme:k:BUDGET_EXCEEDED:60000:p.1:more"],
)
async def test_what_is_no_count_is_told_as_it_is(refusals, redis, name):
    await redis.command("HSET", keys.refusal_counts(ACME), name, "1")
    (waiting,) = await refusals.waiting([ACME], rows=9, counts=9)
    assert tally_of(*next(iter(waiting.counts.items()))) == MalformedEvent({"name": name, "value": "1"})
    assert tally_of(name, "1.5") == MalformedEvent({"name": name, "value": "1.5"})


async def test_what_is_no_row_is_told_as_it_is(refusals, redis):
    await redis.command("XADD", keys.refusals(ACME), "*", "nonsense", "x")
    await refusals.refuse(a_report(1, replace(an_attempt(), facts={})))
    (waiting,) = await refusals.waiting([ACME], rows=9, counts=9)
    malformed, row = waiting.rows.values()
    assert (malformed, row.attempt.facts) == (MalformedEvent({"nonsense": "x"}), {})
