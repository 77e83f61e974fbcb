"""reserve.lua against its reference where it is hard: at the edges of money and of a minute."""

import asyncio
import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core import reserving
from budgetguard.core import shard as reference
from budgetguard.core.budget import UNBOUNDED_TOKENS
from budgetguard.core.counting import Counter
from budgetguard.core.money import CALL_NANOS_MAX, COUNTER_NANOS_MAX
from budgetguard.core.shard import Shard
from budgetguard.core.snapshot import Mode
from tests.plugins.redis_calls import KEY_ID, a_budget, a_key, a_reserve, a_tenant
from tests.plugins.redis_server import sign_off_all

NEAR = st.integers(-2, 2)
COUNTED = st.one_of(
    st.integers(0, 3000),
    st.integers(-(2**53), 0),
    st.integers(2**53 - 3, 2**53 + 3),
    st.integers(0, COUNTER_NANOS_MAX),
    st.integers(COUNTER_NANOS_MAX - 3000, COUNTER_NANOS_MAX),
)
TOKENS = st.tuples(st.integers(0, 100), st.integers(0, 5000)).map(sorted)


class Both:
    """Redis and the reference, in one event loop of their own."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        self.redis = RedisClient(url, timeout_seconds=10)
        self.counters = Counters(self.redis)
        self.clear()

    def clear(self) -> None:
        self.run(self.redis.command("FLUSHALL"))
        self.run_id = self.run(sign_off_all(self.redis))
        self.shard = Shard(epoch=self.run_id)
        for snapshot, publish in (
            (a_tenant(), self.counters.publish_tenant),
            (a_key(), self.counters.publish_key),
        ):
            self.run(publish(snapshot))
        reference.publish(self.shard, ("acme",), 1)
        reference.publish(self.shard, ("acme", KEY_ID), 1)

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def reserve(self, request):
        answer = self.run(self.counters.reserve(request))
        redis_ms = int(time.time() * 1000)
        assert answer == reserving.reserve(self.shard, request, run_id=self.run_id, redis_ms=redis_ms)
        return answer


@pytest.fixture(scope="module")
def both(redis_server):
    asyncio.run(redis_server.wait_until_ready())
    pair = Both(redis_server.url)
    yield pair
    pair.run(pair.redis.close())
    pair.runner.close()


@dataclass(frozen=True)
class Filled:
    """A counter, and how its limit is meant: the room it leaves beside what is asked for."""

    spent_nanos: int
    held_nanos: int
    room: str
    extra_nanos: int
    mode: Mode


FILLED = st.builds(
    Filled,
    spent_nanos=COUNTED,
    held_nanos=st.one_of(st.just(0), COUNTED),
    room=st.sampled_from(["whole", "smallest", "between", "between", "eighth", "floor", "call", "dollars", "none"]),
    extra_nanos=st.one_of(NEAR, st.integers(0, 3000)),
    mode=st.sampled_from([Mode.ENFORCE, Mode.ENFORCE, Mode.OBSERVE]),
)


@given(
    filled=st.lists(FILLED, min_size=1, max_size=2),
    input_nanos=st.one_of(
        st.integers(0, 3000), st.integers(0, 3000), st.integers(CALL_NANOS_MAX - 3000, CALL_NANOS_MAX)
    ),
    output_femtos=st.one_of(st.integers(0, 5 * 10**6), st.integers(10**17, 10**19)),
    tokens=TOKENS,
    eighth=st.sampled_from([False, False, True]),
    part=st.sampled_from([8, 8, 0, 1, 3]),
)
@settings(max_examples=300, deadline=None)
def test_money_at_every_edge(both, filled, input_nanos, output_femtos, tokens, eighth, part):
    fewest, wanted = tokens
    question = {
        "input_nanos": input_nanos,
        "output_femtos": output_femtos,
        "output_tokens": wanted,
        "output_tokens_min": fewest,
        "eighth": eighth,
    }
    alone = a_reserve(a_tenant(), **question)
    rooms = {
        "whole": alone.hold_nanos,
        "smallest": alone.hold_nanos_min,
        "between": (alone.hold_nanos + alone.hold_nanos_min) // 2,
        "eighth": alone.token_nanos * wanted * max(part, 1),
        "floor": alone.hold_nanos_for(min(wanted, UNBOUNDED_TOKENS)),
        "call": CALL_NANOS_MAX,
        "dollars": alone.hold_nanos + 7 * 10**9,
        "none": 0,
    }
    now_ms = int(time.time() * 1000)
    both.shard.counters.clear()
    both.shard.operations.clear()
    both.shard.leases.clear()
    commands = [("DEL", keys.operation("acme", "op-1"), keys.leases(keys.shard_of("acme")))]
    specs = []
    for number, counter in enumerate(filled):
        used = max(counter.spent_nanos, 0) + max(counter.held_nanos, 0)
        limit_nanos = max(0, min(used + rooms[counter.room] + counter.extra_nanos, COUNTER_NANOS_MAX))
        specs.append(a_budget(f"b{number}", limit_nanos, mode=counter.mode))
        name = f"b{number}:1:0:"
        both.shard.counters[("acme", name)] = Counter(counter.spent_nanos, counter.held_nanos)
        fields = ("spent", counter.spent_nanos, "held", counter.held_nanos)
        commands.append(("HSET", keys.counter("acme", name), *fields))
    both.run(both.redis.pipeline(commands))
    both.reserve(a_reserve(a_tenant(*specs, unbounded_share=part), now_ms=now_ms, **question))
    names = [f"b{number}:1:0:" for number in range(len(filled))]
    expected = [both.shard.counters[("acme", name)] for name in names]
    found = both.run(both.counters.read_counters("acme", names))
    assert found == [(counter.spent, counter.held) for counter in expected]


@given(
    steps_ms=st.lists(
        st.one_of(st.sampled_from([0, 1, 999, 1000, 30_000, 59_000, 60_000, 61_000, -3000]), st.integers(0, 20_000)),
        max_size=15,
    ),
    limits=st.lists(st.integers(0, 4), min_size=2, max_size=2),
)
@settings(max_examples=200, deadline=None)
def test_requests_at_every_edge_of_a_minute(both, steps_ms, limits):
    both.clear()
    now_ms = int(time.time() * 1000) + 3_600_000
    for number, step_ms in enumerate(steps_ms):
        now_ms += step_ms
        # Limits are edited while requests come in.
        tenant = a_tenant(requests_per_minute=limits[number % 2])
        key = a_key(requests_per_minute=limits[0] + 1)
        both.reserve(a_reserve(tenant, key=key, operation_id=f"op-{number}", now_ms=now_ms))
