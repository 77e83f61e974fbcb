"""A call as Envoy would tell it, and counters in memory: the reference model that the Lua scripts are held against."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
)

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import CountersUnavailableError, RedisReplyError
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core import shard as model
from budgetguard.core.budget import Reserve, Reserved
from budgetguard.core.events import UsageEvent
from budgetguard.core.handoff import METADATA_NAMESPACE, Handoff
from budgetguard.core.operation import OperationFacts
from budgetguard.core.pricing import RateCard
from budgetguard.core.reserving import reserve
from budgetguard.core.snapshot import BudgetSpec, KeySnapshot, SubjectKind, TenantSnapshot, WindowKind
from ext_proc.exchange import Exchange

FIXTURES = Path("tests/fixtures/openai")
NOW_MS = 1_780_000_000_000
RUN_ID = "run-1"
# $0.15 a million input tokens, half for cached ones, $0.60 out.
CARD = RateCard(
    version="price/1",
    rates={
        "default": {
            "input_tokens": ((-1, 150_000_000),),
            "cache_read_tokens": ((-1, 75_000_000),),
            "output_tokens": ((-1, 600_000_000),),
        }
    },
)
INPUT_BOUND, OUTPUT_BOUND = 100, 50
HOLD_NANOS = 100 * 150 + 50 * 600
# chat.json and its stream: 19 in, of which 4 cached; 10 out.
FIXTURE_NANOS = 15 * 150 + 4 * 75 + 10 * 600

BUDGET = BudgetSpec(budget_id="all", subject_kind=SubjectKind.TENANT, window=WindowKind.LIFETIME, limit_nanos=10**12)
TENANT = TenantSnapshot(tenant_id="acme", version=1, budgets=(BUDGET,))
KEY = KeySnapshot(tenant_id="acme", key_id="0123456789abcdef", version=1, secret_sha256="")


def reserve_request(operation_id="op-1", *, api="openai.chat", stream=False, tenant=TENANT, now_ms=NOW_MS):
    facts = OperationFacts(
        operation_id=operation_id,
        tenant_id="acme",
        key_id=KEY.key_id,
        held_at_ms=now_ms,
        api=api,
        provider_id="openai",
        model="gpt-4o-mini",
        price_version=CARD.version,
        stream=stream,
    )
    return Reserve(
        facts=facts,
        tenant=tenant,
        key=KEY,
        now_ms=now_ms,
        input_nanos=INPUT_BOUND * 150,
        output_femtos=600_000_000,
        output_tokens=OUTPUT_BOUND,
        output_tokens_min=OUTPUT_BOUND,
    )


def handoff_of(request, reserved, **changes):
    assert isinstance(reserved, Reserved)
    handoff = Handoff(
        facts=request.facts,
        counters=reserved.counters,
        hold_nanos=reserved.hold_nanos,
        input_tokens_bound=INPUT_BOUND,
        output_tokens_bound=OUTPUT_BOUND,
        rate_card=CARD,
        service_tier="default",
    )
    return replace(handoff, **changes)


async def admit_in_redis(redis, operation_id="op-1", *, stream=False, **changes):
    """Hold money for a call in a real Redis and hand it over."""
    counters = Counters(redis)
    await counters.publish_tenant(TENANT)
    await counters.publish_key(KEY)
    request = reserve_request(operation_id, stream=stream, now_ms=clock_ms())
    return handoff_of(request, await counters.reserve(request), **changes)


async def counter_in_redis(redis, handoff):
    """Return (spent, held) of the one counter."""
    (counter,) = await Counters(redis).read_counters("acme", list(handoff.counters))
    return counter


async def events_in_redis(redis):
    entries = await redis.command("XRANGE", keys.usage(keys.shard_of("acme")), "-", "+")
    pairs = [(fields[::2], fields[1::2]) for _, fields in entries]
    return [UsageEvent.from_fields(dict(zip(names, values, strict=True))) for names, values in pairs]


def clock_ms():
    return time.time_ns() // 1_000_000


class ModelCounters:
    """Counters in memory. ``silent``: no answer; ``refusing``: error replies; ``gate``: answers wait for it."""

    def __init__(self):
        self.run_id_now = RUN_ID
        self.shard = model.Shard(epoch=RUN_ID)
        model.publish(self.shard, ("acme",), 1)
        model.publish(self.shard, ("acme", KEY.key_id), 1)
        self.now_ms = NOW_MS
        self.limit_nanos = BUDGET.limit_nanos
        self.settles = 0
        self.extends = 0
        self.silent = False
        self.refusing = set()
        self.gate = asyncio.Event()
        self.gate.set()

    def admit(self, operation_id="op-1", *, api="openai.chat", stream=False, **changes):
        tenant = replace(TENANT, budgets=(replace(BUDGET, limit_nanos=self.limit_nanos),))
        request = reserve_request(operation_id, api=api, stream=stream, tenant=tenant)
        reserved = reserve(self.shard, request, run_id=self.run_id_now, redis_ms=NOW_MS)
        return handoff_of(request, reserved, **changes)

    async def _answering(self):
        await self.gate.wait()
        if self.silent:
            raise CountersUnavailableError("down")

    async def settle(self, settlement, *, now_ms):
        self.settles += 1
        await self._answering()
        if settlement.handoff.facts.operation_id in self.refusing:
            raise RedisReplyError("ERR out of order")
        return model.settle(self.shard, settlement, now_ms=now_ms, run_id=self.run_id_now)

    async def extend(self, extension):
        self.extends += 1
        await self._answering()
        return model.extend(self.shard, extension, run_id=self.run_id_now)

    async def renew(self, *, tenant_id, operation_id, now_ms):
        await self._answering()
        return model.renew(self.shard, tenant_id=tenant_id, operation_id=operation_id, now_ms=now_ms)

    async def run_id(self):
        await self._answering()
        return self.run_id_now

    @property
    def counter(self):
        (counter,) = self.shard.counters.values()
        return counter

    @property
    def ends(self):
        return [(event.end, event.amount_nanos) for event in self.shard.events]


class Stream:
    """Plays Envoy: sends the messages of one call and applies the answers to the bytes that client and provider get."""

    def __init__(self, exchange: Exchange):
        self.exchange = exchange
        self.to_client = b""
        self.refused = None
        self.taken_over = False
        self.ended = False

    async def say(self, message: ProcessingRequest) -> ProcessingResponse:
        answer = ProcessingResponse.FromString(await self.exchange.answer(message))
        asked, answered = message.WhichOneof("request"), answer.WhichOneof("response")
        assert answered in (asked, "immediate_response")
        return answer

    async def request_headers(self, handoff=None, *, end=False):
        return await self.say(request_headers(handoff, end=end))

    async def request_body(self, body):
        return await self.say(ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=True)))

    async def response_headers(self, status=200, *, details="via_upstream", end=False, **headers):
        answer = await self.say(response_headers(status, details=details, end=end, **headers))
        self.taken_over = answer.mode_override.response_body_mode == ProcessingMode.FULL_DUPLEX_STREAMED
        return answer

    async def response_body(self, body, *, end=False):
        message = ProcessingRequest(response_body=HttpBody(body=body, end_of_stream=end))
        passed = await self._sent_by_us(message) if self.taken_over else client_bytes(body, await self.say(message))
        self.to_client += passed
        return passed

    async def _sent_by_us(self, message):
        """In a response that was taken over there is nothing but what we send, until we say that it has ended."""
        answer = await self.exchange.answer(message)
        if answer is None:
            return b""
        assert not self.ended
        mutation = ProcessingResponse.FromString(answer).response_body.response.body_mutation
        assert mutation.WhichOneof("mutation") == "streamed_response"
        self.ended = mutation.streamed_response.end_of_stream
        return mutation.streamed_response.body

    async def response_trailers(self):
        return await self.say(ProcessingRequest(response_trailers=HttpTrailers()))


async def eventually(holds, *, seconds=10):
    """Wait for what a background task brings about."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - what is waited for lives in another process or in a plain object
            await asyncio.sleep(0.005)


def client_bytes(body, answer: ProcessingResponse):
    mutation = answer.response_body.response.body_mutation
    kind = mutation.WhichOneof("mutation")
    return {None: body, "body": mutation.body, "clear_body": b""}[kind]


def header_map(headers):
    return HeaderMap(headers=[HeaderValue(key=key, raw_value=value.encode()) for key, value in headers.items()])


def request_headers(handoff=None, *, end=False):
    message = ProcessingRequest(request_headers=HttpHeaders(headers=header_map({":method": "POST"}), end_of_stream=end))
    if handoff is not None:
        message.metadata_context.filter_metadata[METADATA_NAMESPACE].update(handoff.to_metadata())
    return message


def response_headers(status=200, *, details="via_upstream", end=False, **headers):
    named = {":status": str(status)} | {name.replace("_", "-"): value for name, value in headers.items()}
    message = ProcessingRequest(response_headers=HttpHeaders(headers=header_map(named), end_of_stream=end))
    if details is not None:
        message.attributes["envoy.filters.http.ext_proc"].update({"response.code_details": details})
    return message
