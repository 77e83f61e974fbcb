"""Moments that no calendar or store can hold are refused by name wherever a request takes one, and leave nothing."""

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from budgetguard.v1 import api_key_pb2, api_key_pb2_grpc, top_up_pb2, top_up_pb2_grpc
from tests.services.control_plane.conftest import METADATA
from tests.services.control_plane.test_grpc import details
from tests.services.control_plane.test_rest import violations

YEARS = "the years 1970 to 9999"
# What a Timestamp can be in JSON, and what else an ISO date can be.
TIMES = ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000001Z", "0001-01-01T00:00:00.001Z", "1969-12-30T23:59:59.999Z")
DATES = (*TIMES, "0001-01-01", "1969-12-29", "0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59-05:00")
PRICE = {"providerId": "dated", "model": "m", "usd": {"input_tokens": "1", "output_tokens": "1"}}
CUSTOM = {"period": "custom", "amountUsd": 1, "startDate": "2026-01-01", "endDate": "2026-01-31"}
CORRECTION = {"end": "EXPIRED", "from": "2026-01-01", "until": "2026-01-02", "amountUsd": "0", "reason": "x"}


@pytest.fixture
def made(rest, tenant_id) -> dict[str, str]:
    """What the paths below name: one of each."""
    body = {"kind": "openai", "baseUrl": "http://127.0.0.1:9", "apiKeyEnv": "OPENAI_API_KEY", "enabled": False}
    assert rest.put("/admin/provider/dated", json=body).status_code == 200
    budget = rest.post(f"/v1/admin/tenants/{tenant_id}/budgets", json=CUSTOM).json()
    key = rest.post(f"/admin/tenant/{tenant_id}/apikeys", json={}).json()
    return {"tenant": tenant_id, "budget": budget["id"], "key": key["id"]}


def kept(rest, made) -> list[object]:
    """All that the requests below could write."""
    paths = [
        "/admin/price",
        f"/admin/tenant/{made['tenant']}/budgets",
        f"/admin/tenant/{made['tenant']}/apikeys",
        f"/v1/admin/budgets/{made['budget']}/topups",
    ]
    answers = [rest.get(path) for path in paths]
    assert [answer.status_code for answer in answers] == [200] * len(paths)
    return [answer.json() for answer in answers]


BODIES = [
    ("POST", "/admin/price", {**PRICE, "priceId": "dated-1"}, "startDate", DATES),
    ("POST", "/admin/price", {**PRICE, "priceId": "dated-1"}, "endDate", DATES),
    ("PUT", "/admin/price/dated-1", PRICE, "startDate", DATES),
    ("POST", "/v1/admin/tenants/{tenant}/budgets", CUSTOM, "startDate", DATES),
    ("POST", "/v1/admin/tenants/{tenant}/budgets", CUSTOM, "endDate", (*DATES, "9999-12-31")),
    ("PUT", "/admin/budget/{budget}", {}, "startDate", DATES),
    ("PUT", "/admin/budget/{budget}", {}, "endDate", (*DATES, "9999-12-31")),
    ("POST", "/v1/admin/budgets/{budget}/topups", {"amountUsd": 1, "reason": "x"}, "startTime", TIMES),
    ("POST", "/v1/admin/budgets/{budget}/topups", {"amountUsd": 1, "reason": "x"}, "expireTime", TIMES),
    ("POST", "/admin/tenant/{tenant}/apikeys", {}, "expireTime", TIMES),
    ("PUT", "/admin/apikey/{key}", {}, "expireTime", TIMES),
    ("POST", "/v1/admin/tenants/{tenant}/corrections", CORRECTION, "from", DATES),
    ("POST", "/v1/admin/tenants/{tenant}/corrections", CORRECTION, "until", DATES),
]


@pytest.mark.parametrize(("method", "path", "body", "field", "moments"), BODIES)
def test_a_body_s_moment_out_of_range_is_refused_and_writes_nothing(rest, made, method, path, body, field, moments):
    before = kept(rest, made)
    for moment in moments:
        told = violations(rest.request(method, path.format(**made), json={**body, field: moment}))
        assert list(told) == [field], moment
        assert YEARS in told[field], moment
    assert kept(rest, made) == before


@pytest.mark.parametrize("field", ["startDate", "endDate"])
def test_a_listed_budget_s_date_out_of_range_is_refused_by_its_place(rest, made, field):
    before = kept(rest, made)
    for moment in DATES:
        body = {"budgets": [{"period": "daily", "amountUsd": 1}, {**CUSTOM, field: moment}]}
        told = violations(rest.post(f"/admin/tenant/{made['tenant']}/budgets", json=body))
        assert list(told) == [f"budgets[1].{field}"], moment
        assert YEARS in told[f"budgets[1].{field}"], moment
    assert kept(rest, made) == before


@pytest.mark.parametrize("field", ["from", "until"])
@pytest.mark.parametrize(
    "path",
    [
        "/admin/usage/ledger",
        "/admin/tenant/{tenant}/usage/ledger",
        "/admin/tenant/{tenant}/usage",
        "/v1/admin/refusals",
        "/v1/admin/refusals/counts",
        "/admin/tenant/{tenant}/refusals/counts",
    ],
)
def test_a_listing_s_moment_out_of_range_is_refused(rest, made, path, field):
    for moment in DATES:
        told = violations(rest.get(path.format(**made), params={field: moment}))
        assert list(told) == [field], moment
        assert YEARS in told[field], moment


def test_the_first_and_the_last_moments_are_taken_and_read_back(rest, made):
    first, last = "1970-01-01T00:00:00Z", "9999-12-31T23:59:59.999Z"
    price = {**PRICE, "priceId": f"{made['tenant']}-ends", "startDate": first, "endDate": last}
    for _ in range(2):
        answer = rest.post("/admin/price", json=price)
        assert (answer.json()["startDate"], answer.json()["endDate"]) == (first, last)
    assert answer.json() in rest.get("/admin/price").json()["prices"]

    # In a zone where 1970 began before it did in UTC.
    days = {"startDate": "1970-01-01", "endDate": "9999-12-30", "timeZone": "Asia/Tokyo"}
    budget = rest.put(f"/admin/budget/{made['budget']}", json=days)
    assert budget.status_code == 200, budget.text
    assert budget.json()["startDate"] == "1969-12-31T15:00:00Z"
    budget = rest.put(f"/admin/budget/{made['budget']}", json={"startDate": first, "endDate": last})
    assert (budget.json()["startDate"], budget.json()["endDate"]) == (first, last)
    key = rest.put(f"/admin/apikey/{made['key']}", json={"expireTime": last})
    assert key.json()["expireTime"] == last
    top_up = {"amountUsd": 1, "reason": "x", "startTime": first, "expireTime": last}
    added = rest.post(f"/v1/admin/budgets/{made['budget']}/topups", json=top_up)
    assert (added.json()["startTime"], added.json()["expireTime"]) == (first, last)
    span = {"from": first, "until": last}
    assert rest.get("/admin/usage/ledger", params=span).status_code == 200
    assert rest.get(f"/admin/tenant/{made['tenant']}/usage", params=span).status_code == 200


@pytest.mark.parametrize(
    "moment",
    [
        Timestamp(seconds=-62_135_596_800),
        Timestamp(seconds=-62_135_596_800, nanos=1000),
        Timestamp(seconds=-86_401),
        Timestamp(seconds=253_402_300_800),
        Timestamp(seconds=2**62),
        Timestamp(seconds=1, nanos=10**9),
    ],
)
async def test_a_grpc_client_s_moment_out_of_range_is_refused(channel, made, moment):
    keys, top_ups = api_key_pb2_grpc.ApiKeyServiceStub(channel), top_up_pb2_grpc.TopUpServiceStub(channel)
    top_up = {"budget_id": made["budget"], "amount_usd": "1", "reason": "x"}
    calls = [
        (keys.CreateApiKey, api_key_pb2.CreateApiKeyRequest(tenant_id=made["tenant"], expire_time=moment)),
        (keys.UpdateApiKey, api_key_pb2.UpdateApiKeyRequest(api_key_id=made["key"], expire_time=moment)),
        (top_ups.AddTopUp, top_up_pb2.AddTopUpRequest(**top_up, expire_time=moment)),
        (top_ups.AddTopUp, top_up_pb2.AddTopUpRequest(**top_up, start_time=moment)),
    ]
    for number, (method, request) in enumerate(calls):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await method(request, metadata=METADATA)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        _, told, _ = details(refused.value)
        assert list(told) == ["start_time" if number == 3 else "expire_time"]
        assert YEARS in str(told)
