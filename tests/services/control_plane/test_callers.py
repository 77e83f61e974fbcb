"""Who calls with a tenant's key, and what they are told while Redis has lost the records and the counters."""

import asyncio
import time

import asyncpg

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core.api_key import format_api_key, hash_secret, parse_api_key
from budgetguard.core.snapshot import KeySnapshot
from control_plane.callers import NOT_UTF8_HEADER, Callers, SentHeaders, read_headers
from control_plane.errors import DeniedError
from tests.plugins.redis_calls import KEY_ID, a_tenant
from tests.plugins.redis_server import close_shards
from tests.services.control_plane.test_rest import reason

SECRET = b"s" * 32
KEY = format_api_key(tenant_id="acme", key_id=KEY_ID, secret=SECRET)
NOW_MS = 1_767_225_600_000
QUOTED = {"route": "/v1/embeddings", "request": {"model": "text-embedding-3-small", "input": "a"}}


async def publish(redis) -> None:
    secret_sha256 = hash_secret(parse_api_key(KEY).secret)
    await Counters(redis).publish_tenant(a_tenant())
    await Counters(redis).publish_key(
        KeySnapshot(tenant_id="acme", key_id=KEY_ID, version=1, secret_sha256=secret_sha256)
    )


async def told(callers) -> str:
    try:
        caller = await callers.find(SentHeaders(values={"x-api-key": KEY}))
    except DeniedError as denied:
        return str(denied.reason)
    return caller.key.key_id


def callers_of(redis) -> Callers:
    return Callers(Counters(redis), now_ms=lambda: NOW_MS)


async def test_a_key_is_unknown_only_where_all_records_are(ready_redis):
    callers = callers_of(ready_redis)
    assert await told(callers) == "API_KEY_UNKNOWN"
    await publish(ready_redis)
    assert await told(callers) == KEY_ID
    await ready_redis.command("FLUSHALL")
    assert await told(callers) == "COUNTERS_NOT_READY"


async def test_a_key_without_its_tenant_s_record_is_not_revoked_until_all_records_are_there(ready_redis):
    await publish(ready_redis)
    await ready_redis.command("DEL", keys.tenant("acme"))
    assert await told(callers_of(ready_redis)) == "API_KEY_REVOKED"
    await close_shards(ready_redis, [keys.shard_of("acme")])
    assert await told(callers_of(ready_redis)) == "COUNTERS_NOT_READY"


def test_headers_are_read_as_they_came_and_one_that_the_edge_named_is_missing():
    metadata = [
        ("x-tags", "a"),
        ("x-user-id", "jo"),
        ("x-tags", "b"),
        ("grpc-trace-bin", b"\0"),
        (NOT_UTF8_HEADER, "x-session-id"),
    ]
    assert read_headers(metadata) == SentHeaders(
        values={"x-tags": "a,b", "x-user-id": "jo"}, not_utf8=["x-session-id"], repeated=["x-tags"]
    )
    assert read_headers([]) == SentHeaders(values={}, not_utf8=[], repeated=[])


async def test_after_a_flush_nobody_is_told_that_a_key_is_unknown_or_that_nothing_is_spent(rest, tenant_id, program):
    key = rest.post(f"/admin/tenant/{tenant_id}/apikeys", json={}).json()["key"]
    path = f"/admin/tenant/{tenant_id}/budgets"
    (made,) = rest.post(path, json={"budgets": [{"period": "daily", "amountUsd": 1}]}).json()["budgets"]
    assert made["state"] == "ACTIVE"
    redis = RedisClient(program.environment["REDIS_URL"], timeout_seconds=10)
    database = await asyncpg.connect(program.environment["DATABASE_URL"])
    try:
        # The rebuild is kept waiting: what it would do within the second is seen before it is done.
        await database.execute("SELECT pg_advisory_lock(hashtext('rebuild_counters'))")
        await redis.command("FLUSHALL")
        headers = {"X-API-Key": key}
        for answer in (
            rest.post("/v1/budgetguard/quote", json=QUOTED, headers=headers),
            rest.get("/v1/budgetguard/budgets", headers=headers),
        ):
            assert (answer.status_code, reason(answer)) == (503, "COUNTERS_NOT_READY"), answer.text
        (listed,) = rest.get(path).json()["budgets"]
        assert (listed["state"], listed.get("window")) == ("REBUILDING", None)
    finally:
        await database.close()
        await redis.close()
    deadline = time.monotonic() + 30
    # Its health is looked at once a second: others who use the program find it as it was.
    while rest.get(path).json()["budgets"] != [made] or not await asyncio.to_thread(program.serving):
        assert time.monotonic() < deadline, rest.get(path).text
        await asyncio.sleep(0.1)
    (own,) = rest.get("/v1/budgetguard/budgets", headers={"X-API-Key": key}).json()["budgets"]
    assert own["spentUsd"] == "0"


def test_a_stranger_s_key_is_unknown(rest):
    answer = rest.get("/v1/budgetguard/budgets", headers={"X-API-Key": KEY})
    assert (answer.status_code, reason(answer)) == (401, "API_KEY_UNKNOWN")
