"""An administrator's word on what a call cost: budgets and ledger follow it, once, whoever sends it how often."""

import asyncio
import json
import time
from decimal import Decimal

import httpx

from tests.e2e.admin import monthly

PATH = "/v1/chat/completions"


def a_call(tenant, **asked):
    body = {
        "model": "gpt-4o-mini",
        "max_tokens": 50,
        "messages": [{"role": "user", "content": "fake:" + json.dumps(asked)}],
    }
    answer = httpx.post(f"{tenant.base_url}{PATH}", json=body, headers=tenant.headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-budgetguard-operation-id"]


def correct(tenant, operation_id, amount, reason="as the invoice says"):
    path = f"/v1/admin/operations/{operation_id}/corrections"
    return tenant.http.post(path, json={"amountUsd": amount, "reason": reason})


def spent_becomes(tenant, amount):
    deadline = time.monotonic() + 10
    while tenant.budget()[0] != amount and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tenant.budget()[0] == amount


def test_a_correction_moves_the_budget_and_the_ledger_and_can_be_corrected(new_tenant):
    tenant = new_tenant(monthly("1"))
    operation_id = a_call(tenant)
    (row,) = tenant.rows(at_least=1)
    answer = correct(tenant, operation_id, "0.25")
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["amountUsd"], told["previousUsd"], told["previousEnd"]) == ("0.25", row["amountUsd"], "CONFIRMED")
    spent_becomes(tenant, Decimal("0.25"))
    newest = tenant.rows(at_least=2)[0]
    assert (newest["end"], newest["amountUsd"], newest["detail"]) == ("CORRECTED", "0.25", "as the invoice says")
    assert newest["units"] == row["units"]
    assert Decimal(newest["deltaUsd"]) == Decimal("0.25") - Decimal(row["amountUsd"])
    # Sent again it changes nothing and is told the same, for whatever reason.
    assert told["sequence"] == newest["sequence"]
    assert correct(tenant, operation_id, "0.25").json() == told
    assert correct(tenant, operation_id, "0.25", reason="once more").json() == told
    assert len(tenant.rows(at_least=2)) == 2
    assert correct(tenant, operation_id, "0", reason="a test call").json()["previousUsd"] == "0.25"
    spent_becomes(tenant, Decimal(0))
    assert tenant.ledger_sum(at_least=3) == 0


async def test_of_corrections_at_once_one_is_made_and_the_others_are_told_to_read_again(new_tenant):
    tenant = new_tenant(monthly("1"))
    operation_id = a_call(tenant)
    tenant.rows(at_least=1)
    amounts = [f"0.0{number}" for number in range(1, 7)]
    answers = await asyncio.gather(*(asyncio.to_thread(correct, tenant, operation_id, amount) for amount in amounts))
    made = [answer.json()["amountUsd"] for answer in answers if answer.status_code == 200]
    for answer in answers:
        if answer.status_code != 200:
            assert answer.status_code == 409, answer.text
            assert (answer.json()["code"], "OPERATION_CHANGED" in answer.text) == (10, True)
    # Whoever came late enough to read what was made corrected that, which is no conflict.
    rows = tenant.rows(at_least=1 + len(made))
    assert len(rows) == 1 + len(made)
    assert {row["amountUsd"] for row in rows if row["end"] == "CORRECTED"} == set(made)
    spent_becomes(tenant, Decimal(rows[0]["amountUsd"]))
    # The same, six times at once, is one correction with one answer.
    answers = await asyncio.gather(*(asyncio.to_thread(correct, tenant, operation_id, "0.5") for _ in amounts))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert len(tenant.rows(at_least=2 + len(made))) == 2 + len(made)
    spent_becomes(tenant, Decimal("0.5"))


def test_what_cannot_be_corrected_is_refused_by_name(new_tenant):
    tenant = new_tenant(monthly("1"))
    operation_id = a_call(tenant)
    tenant.rows(at_least=1)
    for changes, field in (
        ({"amountUsd": "-1"}, "amountUsd"),
        ({"amountUsd": ""}, "amountUsd"),
        ({"amountUsd": "9007200"}, "amountUsd"),
        ({"reason": " "}, "reason"),
        ({"reason": "x" * 201}, "reason"),
        ({"because": "x"}, "because"),
    ):
        body = {"amountUsd": "1", "reason": "x", **changes}
        answer = tenant.http.post(f"/v1/admin/operations/{operation_id}/corrections", json=body)
        assert answer.status_code == 400, answer.text
        assert field in answer.text or field.replace("Usd", "_usd") in answer.text
    assert correct(tenant, "no-such-operation", "1").status_code == 404
    assert len(tenant.rows(at_least=1)) == 1


def test_all_that_ended_in_one_way_are_corrected_together(new_tenant):
    tenant, other = new_tenant(monthly("1")), new_tenant(monthly("1"))
    for _ in range(5):
        a_call(tenant)
    a_call(other)
    tenant.rows(at_least=5)
    path = f"/v1/admin/tenants/{tenant.tenant_id}/corrections"
    wanted = {"end": "CONFIRMED", "amountUsd": "0.01", "reason": "incident 7"}
    before = tenant.settled()
    dry = tenant.http.post(path, json={**wanted, "validateOnly": True}).json()
    assert (dry["operations"], Decimal(dry["movedUsd"]), dry["more"]) == (5, Decimal("0.05") - before, False)
    assert tenant.settled() == before
    assert tenant.http.post(path, json=wanted).json() == dry
    # The rows are there with the answer, so asking again at once finds none.
    assert tenant.http.post(path, json=wanted).json()["operations"] == 0
    again = tenant.http.post(path, json={**wanted, "end": "CORRECTED"}).json()
    assert (again["operations"], again["movedUsd"], again["more"]) == (0, "0", False)
    spent_becomes(tenant, Decimal("0.05"))
    assert tenant.ledger_sum(at_least=10) == Decimal("0.05")
    assert tenant.http.post(path, json=wanted).json()["operations"] == 0
    assert tenant.http.post(path, json={**wanted, "end": "EXPIRED", "model": "none"}).json()["operations"] == 0
    assert tenant.http.post(path, json={"amountUsd": "0", "reason": "x"}).status_code == 400
    assert tenant.http.post(path, json={**wanted, "from": "yesterday"}).status_code == 400
    assert len(other.rows(at_least=1)) == 1


async def test_calls_under_way_are_listed_with_what_they_hold(new_tenant):
    tenant = new_tenant(monthly("1"))
    call = asyncio.create_task(asyncio.to_thread(a_call, tenant, delay_ms=2000))
    path = f"/admin/tenant/{tenant.tenant_id}/holds"
    for _ in range(60):
        listed = tenant.http.get(path).json()
        if listed["holds"]:
            break
        await asyncio.sleep(0.05)
    (hold,) = listed["holds"]
    assert (hold["model"], hold["apiKeyId"], listed["totalOperations"]) == ("gpt-4o-mini", tenant.key_id, "1")
    assert Decimal(hold["holdUsd"]) == Decimal(listed["totalUsd"]) == tenant.budget()[1] > 0
    assert tenant.http.get(path, params={"page_size": 1}).json()["nextPageToken"] == ""
    assert hold["operationId"] == await call
    assert tenant.http.get(path).json()["holds"] == []
    assert tenant.http.get("/admin/tenant/nobody/holds").status_code == 404


async def test_calls_under_way_are_listed_page_by_page(new_tenant):
    tenant = new_tenant(monthly("1"))
    calls = [asyncio.create_task(asyncio.to_thread(a_call, tenant, delay_ms=2500)) for _ in range(3)]
    path = f"/admin/tenant/{tenant.tenant_id}/holds"
    for _ in range(60):
        if len(tenant.http.get(path).json()["holds"]) == 3:
            break
        await asyncio.sleep(0.05)
    listed, token = [], ""
    for _ in range(3):
        page = tenant.http.get(path, params={"page_size": 1, "page_token": token}).json()
        listed += [hold["operationId"] for hold in page["holds"]]
        token = page["nextPageToken"]
    assert token == ""
    assert sorted(listed) == sorted(await asyncio.gather(*calls))


def test_spend_is_listed_and_summed_by_whose_it_is(new_tenant):
    tenant = new_tenant(monthly("1"))
    for tag, parent in (("eng", ""), ("web", "eng")):
        made = tenant.http.post(f"/admin/tenant/{tenant.tenant_id}/tags", json={"tagId": tag, "parentId": parent})
        assert made.status_code == 200, made.text
    for headers in ({"X-Tags": "web", "X-Session-Id": "run 7"}, {"X-Tags": "eng", "X-User-Id": "jo"}, {}):
        body = {"model": "gpt-4o-mini", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(f"{tenant.base_url}{PATH}", json=body, headers={**tenant.headers, **headers})
        assert answer.status_code == 200, answer.text
    rows = tenant.rows(at_least=3)
    for field, value, number in (
        ("tagId", "eng", 2),
        ("tagId", "web", 1),
        ("sessionId", "run 7", 1),  # spelled run+7 in the URL
        ("endUser", "jo", 1),
        ("providerId", "openai", 3),
        ("providerId", "other", 0),
    ):
        path = f"/admin/tenant/{tenant.tenant_id}/usage/ledger"
        assert len(tenant.http.get(path, params={field: value}).json().get("rows", [])) == number, field
    cost = sum(Decimal(row["amountUsd"]) for row in rows)
    for group, sums in (
        ("tag", {"": 1, "eng": 2, "web": 1}),
        ("session", {"": 2, "run 7": 1}),
        ("end_user", {"": 2, "jo": 1}),
        ("provider", {"openai": 3}),
    ):
        told = tenant.http.get(f"/admin/tenant/{tenant.tenant_id}/usage", params={"groupBy": group}).json()
        assert {one["group"]: int(one["operations"]) for one in told["sums"]} == sums
        assert (Decimal(told["totalUsd"]), told["totalOperations"]) == (cost, "3")
