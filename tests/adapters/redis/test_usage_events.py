import pytest

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisReplyError
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.events import UsageEvents
from budgetguard.core.events import MalformedEvent
from tests.plugins.redis_calls import NOW_MS, a_handoff, a_settlement, the_facts
from tests.plugins.redis_server import ALL_SHARDS

ACME, GLOBEX = keys.shard_of("acme"), keys.shard_of("globex")


@pytest.fixture
def events(ready_redis):
    return UsageEvents(ready_redis)


@pytest.fixture
def end(ready_redis):
    counters = Counters(ready_redis)

    async def end(operation_id, tenant_id="acme"):
        facts = the_facts(operation_id, tenant_id=tenant_id)
        await counters.settle(a_settlement(a_handoff(facts), 5), now_ms=NOW_MS)

    return end


def ids(rows):
    return [(shard, event.facts.operation_id) for shard, _, event in rows]


async def test_each_event_goes_to_one_consumer_in_order(events, end):
    for number in range(3):
        await end(f"op-{number}")
    await end("op-g", "globex")
    first = await events.read(ALL_SHARDS, consumer="a", count=2)
    second = await events.read(ALL_SHARDS, consumer="b", count=2)
    assert sorted(ids(first)) == sorted([(ACME, "op-0"), (ACME, "op-1"), (GLOBEX, "op-g")])
    assert ids(second) == [(ACME, "op-2")]
    assert await events.read(ALL_SHARDS, consumer="a", count=2) == []


async def test_what_was_not_acknowledged_is_given_again_to_its_consumer(events, end):
    for number in range(2):
        await end(f"op-{number}")
    [(_, first, _), (_, second, _)] = await events.read([ACME], consumer="a", count=9)
    assert await events.ack(ACME, [first]) == 1
    assert ids(await events.read([ACME], consumer="a", count=9, pending=True)) == [(ACME, "op-1")]
    assert await events.read([ACME], consumer="b", count=9, pending=True) == []
    assert await events.ack(ACME, [first, second]) == 1
    assert await events.ack(ACME, []) == 0
    assert await events.read([ACME], consumer="a", count=9, pending=True) == []


async def test_a_dead_consumers_events_are_taken_over(events, end):
    assert await events.claim(ALL_SHARDS, consumer="b", idle_ms=0, count=9) == []  # no group yet
    await end("op-1")
    await events.read(ALL_SHARDS, consumer="dead", count=9)
    assert await events.claim(ALL_SHARDS, consumer="b", idle_ms=60_000, count=9) == []
    claimed = await events.claim(ALL_SHARDS, consumer="b", idle_ms=0, count=9)
    assert ids(claimed) == [(ACME, "op-1")]
    assert await events.ack(ACME, [claimed[0][1]]) == 1


async def test_only_what_every_group_has_acknowledged_is_trimmed(events, ready_redis, end):
    assert await events.trim(ACME) == 0  # no stream
    for number in range(5):
        await end(f"op-{number}")
    assert await events.trim(ACME) == 0  # no group
    rows = await events.read([ACME], consumer="a", count=3)
    assert await events.trim(ACME) == 0  # nothing acknowledged
    await events.ack(ACME, [rows[0][1], rows[2][1]])
    assert await events.trim(ACME) == 1  # the second is pending
    other = UsageEvents(ready_redis, group="other")
    await other.read([ACME], consumer="a", count=1)
    await events.ack(ACME, [rows[1][1]])
    assert await events.trim(ACME) == 0  # the other group has taken the oldest and not acknowledged it
    [(_, taken, _)] = await other.read([ACME], consumer="a", count=1, pending=True)
    await other.ack(ACME, [taken])
    assert await events.trim(ACME) == 1
    await ready_redis.command("XGROUP", "DESTROY", keys.usage(ACME), "other")
    assert await events.trim(ACME) == 1
    assert await events.backlog([ACME, GLOBEX]) == {ACME: 2, GLOBEX: 0}
    assert ids(await events.read([ACME], consumer="a", count=9)) == [(ACME, "op-3"), (ACME, "op-4")]


async def test_groups_are_made_again_in_an_emptied_redis(events, ready_redis, end):
    await end("op-1")
    await events.read(ALL_SHARDS, consumer="a", count=9)
    await ready_redis.command("DEL", keys.usage(ACME))
    await end("op-2")
    assert ids(await events.read(ALL_SHARDS, consumer="a", count=9)) == [(ACME, "op-2")]


async def test_an_entry_that_is_no_event_is_given_as_it_is(events, ready_redis, end):
    await ready_redis.command("XADD", keys.usage(ACME), "*", "x", "y")
    await end("op-1")
    [(_, entry_id, malformed), (_, _, event)] = await events.read([ACME], consumer="a", count=9)
    assert malformed == MalformedEvent({"x": "y"})
    assert event.facts.operation_id == "op-1"
    # Deleted by hand while it is pending: still given, so that it can be acknowledged.
    await ready_redis.command("XDEL", keys.usage(ACME), entry_id)
    pending = await events.read([ACME], consumer="a", count=9, pending=True)
    assert pending[0] == (ACME, entry_id, MalformedEvent({}))
    assert len(await events.claim([ACME], consumer="b", idle_ms=0, count=9)) == 1


@pytest.mark.parametrize("method", ["read", "claim"])
async def test_another_error_is_not_mistaken_for_a_missing_group(events, ready_redis, method):
    await ready_redis.command("SET", keys.usage(ACME), "x")
    arguments = {"count": 1} if method == "read" else {"count": 1, "idle_ms": 0}
    with pytest.raises(RedisReplyError, match="WRONGTYPE"):
        await getattr(events, method)([ACME], consumer="a", **arguments)


async def test_a_group_that_cannot_be_made_is_an_error(events, ready_redis):
    await ready_redis.command("SET", keys.usage(ACME), "x")
    with pytest.raises(RedisReplyError, match="WRONGTYPE"):
        await events.read([GLOBEX, ACME], consumer="a", count=1)
