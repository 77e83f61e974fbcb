"""extend.lua against its reference where it matters: budgets in every state around what is asked for."""

import asyncio
import time
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core import reserving
from budgetguard.core import shard as reference
from budgetguard.core.budget import Reserved
from budgetguard.core.counting import Counter
from budgetguard.core.extension import Extension
from budgetguard.core.money import CALL_NANOS_MAX, COUNTER_NANOS_MAX
from budgetguard.core.shard import Shard
from budgetguard.core.snapshot import Mode
from tests.adapters.redis.test_reference import SHARD, read_shard
from tests.plugins.redis_calls import KEY_ID, a_budget, a_key, a_reserve, a_tenant
from tests.plugins.redis_server import sign_off

AMOUNTS = st.one_of(st.integers(0, 2000), st.integers(2**53 - 2000, 2**53 + 2000), st.integers(0, COUNTER_NANOS_MAX))
# Room that is left beside what is spent and held, and what is asked for: around each other.
ROOM = st.one_of(st.integers(-3, 3), st.integers(0, 2000), st.just(CALL_NANOS_MAX))
BUDGETS = st.lists(
    st.tuples(
        AMOUNTS,
        st.one_of(st.just(100), st.integers(-5, 2000)),
        ROOM,
        st.sampled_from([Mode.ENFORCE, Mode.ENFORCE, Mode.OBSERVE]),
    ),
    max_size=3,
)


async def compare(url, budgets, mores, forces):
    redis = RedisClient(url, timeout_seconds=10)
    try:
        await redis.command("FLUSHALL")
        run_id = await sign_off(redis, [SHARD])
        counters, shard = Counters(redis), Shard(epoch=run_id)
        specs = [
            a_budget(f"b{number}", min(spent + 100 + max(room, 0), COUNTER_NANOS_MAX), mode=mode)
            for number, (spent, _, room, mode) in enumerate(budgets)
        ]
        tenant = a_tenant(*specs)
        await counters.publish_tenant(tenant)
        await counters.publish_key(a_key())
        reference.publish(shard, ("acme",), 1)
        reference.publish(shard, ("acme", KEY_ID), 1)
        request = a_reserve(tenant, now_ms=int(time.time() * 1000))
        reserved = await counters.reserve(request)
        assert isinstance(reserved, Reserved)
        reserving.reserve(shard, request, run_id=run_id, redis_ms=request.now_ms)
        for name, (spent, held, _, _) in zip(reserved.counters, budgets, strict=True):
            # As if others had spent and held since, to or beyond the limit.
            state = Counter(min(spent, COUNTER_NANOS_MAX - 10_000), held)
            shard.counters[("acme", name)] = state
            await redis.command("HSET", keys.counter("acme", name), "spent", state.spent, "held", state.held)
        hold_nanos = reserved.hold_nanos
        for more_nanos, force in zip(mores, forces, strict=True):
            hold_nanos = min(max(hold_nanos + more_nanos, 0), CALL_NANOS_MAX)
            extension = Extension(
                tenant_id="acme", operation_id="op-1", counters=reserved.counters, hold_nanos=hold_nanos, force=force
            )
            assert await counters.extend(extension) == reference.extend(shard, extension, run_id=run_id)
            assert await read_shard(redis) == replace(shard, requests={})
    finally:
        await redis.close()


async def test_redis_answers(redis_server):
    await redis_server.wait_until_ready()


def test_a_hold_grows_as_in_the_reference(redis_server):
    @settings(max_examples=150, deadline=None, database=None)
    @given(budgets=BUDGETS, mores=st.lists(ROOM, min_size=3, max_size=3), forces=st.tuples(*[st.booleans()] * 3))
    def agree(budgets, mores, forces):
        asyncio.run(compare(redis_server.url, budgets, mores, forces))

    agree()
