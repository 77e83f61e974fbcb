"""Streams that top up, through a real Envoy: what the client gets, and that a provider stops when a stream is ended."""

import asyncio
import json
from dataclasses import replace

import httpx
import openai
import pytest

from budgetguard.adapters.redis.counters import Counters
from budgetguard.core.operation import End
from budgetguard.core.slices import StreamSlices
from tests.plugins.edge import admit
from tests.services.ext_proc.support import BUDGET, INPUT_BOUND, KEY, TENANT, clock_ms, handoff_of, reserve_request
from tests.services.ext_proc.test_with_envoy import metered  # noqa: F401 - the fixture

FIRST_NANOS = INPUT_BOUND * 150 + 50 * 600
SLICES = StreamSlices(
    slice_tokens=1000, choices=1, output_femtos=600_000_000, output_tokens_largest=16_384, overrun=False
)


async def admit_unbounded(metered, *, limit_nanos, api="openai.chat", overrun=False):  # noqa: F811
    counters = Counters(metered.redis)
    await counters.publish_tenant(TENANT)
    await counters.publish_key(KEY)
    metered.admitted += 1
    tenant = replace(TENANT, budgets=(replace(BUDGET, limit_nanos=limit_nanos),))
    request = reserve_request(f"op-{metered.admitted}", api=api, stream=True, tenant=tenant, now_ms=clock_ms())
    reserved = await counters.reserve(request)
    metered.handoff = handoff_of(request, reserved, slices=replace(SLICES, overrun=overrun))
    answer = admit(None)
    answer.dynamic_metadata.Clear()
    answer.dynamic_metadata.update(metered.handoff.to_metadata())
    metered.edge.authorization.answer = lambda _: answer


@pytest.fixture
async def client(metered):  # noqa: F811
    url = f"{metered.edge.base_url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0, timeout=30) as client:
        yield client


async def left(metered):  # noqa: F811
    async with httpx.AsyncClient() as http:
        return (await http.get(f"{metered.provider_url}/fake/stats")).json()["left"]


async def eventually_left(metered, number):  # noqa: F811
    async with asyncio.timeout(10):
        while await left(metered) < number:  # noqa: ASYNC110 - it happens in the provider
            await asyncio.sleep(0.05)


async def counter(metered):  # noqa: F811
    (counter,) = await Counters(metered.redis).read_counters("acme", list(metered.handoff.counters))
    return counter


async def test_a_stream_that_fits_is_the_provider_s_own_to_the_byte(metered):  # noqa: F811
    body = metered.body(stream=True, prompt_tokens=19, completion_tokens=5000, chunk_tokens=50, chunk_delay_ms=10)
    body["stream_options"] = {"include_usage": True}
    await admit_unbounded(metered, limit_nanos=10**9)
    held = []
    text = b""
    async with metered.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        async for piece in answer.aiter_raw():
            text += piece
            held.append((await counter(metered))[1])
    assert text.endswith(b"data: [DONE]\n\n")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in text.split(b"\n\n")[:-2]]
    words = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    assert len(words.split()) == 5000
    assert chunks[-1]["usage"]["completion_tokens"] == 5000
    assert max(held) == INPUT_BOUND * 150 + 16_384 * 600
    assert len(set(held)) > 5
    event = await metered.end()
    assert (event.end, event.amount_nanos, event.status) == (End.CONFIRMED, 19 * 150 + 5000 * 600, 200)
    assert await left(metered) == 0


@pytest.mark.parametrize("http2", [False, True])
async def test_a_stream_that_does_not_fit_ends_cleanly_and_its_provider_is_cut_off(metered, http2):  # noqa: F811
    limit_nanos = FIRST_NANOS + 3000 * 600
    await admit_unbounded(metered, limit_nanos=limit_nanos)
    body = metered.body(stream=True, completion_tokens=100_000, chunk_tokens=5, chunk_delay_ms=1)
    async with httpx.AsyncClient(base_url=metered.edge.base_url, http1=not http2, http2=http2, timeout=20) as http:
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        *_, last, error, done, rest = answer.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert json.loads(error.removeprefix("data: "))["error"]["budget_id"] == "all"
        assert json.loads(last.removeprefix("data: "))["choices"][0]["delta"]["content"]
        # The connection is as good as new.
        await eventually_left(metered, 1)
        event = await metered.end()
        assert (event.end, event.status) == (End.ESTIMATED, 200)
        assert event.detail == "stream closed: budget all is exhausted"
        assert limit_nanos - 300 * 600 <= event.amount_nanos <= limit_nanos
        # Tokens that the client got, and bytes: never more than was held.
        written = "".join(
            json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
            for chunk in answer.text.split("\n\n")[:-3]
        )
        assert len(written) <= 50 + 3000
        await metered.admit()
        again = await http.post("/v1/chat/completions", json=metered.body())
        assert again.status_code == 200


async def test_the_official_sdk_keeps_what_it_got_and_learns_which_budget(metered, client):  # noqa: F811
    ask = {"completion_tokens": 100_000, "chunk_tokens": 5, "chunk_delay_ms": 1}
    await admit_unbounded(metered, limit_nanos=FIRST_NANOS + 2000 * 600)
    stream = await client.chat.completions.create(
        model="gpt-4o-mini", messages=[{"role": "user", "content": "fake:" + json.dumps(ask)}], stream=True
    )
    texts = []

    async def read():
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content or "")  # noqa: PERF401 - kept when the next one raises

    with pytest.raises(openai.APIError, match="Budget all is exhausted") as raised:
        await read()
    assert 1000 < len("".join(texts)) <= 2050
    assert (raised.value.code, raised.value.body["budget_id"]) == ("BUDGET_EXCEEDED", "all")
    assert (await metered.end()).end is End.ESTIMATED

    await admit_unbounded(metered, limit_nanos=10**7, api="openai.responses")
    events = await client.responses.create(model="gpt-4o-mini", input="fake:" + json.dumps(ask), stream=True)
    kinds, got, last = [], "", None
    async for event in events:
        kinds.append(event.type)
        got += event.delta if event.type == "response.output_text.delta" else ""
        last = event
    assert kinds[0] == "response.created"
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert (last.response.error.code, last.response.error.budget_id) == ("BUDGET_EXCEEDED", "all")
    assert got
    assert (await metered.end()).end is End.ESTIMATED
    await eventually_left(metered, 2)


async def test_a_tenant_may_let_a_stream_run_on(metered):  # noqa: F811
    await admit_unbounded(metered, limit_nanos=FIRST_NANOS, overrun=True)
    body = metered.body(stream=True, prompt_tokens=19, completion_tokens=2000, chunk_tokens=20, chunk_delay_ms=5)
    body["stream_options"] = {"include_usage": True}
    answer = await metered.http.post("/v1/chat/completions", json=body)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"error"' not in answer.text
    event = await metered.end()
    assert (event.end, event.amount_nanos) == (End.CONFIRMED, 19 * 150 + 2000 * 600)
    assert event.detail == "overrun: budget all is exhausted"
    assert event.hold_nanos > FIRST_NANOS


async def test_a_stream_outlives_a_silence_of_redis(metered):  # noqa: F811
    await admit_unbounded(metered, limit_nanos=10**9)
    body = metered.body(stream=True, completion_tokens=3000, chunk_tokens=20, chunk_delay_ms=20)
    body["stream_options"] = {"include_usage": True}
    async with metered.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        pieces = answer.aiter_text()
        text = await anext(pieces)
        pausing = asyncio.create_task(metered.redis.command("CLIENT", "PAUSE", 1500, "ALL"))
        async for piece in pieces:
            text += piece
    await pausing
    assert text.endswith("data: [DONE]\n\n")
    assert '"error"' not in text
    assert (await metered.end()).end is End.CONFIRMED


async def test_a_client_that_leaves_frees_all_that_was_topped_up(metered):  # noqa: F811
    await admit_unbounded(metered, limit_nanos=10**9)
    body = metered.body(stream=True, completion_tokens=100_000, chunk_tokens=20, chunk_delay_ms=5)
    seen = 0
    async with metered.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for piece in answer.aiter_raw():
            seen += len(piece)
            if seen > 30_000:
                break
    event = await metered.end()
    assert event.end is End.ESTIMATED
    assert event.hold_nanos > FIRST_NANOS
    await eventually_left(metered, 1)
