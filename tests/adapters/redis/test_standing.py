"""A quote says what the very next reserve answers, of every kind of limit, and leaves no trace."""

import random
import time
from dataclasses import replace

import pytest

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.standing import StandingReader
from budgetguard.core.budget import Refusal, Reserved
from budgetguard.core.quoting import verdict
from budgetguard.core.snapshot import Mode, SubjectKind, WindowKind
from tests.plugins.redis_calls import a_budget, a_key, a_reserve, a_settlement, a_tenant, the_handoff
from tests.plugins.redis_server import sign_off

EACH_SESSION = {"subject_kind": SubjectKind.SESSION, "each": True}


async def everything(redis):
    """A digest of all data."""
    return await redis.command("DEBUG", "DIGEST")


@pytest.mark.parametrize("seed", range(6))
async def test_a_quote_is_what_the_next_call_gets(ready_redis, seed):
    chance = random.Random(seed)
    counters, reader = Counters(ready_redis), StandingReader(ready_redis)
    tenant = a_tenant(
        a_budget("roll", chance.randrange(500, 3000), window=WindowKind.ROLLING, rolling_ms=60_000),
        a_budget("each", 300, subjects_max=3, **EACH_SESSION),
        a_budget("seen", 10, mode=Mode.OBSERVE),
        requests_per_minute=chance.choice([0, 8]),
        tokens_per_minute=chance.choice([0, 400]),
        concurrent_calls=chance.choice([0, 3]),
    )
    key = a_key(tokens_per_minute=chance.choice([None, 300]))
    await counters.publish_tenant(tenant)
    await counters.publish_key(key)
    kinds = set()
    now_ms = int(time.time() * 1000)
    for number in range(40):
        now_ms += chance.choice([0, 100, 5_000])
        request = a_reserve(
            tenant,
            key=key,
            operation_id=f"op-{number}",
            now_ms=now_ms,
            input_nanos=chance.randrange(100),
            output_femtos=chance.choice([0, 10**6]),
            output_tokens=chance.choice([0, 50]),
            output_tokens_min=0,
        )
        facts = replace(request.facts, session_id=chance.choice(["", "a", "b", "c", "d"]))
        request = replace(request, facts=facts, input_tokens=chance.randrange(30))
        before = await everything(ready_redis)
        quoted = verdict(request, await reader.read(request))
        assert await everything(ready_redis) == before
        answer = await counters.reserve(request)
        assert quoted == answer
        kinds.add("RESERVED" if isinstance(answer, Reserved) else answer.kind)
        if isinstance(answer, Reserved) and chance.random() < 0.6:
            settlement = a_settlement(the_handoff(request, answer), chance.randrange(120))
            await counters.settle(settlement, now_ms=now_ms)
    assert "RESERVED" in kinds
    assert kinds & {Refusal.SUBJECTS, Refusal.BUDGET, Refusal.CALLS, Refusal.TOKENS, Refusal.RATE}


async def test_counters_that_are_not_signed_off_have_no_figures(ready_redis):
    counters, reader = Counters(ready_redis), StandingReader(ready_redis)
    rolling = a_budget("roll", 3000, window=WindowKind.ROLLING, rolling_ms=60_000)
    tenant = a_tenant(a_budget("month", 5000), rolling)
    await counters.publish_tenant(tenant)
    await counters.publish_key(a_key())
    now_ms = int(time.time() * 1000)
    request = a_reserve(tenant, now_ms=now_ms, input_nanos=100)
    held = await counters.reserve(request)
    names = list(held.counters)
    assert await reader.counted("acme", names) == await counters.read_counters("acme", names)
    handoff = the_handoff(request, held)
    await counters.settle(a_settlement(handoff, 60), now_ms=now_ms)
    assert await reader.counted("acme", names) == [(60, 0), (60, 0)]
    assert await reader.counted("acme", []) == []
    await ready_redis.command("FLUSHALL")
    assert await reader.counted("acme", names) is None
    assert await reader.counted("acme", []) is None
    await sign_off(ready_redis, [keys.shard_of("acme")])
    assert await reader.counted("acme", names) == [(0, 0), (0, 0)]
