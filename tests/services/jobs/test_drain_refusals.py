import asyncio

import pytest
from prometheus_client import CollectorRegistry

from budgetguard.adapters.postgres.refusals import RefusalRepository
from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.refusals import Refusals
from budgetguard.core.attempts import RefusalFilter, RefusalGroup
from budgetguard.core.errors import DependencyUnavailableError
from control_plane.jobs import drain_refusals as module
from control_plane.jobs.drain_refusals import DrainRefusals, DrainRefusalsMetrics
from tests.plugins.attempts import a_report, an_attempt

ACME = keys.shard_of("acme")


class CrashError(Exception):
    pass


class Drained:
    def __init__(self, database, redis) -> None:
        self.redis = redis
        self.refusals = Refusals(redis)
        self.repository = RefusalRepository(database)
        self.metrics = DrainRefusalsMetrics(CollectorRegistry())

    def job(self, refusals=None) -> DrainRefusals:
        return DrainRefusals(refusals or self.refusals, self.repository, metrics=self.metrics)

    async def drain(self, job=None) -> None:
        job = job or self.job()
        while await job.run_once():
            pass

    async def operations(self) -> list[str]:
        page = await self.repository.list(RefusalFilter(), page_size=1000)
        return [row.attempt.operation_id for row in page.items]

    async def total(self) -> int:
        return await self.repository.total(RefusalFilter())

    async def waits(self) -> bool:
        return bool(await self.refusals.waiting(range(keys.SHARDS), rows=1, counts=1))


@pytest.fixture
def drained(database, redis):
    return Drained(database, redis)


async def test_rows_and_counts_arrive_and_leave_redis(drained):
    attempts = [an_attempt(f"op-{number}") for number in range(3)]
    await drained.refusals.refuse(a_report(25, *attempts))
    await drained.refusals.refuse(a_report(2, an_attempt("g", tenant_id="globex"), tenant_id="globex"))
    assert not await drained.job().run_once(), "it took everything, so there is no more to do at once"
    assert sorted(await drained.operations()) == ["g", "op-0", "op-1", "op-2"]
    assert await drained.total() == 27
    assert not await drained.waits()


async def test_an_idle_drain_has_nothing_to_do(drained):
    assert not await drained.job().run_once()
    assert await drained.total() == 0


async def test_a_count_that_goes_on_is_drained_again(drained):
    for number in (3, 4, 9):
        await drained.refusals.refuse(a_report(number))
        await drained.drain()
    assert await drained.total() == 9


async def test_what_was_committed_but_not_forgotten_counts_once(drained, monkeypatch):
    await drained.refusals.refuse(a_report(5, an_attempt("a"), an_attempt("b")))
    dying = Refusals(drained.redis)

    async def die(_):
        raise CrashError

    monkeypatch.setattr(dying, "forget", die)
    with pytest.raises(CrashError):
        await drained.job(dying).run_once()
    assert (len(await drained.operations()), await drained.total(), await drained.waits()) == (2, 5, True)
    await drained.refusals.refuse(a_report(6))
    await drained.drain()
    assert (len(await drained.operations()), await drained.total(), await drained.waits()) == (2, 6, False)


async def test_two_workers_at_once_record_it_once(drained, monkeypatch):
    monkeypatch.setattr(module, "ROWS_COUNT", 2)
    monkeypatch.setattr(module, "COUNTS_COUNT", 2)
    for source in range(60):
        number = source % 10 + 1
        await drained.refusals.refuse(a_report(number, an_attempt(f"op-{source}"), source=f"p.{source}"))
    await asyncio.gather(*(drained.drain() for _ in range(3)))
    assert (len(await drained.operations()), await drained.total()) == (10, 6 * sum(range(1, 11)))
    assert not await drained.waits()


async def test_a_redis_that_lost_everything_changes_no_count_and_makes_no_eleventh_row(drained):
    await drained.refusals.refuse(a_report(9, *(an_attempt(f"op-{number}") for number in range(9))))
    await drained.drain()
    await drained.redis.command("FLUSHALL")
    await drained.refusals.refuse(a_report(10, an_attempt("op-9"), first_number=10))
    await drained.refusals.refuse(a_report(4, *(an_attempt(f"q-{number}") for number in range(4)), source="q.1"))
    await drained.drain()
    assert await drained.total() == 14
    assert len(await drained.operations()) <= 10
    assert {f"op-{number}" for number in range(9)} <= {*await drained.operations()}


async def test_when_postgres_is_away_it_waits(drained, monkeypatch):
    await drained.refusals.refuse(a_report(5, an_attempt()))
    record = drained.repository.record

    async def unavailable(*_, **__):
        raise DependencyUnavailableError("Postgres")

    monkeypatch.setattr(drained.repository, "record", unavailable)
    with pytest.raises(DependencyUnavailableError):
        await drained.job().run_once()
    assert await drained.waits()
    monkeypatch.setattr(drained.repository, "record", record)
    await drained.drain()
    assert (await drained.total(), await drained.waits()) == (5, False)


async def test_malformed_entries_are_put_aside_and_block_nobody(drained, owner, caplog):
    await drained.redis.command("XADD", keys.refusals(ACME), "*", "nonsense", "x\x00y")
    await drained.redis.command("XADD", keys.refusals(ACME), "*", b"nonsense\xff", b"\xff")
    await drained.redis.command("HSET", keys.refusal_counts(ACME), "nonsense", "1")
    await drained.refusals.refuse(a_report(5, an_attempt("good"), an_attempt("poison", model="x\x00y")))
    await drained.drain()
    assert (await drained.operations(), await drained.total(), await drained.waits()) == (["good"], 5, False)
    errors = await owner.fetch("SELECT shard, error FROM dead_refusals ORDER BY error")
    assert [(row["shard"], row["error"]) for row in errors] == [
        (ACME, "malformed"),
        (ACME, "malformed"),
        (ACME, "malformed"),
        (ACME, "refused"),
    ]
    assert drained.metrics.dead._value.get() == 4
    assert "alarm=dead_refusals count=4" in caplog.text


async def test_more_than_one_run_takes_is_taken_at_once(drained, monkeypatch):
    monkeypatch.setattr(module, "ROWS_COUNT", 2)
    await drained.refusals.refuse(a_report(5, *(an_attempt(f"op-{number}") for number in range(5))))
    job = drained.job()
    assert await job.run_once()
    assert len(await drained.operations()) == 2
    await drained.drain(job)
    assert len(await drained.operations()) == 5
    by_minute = await drained.repository.counts(RefusalFilter(), by=RefusalGroup.MINUTE)
    assert [one.count for one in by_minute] == [5]
