"""Holds that grow while many others do: never over the limit, whatever the order."""

import asyncio
import time

import pytest

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core.budget import NotReady, Reserved
from budgetguard.core.extension import CounterLimit, Extended, Extension, ExtensionRefused, NoHold
from budgetguard.core.operation import End
from budgetguard.core.snapshot import SubjectKind, WindowKind
from tests.plugins.redis_calls import (
    KEY_ID,
    a_budget,
    a_key,
    a_reserve,
    a_settlement,
    a_tenant,
    live_holds,
    the_handoff,
)

B1 = "b1:1:0:"


def the_time_ms() -> int:
    return int(time.time() * 1000)


@pytest.fixture
async def counters(ready_redis):
    counters = Counters(ready_redis)
    await counters.publish_tenant(a_tenant())
    await counters.publish_key(a_key())
    return counters


async def admit(counters, number=1, *, limit_nanos=5000, **budget):
    tenant = a_tenant(a_budget("b1", limit_nanos, **budget))
    request = a_reserve(tenant, operation_id=f"op-{number}", now_ms=the_time_ms())
    reserved = await counters.reserve(request)
    assert isinstance(reserved, Reserved)
    return the_handoff(request, reserved)


def grown(handoff, hold_nanos, **changes) -> Extension:
    fields = {"counters": handoff.counters, **changes}
    return Extension(tenant_id="acme", operation_id=handoff.facts.operation_id, hold_nanos=hold_nanos, **fields)


async def test_fifty_streams_at_the_last_cent_never_hold_more_than_the_limit(counters):
    """Each holds 100 of 10,000 and tops up by 37 until it is refused; one in three ends meanwhile and gives back."""
    limit_nanos = 10_000
    handoffs = [await admit(counters, number, limit_nanos=limit_nanos) for number in range(50)]
    refused = []

    async def stream(handoff, hold_nanos, top_ups):
        for _ in range(top_ups):
            # Asked twice at once, as after an answer that got lost.
            wanted = grown(handoff, hold_nanos + 37)
            answers = await asyncio.gather(counters.extend(wanted), counters.extend(wanted))
            if Extended(hold_nanos=hold_nanos + 37) not in answers:
                refused.append(answers[0])
                break
            hold_nanos += 37
        return hold_nanos

    async def end(handoff):
        hold_nanos = await stream(handoff, handoff.hold_nanos, 5)
        await counters.settle(a_settlement(handoff, hold_nanos // 2, End.ESTIMATED), now_ms=the_time_ms())

    watching = True
    sums = []

    async def watch():
        while watching:
            ((spent, held),) = await counters.read_counters("acme", [B1])
            sums.append(spent + held)

    watcher = asyncio.create_task(watch())
    ending, going_on = handoffs[::3], [handoff for number, handoff in enumerate(handoffs) if number % 3]
    *held, _ = await asyncio.gather(
        *(stream(handoff, handoff.hold_nanos, 1000) for handoff in going_on),
        asyncio.gather(*map(end, ending)),
    )
    held = await asyncio.gather(*map(stream, going_on, held, [1000] * len(held)))
    watching = False
    await watcher
    assert max(sums) <= limit_nanos
    assert len(refused) >= 2 * len(going_on)
    assert {type(answer) for answer in refused} == {ExtensionRefused}
    ((spent, held_nanos),) = await counters.read_counters("acme", [B1])
    assert held_nanos == sum(held)
    # Nobody was refused while there was room for one more top-up.
    assert limit_nanos - 37 < spent + held_nanos <= limit_nanos


async def test_a_hold_that_grew_is_freed_whole_whoever_ends_it(counters):
    handoff = await admit(counters)
    assert await counters.extend(grown(handoff, 900)) == Extended(hold_nanos=900)
    assert await live_holds(counters, "acme") == (1, 900)
    # The answer of that extension never came: the handoff still says 100.
    await counters.settle(a_settlement(handoff, 250, End.ESTIMATED), now_ms=the_time_ms())
    assert await counters.read_counters("acme", [B1]) == [(250, 0)]
    assert await counters.extend(grown(handoff, 1000)) == NoHold()
    assert await counters.read_counters("acme", [B1]) == [(250, 0)]


async def test_a_hold_that_grew_expires_at_what_it_holds(counters):
    handoff = await admit(counters)
    await counters.extend(grown(handoff, 900))
    assert await counters.expire_due(keys.shard_of("acme"), now_ms=the_time_ms() + 10**6, limit=10) == 1
    assert await counters.read_counters("acme", [B1]) == [(900, 0)]


async def test_a_refusal_names_the_budget_and_what_would_fit(counters):
    handoff = await admit(counters, limit_nanos=250)
    refused = await counters.extend(grown(handoff, 400))
    assert refused == ExtensionRefused(
        limit=CounterLimit(limit_nanos=250, budget_id="b1"),
        resets_at_ms=None,
        spent_nanos=0,
        held_nanos=100,
        needed_nanos=300,
        room_nanos=150,
    )
    assert await counters.extend(grown(handoff, 100 + refused.room_nanos)) == Extended(hold_nanos=250)
    assert await counters.extend(grown(handoff, 400, force=True)) == Extended(hold_nanos=400)
    assert await counters.read_counters("acme", [B1]) == [(0, 400)]


async def test_a_rolling_budget_says_when_it_has_room_again_and_whose_it_is(counters):
    """A minute is sixty buckets and one: what was held in this one leaves when it is wholly past."""
    whose = {"subject_kind": SubjectKind.API_KEY, "subject": KEY_ID, "window": WindowKind.ROLLING}
    handoff = await admit(counters, limit_nanos=250, rolling_ms=60_000, **whose)
    bucket = handoff.facts.held_at_ms // 1000
    refused = await counters.extend(grown(handoff, 400))
    assert (refused.limit.scope, refused.limit.subject) == (SubjectKind.API_KEY, KEY_ID)
    assert refused.resets_at_ms == (bucket + 61) * 1000


async def test_whoever_believes_in_other_counters_gets_the_right_ones(counters):
    handoff = await admit(counters)
    assert await counters.extend(grown(handoff, 300, counters=())) == Extended(hold_nanos=300)
    assert await counters.read_counters("acme", [B1]) == [(0, 300)]


async def test_the_question_of_admission_is_still_answered_as_before(counters):
    request = a_reserve(a_tenant(a_budget("b1", 5000)), now_ms=the_time_ms())
    reserved = await counters.reserve(request)
    await counters.extend(grown(the_handoff(request, reserved), 700))
    assert await counters.reserve(request) == reserved


async def test_counters_that_wait_for_their_rebuild_extend_nothing(counters, ready_redis):
    handoff = await admit(counters)
    await ready_redis.command("SET", keys.epoch(keys.shard_of("acme")), "another")
    assert await counters.extend(grown(handoff, 300)) == NotReady()


async def test_a_counter_that_was_lost_is_kept_no_longer_than_its_window(counters, ready_redis):
    handoff = await admit(counters, window=WindowKind.DAY)
    counter = keys.counter("acme", handoff.counters[0])
    await ready_redis.command("DEL", counter)
    assert await counters.extend(grown(handoff, 300)) == Extended(hold_nanos=300)
    assert await ready_redis.command("PTTL", counter) > 0
