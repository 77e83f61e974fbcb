"""What Envoy really sends and does with the answers: each ending of a call once, with a real Envoy in front."""

import asyncio
import contextlib
import json
import os
import sys

import httpx
import pytest

from budgetguard.adapters.redis.client import RedisClient
from budgetguard.cli.fake_provider import serve
from budgetguard.cli.local.parts import free_port
from budgetguard.core.operation import End
from tests.plugins.edge import CLUSTER, admit
from tests.plugins.redis_server import sign_off_all
from tests.services.ext_proc.support import (
    HOLD_NANOS,
    INPUT_BOUND,
    admit_in_redis,
    counter_in_redis,
    events_in_redis,
    eventually,
)

INPUT_NANOS = INPUT_BOUND * 150


class Metered:
    """The edge with the real ext_proc behind it; each call is admitted by the test."""

    def __init__(self, edge, redis, http, provider_url):
        self.provider_url = provider_url
        self.edge = edge
        self.redis = redis
        self.http = http
        self.admitted = 0

    async def admit(self, *, stream=False, **changes):
        self.admitted += 1
        self.handoff = await admit_in_redis(self.redis, f"op-{self.admitted}", stream=stream, **changes)
        answer = admit(None)
        answer.dynamic_metadata.Clear()
        answer.dynamic_metadata.update(self.handoff.to_metadata())
        self.edge.authorization.answer = lambda _: answer

    def body(self, *, stream=False, padding="", **directive):
        messages = [{"role": "user", "content": padding}, {"role": "user", "content": "fake:" + json.dumps(directive)}]
        return {"model": "gpt-4o-mini", "messages": messages} | ({"stream": True} if stream else {})

    async def end(self):
        """Return how the last call ended, once it has, and that nothing is held."""
        name = f"op-{self.admitted}"
        for _ in range(1000):
            events = [event for event in await events_in_redis(self.redis) if event.facts.operation_id == name]
            if events:
                (event,) = events
                assert (await counter_in_redis(self.redis, self.handoff))[1] == 0
                return event
            await asyncio.sleep(0.01)
        pytest.fail("the call did not end")


@pytest.fixture
async def metered(bare_edge, redis_server):
    await redis_server.wait_until_ready()
    redis = RedisClient(redis_server.url, timeout_seconds=10)
    await redis.command("FLUSHALL")
    await sign_off_all(redis)
    bare_edge.stop_server("proc")
    port = free_port()
    provider = await serve(port=port)
    bare_edge.write_clusters({CLUSTER: port, "provider-closed": free_port()})
    variables = {
        "EXT_PROC_ADDRESS": f"unix:{bare_edge.settings.ext_proc_socket}",
        "REDIS_URL": redis_server.url,
        "SPOOL_DIR": str(bare_edge.folder / "spool"),
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "ext_proc", env=os.environ | variables)
    await eventually(lambda: bare_edge.knows(CLUSTER, port) and bare_edge.settings.ext_proc_socket.exists())
    async with httpx.AsyncClient(base_url=bare_edge.base_url, timeout=20) as http:
        yield Metered(bare_edge, redis, http, f"http://127.0.0.1:{port}")
    process.kill()
    await process.wait()
    await provider.cleanup()
    await redis.close()


async def test_answers_pass_and_are_metered(metered):
    await metered.admit()
    answer = await metered.http.post("/v1/chat/completions", json=metered.body(prompt_tokens=19, completion_tokens=10))
    assert answer.json()["usage"]["completion_tokens"] == 10
    # Before the last piece has passed, the money is free.
    assert await counter_in_redis(metered.redis, metered.handoff) == (19 * 150 + 10 * 600, 0)
    event = await metered.end()
    assert (event.end, event.amount_nanos, event.status) == (End.CONFIRMED, 19 * 150 + 10 * 600, 200)

    # A stream whose usage nobody asked for.
    await metered.admit(stream=True, inject_usage=True)
    body = metered.body(stream=True, prompt_tokens=19, completion_tokens=10)
    answer = await metered.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert '"usage"' not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    assert len(answer.text.split("\n\n")) > 10
    event = await metered.end()
    assert (event.end, event.amount_nanos) == (End.CONFIRMED, 19 * 150 + 10 * 600)

    # A large request whose bound is lowered, and a large answer.
    await metered.admit(clamped_output_tokens=50)
    body = metered.body(padding="x" * (9 * 2**20), echo=True) | {"max_tokens": 5000}
    answer = await metered.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    received = json.loads(answer.json()["choices"][0]["message"]["content"])
    sent = json.loads(received["body"])
    assert sent["max_tokens"] == 50
    assert sent["messages"][0] == body["messages"][0]
    assert (await metered.end()).end is End.CONFIRMED


@pytest.mark.parametrize("is_stream", [False, True])
async def test_every_other_ending_happens_once(metered, is_stream):
    async def call(**directive):
        await metered.admit(stream=is_stream)
        answer = await metered.http.post("/v1/chat/completions", json=metered.body(stream=is_stream, **directive))
        return answer.status_code

    assert await call(status=429) == 429
    event = await metered.end()
    assert (event.end, event.amount_nanos, event.status) == (End.RELEASED, 0, 429)

    assert await call(reset=True) == 503
    event = await metered.end()
    assert (event.end, event.amount_nanos, event.status) == (End.ESTIMATED, HOLD_NANOS, 503)

    # Whether the client sees a piece of a JSON answer or only a 503 is a race inside Envoy.
    with contextlib.suppress(httpx.TransportError):
        await call(cut_after_chunks=2, chunk_delay_ms=50)
    event = await metered.end()
    assert event.end is End.ESTIMATED
    assert (event.amount_nanos < HOLD_NANOS) is is_stream

    assert await call(no_usage=True) == 200
    event = await metered.end()
    assert event.end is End.ESTIMATED

    # Nobody listens where the provider should be.
    await metered.admit(stream=is_stream)
    answer = metered.edge.authorization.answer(None)
    answer.ok_response.headers[0].header.value = "provider-closed"
    answered = await metered.http.post("/v1/chat/completions", json=metered.body(stream=is_stream))
    assert answered.status_code == 503
    event = await metered.end()
    assert (event.end, event.amount_nanos) == (End.RELEASED, 0)
    assert "connection_failure" in event.detail

    # The client does not wait for the answer.
    await metered.admit(stream=is_stream)
    body = metered.body(stream=is_stream, delay_ms=2000)
    with pytest.raises(httpx.ReadTimeout):
        await metered.http.post("/v1/chat/completions", json=body, timeout=0.3)
    event = await metered.end()
    assert (event.end, event.amount_nanos, event.status) == (
        End.ESTIMATED,
        INPUT_NANOS if is_stream else HOLD_NANOS,
        0,
    )


async def test_a_client_that_leaves_in_the_middle_of_a_stream(metered):
    await metered.admit(stream=True)
    body = metered.body(stream=True, chunk_delay_ms=200)
    async with metered.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for _ in answer.aiter_bytes():
            break
    event = await metered.end()
    assert (event.end, event.status) == (End.ESTIMATED, 200)
    assert INPUT_NANOS <= event.amount_nanos <= HOLD_NANOS


async def test_a_request_that_cannot_be_rewritten_never_reaches_the_provider(metered):
    await metered.admit(clamped_output_tokens=50)
    answer = await metered.http.post("/v1/chat/completions", content=b"not JSON")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "INTERNAL"
    event = await metered.end()
    assert (event.end, event.amount_nanos) == (End.RELEASED, 0)
