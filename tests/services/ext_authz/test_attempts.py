"""Refused calls on their way into the record: whose they are, what is kept, and that nothing waits for it."""

import asyncio
import json
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import CountersUnavailableError, RedisClient, RedisReplyError
from budgetguard.adapters.redis.epoch import incarnation_of
from budgetguard.adapters.redis.refusals import Refusals, tally_of
from budgetguard.core import attempt_counts
from budgetguard.core.api_key import format_api_key
from budgetguard.core.policy import PolicyDecision
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.snapshot import KeyStatus, Status, TagSpec
from ext_authz import attempts as module
from ext_authz.attempts import RefusalLog, Seen
from tests.plugins.redis_calls import a_budget
from tests.plugins.redis_server import sign_off_all
from tests.services.ext_authz.test_check import BODY, KEY, KEY_ID, RECORD, TENANT

ACME = keys.shard_of("acme")
STRANGER = format_api_key(tenant_id="acme", key_id=KEY_ID, secret=b"x" * 32)


async def recorded(bench):
    """Return the attempts and the counts by reason that have arrived in Redis."""
    await bench.refusals.tell()
    rows, counts = [], {}
    for waiting in await bench.recorded.waiting([ACME], rows=999, counts=999):
        rows += [row.attempt for row in waiting.rows.values()]
        for name, value in waiting.counts.items():
            tally, number = tally_of(name, value)
            counts[tally.reason.value] = counts.get(tally.reason.value, 0) + number
    return rows, counts


async def test_a_refused_call_is_recorded_as_it_was_told(bench):
    budget = a_budget("b1", limit_nanos=10)
    tags = (TagSpec(tag_id="eng"), TagSpec(tag_id="search", parent_id="eng"))
    await bench.counters.publish_tenant(replace(TENANT, version=2, budgets=(budget,), tags=tags))
    before_ms = bench.now_ms()
    answer = await bench.check(x_tags="search", x_session_id="run 7", x_user_id="jo")
    told = json.loads(answer.body)["error"]
    ((attempt,), counts) = await recorded(bench)
    assert counts == {"BUDGET_EXCEEDED": 1}
    assert (attempt.tenant_id, attempt.key_id, attempt.operation_id) == ("acme", KEY_ID, "op-1")
    assert (attempt.api, attempt.provider_id, attempt.model) == ("openai.chat", "openai", "gpt-4o-mini")
    assert (attempt.reason, attempt.status, attempt.message) == (Reason.BUDGET_EXCEEDED, 402, told["message"])
    assert attempt.facts == {
        name: value for name, value in told.items() if name not in {"message", "type", "param", "code"}
    }
    assert {"budget_id", "limit_usd", "spent_usd", "held_usd", "needed_usd"} <= attempt.facts.keys()
    assert (attempt.tags, attempt.session_id, attempt.end_user) == (("eng", "search"), "run 7", "jo")
    assert before_ms <= attempt.refused_at_ms <= bench.now_ms()


async def test_an_admitted_call_is_not_recorded(bench):
    await bench.check()
    assert await recorded(bench) == ([], {})


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"x_api_key": ""}, "API_KEY_MISSING"),
        ({"x_api_key": "nonsense"}, "API_KEY_UNKNOWN"),
        ({"x_api_key": STRANGER}, "API_KEY_UNKNOWN"),
        ({"x_tenant_id": "globex"}, "TENANT_MISMATCH"),
        ({"path": "/v1/nope"}, "ROUTE_UNKNOWN"),
    ],
)
async def test_what_no_authenticated_key_did_is_nobody_s(bench, call, reason):
    answer = await bench.check(**call)
    assert json.loads(answer.body)["error"]["code"] == reason
    assert await recorded(bench) == ([], {})


@pytest.mark.parametrize(
    ("key", "tenant", "call", "reason"),
    [
        ({"status": KeyStatus.REVOKED}, {}, {}, "API_KEY_REVOKED"),
        ({"expires_at_ms": 1}, {}, {}, "API_KEY_EXPIRED"),
        ({}, {"status": Status.SUSPENDED}, {}, "TENANT_SUSPENDED"),
        ({}, {"closed_sessions": ("s1",)}, {"x_session_id": "s1"}, "SESSION_INACTIVE"),
        ({}, {}, {"x_tags": "nope, nope,", "x_session_id": "s1"}, "TAG_UNKNOWN"),
        ({}, {"required_tags": ("eng",)}, {}, "TAG_REQUIRED"),
        ({}, {}, {"raw": b"{"}, "REQUEST_INVALID"),
        ({}, {}, {"content_encoding": "gzip"}, "BODY_ENCODED"),
        ({}, {}, {"body": {**BODY, "model": "gpt-nope"}}, "MODEL_UNKNOWN"),
    ],
)
async def test_every_refusal_of_a_known_key_is_recorded(bench, key, tenant, call, reason):
    await bench.counters.publish_key(replace(RECORD, version=2, **key))
    await bench.counters.publish_tenant(replace(TENANT, version=2, **tenant))
    answer = await bench.check(**call)
    ((attempt,), counts) = await recorded(bench)
    assert counts == {reason: 1}
    assert (attempt.reason.value, attempt.status) == (reason, answer.deny.telling.http_status)
    # What the call said of itself is told even where it was not looked at, or not accepted.
    assert attempt.session_id == call.get("x_session_id", "")
    assert attempt.tags == (("nope",) if "x_tags" in call else ())
    assert attempt.model == ("gpt-nope" if reason == "MODEL_UNKNOWN" else "")


async def test_a_policy_s_words_and_a_limit_s_are_recorded_apart(bench):
    bench.policy.answer = PolicyDecision(allow=False, reason="not on Sundays")
    await bench.check()
    bench.policy.answer = PolicyDecision(allow=True, reason="")
    await bench.counters.publish_tenant(replace(TENANT, version=2, requests_per_minute=1))
    for _ in range(3):
        await bench.check()
    rows, counts = await recorded(bench)
    assert counts == {"POLICY_DENIED": 1, "RATE_LIMIT_EXCEEDED": 2}
    assert rows[0].message == "not on Sundays"
    assert rows[1].facts["limit_requests_per_minute"] == 1


async def test_tags_of_an_older_record_are_not_told_of_a_call_that_was_refused_by_a_newer_one(bench):
    await bench.counters.publish_tenant(replace(TENANT, version=2, tags=(TagSpec(tag_id="a"),)))
    await bench.check(x_tags="a")
    await bench.counters.publish_tenant(replace(TENANT, version=3, required_tags=("b",), tags=(TagSpec(tag_id="a"),)))
    await bench.check(x_tags=" a,a ")
    ((attempt,), counts) = await recorded(bench)
    assert (attempt.tags, counts) == (("a",), {"TAG_REQUIRED": 1})


class Down:
    """A Redis that fails as told, until it does not."""

    def __init__(self, redis, fault) -> None:
        self.fault = fault
        self.refusals = Refusals(redis)
        self.tried = 0

    async def refuse(self, report):
        self.tried += 1
        if self.fault is not None:
            raise self.fault
        return await self.refusals.refuse(report)


async def the_same_one():
    return "same"


def a_log(store, *, now_ms=lambda: time.time_ns() // 1_000_000, incarnation=the_same_one):
    return RefusalLog(store, source="q", incarnation=incarnation, now_ms=now_ms)


def record(log, bench, times=1, *, reason=Reason.BUDGET_EXCEEDED):
    for _ in range(times):
        log.record(Deny(reason), call=bench.call(), api="openai.chat", seen=Seen(key=RECORD))


async def test_a_flood_costs_redis_a_command_and_ten_rows(bench):
    class Counting(Refusals):
        calls = 0

        async def refuse(self, report):
            self.calls += 1
            return await super().refuse(report)

    bench.recorded = Counting(bench.redis)
    bench.refusals = a_log(bench.recorded, now_ms=lambda: 1_750_000_020_000)
    record(bench.refusals, bench, 10_000)
    rows, counts = await recorded(bench)
    assert (len(rows), counts, bench.recorded.calls) == (10, {"BUDGET_EXCEEDED": 10_000}, 1)


@pytest.mark.parametrize("fault", [CountersUnavailableError("away"), RedisReplyError("OOM"), OSError("odd")])
async def test_while_redis_is_away_refusals_wait_and_are_counted_once(bench, fault, monkeypatch):
    monkeypatch.setattr(module, "TELL_EVERY_SECONDS", 0.001)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.001)
    store = Down(bench.redis, fault)
    bench.refusals = a_log(store, now_ms=lambda: 1_750_000_020_000)
    telling = asyncio.create_task(bench.refusals.keep_telling())
    for _ in range(3):
        record(bench.refusals, bench, 5)
        tried = store.tried
        async with asyncio.timeout(10):
            while store.tried == tried:  # noqa: ASYNC110 - a plain number
                await asyncio.sleep(0.001)
    assert await bench.recorded.waiting([ACME], rows=9, counts=9) == []
    store.fault = None
    async with asyncio.timeout(10):
        while not await bench.recorded.waiting([ACME], rows=9, counts=9):  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.001)
    telling.cancel()
    rows, counts = await recorded(bench)
    assert (len(rows), counts) == (10, {"BUDGET_EXCEEDED": 15})


async def test_what_redis_refuses_does_not_stand_before_the_rest(bench):
    class Picky(Refusals):
        async def refuse(self, report):
            if report.tally.reason is Reason.BUDGET_EXCEEDED:
                raise RedisReplyError("OOM")
            return await super().refuse(report)

    bench.refusals = a_log(Picky(bench.redis))
    record(bench.refusals, bench)
    record(bench.refusals, bench, reason=Reason.POLICY_DENIED)
    with pytest.raises(RedisReplyError):
        await bench.refusals.tell()
    (waiting,) = await bench.recorded.waiting([ACME], rows=9, counts=9)
    assert [row.attempt.reason for row in waiting.rows.values()] == [Reason.POLICY_DENIED]


async def test_what_cannot_be_kept_is_dropped_and_said(bench, monkeypatch, caplog):
    monkeypatch.setattr(module, "TELL_EVERY_SECONDS", 0.001)
    monkeypatch.setattr(attempt_counts, "GROUPS_MAX", 1)
    log = a_log(bench.recorded)
    dropped = module._DROPPED._value.get()
    record(log, bench, 2)
    record(log, bench, 3, reason=Reason.POLICY_DENIED)
    assert module._DROPPED._value.get() == dropped + 3
    telling = asyncio.create_task(log.keep_telling())
    async with asyncio.timeout(10):
        while "3 refused calls are in no record" not in caplog.text:  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.001)
    telling.cancel()
    bench.refusals = log
    assert (await recorded(bench))[1] == {"BUDGET_EXCEEDED": 2}


async def counts_in(refusals) -> list[str]:
    return [
        value for waiting in await refusals.waiting([ACME], rows=99, counts=99) for value in waiting.counts.values()
    ]


async def test_a_redis_that_came_back_older_is_told_the_last_counts_again(own_redis_server, bench, monkeypatch):
    """It was killed before its append-only file had them, and before anybody had drained them."""
    monkeypatch.setattr(module, "TELL_EVERY_SECONDS", 0.001)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(module, "WATCH_EVERY_MS", 0)
    await own_redis_server.wait_until_ready()
    redis = RedisClient(own_redis_server.url, timeout_seconds=1)
    await sign_off_all(redis)
    await own_redis_server.wait_until_written()
    older = own_redis_server.folder.with_name(f"{own_redis_server.folder.name}-older")
    shutil.copytree(own_redis_server.folder, older, ignore=shutil.ignore_patterns("*.sock"))
    refusals = Refusals(redis)
    log = a_log(refusals, incarnation=partial(incarnation_of, redis))
    telling = asyncio.create_task(log.keep_telling())
    try:
        record(log, bench, 12)
        async with asyncio.timeout(20):
            while not await counts_in(refusals):  # noqa: ASYNC110 - Redis has no event for it
                await asyncio.sleep(0.001)
            own_redis_server.kill()
            shutil.copytree(older, own_redis_server.folder, dirs_exist_ok=True)
            own_redis_server.start()
            await own_redis_server.wait_until_ready()
            while not await counts_in(refusals):  # noqa: ASYNC110 - likewise
                await asyncio.sleep(0.001)
        assert await counts_in(refusals) == ["12"]
    finally:
        telling.cancel()
        await asyncio.wait([telling])
        await redis.close()
        shutil.rmtree(older, ignore_errors=True)


class Clocked:
    """A log whose clock and whose Redis' name are as the test says."""

    def __init__(self, store) -> None:
        self.now_ms = 1_750_000_020_000
        self.incarnation: str | None = "one"
        self.log = a_log(store, now_ms=lambda: self.now_ms, incarnation=self.ask)

    async def ask(self):
        if self.incarnation == "away":
            raise CountersUnavailableError("away")
        return self.incarnation

    async def round(self, seconds=1) -> None:
        """What the loop does, some time later."""
        self.now_ms += seconds * 1000
        with suppress(CountersUnavailableError):
            await self.log.watch()
            await self.log.tell()
        self.log._drop(self.log._gathering.forget(self.now_ms, same_until_ms=self.log._known_at_ms))


@pytest.mark.parametrize("meanwhile", [[], ["one"], ["away"], [None], ["away", None]])
async def test_counts_that_a_lost_redis_had_are_told_again_once(bench, caplog, meanwhile):
    clocked = Clocked(bench.recorded)
    await clocked.round()
    record(clocked.log, bench, 3)
    await clocked.round()
    assert await counts_in(bench.recorded) == ["3"]
    await bench.redis.command("FLUSHALL")
    # However long it is away, or nobody knows yet which one it is.
    for clocked.incarnation in meanwhile:
        await clocked.round(seconds=9 if clocked.incarnation == "one" else 200)
    clocked.incarnation = "another"
    await clocked.round()
    assert await counts_in(bench.recorded) == ["3"]
    assert "telling 1 counts of refusals again" in caplog.text
    await bench.redis.command("FLUSHALL")
    await clocked.round()
    assert await counts_in(bench.recorded) == []
    assert clocked.log._dropped == 0


async def test_while_redis_is_the_same_nothing_is_told_again_and_safe_counts_are_forgotten(bench):
    clocked = Clocked(bench.recorded)
    await clocked.round()
    record(clocked.log, bench, 3)
    await clocked.round()
    await bench.redis.command("FLUSHALL")
    for _ in range(70):
        await clocked.round()
    assert clocked.log._gathering.tell_again() == 0
    assert await counts_in(bench.recorded) == []


async def test_what_is_left_at_the_end_is_told(bench):
    record(bench.refusals, bench, 12)
    await bench.refusals.drain()
    (waiting,) = await bench.recorded.waiting([ACME], rows=99, counts=99)
    assert len(waiting.rows) == 10
    assert list(waiting.counts.values()) == ["12"]


async def test_an_end_without_redis_is_short_and_said(bench, monkeypatch, caplog):
    monkeypatch.setattr(module, "DRAIN_SECONDS", 0.01)

    class Silent:
        async def refuse(self, report):
            await asyncio.Event().wait()

    for store in (Silent(), Down(bench.redis, CountersUnavailableError("away"))):
        caplog.clear()
        log = a_log(store)
        record(log, bench, 12)
        await log.drain()
        assert "12 refused calls are in no record" in caplog.text


async def test_a_full_redis_gets_it_later(bench, redis):
    bench.recorded = Refusals(redis, tallies_max=1)
    bench.refusals = a_log(bench.recorded, now_ms=lambda: 1_750_000_020_000)
    record(bench.refusals, bench)
    record(bench.refusals, bench, reason=Reason.POLICY_DENIED)
    rows, counts = await recorded(bench)
    assert (len(rows), counts) == (1, {"BUDGET_EXCEEDED": 1})
    (waiting,) = await bench.recorded.waiting([ACME], rows=9, counts=9)
    await bench.recorded.forget(waiting)
    rows, counts = await recorded(bench)
    assert (len(rows), counts) == (1, {"POLICY_DENIED": 1})


async def test_the_program_s_own_key_is_in_no_record(bench):
    await bench.check(body={**BODY, "model": "gpt-nope"}, authorization="Bearer sk-theirs")
    ((attempt,), _) = await recorded(bench)
    assert "sk-theirs" not in repr(attempt)
    assert KEY not in repr(attempt)
