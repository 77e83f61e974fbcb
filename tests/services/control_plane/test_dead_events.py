"""Dead events over REST through the real edge, and over gRPC: put aside by the running drain, seen, ended."""

import time
from itertools import count

import grpc
import pytest

from budgetguard.adapters.postgres.ledger import DeadEvent, LedgerRepository
from budgetguard.adapters.postgres.pool import open_database
from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.v1 import dead_event_pb2, dead_event_pb2_grpc
from tests.plugins.usage_events import an_event
from tests.services.control_plane.conftest import METADATA
from tests.services.control_plane.test_rest import reason, violations

SECONDS = 30
_numbers = count(1)


@pytest.fixture
async def lose_usage(program, rest, tenant_id):
    """Bring an event of the tenant into its stream that nobody can read, and wait until the drain has put it aside."""
    redis = RedisClient(program.environment["REDIS_URL"])
    shard = keys.shard_of(tenant_id)

    async def lose(facts=f'{{"tenant_id":"{tenant_id}","unheard-of":1}}') -> str:
        entry = await redis.command("XADD", keys.usage(shard), "*", "facts", facts, "delta", "\u2603\x00")
        deadline = time.monotonic() + SECONDS
        while rest.get(f"/admin/usage/deadevents/{shard}-{entry}").status_code == 404:
            assert time.monotonic() < deadline, program.log()[-3000:]
        return f"{shard}-{entry}"

    yield lose
    await redis.close()


@pytest.fixture
async def put_aside(program, tenant_id):
    """Put an event aside that can be read by now."""
    database = await open_database(program.environment["DATABASE_URL"])

    async def put() -> str:
        shard, event_id = keys.shard_of(tenant_id), f"{next(_numbers)}-0"
        event = an_event(f"{tenant_id}-{event_id}", tenant_id=tenant_id, delta_nanos=2_000_000_000)
        dead = DeadEvent(shard=shard, event_id=event_id, fields=event.to_fields(), error="malformed")
        await LedgerRepository(database).insert_events([], dead=[dead])
        return f"{shard}-{event_id}"

    yield put
    await database.close()


async def test_they_are_seen_and_discarded_with_a_reason(rest, tenant_id, lose_usage):
    first, second = await lose_usage(), await lose_usage("nonsense")
    (dead,) = rest.get(f"/admin/tenant/{tenant_id}/usage/deadevents").json()["deadEvents"]
    assert (dead["id"], dead["tenantId"], dead["error"], dead["state"]) == (first, tenant_id, "malformed", "STANDING")
    assert dead["shard"] == keys.shard_of(tenant_id)
    assert dead["fields"] == {"facts": f'{{"tenant_id":"{tenant_id}","unheard-of":1}}', "delta": "\u2603\x00"}
    assert dead["recordTime"]
    assert "resolveTime" not in dead
    assert rest.get(f"/v1/admin/usage/deadevents/{second}").json()["tenantId"] == ""
    deadline = time.monotonic() + SECONDS  # health is kept for a second
    while not any("deadevents" in problem for problem in rest.get("/admin/health").json()["problems"]):
        assert time.monotonic() < deadline

    one = f"/admin/usage/deadevents/{first}"
    assert list(violations(rest.post(f"{one}/discard", json={}))) == ["reason"]
    assert list(violations(rest.post(f"{one}/discard", json={"why": "x"}))) == ["why"]
    again = rest.post(f"{one}/retry")
    assert (again.status_code, reason(again)) == (400, "DEAD_EVENT_REFUSED")
    discarded = rest.post(f"{one}/discard", json={"reason": "a test's"})
    assert discarded.status_code == 200, discarded.text
    assert (discarded.json()["state"], discarded.json()["reason"]) == ("DISCARDED", "a test's")
    assert rest.post(f"/v1{one}/discard", json={"reason": "other words"}).json() == discarded.json()
    assert rest.get(one).json() == discarded.json()
    late = rest.post(f"{one}/retry", json={})
    assert (late.status_code, reason(late)) == (409, "DEAD_EVENT_RESOLVED")

    listed = rest.get("/admin/usage/deadevents", params={"state": "STANDING", "shard": keys.shard_of(tenant_id)}).json()
    assert second in {event["id"] for event in listed["deadEvents"]}
    assert first not in {event["id"] for event in listed["deadEvents"]}
    assert rest.post(f"/admin/usage/deadevents/{second}/discard", json={"reason": "x"}).status_code == 200


async def test_one_whose_cause_was_mended_is_retried(rest, tenant_id, put_aside):
    dead_event_id = await put_aside()
    retried = rest.post(f"/admin/usage/deadevents/{dead_event_id}/retry")
    assert retried.status_code == 200, retried.text
    assert (retried.json()["state"], retried.json()["tenantId"]) == ("RETRIED", tenant_id)
    assert rest.post(f"/admin/usage/deadevents/{dead_event_id}/retry").json() == retried.json()
    (row,) = rest.get(f"/admin/tenant/{tenant_id}/usage/ledger").json()["rows"]
    assert row["deltaUsd"] == "2"
    late = rest.post(f"/admin/usage/deadevents/{dead_event_id}/discard", json={"reason": "x"})
    assert (late.status_code, reason(late)) == (409, "DEAD_EVENT_RESOLVED")


async def test_the_alarm_rises_and_falls_with_them(program, rest, lose_usage):
    def wait_for(number: int) -> None:
        deadline = time.monotonic() + SECONDS
        while f'budgetguard_ledger_alarms{{kind="dead_events"}} {number}.0' not in rest.get("/metrics").text:
            assert time.monotonic() < deadline, program.log()[-3000:]
            time.sleep(0.2)

    standing = len(rest.get("/admin/usage/deadevents", params={"state": "STANDING"}).json()["deadEvents"])
    lost = await lose_usage()
    wait_for(standing + 1)
    rest.post(f"/admin/usage/deadevents/{lost}/discard", json={"reason": "a test's"})
    wait_for(standing)


@pytest.mark.parametrize("path", ["/admin/tenant/{}/usage/deadevents", "/v1/admin/tenants/{}/usage/deadevents"])
def test_a_tenant_that_there_is_not_has_no_list(rest, path):
    for query in ({}, {"state": "STANDING"}):
        missing = rest.get(path.format("nobody"), params=query)
        assert (missing.status_code, reason(missing)) == (404, "RESOURCE_NOT_FOUND")


def test_what_cannot_be_asked_is_refused_by_name(rest):
    assert list(violations(rest.get("/admin/usage/deadevents", params={"shard": 256}))) == ["shard"]
    assert list(violations(rest.get("/admin/usage/deadevents", params={"page_token": "x"}))) == ["page_token"]
    for missing in (rest.get("/admin/usage/deadevents/x"), rest.post("/admin/usage/deadevents/1-5-0/retry")):
        assert (missing.status_code, reason(missing)) == (404, "RESOURCE_NOT_FOUND")
    assert rest.get("/admin/usage/deadevents", headers={"X-Admin-Key": "x"}).status_code == 401


async def test_over_grpc(channel, tenant_id, put_aside):
    stub = dead_event_pb2_grpc.DeadEventServiceStub(channel)
    made = {await put_aside() for _ in range(3)}
    request = dead_event_pb2.ListDeadEventsRequest(tenant_id=tenant_id, page_size=2)
    page = await stub.ListDeadEvents(request, metadata=METADATA)
    request.page_token = page.next_page_token
    rest_of_it = await stub.ListDeadEvents(request, metadata=METADATA)
    assert (len(page.dead_events), rest_of_it.next_page_token) == (2, "")
    assert {event.id for event in (*page.dead_events, *rest_of_it.dead_events)} == made
    for dead_event_id in made:
        retry = dead_event_pb2.RetryDeadEventRequest(dead_event_id=dead_event_id)
        assert (await stub.RetryDeadEvent(retry, metadata=METADATA)).state == dead_event_pb2.DeadEvent.RETRIED
        got = await stub.GetDeadEvent(
            dead_event_pb2.GetDeadEventRequest(dead_event_id=dead_event_id), metadata=METADATA
        )
        assert got.resolve_time.seconds > 0
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.DiscardDeadEvent(
            dead_event_pb2.DiscardDeadEventRequest(dead_event_id=min(made), reason="x"), metadata=METADATA
        )
    assert refused.value.code() is grpc.StatusCode.ABORTED
    with pytest.raises(grpc.aio.AioRpcError, match="expected STANDING, RETRIED, DISCARDED"):
        await stub.ListDeadEvents(dead_event_pb2.ListDeadEventsRequest(state=9), metadata=METADATA)
