import asyncio

import pytest

from budgetguard.adapters.postgres.ledger import LedgerRepository
from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.events import UsageEvents
from budgetguard.adapters.redis.keys import SHARDS, shard_of
from budgetguard.core.errors import DependencyUnavailableError
from budgetguard.core.operation import End
from control_plane.jobs.drain_usage import READ_COUNT, DrainUsage, LedgerWriter
from tests.plugins.redis_calls import a_settlement, newest_event
from tests.services.jobs.conftest import now_ms

ACME = shard_of("acme")


class CrashError(Exception):
    pass


class DiesBeforeAck(LedgerWriter):
    """Commits, then its process ends."""

    async def write(self, entries):
        async def die(*_):
            raise CrashError

        self.events.ack = die
        await super().write(entries)


async def drain_all(job) -> None:
    while await job.run_once():
        pass


async def test_calls_arrive_in_the_ledger_and_leave_the_stream(plane):
    await plane.make_tenant()
    for number in range(5):
        await plane.call(f"op-{number}", number)
    assert (await plane.events.backlog([ACME]))[ACME] == 5
    job = plane.drain()
    assert not await job.run_once(), "it took everything, so there is no more to do at once"
    assert await plane.in_ledger() == 0 + 1 + 2 + 3 + 4
    assert (await plane.events.backlog([ACME]))[ACME] == 0
    assert plane.metrics.rows._value.get() == 5
    positions = await plane.ledger.positions()
    assert list(positions) == [ACME]
    assert await newest_event(plane.redis, ACME) == positions[ACME]


async def test_an_idle_drain_has_nothing_to_do(plane):
    assert not await plane.drain().run_once()
    assert await plane.ledger.positions() == {}


async def test_two_workers_and_more_events_than_one_read_takes(plane):
    await plane.make_tenant()
    await plane.make_tenant("other", key_id="o" * 16)
    total = READ_COUNT + 50
    for number in range(total):
        await plane.call(f"op-{number}", 1)
    await plane.call("op-other", 7, tenant_id="other", key_id="o" * 16)
    await asyncio.gather(drain_all(plane.drain("one")), drain_all(plane.drain("two")))
    assert await plane.in_ledger() == total
    assert await plane.in_ledger("other") == 7
    assert sum((await plane.events.backlog(range(SHARDS))).values()) == 0


async def test_what_a_worker_committed_but_did_not_acknowledge_counts_once(plane, database):
    await plane.make_tenant()
    for number in range(5):
        await plane.call(f"op-{number}", 10)
    dying = DrainUsage(
        DiesBeforeAck(UsageEvents(plane.redis), LedgerRepository(database), metrics=plane.metrics),
        consumer="dies",
    )
    with pytest.raises(CrashError):
        await dying.run_once()
    assert await plane.in_ledger() == 50
    assert (await plane.events.backlog([ACME]))[ACME] == 5
    patient = plane.drain("patient")
    assert not await patient.run_once(), "it must leave to others what they may still be writing"
    heir = plane.drain("heir", claim_idle_ms=0)
    await drain_all(heir)
    assert await plane.in_ledger() == 50
    assert (await plane.events.backlog([ACME]))[ACME] == 0


async def test_a_full_read_says_that_there_may_be_more(plane):
    await plane.make_tenant()
    for number in range(READ_COUNT):
        await plane.call(f"op-{number}", 1)
    job = plane.drain()
    assert await job.run_once()
    assert not await job.run_once()
    assert await plane.in_ledger() == READ_COUNT


async def test_when_postgres_is_away_events_wait_and_the_same_worker_writes_them_later(plane, monkeypatch):
    await plane.make_tenant()
    await plane.call("op-1", 10)
    job = plane.drain()
    insert = plane.ledger.insert_events

    async def unavailable(*_, **__):
        raise DependencyUnavailableError("Postgres")

    monkeypatch.setattr(plane.ledger, "insert_events", unavailable)
    for _ in range(2):
        with pytest.raises(DependencyUnavailableError):
            await job.run_once()
    assert (await plane.events.backlog([ACME]))[ACME] == 1
    monkeypatch.setattr(plane.ledger, "insert_events", insert)
    await plane.call("op-2", 5)
    await drain_all(job)
    assert await plane.in_ledger() == 15
    assert (await plane.events.backlog([ACME]))[ACME] == 0


@pytest.mark.parametrize("nonsense", ["x\x00y", b"x\xffy"])
async def test_a_malformed_entry_is_put_aside_and_blocks_nobody(plane, owner, caplog, nonsense):
    await plane.make_tenant()
    await plane.call("op-1", 10)
    await plane.redis.command("XADD", keys.usage(ACME), "*", "nonsense", nonsense)
    await plane.call("op-2", 5)
    await drain_all(plane.drain())
    assert await plane.in_ledger() == 15
    assert (await plane.events.backlog([ACME]))[ACME] == 0
    row = await owner.fetchrow("SELECT shard, error, fields FROM dead_events")
    assert (row["shard"], row["error"]) == (ACME, "malformed")
    assert b"nonsense" in row["fields"]
    assert plane.metrics.dead._value.get() == 1
    assert "alarm=dead_events" in caplog.text


async def test_an_event_in_another_shard_than_its_tenant_s_is_put_aside(plane, owner):
    """It would be a row of somebody else's, and take the place of the true one."""
    await plane.make_tenant()
    await plane.call("op-1", 10)
    ((_, pairs),) = await plane.redis.command("XRANGE", keys.usage(ACME), "-", "+")
    facts = pairs.index("facts") + 1
    pairs[facts] = pairs[facts].replace('"acme"', '"globex"')
    await plane.redis.command("XADD", keys.usage(ACME), "*", *pairs)
    await drain_all(plane.drain())
    assert (await plane.in_ledger(), await plane.in_ledger("globex")) == (10, 0)
    assert await owner.fetchval("SELECT error FROM dead_events") == "malformed"


async def test_every_rank_of_a_call_gets_there_in_order(plane):
    await plane.make_tenant()
    handoff = await plane.hold("op-1", nanos=100)
    await plane.counters.settle(a_settlement(handoff, 80, End.ESTIMATED), now_ms=now_ms())
    await plane.counters.settle(a_settlement(handoff, 30, End.CONFIRMED), now_ms=now_ms())
    await drain_all(plane.drain())
    assert await plane.in_ledger() == 30
    assert (await plane.counted())["acme-month"] == (30, 0)


async def test_settling_after_redis_forgot_the_call_charges_the_ledger_once(plane):
    await plane.make_tenant()
    handoff = await plane.call("op-1", 60)
    await drain_all(plane.drain())
    await plane.redis.command("DEL", keys.operation("acme", "op-1"))
    await plane.counters.settle(a_settlement(handoff, 60), now_ms=now_ms())
    await drain_all(plane.drain())
    assert await plane.in_ledger() == 60
