"""The server as Envoy meets it: over gRPC, driven by a second codec, with a real Redis behind it."""

import asyncio
import json
import tempfile
from pathlib import Path

import grpc
import pytest
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue, Metadata
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode
from envoy_data_plane.envoy.service.ext_proc.v3 import HttpBody, HttpHeaders, ProcessingRequest, ProcessingResponse
from envoy_data_plane.google.protobuf import Struct
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from h2.errors import ErrorCodes

from budgetguard.adapters.grpc_wire.server import WireServer
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.epoch import Epoch
from budgetguard.core.handoff import METADATA_NAMESPACE
from budgetguard.core.operation import End
from ext_proc.exchange import Exchange
from ext_proc.leases import Leases
from ext_proc.service import PROCESS, ExternalProcessor
from ext_proc.settler import Settler
from ext_proc.spool import Spool
from tests.adapters.grpc_wire.raw import RawClient, framed
from tests.services.ext_proc.support import (
    FIXTURE_NANOS,
    FIXTURES,
    HOLD_NANOS,
    admit_in_redis,
    clock_ms,
    counter_in_redis,
    events_in_redis,
    request_headers,
)

JSON = (FIXTURES / "chat.json").read_bytes()
SSE = (FIXTURES / "chat_stream.sse").read_bytes()
SSE_WITH_USAGE = (FIXTURES / "chat_stream_with_usage.sse").read_bytes()


@pytest.fixture
async def settler(ready_redis, tmp_path):
    settler = Settler(Counters(ready_redis), Spool(tmp_path), incarnation=Epoch(ready_redis).run_id, now_ms=clock_ms)
    await settler.start()
    yield settler
    await settler.close()


@pytest.fixture
async def server(settler, ready_redis):
    counters = Counters(ready_redis)
    leases = Leases(counters, now_ms=clock_ms)
    with tempfile.TemporaryDirectory(prefix="bg-proc-", dir="/tmp") as folder:
        service = ExternalProcessor(
            lambda: Exchange(settler=settler, leases=leases, counters=counters, now_ms=clock_ms)
        )
        server = WireServer(f"unix:{Path(folder)}/proc.sock", bidirectional=service.methods(), drain_seconds=0.1)
        await server.set_serving(serving=True)
        await server.start()
        yield server
        await server.stop()


@pytest.fixture
async def channel(server):
    # Envoy has no limit of its own on what it is answered.
    options = (("grpc.max_receive_message_length", -1),)
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        yield channel


class Call:
    """One stream to the server, in betterproto's messages."""

    def __init__(self, channel):
        process = channel.stream_stream(
            PROCESS, request_serializer=bytes, response_deserializer=ProcessingResponse.parse
        )
        self.stream = process()
        self.to_client = b""

    async def say(self, **parts):
        await self.stream.write(ProcessingRequest(**parts))
        return await self.stream.read()

    async def request_headers(self, handoff):
        metadata = Metadata(filter_metadata={METADATA_NAMESPACE: Struct.from_dict(handoff.to_metadata())})
        headers = header_map({":method": "POST", ":path": "/v1/chat/completions"})
        return await self.say(request_headers=HttpHeaders(headers=headers), metadata_context=metadata)

    async def response_headers(self, status=200, **named):
        headers = {":status": str(status)} | {name.replace("_", "-"): value for name, value in named.items()}
        details = Struct.from_dict({"response.code_details": "via_upstream"})
        return await self.say(
            response_headers=HttpHeaders(headers=header_map(headers)),
            attributes={"envoy.filters.http.ext_proc": details},
        )

    async def response_body(self, body, *, end=False):
        answer = await self.say(response_body=HttpBody(body=body, end_of_stream=end))
        common = answer.response_body.response
        mutation = common.body_mutation if common is not None else None
        if mutation is None:
            self.to_client += body
        elif mutation.body is not None:
            self.to_client += mutation.body


def header_map(headers):
    return HeaderMap(headers=[HeaderValue(key=key, raw_value=value.encode()) for key, value in headers.items()])


async def test_a_json_call_is_settled_when_its_last_piece_arrives(channel, ready_redis):
    handoff = await admit_in_redis(ready_redis)
    assert await counter_in_redis(ready_redis, handoff) == (0, HOLD_NANOS)
    call = Call(channel)
    answer = await call.request_headers(handoff)
    assert answer.request_headers is not None
    assert answer.mode_override is None
    await call.response_headers(content_type="application/json", content_length=str(len(JSON)))
    await call.response_body(JSON[:100])
    await call.response_body(JSON[100:])
    assert await counter_in_redis(ready_redis, handoff) == (FIXTURE_NANOS, 0)
    await call.stream.done_writing()
    assert await call.stream.read() is grpc.aio.EOF
    (event,) = await events_in_redis(ready_redis)
    assert (event.end, event.amount_nanos, event.status) == (End.CONFIRMED, FIXTURE_NANOS, 200)
    assert event.usage.output_tokens == 10


async def test_a_stream_that_must_be_rewritten_and_filtered(channel, ready_redis):
    handoff = await admit_in_redis(ready_redis, stream=True, inject_usage=True, clamped_output_tokens=50)
    call = Call(channel)
    answer = await call.request_headers(handoff)
    assert answer.mode_override.request_body_mode == ProcessingModeBodySendMode.BUFFERED
    assert answer.mode_override.response_body_mode == ProcessingModeBodySendMode.STREAMED
    asked = b'{"model":"gpt-4o-mini","stream":true,"messages":[]}'
    answer = await call.say(request_body=HttpBody(body=asked, end_of_stream=True))
    change = answer.request_body.response
    sent = json.loads(change.body_mutation.body)
    assert (sent["max_tokens"], sent["stream_options"]) == (50, {"include_usage": True})
    (length,) = change.header_mutation.set_headers
    assert int(length.header.raw_value) == len(change.body_mutation.body)
    await call.response_headers(content_type="text/event-stream")
    for start in range(0, len(SSE_WITH_USAGE), 40):
        await call.response_body(SSE_WITH_USAGE[start : start + 40])
    assert await counter_in_redis(ready_redis, handoff) == (FIXTURE_NANOS, 0)
    await call.response_body(b"", end=True)
    assert call.to_client == SSE


async def test_envoy_drops_the_stream_of_a_client_that_left(channel, ready_redis):
    handoff = await admit_in_redis(ready_redis)
    call = Call(channel)
    await call.request_headers(handoff)
    call.stream.cancel()
    await ended(ready_redis, handoff)
    (event,) = await events_in_redis(ready_redis)
    assert (event.end, event.amount_nanos, event.status) == (End.ESTIMATED, HOLD_NANOS, 0)


async def test_a_hundred_clients_that_leave_in_the_middle_of_their_streams(channel, ready_redis):
    handoffs = [await admit_in_redis(ready_redis, f"op-{number}", stream=True) for number in range(100)]
    calls = [Call(channel) for _ in handoffs]
    for call, handoff in zip(calls, handoffs, strict=True):
        await call.request_headers(handoff)
        await call.response_headers(content_type="text/event-stream")
        await call.response_body(b'data: {"choices":[{"index":0,"delta":{"content":"Hello"}}]}\n\n')
        call.stream.cancel()
    await ended(ready_redis, handoffs[0])
    events = await events_in_redis(ready_redis)
    assert {event.facts.operation_id for event in events} == {handoff.facts.operation_id for handoff in handoffs}
    assert [(event.end, event.amount_nanos) for event in events] == [(End.ESTIMATED, 100 * 150 + 5 * 600)] * 100


async def test_calls_that_outlast_the_drain_are_settled_too(server, channel, settler, ready_redis):
    handoff = await admit_in_redis(ready_redis)
    call = Call(channel)
    await call.request_headers(handoff)
    await server.stop()
    await ended(ready_redis, handoff)
    (event,) = await events_in_redis(ready_redis)
    assert event.end is End.ESTIMATED


async def test_a_body_of_ten_mebibytes_passes(channel, ready_redis):
    handoff = await admit_in_redis(ready_redis, clamped_output_tokens=50)
    call = Call(channel)
    await call.request_headers(handoff)
    body = json.dumps({"max_tokens": 100, "messages": ["x" * (10 * 2**20 - 100)]}).encode()
    answer = await call.say(request_body=HttpBody(body=body, end_of_stream=True))
    assert answer.request_body.response.body_mutation.body == body.replace(b"100", b"50", 1)


async def first_events(redis):
    async with asyncio.timeout(10):
        while not (events := await events_in_redis(redis)):  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.005)
    return events


@pytest.mark.parametrize("rewritten", [False, True])
async def test_a_call_that_envoy_drops_in_the_breath_that_it_opens_it(server, ready_redis, rewritten):
    """Its hold is heard of all the same, and freed: Envoy cannot have forwarded what waited for our answer."""
    handoff = await admit_in_redis(ready_redis, clamped_output_tokens=10 if rewritten else None)
    async with RawClient.connected(server.address.removeprefix("unix:")) as client:
        stream_id = client.open("Process", **{":path": PROCESS})
        client.h2.send_data(stream_id, framed(request_headers(handoff).SerializeToString()))
        client.h2.reset_stream(stream_id, ErrorCodes.CANCEL)
        await client.settled()
        (event,) = await first_events(ready_redis)
    assert (event.end, event.amount_nanos, event.detail) == (End.RELEASED, 0, "never forwarded")
    assert await counter_in_redis(ready_redis, handoff) == (0, 0)


async def test_a_call_whose_envoy_is_gone_in_the_breath_that_it_opens_it(server, ready_redis):
    handoff = await admit_in_redis(ready_redis)
    async with RawClient.connected(server.address.removeprefix("unix:")) as client:
        stream_id = client.open("Process", **{":path": PROCESS})
        client.h2.send_data(stream_id, framed(request_headers(handoff).SerializeToString()))
        client.writer.write(client.h2.data_to_send())
    await first_events(ready_redis)
    assert (await counter_in_redis(ready_redis, handoff))[1] == 0


async def test_health(channel):
    answer = await HealthStub(channel).Check(HealthCheckRequest())
    assert answer.status == HealthCheckResponse.SERVING


async def ended(redis, handoff):
    """Wait until nothing is held any more."""
    for _ in range(1000):
        if (await counter_in_redis(redis, handoff))[1] == 0:
            return
        await asyncio.sleep(0.01)
    pytest.fail("money is still held")
