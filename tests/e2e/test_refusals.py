"""Refused calls through the edge: what their caller is told is what an administrator sees later."""

import asyncio
import time
from collections import Counter

import httpx
import pytest

from tests.e2e.admin import DRAIN_SECONDS, monthly

PATH = "/v1/chat/completions"
CHAT = {"model": "gpt-4o-mini", "max_tokens": 64, "messages": [{"role": "user", "content": "Say hello."}]}


def get(tenant, path="", **params):
    answer = tenant.http.get(f"/admin/tenant/{tenant.tenant_id}/refusals{path}", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def counts(tenant, **params) -> dict[str, int]:
    return {one["group"]: int(one["count"]) for one in get(tenant, "/counts", **params)["counts"]}


def recorded(tenant, number, **params):
    """Return the rows once ``number`` refusals are counted: a count never comes before its rows."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while int(get(tenant, "/counts", **params)["total"]) < number:
        assert time.monotonic() < deadline, get(tenant, "/counts", **params)
        time.sleep(0.1)
    assert int(get(tenant, "/counts", **params)["total"]) == number
    return get(tenant, page_size=1000, **params)["refusals"]


def call(tenant, *, key=None, body=CHAT, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(
        f"{tenant.base_url}{PATH}", json=body, headers={"X-API-Key": key or tenant.key, **names}, timeout=20
    )


def test_a_row_tells_the_very_numbers_that_the_caller_was_told(new_tenant):
    tenant = new_tenant(monthly("0.00001"))
    answer = call(tenant, X_Session_Id="run-7", X_User_Id="jo@example.org")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (402, "BUDGET_EXCEEDED")
    (row,) = recorded(tenant, 1)
    told = {name: value for name, value in error.items() if name not in {"message", "type", "param", "code"}}
    assert {"budget_id", "limit_usd", "spent_usd", "held_usd", "needed_usd", "resets_at"} <= told.keys()
    assert row["facts"] == told
    assert row["message"] == error["message"]
    assert (row["reason"], row["httpStatus"]) == (error["code"], answer.status_code)
    assert row["operationId"] == answer.headers["x-budgetguard-operation-id"]
    assert (row["tenantId"], row["apiKeyId"]) == (tenant.tenant_id, tenant.key_id)
    assert (row["api"], row["providerId"], row["model"]) == ("openai.chat", "openai", "gpt-4o-mini")
    assert (row["sessionId"], row["endUser"]) == ("run-7", "jo@example.org")
    assert get(tenant, session_id="run-7", model="gpt-4o-mini")["refusals"] == [row]
    assert get(tenant, session_id="run-8")["refusals"] == []
    assert tenant.budget() == (0, 0), "a refusal moves no counter"
    ledger = tenant.http.get(f"/admin/tenant/{tenant.tenant_id}/usage/ledger").json()
    assert ledger["rows"] == [], "and is no row of the ledger"


@pytest.mark.timeout(120)
async def test_a_loop_of_refusals_is_ten_rows_a_minute_and_a_count_of_all(new_tenant):
    tenant = new_tenant(monthly("0.00001"))
    other = tenant.http.post(f"/admin/tenant/{tenant.tenant_id}/apikeys", json={}).json()
    async with httpx.AsyncClient(base_url=tenant.base_url, timeout=20) as http:

        async def send(key, model="gpt-4o-mini") -> int:
            answer = await http.post(PATH, json={**CHAT, "model": model}, headers={"X-API-Key": key})
            return answer.status_code

        statuses = await asyncio.gather(
            *(send(tenant.key) for _ in range(25)),
            *(send(tenant.key, model="gpt-nope") for _ in range(12)),
            *(send(other["key"]) for _ in range(13)),
        )
    assert Counter(statuses) == {402: 38, 404: 12}
    rows = recorded(tenant, 50)
    assert counts(tenant) == {"BUDGET_EXCEEDED": 38, "MODEL_UNKNOWN": 12}
    assert counts(tenant, group_by="API_KEY") == {tenant.key_id: 37, other["id"]: 13}
    assert sum(counts(tenant, group_by="DAY").values()) == 50
    kept = Counter((row["apiKeyId"], row["reason"], row["refuseTime"][:16]) for row in rows)
    for key_id, reason, number in (
        (tenant.key_id, "BUDGET_EXCEEDED", 25),
        (tenant.key_id, "MODEL_UNKNOWN", 12),
        (other["id"], "BUDGET_EXCEEDED", 13),
    ):
        by_minute = counts(tenant, group_by="MINUTE", api_key_id=key_id, reason=reason)
        assert sum(by_minute.values()) == number
        for minute, refused in by_minute.items():
            assert kept.pop((key_id, reason, minute.removesuffix("Z"))) == min(10, refused)
    assert not kept
    times = [row["refuseTime"] for row in rows]
    assert times == sorted(times, reverse=True)


def test_a_revoked_key_s_attempts_are_seen_and_a_stranger_s_are_not(new_tenant):
    tenant = new_tenant()
    key = tenant.http.post(f"/admin/tenant/{tenant.tenant_id}/apikeys", json={}).json()
    assert call(tenant, key=key["key"][:-1] + ("A" if key["key"][-1] != "A" else "B")).status_code == 401
    assert tenant.http.delete(f"/admin/apikey/{key['id']}").json()["status"] == "REVOKED"
    assert call(tenant, key=key["key"]).status_code == 401
    assert call(tenant, X_Tags="nope").status_code == 400
    recorded(tenant, 2)
    assert counts(tenant) == {"API_KEY_REVOKED": 1, "TAG_UNKNOWN": 1}
    assert counts(tenant, group_by="API_KEY", reason="API_KEY_REVOKED") == {key["id"]: 1}
