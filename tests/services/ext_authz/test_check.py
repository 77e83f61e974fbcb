"""Admission against a real Redis: what is let through, what is refused and told, and that no hold is left behind."""

import asyncio
import gzip
import json
import time
from dataclasses import replace
from decimal import Decimal
from functools import partial

import pytest

from budgetguard.adapters.prices import PriceBook
from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import CountersUnavailableError, RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.epoch import incarnation_of
from budgetguard.adapters.redis.refusals import Refusals
from budgetguard.core.api_key import format_api_key, hash_secret
from budgetguard.core.catalog import Catalog, ProviderSpec
from budgetguard.core.policy import PolicyDecision, PolicyFault, PolicyUnavailableError
from budgetguard.core.pricing import PriceOverride
from budgetguard.core.snapshot import (
    BudgetSpec,
    KeySnapshot,
    KeyStatus,
    Mode,
    Status,
    SubjectKind,
    TagSpec,
    TenantSnapshot,
    WindowKind,
)
from ext_authz.attempts import RefusalLog
from ext_authz.call import Admitted, IncomingCall, Refused
from ext_authz.check import Checker
from ext_authz.failures import CLOSED, POLICY_SKIPPED, Failure, Failures
from ext_authz.large_bodies import LargeBodies
from ext_authz.records import Records
from ext_authz.releases import Releases
from tests.plugins.redis_calls import live_holds
from tests.plugins.redis_server import sign_off_all

KEY_ID = "0123456789abcdef"
KEY = format_api_key(tenant_id="acme", key_id=KEY_ID, secret=bytes(32))
SECRET = KEY.rpartition("_")[2]
TENANT = TenantSnapshot(tenant_id="acme", version=1, requests_per_minute=600)
RECORD = KeySnapshot(tenant_id="acme", key_id=KEY_ID, version=1, secret_sha256=hash_secret(KEY.split("_", 3)[3]))
PROVIDER = ProviderSpec(
    provider_id="openai",
    kind="openai",
    base_url="https://api.openai.com",
    api_key_env="OPENAI_API_KEY",
    cluster="provider-openai",
)
BODY = {"model": "gpt-4o-mini", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}


class AskedPolicy:
    """Answers as it is told to, and keeps the question."""

    def __init__(self) -> None:
        self.answer: PolicyDecision | Exception = PolicyDecision(allow=True, reason="")
        self.question = None

    async def decide(self, question):
        self.question = question
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Bench:
    """One checker with what it stands on."""

    def __init__(self, redis: RedisClient) -> None:
        self.redis = redis
        self.counters = Counters(redis)
        self.prices = PriceBook(self.counters)
        self.policy = AskedPolicy()
        self.provider_keys = {"OPENAI_API_KEY": "sk-ours"}
        self.calls = 0
        self.large_bodies = LargeBodies()
        self.recorded = Refusals(redis)
        self.refusals = RefusalLog(
            self.recorded, source="p", incarnation=partial(incarnation_of, redis), now_ms=self.now_ms
        )
        self.checker = self.make()

    def make(self, *, counters=None, records=None, failures=CLOSED, now_ms=None, is_metered=lambda: True) -> Checker:
        self.releases = Releases(counters or self.counters, now_ms=now_ms or self.now_ms)
        return Checker(
            counters=counters or self.counters,
            releases=self.releases,
            records=records or Records(self.counters),
            prices=self.prices,
            policy=self.policy,
            provider_key=self.provider_keys.get,
            now_ms=now_ms or self.now_ms,
            failures=Failures(failures),
            large_bodies=self.large_bodies,
            refusals=self.refusals,
            is_metered=is_metered,
        )

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def call(self, body=None, *, path="/v1/chat/completions", method="POST", raw=None, **headers) -> IncomingCall:
        self.calls += 1
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return IncomingCall(
            operation_id=f"op-{self.calls}",
            method=method,
            path=path,
            headers={"x-api-key": KEY} | names,
            body=json.dumps(BODY if body is None else body).encode() if raw is None else raw,
        )

    async def check(self, *args, checker=None, **kwargs):
        return await (checker or self.checker).check(self.call(*args, **kwargs))

    async def held(self) -> tuple[int, int]:
        return await live_holds(self.counters, "acme")


def reason(answer) -> str:
    assert isinstance(answer, Refused), answer
    return json.loads(answer.body)["error"]["code"]


async def test_an_admitted_call_is_held_handed_over_and_told(bench):
    await bench.counters.publish_tenant(replace(TENANT, version=2, tags=(TagSpec(tag_id="a"), TagSpec(tag_id="b"))))
    answer = await bench.check(x_tags="b, a", x_session_id="s1")
    assert isinstance(answer, Admitted)
    assert (answer.cluster, answer.path, answer.authorization) == (
        "provider-openai",
        "/v1/chat/completions",
        "Bearer sk-ours",
    )
    handoff = answer.handoff
    assert handoff.facts.operation_id == "op-1"
    assert not handoff.rewrites_request
    assert handoff.hold_nanos == handoff.input_tokens_bound * 150 + 100 * 600
    assert await bench.held() == (1, handoff.hold_nanos)
    question = bench.policy.question
    assert (question.tags, question.session_id, question.route) == (("a", "b"), "s1", "openai.chat")
    assert Decimal(question.estimate_usd) == Decimal(handoff.hold_nanos) / 10**9


@pytest.mark.parametrize("model", ["gpt-4o-mini", "GPT-4o-mini", "gpt-4o-mini-2024-07-18"])
async def test_a_call_is_known_by_the_model_that_it_names_and_by_the_one_that_it_is_priced_as(bench, model):
    answer = await bench.check(BODY | {"model": model})
    assert isinstance(answer, Admitted)
    for told in (answer.handoff.facts, bench.policy.question):
        assert (told.model, told.priced_model) == (model, "gpt-4o-mini")


async def test_a_caller_s_own_provider_key_goes_upstream(bench):
    answer = await bench.check(authorization="Bearer sk-theirs")
    assert isinstance(answer, Admitted)
    assert answer.authorization == "Bearer sk-theirs"


async def test_a_missing_provider_key_is_said_before_anything_is_held(bench):
    bench.provider_keys.clear()
    assert reason(await bench.check()) == "PROVIDER_UNAVAILABLE"
    assert await bench.held() == (0, 0)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"path": "/v1/files"}, "ROUTE_UNKNOWN"),
        ({"method": "GET"}, "ROUTE_UNKNOWN"),
        ({"x_api_key": ""}, "API_KEY_MISSING"),
        ({"x_api_key": KEY[:-1] + "B"}, "API_KEY_UNKNOWN"),
        ({"x_api_key": KEY.replace("acme", "other")}, "API_KEY_UNKNOWN"),
        ({"x_tenant_id": "other"}, "TENANT_MISMATCH"),
        ({"content_encoding": "gzip", "raw": gzip.compress(b"{}")}, "BODY_ENCODED"),
        ({"raw": b"{"}, "REQUEST_INVALID"),
        ({"body": BODY | {"model": "no-such-model"}}, "MODEL_UNKNOWN"),
        ({"body": BODY | {"max_tokens": 2**31 - 1, "n": 128, "model": "o1-pro"}}, "REQUEST_INVALID"),
    ],
)
async def test_refusals(bench, call, expected):
    answer = await bench.check(**call)
    assert reason(answer) == expected
    assert answer.headers["content-type"] == "application/json"
    assert await bench.held() == (0, 0)


async def test_a_call_without_an_id_is_a_fault(bench):
    call = replace(bench.call(), operation_id="")
    assert reason(await bench.checker.check(call)) == "INTERNAL"


async def test_a_big_body_is_read_too(bench):
    big = BODY | {"messages": [{"role": "user", "content": "x" * 300_000}]}
    assert isinstance(await bench.check(big), Admitted)


async def test_changes_hold_for_the_very_next_call_though_records_are_cached(bench):
    assert isinstance(await bench.check(), Admitted)
    await bench.counters.publish_tenant(replace(TENANT, version=2, status=Status.SUSPENDED))
    assert reason(await bench.check()) == "TENANT_SUSPENDED"
    await bench.counters.publish_tenant(replace(TENANT, version=3))
    assert isinstance(await bench.check(), Admitted)
    await bench.counters.publish_key(replace(RECORD, version=2, expires_at_ms=1))
    assert reason(await bench.check()) == "API_KEY_EXPIRED"
    await bench.counters.publish_key(replace(RECORD, version=3, expires_at_ms=None))
    assert isinstance(await bench.check(), Admitted)
    await bench.counters.publish_key(replace(RECORD, version=4, status=KeyStatus.REVOKED))
    assert reason(await bench.check()) == "API_KEY_REVOKED"


def budget(limit_nanos, **changes) -> BudgetSpec:
    return BudgetSpec(
        **{
            "budget_id": "b1",
            "subject_kind": SubjectKind.TENANT,
            "window": WindowKind.LIFETIME,
            "limit_nanos": limit_nanos,
        }
        | changes
    )


async def test_a_budget_refusal_explains_itself(bench):
    await bench.counters.publish_tenant(replace(TENANT, version=2, budgets=(budget(70_000),)))
    first = await bench.check()
    assert isinstance(first, Admitted)
    refused = await bench.check()
    assert reason(refused) == "BUDGET_EXCEEDED"
    error = json.loads(refused.body)["error"]
    held = Decimal(first.handoff.hold_nanos) / 10**9
    assert error["budget_id"] == "b1"
    assert error["resets_at"] is None
    assert (error["limit_usd"], error["spent_usd"], error["held_usd"]) == ("0.00007", "0", f"{held:f}")
    assert error["retryable"] is True  # the hold may come back
    monthly = budget(10, window=WindowKind.MONTH)
    await bench.counters.publish_tenant(replace(TENANT, version=3, budgets=(monthly,)))
    error = json.loads((await bench.check()).body)["error"]
    assert error["retryable"] is False
    assert error["resets_at"].endswith("-01T00:00:00Z")
    assert error["resets_at"] in error["message"]


async def test_another_key_s_budget_and_an_observed_one_do_not_bind(bench):
    others = budget(0, subject_kind=SubjectKind.API_KEY, subject="another")
    observed = budget(0, budget_id="b2", mode=Mode.OBSERVE)
    await bench.counters.publish_tenant(replace(TENANT, version=2, budgets=(others, observed)))
    answer = await bench.check()
    assert isinstance(answer, Admitted)
    assert len(answer.handoff.counters) == 1


async def test_without_a_bound_a_call_takes_an_eighth_of_what_is_left(bench):
    await bench.counters.publish_tenant(replace(TENANT, version=2, budgets=(budget(10_000_000),)))
    unbounded = {name: value for name, value in BODY.items() if name != "max_tokens"}
    answer = await bench.check(unbounded)
    assert isinstance(answer, Admitted)
    assert answer.handoff.clamped_output_tokens == answer.handoff.output_tokens_bound < 4096
    assert answer.handoff.output_tokens_bound * 600 <= 10_000_000 // 8
    assert answer.handoff.rewrites_request


async def test_a_bound_that_does_not_fit_is_clamped_or_refused_as_the_tenant_chose(bench):
    limited = replace(TENANT, version=2, budgets=(budget(1_000_000),))
    await bench.counters.publish_tenant(limited)
    asked = BODY | {"max_tokens": 16_000}
    answer = await bench.check(asked)
    assert isinstance(answer, Admitted)
    assert 16 <= answer.handoff.clamped_output_tokens < 16_000
    assert answer.handoff.hold_nanos <= 1_000_000
    await bench.counters.release(answer.handoff, now_ms=bench.now_ms(), ended_at_ms=0, status=0, detail="")
    await bench.counters.publish_tenant(replace(limited, version=3, clamp=False))
    assert reason(await bench.check(asked)) == "BUDGET_EXCEEDED"


async def test_a_rate_limit_says_when_to_come_back(bench):
    await bench.counters.publish_tenant(replace(TENANT, version=2, requests_per_minute=2))
    assert [(await bench.check()).reserved.requests_remaining for _ in range(2)] == [1, 0]
    refused = await bench.check()
    assert reason(refused) == "RATE_LIMIT_EXCEEDED"
    assert 1 <= int(refused.headers["retry-after"]) <= 60


async def test_the_policy_decides_between(bench):
    bench.policy.answer = PolicyDecision(allow=False, reason="no models on Sundays")
    refused = await bench.check()
    assert reason(refused) == "POLICY_DENIED"
    assert json.loads(refused.body)["error"]["message"] == "no models on Sundays"
    bench.policy.answer = PolicyUnavailableError(PolicyFault.SLOW, "50 ms")
    assert reason(await bench.check()) == "POLICY_UNAVAILABLE"
    assert isinstance(await bench.check(checker=bench.make(failures=POLICY_SKIPPED)), Admitted)


async def test_prices_follow_the_catalog(bench):
    own = PriceOverride(
        price_id="p1",
        provider_id="openai",
        model="own-model",
        usd={"input_tokens": Decimal(1), "output_tokens": Decimal(2)},
    )
    assert reason(await bench.check(BODY | {"model": "own-model"})) == "MODEL_UNKNOWN"
    record = Catalog(version=2, providers=(PROVIDER,), prices=(own,)).to_json()
    await bench.counters.publish_catalog(record, version=2)
    await bench.prices.refresh()
    answer = await bench.check(BODY | {"model": "own-model"})
    assert isinstance(answer, Admitted)
    assert answer.handoff.facts.price_version == "price/p1"
    assert answer.handoff.facts.priced_model == "own-model"
    assert (await bench.check(BODY | {"model": "OWN-model"})).handoff.facts.priced_model == "own-model"
    assert answer.handoff.hold_nanos == answer.handoff.input_tokens_bound * 1000 + 100 * 2000


async def test_without_a_catalog_nothing_is_forwarded(bench):
    empty = PriceBook(bench.counters)
    checker = bench.make()
    checker._prices = empty
    assert not empty.ready
    assert reason(await bench.check(checker=checker)) == "PROVIDER_UNAVAILABLE"


MADE_UP = KEY.replace(KEY_ID, KEY_ID[::-1])


@pytest.mark.parametrize("known_before", [True, False])
async def test_while_redis_has_lost_its_records_no_key_is_unknown(bench, known_before):
    if known_before:
        assert isinstance(await bench.check(), Admitted)
    await bench.redis.command("FLUSHALL")
    for key in (KEY, MADE_UP, KEY.replace("acme", "other")):
        answer = await bench.check(x_api_key=key)
        assert (reason(answer), answer.deny.telling.http_status) == ("COUNTERS_NOT_READY", 503)
        assert answer.deny.telling.retryable
        assert answer.headers["retry-after"] == "1"
    # Signed off without them, they are not lost: there are none. One that was known is, with its tenant.
    await sign_off_all(bench.redis)
    assert reason(await bench.check()) == ("COUNTERS_NOT_READY" if known_before else "API_KEY_UNKNOWN")
    await bench.counters.publish_tenant(TENANT)
    await bench.counters.publish_key(RECORD)
    assert isinstance(await bench.check(), Admitted)
    assert reason(await bench.check(x_api_key=MADE_UP)) == "API_KEY_UNKNOWN"


@pytest.mark.parametrize(
    "older",
    [
        replace(RECORD, status=KeyStatus.REVOKED),
        replace(RECORD, expires_at_ms=1),
        replace(TENANT, status=Status.SUSPENDED),
    ],
)
async def test_nobody_is_refused_by_records_that_are_not_signed_off(bench, older):
    publish = bench.counters.publish_key if isinstance(older, KeySnapshot) else bench.counters.publish_tenant
    await publish(replace(older, version=2))
    refused = reason(await bench.check())
    assert refused in ("API_KEY_REVOKED", "API_KEY_EXPIRED", "TENANT_SUSPENDED")
    await bench.redis.command("SET", keys.epoch(keys.shard_of("acme")), "the process before")
    assert reason(await bench.check()) == "COUNTERS_NOT_READY"
    await sign_off_all(bench.redis)
    assert reason(await bench.check()) == refused


class CountedRedis(RedisClient):
    """Counts its trips to Redis."""

    trips = 0

    async def _ask(self, packed, count):
        self.trips += 1
        return await super()._ask(packed, count)


async def test_a_cached_key_costs_no_trip_beyond_its_reserve_and_an_unknown_one_two(bench, redis_server):
    redis = CountedRedis(redis_server.url, timeout_seconds=10)
    checker = bench.make(counters=Counters(redis), records=Records(Counters(redis)))

    async def trips(**call) -> int:
        before = redis.trips
        await bench.check(checker=checker, **call)
        return redis.trips - before

    await trips()
    await trips(x_api_key=MADE_UP)  # from here on Redis knows every script
    assert await trips() == 1
    for _ in range(2):
        assert await trips(x_api_key=MADE_UP) == 2
    await redis.close()


class SlowCounters(Counters):
    """Holds the money and then keeps the answer to itself."""

    def __init__(self, redis, seconds: float) -> None:
        super().__init__(redis)
        self.seconds = seconds

    async def reserve(self, request):
        answer = await super().reserve(request)
        await asyncio.sleep(self.seconds)
        return answer


class DeadCounters(Counters):
    async def reserve(self, request):
        await super().reserve(request)
        raise CountersUnavailableError("connection lost")


@pytest.mark.parametrize(("kind", "told"), [("slow", "TOO_LATE"), ("dead", "COUNTERS_UNAVAILABLE")])
async def test_an_unheard_reservation_is_undone(bench, kind, told):
    counters = SlowCounters(bench.redis, 5) if kind == "slow" else DeadCounters(bench.redis)
    checker = bench.make(counters=counters)
    assert reason(await bench.check(checker=checker)) == told
    await bench.releases.drain()
    assert await bench.held() == (0, 0)


async def test_a_check_that_envoy_gave_up_is_undone(bench):
    checker = bench.make(counters=SlowCounters(bench.redis, 0.03))
    waiting = asyncio.create_task(checker.check(bench.call()))
    while await bench.held() == (0, 0):  # noqa: ASYNC110 - Redis has no event for it
        await asyncio.sleep(0.001)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await bench.releases.drain()
    assert await bench.held() == (0, 0)


async def test_an_answer_that_nobody_heard_is_undone(bench):
    answer = await bench.check()
    bench.checker.give_up(answer)
    await bench.releases.drain()
    assert await bench.held() == (0, 0)


async def test_the_last_cent_is_sold_once(bench):
    first = await bench.check()
    hold = first.handoff.hold_nanos
    await bench.counters.publish_tenant(replace(TENANT, version=2, requests_per_minute=0, budgets=(budget(50 * hold),)))
    gate = asyncio.Semaphore(16)

    async def check():
        async with gate:
            return await bench.check()

    answers = await asyncio.gather(*(check() for _ in range(200)))
    assert sum(isinstance(answer, Admitted) for answer in answers) == 50
    assert {reason(answer) for answer in answers if isinstance(answer, Refused)} == {"BUDGET_EXCEEDED"}


async def test_without_a_meter_nothing_is_held(bench):
    checker = bench.make(is_metered=lambda: False)
    assert reason(await bench.check(checker=checker)) == "METERING_UNAVAILABLE"
    assert await bench.held() == (0, 0)


def test_every_failure_has_a_behaviour():
    assert set(CLOSED) == set(Failure)
    assert all(behaviour.reason is not None for behaviour in CLOSED.values())
    assert {name for name, behaviour in POLICY_SKIPPED.items() if behaviour.reason is None} == {Failure.POLICY}


async def test_a_stream_without_a_bound_holds_a_slice_and_gets_none_written(bench):
    unbounded = {"model": "gpt-4o-mini", "messages": BODY["messages"], "stream": True, "n": 2}
    answer = await bench.check(unbounded)
    handoff = answer.handoff
    assert (handoff.slices.slice_tokens, handoff.slices.choices, handoff.slices.output_tokens_largest) == (
        4096,
        2,
        16_384,
    )
    assert handoff.clamped_output_tokens is None
    assert handoff.hold_nanos == handoff.input_tokens_bound * 150 + 2 * 4096 * 600
    # A model whose stream does not show all that it writes gets its bound, as any other call.
    thinking = (await bench.check(unbounded | {"model": "o3-mini"})).handoff
    assert (thinking.slices, thinking.clamped_output_tokens) == (None, 4096)


async def test_a_slice_that_does_not_fit_is_lowered_and_still_no_bound_is_written(bench):
    budget = BudgetSpec(
        budget_id="b", subject_kind=SubjectKind.TENANT, window=WindowKind.LIFETIME, limit_nanos=2000 * 600
    )
    await bench.counters.publish_tenant(replace(TENANT, version=2, budgets=(budget,)))
    answer = await bench.check({"model": "gpt-4o-mini", "messages": BODY["messages"], "stream": True})
    handoff = answer.handoff
    assert 1024 < handoff.output_tokens_bound < 2000
    assert (handoff.clamped_output_tokens, handoff.slices.slice_tokens) == (None, 4096)
    assert handoff.hold_nanos == handoff.input_tokens_bound * 150 + handoff.output_tokens_bound * 600
