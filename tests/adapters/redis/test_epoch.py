import time

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.epoch import Epoch
from budgetguard.core.events import entry_order
from budgetguard.core.shard import SignOff
from tests.plugins.redis_calls import a_handoff, a_settlement, newest_event, the_facts
from tests.plugins.redis_server import close_shards, sign_off

SHARD = keys.shard_of("acme")


async def test_a_shard_is_signed_off_for_one_process(redis):
    epoch = Epoch(redis)
    assert await epoch.signed_off([SHARD, 1]) == {SHARD: None, 1: None}
    run_id = await sign_off(redis, [SHARD])
    assert await epoch.signed_off([SHARD, 1]) == {SHARD: run_id, 1: None}
    opening = await close_shards(redis, [SHARD])
    assert await epoch.signed_off([SHARD]) == {SHARD: opening.name}


async def test_a_sign_off_for_a_process_that_is_gone_opens_nothing(redis):
    epoch = Epoch(redis)
    opening = await epoch.begin_opening([SHARD], "a" * 40)
    for rebuilt in (False, True):
        assert await epoch.sign_off(opening, SHARD, rebuilt=rebuilt) is SignOff.LOST
    assert await epoch.signed_off([SHARD]) == {SHARD: opening.name}


async def test_what_is_lost_in_an_opening_is_not_made_to_look_whole(redis):
    """A stream that ended where the ledger does would be taken for one whose counters are right."""
    epoch, position = Epoch(redis), (1_700_000_000_000, 3)
    opening = await close_shards(redis, [SHARD])
    await redis.command("FLUSHALL")
    assert not await epoch.write_counter(opening, "acme", "b1:1:0:", 5, now_ms=0)
    assert await epoch.sign_off(opening, SHARD, position=position, rebuilt=True) is SignOff.LOST
    assert await redis.command("KEYS", "*") == []
    opening = await close_shards(redis, [SHARD])
    assert await epoch.sign_off(opening, SHARD, position=position) is SignOff.BEHIND
    assert await epoch.sign_off(opening, SHARD, position=position, rebuilt=True) is SignOff.OPENED
    assert await newest_event(redis, SHARD) == position


async def test_an_opening_ends_when_another_begins(redis):
    epoch = Epoch(redis)
    first, second = await close_shards(redis, [SHARD]), await close_shards(redis, [SHARD])
    assert await epoch.sign_off(first, SHARD) is SignOff.LOST
    assert await epoch.sign_off(second, SHARD) is SignOff.OPENED
    assert await epoch.sign_off(second, SHARD) is SignOff.LOST


async def test_a_rebuilt_counter_is_kept_as_long_as_any(redis):
    epoch = Epoch(redis)
    now_ms = int(time.time() * 1000)
    opening = await close_shards(redis, [SHARD])
    assert await epoch.write_counter(opening, "acme", f"b1:1:0:{now_ms}", 2**63 - 1, now_ms=now_ms)
    assert await epoch.write_counter(opening, "acme", "b1:1:0:", 5, now_ms=now_ms)
    closed, open_ended = keys.counters("acme", [f"b1:1:0:{now_ms}", "b1:1:0:"])
    assert 47 * 3600 < await redis.command("TTL", closed) <= 48 * 3600
    assert await redis.command("TTL", open_ended) == -1
    assert await Counters(redis).read_counters("acme", [f"b1:1:0:{now_ms}"]) == [(2**63 - 1, 0)]


async def test_a_stream_has_its_last_event_also_when_it_is_trimmed(ready_redis):
    epoch = Epoch(ready_redis)
    await Counters(ready_redis).settle(a_settlement(a_handoff(the_facts()), 5), now_ms=0)
    [(last_id, _)] = await ready_redis.command("XRANGE", keys.usage(SHARD), "-", "+")
    await ready_redis.command("XTRIM", keys.usage(SHARD), "MAXLEN", 0)
    opening, (ms, sequence) = await close_shards(ready_redis, [SHARD]), entry_order(last_id)
    for later in ((ms, sequence + 1), (ms + 1, 0)):
        assert await epoch.sign_off(opening, SHARD, position=later) is SignOff.BEHIND
    assert await epoch.sign_off(opening, SHARD, position=(ms, sequence)) is SignOff.OPENED


async def test_a_redis_that_may_forget_is_told_so(own_redis_server):
    await own_redis_server.wait_until_ready()
    redis = RedisClient(own_redis_server.url)
    epoch = Epoch(redis)
    assert await epoch.faults() == ()
    await redis.pipeline([("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"), ("CONFIG", "SET", "appendonly", "no")])
    policy, append_only = await epoch.faults()
    assert "allkeys-lru" in policy
    assert "appendonly" in append_only
    await redis.close()
