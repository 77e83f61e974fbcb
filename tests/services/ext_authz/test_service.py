"""The server as Envoy meets it: over gRPC, driven by a second codec, with a real Redis behind it."""

import asyncio
import json
import tempfile
from dataclasses import replace

import grpc
import pytest
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.service.auth.v3 import (
    AttributeContext,
    AttributeContextHttpRequest,
    AttributeContextRequest,
    CheckRequest,
    CheckResponse,
)
from prometheus_client import REGISTRY

from budgetguard.adapters.grpc_wire.call import StatusCode
from budgetguard.adapters.grpc_wire.server import WireServer
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core.handoff import Handoff
from budgetguard.core.snapshot import TagSpec
from ext_authz import check
from ext_authz.service import CHECK, AuthorizationService
from tests.adapters.grpc_wire.frames import RST_STREAM, frame, u32
from tests.adapters.grpc_wire.raw import RawClient
from tests.services.ext_authz.test_check import BODY, KEY, TENANT, budget

CANCEL = 8


@pytest.fixture
async def serve():
    """Serve a checker; return the server."""
    servers = []
    with tempfile.TemporaryDirectory(prefix="bg-authz-", dir="/tmp") as folder:

        async def serve(checker):
            server = WireServer(
                f"unix:{folder}/{len(servers)}.sock", unary=AuthorizationService(checker).methods(), drain_seconds=5
            )
            await server.start()
            servers.append(server)
            return server

        yield serve
        for server in servers:
            await server.stop()


def check_request(*headers, body=BODY, **changes):
    """Ask as Envoy does; ``headers`` are pairs of a name and bytes."""
    sent = (("x-request-id", b"op-1"), ("x-api-key", KEY.encode()), *headers)
    header_map = HeaderMap(headers=[HeaderValue(key=name, raw_value=value) for name, value in sent])
    call = {"method": "POST", "path": "/v1/chat/completions", "header_map": header_map} | changes
    http = AttributeContextHttpRequest(raw_body=json.dumps(body).encode(), **call)
    return CheckRequest(attributes=AttributeContext(request=AttributeContextRequest(http=http)))


def stub(channel):
    return channel.unary_unary(CHECK, request_serializer=bytes, response_deserializer=CheckResponse.parse)


def names(options):
    return {option.header.key: option.header.value for option in options}


def decided(reason):
    """How many decisions Prometheus is told of."""
    return REGISTRY.get_sample_value("budgetguard_admission_decisions_total", {"reason": reason})


async def test_an_admitted_call(bench, serve):
    counted = decided("ADMITTED")
    server = await serve(bench.checker)
    async with grpc.aio.insecure_channel(server.address) as channel:
        answer = await stub(channel)(check_request())
    assert answer.status.code == 0
    assert answer.denied_response is None
    admitted = answer.ok_response
    assert names(admitted.headers) == {
        "x-budgetguard-cluster": "provider-openai",
        ":path": "/v1/chat/completions",
        "authorization": "Bearer sk-ours",
    }
    assert {"x-api-key", "x-tenant-id", "cookie"} <= set(admitted.headers_to_remove)
    assert "authorization" not in admitted.headers_to_remove
    told = names(admitted.response_headers_to_add)
    assert told["x-budgetguard-operation-id"] == "op-1"
    assert told["x-ratelimit-remaining-requests"] == "599"
    handoff = Handoff.from_metadata({key: value.string_value for key, value in answer.dynamic_metadata.fields.items()})
    assert (handoff.facts.operation_id, handoff.facts.tenant_id) == ("op-1", "acme")
    assert await bench.held() == (1, handoff.hold_nanos)
    assert decided("ADMITTED") == counted + 1
    # What Envoy hands on ends the very hold that the answer told of.
    await bench.counters.release(handoff, now_ms=bench.now_ms(), ended_at_ms=0, status=0, detail="")
    assert await bench.held() == (0, 0)


async def test_a_refusal(bench, serve):
    counted = decided("BUDGET_EXCEEDED"), decided("ROUTE_UNKNOWN"), decided("ADMITTED")
    await bench.counters.publish_tenant(replace(TENANT, version=2, budgets=(budget(1),)))
    server = await serve(bench.checker)
    async with grpc.aio.insecure_channel(server.address) as channel:
        answer = await stub(channel)(check_request())
        unknown = await stub(channel)(check_request(path="/v1/files"))
    assert answer.status.code == 7
    assert answer.ok_response is None
    assert answer.denied_response.status.code == 402
    assert json.loads(answer.denied_response.body)["error"]["code"] == "BUDGET_EXCEEDED"
    headers = names(answer.denied_response.headers)
    assert headers["content-type"] == "application/json"
    assert (headers["x-budgetguard-reason"], headers["x-budgetguard-operation-id"]) == ("BUDGET_EXCEEDED", "op-1")
    assert unknown.denied_response.status.code == 404
    assert await bench.held() == (0, 0)
    assert (decided("BUDGET_EXCEEDED") - 1, decided("ROUTE_UNKNOWN") - 1, decided("ADMITTED")) == counted


class PatientCounters(Counters):
    """Holds the money, and tells of it when it is let."""

    def __init__(self, redis):
        super().__init__(redis)
        self.reserved = asyncio.Event()
        self.gate = asyncio.Event()

    async def reserve(self, request):
        answer = await super().reserve(request)
        self.reserved.set()
        await self.gate.wait()
        return answer


async def told_of(server, *headers):
    """Return the facts that an admitted call is held by, or the error that a refused one gets."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        answer = await stub(channel)(check_request(*headers))
    if answer.denied_response is not None:
        assert answer.denied_response.status.code == 400
        return json.loads(answer.denied_response.body)["error"]
    fields = answer.dynamic_metadata.fields.items()
    return Handoff.from_metadata({key: value.string_value for key, value in fields}).facts


@pytest.mark.parametrize("name", ["X-Tags", "X-Session-Id", "X-Session-Name", "X-Session-Path", "X-User-Id"])
async def test_a_header_that_is_no_utf8_names_nobody(bench, serve, name):
    """Read as some text, two users (here: in Latin-1) would be one, and spend each other's budget."""
    session = () if name == "X-Session-Id" else (("x-session-id", b"s"),)
    error = await told_of(await serve(bench.checker), *session, (name.lower(), "jö".encode("latin-1")))
    assert (error["code"], error["param"]) == ("REQUEST_INVALID", name)
    assert error["message"].startswith(f"{name}: expected UTF-8")
    assert await bench.held() == (0, 0)


@pytest.mark.parametrize("user", ["jö", "j!", "李"])
async def test_other_languages_and_exclamation_marks_are_ids(bench, serve, user):
    assert (await told_of(await serve(bench.checker), ("x-user-id", user.encode()))).end_user == user


@pytest.mark.parametrize("name", ["X-Session-Id", "X-Session-Name", "X-Session-Path", "X-User-Id"])
async def test_a_header_with_one_value_may_not_come_twice(bench, serve, name):
    session = () if name == "X-Session-Id" else (("x-session-id", b"s"),)
    error = await told_of(await serve(bench.checker), *session, (name.lower(), b"a"), (name.lower(), b"b"))
    assert (error["code"], error["param"]) == ("REQUEST_INVALID", name)
    assert error["message"] == f"{name}: expected it once, got it several times."
    assert await bench.held() == (0, 0)


async def test_tags_may_come_in_several_headers(bench, serve):
    tags = tuple(TagSpec(tag_id=tag) for tag in ("a", "b", "c"))
    await bench.counters.publish_tenant(replace(TENANT, version=2, tags=tags))
    facts = await told_of(await serve(bench.checker), ("x-tags", b"c, a"), ("x-tags", b"b"))
    assert facts.tags == ("a", "b", "c")


async def test_a_client_that_gives_up_while_redis_is_slow(bench, serve, monkeypatch):
    monkeypatch.setattr(check, "CHECK_SECONDS", 60)
    counters = PatientCounters(bench.redis)
    server = await serve(bench.make(counters=counters))
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = stub(channel)(check_request())
        await counters.reserved.wait()
        assert (await bench.held())[0] == 1
        call.cancel()
        await nothing_held(bench)


async def test_an_answer_that_nobody_waited_for(bench, serve):
    server = await serve(bench.checker)
    async with RawClient.connected(server.address.removeprefix("unix:")) as client:
        answer = await client.call("Check", bytes(check_request()), **{":path": CHECK})
        assert answer.status == StatusCode.OK
        assert CheckResponse.parse(answer.messages[0]).ok_response is not None
        assert (await bench.held())[0] == 1
        # Envoy's deadline passed while the answer was on its way.
        client.writer.write(frame(RST_STREAM, 0, 1, u32(CANCEL)))
        await client.settled()
        await bench.releases.drain()
    assert await bench.held() == (0, 0)


async def test_a_refusal_that_nobody_waited_for(bench, serve):
    server = await serve(bench.checker)
    async with RawClient.connected(server.address.removeprefix("unix:")) as client:
        admitted = await client.call("Check", bytes(check_request()), **{":path": CHECK})
        refused = await client.call("Check", bytes(check_request(path="/v1/files")), **{":path": CHECK})
        assert admitted.status == refused.status == StatusCode.OK
        client.writer.write(frame(RST_STREAM, 0, 3, u32(CANCEL)))
        await client.settled()
        await bench.releases.drain()
    # The other one's hold stays.
    assert (await bench.held())[0] == 1


async def test_what_is_not_a_check_is_an_error_and_holds_nothing(bench, serve):
    server = await serve(bench.checker)
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_unary(CHECK)(b"\xff\xff\xff")
        assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.INTERNAL, "internal error")
        # Nothing at all is a call without a path: refused, as it names no route.
        answer = await stub(channel)(CheckRequest())
    assert answer.denied_response.status.code == 404
    assert await bench.held() == (0, 0)


async def nothing_held(bench):
    async with asyncio.timeout(20):
        while await bench.held() != (0, 0):  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.005)
