"""Holds of calls that were not forwarded, freed whatever Redis does meanwhile."""

import asyncio
import signal
from dataclasses import replace
from inspect import isawaitable

import pytest
from prometheus_client import REGISTRY

from budgetguard.adapters.redis import counters as counters_module
from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import CountersUnavailableError, RedisClient, RedisReplyError
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core.budget import NotReady
from budgetguard.core.catalog import Catalog
from budgetguard.core.operation import LEASE_MS
from ext_authz import releases as releases_module
from ext_authz.call import Admitted
from ext_authz.releases import AGE_MS_MAX, FULL, STOPPED, TOO_OLD, Releases
from tests.plugins.redis_server import close_shards, sign_off_all
from tests.services.ext_authz.test_check import PROVIDER, RECORD, TENANT, Bench, DeadCounters, budget, reason

SHARD = keys.shard_of("acme")
WHYS = (FULL, TOO_OLD, STOPPED)


@pytest.fixture(autouse=True)
def never_too_late(monkeypatch):
    """On a machine that is too busy, calls are refused as TOO_LATE; here they are to be admitted."""
    monkeypatch.setattr(counters_module, "TOO_LATE_MS", 60_000)


def lost():
    """How many releases Prometheus is told were lost, and why."""
    return {why: REGISTRY.get_sample_value("budgetguard_releases_lost_total", {"why": why}) for why in WHYS}


def waiting():
    return REGISTRY.get_sample_value("budgetguard_releases_waiting")


async def until(condition):
    async with asyncio.timeout(20):
        while not (await found if isawaitable(found := condition()) else found):  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.005)


def one_waits(bench):
    return lambda: bench.releases.waiting == 1


async def ends(redis):
    """What the ledger will be told: each end and what it costs."""
    entries = await redis.command("XRANGE", keys.usage(SHARD), "-", "+")
    fields = [dict(zip(pairs[::2], pairs[1::2], strict=True)) for _, pairs in entries]
    return [(event["end"], int(event["delta"])) for event in fields]


class Money:
    """A bench whose calls are counted by a budget."""

    def __init__(self, bench):
        self.bench = bench

    async def limit(self):
        await self.bench.counters.publish_tenant(replace(TENANT, version=2, budgets=(budget(10**9),)))

    async def is_freed(self):
        return await self.bench.held() == (0, 0)

    async def stands(self, admitted):
        """Return (spent, held) of the budget."""
        (stands,) = await self.bench.counters.read_counters("acme", admitted.handoff.counters)
        return stands


@pytest.fixture
async def money(bench):
    money = Money(bench)
    await money.limit()
    return money


class GatedCounters(Counters):
    """A Redis that does not do what it is asked to, until it is let."""

    def __init__(self, redis, answer=None):
        super().__init__(redis)
        self.answer = answer or CountersUnavailableError("away")
        self.refuses = True
        self.asked = 0

    async def release(self, handoff, **call):
        self.asked += 1
        if self.refuses_now(handoff):
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer
        return await super().release(handoff, **call)

    def refuses_now(self, _handoff):
        return self.refuses


class UnsignedCounters(DeadCounters):
    """Holds the money and loses the answer, as a Redis does that is another after it."""

    async def reserve(self, request):
        try:
            return await super().reserve(request)
        finally:
            await close_shards(self._redis, [SHARD])


async def test_a_shard_that_is_not_signed_off_yet_frees_the_hold_when_it_is(bench, money):
    lost_before = lost()
    checker = bench.make(counters=UnsignedCounters(bench.redis))
    assert reason(await bench.check(checker=checker)) == "COUNTERS_UNAVAILABLE"

    await until(one_waits(bench))
    assert waiting() == 1
    assert (await bench.held())[0] == 1
    await sign_off_all(bench.redis)
    await until(money.is_freed)
    assert await ends(bench.redis) == [("RELEASED", 0)]
    await bench.releases.drain()
    assert (waiting(), lost()) == (0, lost_before)


class Outage:
    """A Redis of its own, and a clock that can be ahead: for the loop's timers and for all else."""

    def __init__(self, server, bench, monkeypatch):
        self.server, self.bench = server, bench
        self._ahead_ms = 0
        loop, now_ms = asyncio.get_running_loop(), bench.now_ms
        loop_time = loop.time
        monkeypatch.setattr(loop, "time", lambda: loop_time() + self._ahead_ms / 1000)
        self.now_ms = lambda: now_ms() + self._ahead_ms

    def advance(self, milliseconds):
        self._ahead_ms += milliseconds


@pytest.fixture
async def outage(own_redis_server, monkeypatch):
    await own_redis_server.wait_until_ready()
    redis = RedisClient(own_redis_server.url, timeout_seconds=0.2)
    await sign_off_all(redis)
    bench = Bench(redis)
    await bench.counters.publish_tenant(TENANT)
    await bench.counters.publish_key(RECORD)
    await bench.counters.publish_catalog(Catalog(version=1, providers=(PROVIDER,)).to_json(), version=1)
    await bench.prices.refresh()
    await Money(bench).limit()
    yield Outage(own_redis_server, bench, monkeypatch)
    await bench.large_bodies.close()
    await redis.close()


@pytest.mark.parametrize("seconds", [6, 80])
async def test_a_redis_that_is_away_for_long_frees_the_hold_when_it_is_back(outage, seconds):
    bench, money = outage.bench, Money(outage.bench)
    checker = bench.make(now_ms=outage.now_ms)
    admitted = await bench.check(checker=checker)
    assert isinstance(admitted, Admitted)
    outage.server.send(signal.SIGSTOP)
    checker.give_up(admitted)

    await until(one_waits(bench))
    for _ in range(seconds):  # and not in one step: each attempt may begin anew
        outage.advance(1000)
        await asyncio.sleep(0.01)
    assert bench.releases.waiting == 1
    outage.server.send(signal.SIGCONT)
    await until(money.is_freed)
    assert await ends(bench.redis) == [("RELEASED", 0)]
    assert await money.stands(admitted) == (0, 0)
    await bench.releases.drain()
    assert bench.releases.waiting == 0


async def test_what_surely_did_not_run_has_nothing_to_be_freed(outage):
    bench = outage.bench
    assert isinstance(await bench.check(), Admitted)  # so that the key is cached
    outage.server.kill()
    for _ in range(4):
        assert reason(await bench.check()) == "COUNTERS_UNAVAILABLE"
    while bench.releases._first_attempts:
        await asyncio.wait(bench.releases._first_attempts)
    # The first one may have been sent to the Redis that just went; from then on there was none to send it to.
    assert bench.releases.waiting <= 1


async def test_an_end_that_the_lease_ran_out_to_is_taken_back(bench, money):
    counters = GatedCounters(bench.redis)
    checker = bench.make(counters=counters)
    admitted = await bench.check(checker=checker)
    hold = admitted.handoff.hold_nanos
    checker.give_up(admitted)
    assert await bench.counters.expire_due(SHARD, now_ms=bench.now_ms() + LEASE_MS + 1, limit=10) == 1
    assert await money.stands(admitted) == (hold, 0)
    counters.refuses = False

    async def is_unspent():
        return await money.stands(admitted) == (0, 0)

    await until(is_unspent)
    assert await ends(bench.redis) == [("EXPIRED", hold), ("RELEASED", -hold)]


@pytest.mark.parametrize("answer", [RedisReplyError("WRONGTYPE"), TypeError("a fault of ours"), NotReady()])
async def test_one_that_is_refused_over_and_over_holds_nobody_up(bench, money, answer):
    class Picky(GatedCounters):
        def refuses_now(self, handoff):
            return self.refuses or handoff.facts.operation_id == "op-1"

    counters = Picky(bench.redis, answer)
    checker = bench.make(counters=counters)
    calls = 2 * releases_module.BATCH
    for _ in range(calls):
        checker.give_up(await bench.check(checker=checker))
    await until(lambda: bench.releases.waiting == calls)
    counters.refuses = False
    await until(one_waits(bench))
    assert (await bench.held())[0] == 1


async def test_a_closed_shard_is_asked_for_one_batch_at_a_time(bench):
    counters = GatedCounters(bench.redis, NotReady())
    checker = bench.make(counters=counters)
    for _ in range(3 * releases_module.BATCH):
        checker.give_up(await bench.check(checker=checker))
    await asyncio.wait(bench.releases._first_attempts)
    bench.releases._retrying.cancel()
    asked = counters.asked
    assert await bench.releases._try_again() == 0
    assert counters.asked == asked + releases_module.BATCH


async def test_too_many_are_let_go_unless_redis_takes_them_at_once(bench, money):
    counters = GatedCounters(bench.redis)
    checker = bench.make(counters=counters)
    small = Releases(counters, now_ms=bench.now_ms, waiting_max=1)
    lost_before = lost()
    first, second, third = [await bench.check(checker=checker) for _ in range(3)]
    small.submit(first.handoff, detail="")
    small.submit(second.handoff, detail="")
    await asyncio.wait(small._first_attempts)
    assert (small.waiting, waiting()) == (1, 1)
    assert lost() == lost_before | {FULL: lost_before[FULL] + 1}
    small._retrying.cancel()
    counters.refuses = False
    small.submit(third.handoff, detail="")
    await asyncio.wait(small._first_attempts)
    assert (await bench.held())[0] == 2
    await small.drain()
    assert await bench.held() == (1, second.handoff.hold_nanos)
    assert lost() == lost_before | {FULL: lost_before[FULL] + 1}


async def test_what_is_never_taken_is_let_go_at_last(bench):
    ahead_ms = 0
    counters = GatedCounters(bench.redis)
    checker = bench.make(counters=counters, now_ms=lambda: bench.now_ms() + ahead_ms)
    lost_before = lost()
    checker.give_up(await bench.check(checker=checker))

    await until(one_waits(bench))
    ahead_ms = AGE_MS_MAX + 1

    await until(lambda: lost() == lost_before | {TOO_OLD: lost_before[TOO_OLD] + 1})
    assert (bench.releases.waiting, waiting()) == (0, 0)


async def test_a_process_that_ends_waits_for_redis_a_little(bench, money):
    checker = bench.make(counters=UnsignedCounters(bench.redis))
    await bench.check(checker=checker)
    draining = asyncio.create_task(bench.releases.drain())

    await until(one_waits(bench))
    await sign_off_all(bench.redis)
    await draining
    assert await ends(bench.redis) == [("RELEASED", 0)]


async def test_a_process_that_ends_says_what_it_leaves(bench, money, monkeypatch, caplog):
    monkeypatch.setattr(releases_module, "DRAIN_SECONDS", 0.05)
    checker = bench.make(counters=GatedCounters(bench.redis))
    lost_before = lost()
    checker.give_up(await bench.check(checker=checker))
    await bench.releases.drain()
    assert lost() == lost_before | {STOPPED: lost_before[STOPPED] + 1}
    assert (bench.releases.waiting, waiting()) == (0, 0)
    assert "1 holds not released (stopped), they will expire: op-1" in caplog.messages
    assert (await bench.held())[0] == 1
