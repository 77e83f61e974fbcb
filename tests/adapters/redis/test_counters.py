"""What the counters promise when many ask at once, and when Redis hangs, dies or forgets."""

import asyncio
import signal
import time

import pytest

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import CountersUnavailableError, RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.epoch import Epoch
from budgetguard.core.budget import NotReady, Refusal, Reserved, Settled
from budgetguard.core.events import DETAIL_CHARS_MAX, UsageEvent
from budgetguard.core.operation import ENDED_KEPT_MS, End
from budgetguard.core.snapshot import CallerRecords, KeyStatus, Status, SubjectKind, WindowKind
from tests.plugins.redis_calls import (
    KEY_ID,
    a_budget,
    a_handoff,
    a_key,
    a_reserve,
    a_settlement,
    a_tenant,
    live_holds,
    the_handoff,
)
from tests.plugins.redis_server import close_shards, sign_off, sign_off_all

SHARD = keys.shard_of("acme")
B1 = "b1:1:0:"


def the_time_ms() -> int:
    return int(time.time() * 1000)


@pytest.fixture
async def counters(ready_redis):
    counters = Counters(ready_redis)
    await counters.publish_tenant(a_tenant())
    await counters.publish_key(a_key())
    return counters


def ask(limit_nanos: int = 5000, operation_id: str = "op-1", **changes):
    request = {"now_ms": the_time_ms(), **changes}
    return a_reserve(a_tenant(a_budget("b1", limit_nanos)), operation_id=operation_id, **request)


async def read_events(redis) -> list[UsageEvent]:
    entries = await redis.command("XRANGE", keys.usage(SHARD), "-", "+")
    return [UsageEvent.from_fields(dict(zip(fields[::2], fields[1::2], strict=True))) for _, fields in entries]


async def test_of_200_at_once_a_budget_for_50_admits_exactly_50(counters):
    requests = [ask(operation_id=f"op-{number}") for number in range(200)]
    answers = await asyncio.gather(*map(counters.reserve, requests))
    admitted = [(r, a) for r, a in zip(requests, answers, strict=True) if isinstance(a, Reserved)]
    assert len(admitted) == 50
    assert {answer.kind for answer in answers if not isinstance(answer, Reserved)} == {Refusal.BUDGET}
    assert await counters.read_counters("acme", [B1]) == [(0, 5000)]
    assert await live_holds(counters, "acme") == (50, 5000)
    # Each settlement arrives three times, in any order with the others.
    settlements = [a_settlement(the_handoff(r, a), 60) for r, a in admitted] * 3
    settled = await asyncio.gather(*(counters.settle(s, now_ms=the_time_ms()) for s in settlements))
    assert set(settled) == {Settled(end=End.CONFIRMED, amount_nanos=60, sequence=1)}
    assert await counters.read_counters("acme", [B1]) == [(3000, 0)]
    assert await live_holds(counters, "acme") == (0, 0)


@pytest.mark.parametrize("limit_nanos", [1000, 2**53 + 1000])
async def test_what_older_calls_hold_leaves_no_room(counters, ready_redis, limit_nanos):
    """For the sums that one number holds, and for longer ones."""
    spent_nanos = limit_nanos - 1000
    await ready_redis.command("HSET", keys.counter("acme", B1), "spent", spent_nanos, "held", 300, "seed", 650)
    refused = await counters.reserve(ask(limit_nanos))
    assert (refused.kind, refused.spent, refused.held) == (Refusal.BUDGET, spent_nanos, 950)
    await ready_redis.command("HSET", keys.counter("acme", B1), "seed", 600)
    admitted = await counters.reserve(ask(limit_nanos, "op-2"))
    assert (admitted.hold_nanos, admitted.budget_remaining_nanos) == (100, 0)


async def test_a_template_s_counter_that_never_ends_is_kept_longer_with_each_call(counters, ready_redis):
    tenant = a_tenant(a_budget("b1", subject_kind=SubjectKind.API_KEY, each=True, window=WindowKind.LIFETIME))
    first = await counters.reserve(a_reserve(tenant, now_ms=the_time_ms()))
    (counter,) = keys.counters("acme", first.counters)
    kept_ms = await ready_redis.command("PTTL", counter)
    await ready_redis.command("PEXPIRE", counter, 60_000)
    assert isinstance(await counters.reserve(a_reserve(tenant, operation_id="op-2", now_ms=the_time_ms())), Reserved)
    assert 60_000 < kept_ms - 60_000 < await ready_redis.command("PTTL", counter)


async def test_of_200_at_once_a_minute_for_50_admits_exactly_50(counters):
    tenant = a_tenant(requests_per_minute=50)
    now_ms = the_time_ms()
    requests = [a_reserve(tenant, operation_id=f"op-{number}", now_ms=now_ms) for number in range(200)]
    answers = await asyncio.gather(*map(counters.reserve, requests))
    assert sorted(a.requests_remaining for a in answers if isinstance(a, Reserved)) == list(range(50))


async def test_the_same_reserve_at_once_holds_once(counters):
    request = ask()
    answers = await asyncio.gather(*(counters.reserve(request) for _ in range(20)))
    assert len(set(answers)) == 1
    assert await counters.read_counters("acme", [B1]) == [(0, 100)]


async def test_settle_and_expire_at_once_charge_once(counters, ready_redis):
    held_at_ms = the_time_ms()
    requests = [ask(operation_id=f"op-{number}", now_ms=held_at_ms) for number in range(50)]
    answers = await asyncio.gather(*map(counters.reserve, requests))
    later_ms = held_at_ms + 90_000
    settlements = [a_settlement(the_handoff(r, a), 40) for r, a in zip(requests, answers, strict=True)]
    settling = (counters.settle(settlement, now_ms=later_ms) for settlement in settlements)
    await asyncio.gather(*(counters.expire_due(SHARD, now_ms=later_ms, limit=30) for _ in range(4)), *settling)
    assert await counters.read_counters("acme", [B1]) == [(2000, 0)]
    events = await read_events(ready_redis)
    assert sum(event.delta_nanos for event in events) == 2000
    assert await counters.due_shards(now_ms=later_ms) == []


@pytest.fixture
async def own_counters(own_redis_server):
    """Counters, signed off, of a Redis that the test may stop."""
    await own_redis_server.wait_until_ready()
    redis = RedisClient(own_redis_server.url, timeout_seconds=0.2)
    await sign_off_all(redis)
    counters = Counters(redis)
    await counters.publish_tenant(a_tenant())
    await counters.publish_key(a_key())
    yield counters
    await redis.close()


async def test_a_reserve_that_redis_runs_too_late_holds_nothing(own_redis_server, own_counters):
    counters = own_counters
    own_redis_server.send(signal.SIGSTOP)
    with pytest.raises(CountersUnavailableError):
        await counters.reserve(ask(now_ms=the_time_ms() - 900))
    await asyncio.sleep(0.2)
    own_redis_server.send(signal.SIGCONT)
    await own_redis_server.wait_until_ready()
    assert await live_holds(counters, "acme") == (0, 0)
    assert (await counters.reserve(ask(now_ms=the_time_ms() - 1100))).kind is Refusal.TOO_LATE


async def test_a_reserve_that_nobody_heard_is_freed_by_a_release_of_its_id(own_redis_server, own_counters):
    counters = own_counters
    # Loaded, so that the next one runs as soon as Redis does.
    assert isinstance(await counters.reserve(ask(operation_id="op-0")), Reserved)
    request = ask()
    own_redis_server.send(signal.SIGSTOP)
    with pytest.raises(CountersUnavailableError):
        await counters.reserve(request)
    own_redis_server.send(signal.SIGCONT)
    await own_redis_server.wait_until_ready()
    assert await live_holds(counters, "acme") == (2, 200)
    told = {"now_ms": the_time_ms(), "ended_at_ms": the_time_ms(), "status": 503, "detail": "given up"}
    assert (await counters.release(a_handoff(request.facts), **told)).end is End.RELEASED
    assert await live_holds(counters, "acme") == (1, 100)
    # And when the release comes first, the reserve is refused.
    other = ask(operation_id="op-2")
    await counters.release(a_handoff(other.facts), **told)
    assert (await counters.reserve(other)).kind is Refusal.REPLAYED


async def test_a_killed_redis_loses_nothing_acknowledged_and_admits_nothing_until_signed_off(own_redis_server):
    await own_redis_server.wait_until_ready()
    redis = RedisClient(own_redis_server.url)
    await sign_off_all(redis)
    counters, epoch = Counters(redis), Epoch(redis)
    await counters.publish_tenant(a_tenant())
    await counters.publish_key(a_key())
    requests = [ask(operation_id=f"op-{number}") for number in range(40)]
    answers = [await counters.reserve(request) for request in requests]
    settlements = [a_settlement(the_handoff(r, a), 70) for r, a in zip(requests[:30], answers, strict=False)]
    for settlement in settlements:
        await counters.settle(settlement, now_ms=the_time_ms())
    before = await redis.command("XRANGE", keys.usage(SHARD), "-", "+")
    await own_redis_server.wait_until_written()
    own_redis_server.kill()
    own_redis_server.start()
    await own_redis_server.wait_until_ready()

    assert await redis.command("XRANGE", keys.usage(SHARD), "-", "+") == before
    assert await live_holds(counters, "acme") == (10, 1000)
    assert (await counters.reserve(ask(operation_id="op-99"))).kind is Refusal.NOT_READY
    late = a_settlement(the_handoff(requests[30], answers[30]), 70)
    assert await counters.settle(late, now_ms=the_time_ms()) == NotReady()
    assert await counters.expire_due(SHARD, now_ms=the_time_ms() + 10**6, limit=100) == 0
    assert await counters.read_counters("acme", [B1]) == [(2100, 1000)]

    assert (await epoch.signed_off([SHARD]))[SHARD] != await epoch.run_id()
    await sign_off(redis, [SHARD])
    assert await counters.settle(late, now_ms=the_time_ms()) == Settled(end=End.CONFIRMED, amount_nanos=70, sequence=1)
    assert isinstance(await counters.reserve(ask(operation_id="op-99")), Reserved)
    # What was settled before is remembered across the restart.
    assert (await counters.settle(settlements[0], now_ms=the_time_ms())).sequence == 1
    assert await counters.read_counters("acme", [B1]) == [(2170, 1000)]
    await redis.close()


async def test_an_emptied_redis_admits_nothing_even_when_only_its_records_are_gone(counters, ready_redis):
    await ready_redis.command("DEL", keys.tenant("acme"))
    assert (await counters.reserve(ask())).kind is Refusal.NOT_READY
    await ready_redis.command("FLUSHALL")
    assert (await counters.reserve(ask())).kind is Refusal.NOT_READY
    assert await ready_redis.command("DBSIZE") == 0


async def test_a_counter_is_kept_48_hours_after_its_window_and_a_marker_15_minutes(counters, ready_redis):
    tenant = a_tenant(a_budget("day", window=WindowKind.DAY), a_budget("life"))
    request = a_reserve(tenant, now_ms=the_time_ms())
    answer = await counters.reserve(request)
    day, life = keys.counters("acme", answer.counters)
    resets_at_ms = int(answer.counters[0].rpartition(":")[2])
    until_ms = the_time_ms() + await ready_redis.command("PTTL", day)
    assert abs(until_ms - resets_at_ms - 48 * 3_600_000) < 5000
    operation = keys.operation("acme", "op-1")
    assert await ready_redis.pipeline([("PTTL", life), ("PTTL", operation)]) == [-1, -1]
    await counters.settle(a_settlement(the_handoff(request, answer), 5), now_ms=the_time_ms())
    kept_ms = await ready_redis.command("PTTL", operation)
    assert ENDED_KEPT_MS - 5000 < kept_ms <= ENDED_KEPT_MS


async def test_a_counter_that_only_a_settle_made_is_kept_no_longer(counters, ready_redis):
    request = a_reserve(a_tenant(), now_ms=the_time_ms())
    handoff = a_handoff(request.facts, counters=(f"day:1:5:{the_time_ms()}", "day:1:5:6"))
    await counters.settle(a_settlement(handoff, 5), now_ms=the_time_ms())
    assert await counters.read_counters("acme", handoff.counters) == [(5, 0), (0, 0)]
    assert await ready_redis.command("PTTL", keys.counter("acme", handoff.counters[0])) > 0


async def test_requests_are_forgotten_after_the_minute(counters, ready_redis):
    await counters.reserve(a_reserve(a_tenant(requests_per_minute=5), now_ms=the_time_ms()))
    assert 60 < await ready_redis.command("TTL", keys.tenant_requests("acme")) <= 120


async def test_a_detail_is_cut_and_what_utf_8_cannot_carry_is_replaced(counters, ready_redis):
    request = ask()
    answer = await counters.reserve(request)
    settlement = a_settlement(the_handoff(request, answer), 5, detail="\ud800ü" + "x" * 5000)
    await counters.settle(settlement, now_ms=the_time_ms())
    [event] = await read_events(ready_redis)
    assert event.detail == "?ü" + "x" * (DETAIL_CHARS_MAX - 2)


async def test_a_revoked_key_and_a_deleted_tenant_are_records_that_nothing_older_replaces(counters):
    assert await counters.load_tenant("acme") == a_tenant()
    assert await counters.load_key("acme", KEY_ID) == a_key()
    revoked, deleted = a_key(version=2, status=KeyStatus.REVOKED), a_tenant(version=2, status=Status.DELETED)
    assert await counters.publish_key(revoked)
    assert await counters.publish_tenant(deleted)
    assert not await counters.publish_key(a_key())
    assert not await counters.publish_tenant(a_tenant())
    assert await counters.load_key("acme", KEY_ID) == revoked
    assert await counters.load_tenant("acme") == deleted
    assert (await counters.reserve(ask())).kind is Refusal.STALE


async def test_records_are_loaded_for_sure_only_while_their_shard_is_signed_off(counters, ready_redis):
    both = CallerRecords(tenant=a_tenant(), key=a_key())
    assert await counters.load_records("acme", KEY_ID) == both
    assert await counters.load_records("acme", "x") == CallerRecords(tenant=None, key=None)
    for lose in (
        close_shards(ready_redis, [SHARD]),
        ready_redis.command("SET", keys.epoch(SHARD), "another-run"),
        ready_redis.command("FLUSHALL"),
    ):
        await lose
        for key_id in (KEY_ID, "x"):
            assert await counters.load_records("acme", key_id) == NotReady()
        await sign_off_all(ready_redis)
    assert await counters.load_records("acme", KEY_ID) == CallerRecords(tenant=None, key=None)
    await counters.publish_key(a_key())
    assert await counters.load_records("acme", KEY_ID) == CallerRecords(tenant=None, key=a_key())


async def test_a_restarted_redis_loads_no_records_for_sure_until_it_is_signed_off(own_redis_server, own_counters):
    both = await own_counters.load_records("acme", KEY_ID)
    await own_redis_server.wait_until_written()
    own_redis_server.kill()
    own_redis_server.start()
    await own_redis_server.wait_until_ready()
    assert await own_counters.load_key("acme", KEY_ID) == both.key
    assert await own_counters.load_records("acme", KEY_ID) == NotReady()
    redis = RedisClient(own_redis_server.url)
    await sign_off_all(redis)
    await redis.close()
    assert await own_counters.load_records("acme", KEY_ID) == both


async def test_what_is_not_there_is_none(counters):
    assert await counters.load_tenant("globex") is None
    assert await counters.load_key("acme", "x") is None
    assert await counters.load_catalog() is None
    assert await counters.read_counters("acme", []) == []


async def test_the_catalog_is_stored_once_for_all(counters):
    assert await counters.publish_catalog('{"ü":1}'.encode(), version=2)
    assert not await counters.publish_catalog(b"{}", version=1)
    assert await counters.load_catalog() == '{"ü":1}'.encode()
