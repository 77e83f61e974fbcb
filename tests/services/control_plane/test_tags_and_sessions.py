"""Tags, sessions and what records carry of them: over REST through the real edge, down to what calls are decided by."""

import pytest

from budgetguard.adapters.postgres.ledger import LedgerRepository
from budgetguard.adapters.postgres.pool import open_database
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core.snapshot import TagSpec
from budgetguard.v1 import tag_pb2, tag_pb2_grpc
from tests.plugins.usage_events import a_delivery
from tests.services.control_plane.conftest import METADATA
from tests.services.control_plane.test_rest import reason, violations


@pytest.fixture
def tags(rest, tenant_id):
    path = f"/admin/tenant/{tenant_id}/tags"

    def add(tag_id, parent_id="", **more):
        answer = rest.post(path, json={"tagId": tag_id, "parentId": parent_id, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    add.path = path
    return add


@pytest.fixture
async def counters(program):
    redis = RedisClient(program.environment["REDIS_URL"])
    yield Counters(redis)
    await redis.close()


async def test_a_tree_over_rest(rest, tenant_id, tags, counters):
    tags("company")
    made = tags("eng", "company", name="Engineering")
    assert (made["path"], made["status"], made["name"]) == ("company/eng", "ACTIVE", "Engineering")
    assert tags("team:search_1.0", "eng")["name"] == "team:search_1.0"
    assert tags("sales")["parentId"] == ""
    one = f"{tags.path}/team:search_1.0"
    assert rest.get(one).json()["path"] == "company/eng/team:search_1.0"

    moved = rest.post(f"{one}/move", json={"parentId": "sales"})
    assert moved.json()["path"] == "sales/team:search_1.0", moved.text
    assert TagSpec(tag_id="team:search_1.0", parent_id="sales") in (await counters.load_tenant(tenant_id)).tags
    renamed = rest.put(one, json={"name": "Search", "etag": moved.json()["etag"]})
    assert renamed.json()["name"] == "Search"
    assert reason(rest.put(one, json={"name": "x", "etag": moved.json()["etag"]})) == "ETAG_MISMATCH"

    closed = rest.delete(f"{tags.path}/sales")
    assert closed.json()["status"] == "INACTIVE", closed.text
    assert TagSpec(tag_id="sales", active=False) in (await counters.load_tenant(tenant_id)).tags
    assert rest.put(f"{tags.path}/sales", json={"status": "active"}).json()["status"] == "ACTIVE"
    assert TagSpec(tag_id="sales") in (await counters.load_tenant(tenant_id)).tags
    listed = rest.get(tags.path).json()["tags"]
    assert [tag["path"] for tag in listed] == ["company", "company/eng", "sales", "sales/team:search_1.0"]
    first = rest.get(tags.path, params={"pageSize": 2}).json()
    rest_of_it = rest.get(tags.path, params={"page_token": first["nextPageToken"]}).json()
    assert first["tags"] + rest_of_it["tags"] == listed


def test_what_cannot_be_is_refused_by_name(rest, tags):
    tags("a")
    tags("b", "a")
    assert list(violations(rest.post(tags.path, json={"tagId": "a/b"}))) == ["tagId"]
    assert list(violations(rest.post(tags.path, json={"name": "Nameless"}))) == ["tagId"]
    assert list(violations(rest.post(f"{tags.path}/a/move", json={"parentId": "b"}))) == ["parentId"]
    # A forgotten parent is not the root.
    assert list(violations(rest.post(f"{tags.path}/b/move", json={}))) == ["parentId"]
    assert list(violations(rest.put(f"{tags.path}/a", json={}))) == ["updateMask"]
    assert list(violations(rest.put(f"{tags.path}/a", json={"name": ""}))) == ["name"]
    assert list(violations(rest.put(f"{tags.path}/a", json={"parentId": "b"}))) == ["parentId"]
    assert reason(rest.post(tags.path, json={"tagId": "a"})) == "RESOURCE_ALREADY_EXISTS"
    assert reason(rest.post(tags.path, json={"tagId": "c", "parentId": "nope"})) == "RESOURCE_NOT_FOUND"
    assert reason(rest.get(f"{tags.path}/nope")) == "RESOURCE_NOT_FOUND"


async def test_over_grpc(channel, tenant_id):
    stub = tag_pb2_grpc.TagServiceStub(channel)
    await stub.CreateTag(tag_pb2.CreateTagRequest(tenant_id=tenant_id, tag_id="a"), metadata=METADATA)
    request = tag_pb2.CreateTagRequest(tenant_id=tenant_id, tag_id="b", parent_id="a", request_id=f"{tenant_id}-1")
    made = await stub.CreateTag(request, metadata=METADATA)
    assert await stub.CreateTag(request, metadata=METADATA) == made
    moved = await stub.MoveTag(
        tag_pb2.MoveTagRequest(tenant_id=tenant_id, tag_id="b", parent_id="", etag=made.etag), metadata=METADATA
    )
    assert (moved.path, moved.parent_id) == ("b", "")
    listed = await stub.ListTags(tag_pb2.ListTagsRequest(tenant_id=tenant_id), metadata=METADATA)
    assert [tag.path for tag in listed.tags] == ["a", "b"]


async def test_keys_have_fixed_tags_and_tenants_required_ones(rest, tenant_id, tags, counters):
    tags("team")
    tags("prod")
    keys = f"/admin/tenant/{tenant_id}/apikeys"
    assert list(violations(rest.post(keys, json={"tags": ["nope"]}))) == ["tags"]
    assert list(violations(rest.post(keys, json={"tags": ["team", 5]}))) == ["tags[1]"]
    assert list(violations(rest.post(keys, json={"tags": "team"}))) == ["tags"]
    made = rest.post(keys, json={"tags": ["team"], "tokensPerMin": 1000, "concurrentCalls": 2})
    assert made.status_code == 200, made.text
    key_id, key = made.json()["id"], made.json()["apiKey"]
    assert (key["tags"], key["tokensPerMin"], key["concurrentCalls"]) == (["team"], 1000, 2)
    record = await counters.load_key(tenant_id, key_id)
    assert (record.tags, record.tokens_per_minute, record.concurrent_calls) == (("team",), 1000, 2)
    one = f"/admin/apikey/{key_id}"
    assert rest.put(one, json={"tags": ["prod", "team"]}).json()["tags"] == ["prod", "team"]
    cleared = rest.put(one, json={"tags": [], "tokensPerMin": None}).json()
    assert cleared["tags"] == []
    assert "tokensPerMin" not in cleared
    assert rest.get(keys).json()["apiKeys"] == [cleared]
    record = await counters.load_key(tenant_id, key_id)
    assert (record.tags, record.tokens_per_minute, record.concurrent_calls) == ((), None, 2)

    tenant = f"/admin/tenant/{tenant_id}"
    assert list(violations(rest.put(tenant, json={"requiredTags": ["nope"]}))) == ["requiredTags"]
    assert rest.put(tenant, json={"requiredTags": ["team"]}).json()["requiredTags"] == ["team"]
    assert (await counters.load_tenant(tenant_id)).required_tags == ("team",)
    assert list(violations(rest.delete(f"{tags.path}/team"))) == ["status"]
    assert rest.put(tenant, json={"requiredTags": []}).json()["requiredTags"] == []
    assert (await counters.load_tenant(tenant_id)).required_tags == ()


async def test_a_tenant_s_limits(rest, tenant_id, counters):
    limits = {
        "tokensPerMin": 100_000,
        "concurrentCalls": 20,
        "unboundedShare": 4,
        "streamSliceTokens": 512,
        "overrun": True,
    }
    tenant = f"/admin/tenant/{tenant_id}"
    assert (
        rest.get(tenant).json()
        | {
            "tokensPerMin": 0,
            "concurrentCalls": 0,
            "unboundedShare": 8,
            "streamSliceTokens": 4096,
            "overrun": False,
        }
        == rest.get(tenant).json()
    )
    changed = rest.put(tenant, json=limits).json()
    assert changed | limits == changed
    record = await counters.load_tenant(tenant_id)
    assert (record.tokens_per_minute, record.concurrent_calls, record.overrun) == (100_000, 20, True)
    assert (record.unbounded_share, record.stream_slice_tokens) == (4, 512)
    assert list(violations(rest.put(tenant, json={"tokensPerMin": -1}))) == ["tokensPerMin"]
    assert list(violations(rest.put(tenant, json={"streamSliceTokens": 15}))) == ["streamSliceTokens"]
    assert list(violations(rest.put(tenant, json={"unboundedShare": 0}))) == ["unboundedShare"]
    assert list(violations(rest.put(tenant, json={"overrun": None}))) == ["overrun"]
    created = rest.post("/admin/tenant", json={"name": f"{tenant_id} again", **limits}).json()
    assert created | limits == created


async def test_sessions(rest, tenant_id, counters, program):
    database = await open_database(program.environment["DATABASE_URL"])
    told = {"tenant_id": tenant_id, "session_id": "run/7", "session_name": "Nightly", "session_path": "/plan"}
    await LedgerRepository(database).insert_events([a_delivery(f"{tenant_id}-op", delta_nanos=2_500, **told)])
    await database.close()
    sessions = f"/admin/tenant/{tenant_id}/sessions"
    (session,) = rest.get(sessions).json()["sessions"]
    assert (session["sessionId"], session["name"], session["path"]) == ("run/7", "Nightly", "/plan")
    assert (session["calls"], session["spentUsd"], session["status"]) == ("1", "0.0000025", "ACTIVE")
    assert session["firstCallTime"] == session["lastCallTime"]
    by_query = rest.get(f"/admin/tenant/{tenant_id}/session", params={"sessionId": "run/7"})
    assert by_query.json() == session, by_query.text

    closed = rest.post(f"{sessions}/deactivate", json={"sessionId": "run/7"})
    assert closed.json() == session | {"status": "INACTIVE"}, closed.text
    assert (await counters.load_tenant(tenant_id)).closed_sessions == ("run/7",)
    assert rest.post(f"{sessions}/deactivate", json={"sessionId": "later"}).json()["calls"] == "0"
    assert rest.get(f"{sessions}/later").json()["status"] == "INACTIVE"
    assert rest.post(f"{sessions}/reactivate", json={"sessionId": "run/7"}).json() == session
    assert (await counters.load_tenant(tenant_id)).closed_sessions == ("later",)
    assert list(violations(rest.post(f"{sessions}/deactivate", json={}))) == ["sessionId"]
    assert reason(rest.get(f"{sessions}/nope")) == "RESOURCE_NOT_FOUND"
