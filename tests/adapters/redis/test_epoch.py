import time

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.epoch import Epoch
from tests.plugins.redis_calls import a_handoff, a_settlement, the_facts

SHARD = keys.shard_of("acme")


async def test_a_shard_is_signed_off_for_one_process(redis):
    epoch = Epoch(redis)
    assert await epoch.signed_off([SHARD, 1]) == {SHARD: None, 1: None}
    await epoch.sign_off(SHARD, await epoch.run_id())
    assert await epoch.signed_off([SHARD, 1]) == {SHARD: await epoch.run_id(), 1: None}
    await epoch.begin_rebuild(SHARD)
    assert await epoch.signed_off([SHARD]) == {SHARD: None}


async def test_a_sign_off_for_a_process_that_is_gone_opens_nothing(redis):
    epoch = Epoch(redis)
    await epoch.sign_off(SHARD, "a" * 40)
    assert await epoch.write_counter("acme", "b1:1:0:", 5, now_ms=0)


async def test_a_rebuilt_counter_is_kept_as_long_as_any(redis):
    epoch = Epoch(redis)
    now_ms = int(time.time() * 1000)
    assert await epoch.write_counter("acme", f"b1:1:0:{now_ms}", 2**63 - 1, now_ms=now_ms)
    assert await epoch.write_counter("acme", "b1:1:0:", 5, now_ms=now_ms)
    closed, open_ended = keys.counters("acme", [f"b1:1:0:{now_ms}", "b1:1:0:"])
    assert 47 * 3600 < await redis.command("TTL", closed) <= 48 * 3600
    assert await redis.command("TTL", open_ended) == -1
    assert await Counters(redis).read_counters("acme", [f"b1:1:0:{now_ms}"]) == [(2**63 - 1, 0)]


async def test_a_stream_knows_its_last_event_also_when_it_is_trimmed(ready_redis):
    epoch, counters = Epoch(ready_redis), Counters(ready_redis)
    assert await epoch.stream_last_id(SHARD) == "0-0"
    await counters.settle(a_settlement(a_handoff(the_facts()), 5), now_ms=0)
    [(last_id, _)] = await ready_redis.command("XRANGE", keys.usage(SHARD), "-", "+")
    await ready_redis.command("XTRIM", keys.usage(SHARD), "MAXLEN", 0)
    assert await epoch.stream_last_id(SHARD) == last_id


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
