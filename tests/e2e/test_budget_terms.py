"""What a budget's terms mean for real calls: a top-up admits, an observed budget only tells what it sees."""

import time
from decimal import Decimal

import httpx

CHAT = {
    "model": "gpt-4o-mini",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "Say hello."}],
}
EVENT_SECONDS = 30


def call(tenant) -> httpx.Response:
    return httpx.post(f"{tenant.base_url}/v1/chat/completions", json=CHAT, headers=tenant.headers, timeout=20)


def test_a_top_up_admits_the_next_call_and_its_removal_refuses_again(new_tenant):
    tenant = new_tenant({"period": "yearly", "amountUsd": "0", "timeZone": "Asia/Tokyo", "anchorDay": 31})
    assert call(tenant).status_code == 402
    path = f"/v1/admin/budgets/{tenant.budgets[0]['id']}/topups"
    added = tenant.http.post(path, json={"amountUsd": "1", "reason": "the end of the year"})
    assert added.status_code == 200, added.text
    assert call(tenant).status_code == 200
    spent = tenant.settled()
    assert 0 < spent < Decimal("0.001")
    assert tenant.http.delete(f"{path}/{added.json()['id']}").status_code == 200
    refused = call(tenant)
    assert refused.status_code == 402
    assert refused.json()["error"]["limit_usd"] == "0"
    window = tenant.http.get(f"/v1/admin/budgets/{tenant.budgets[0]['id']}").json()["window"]
    assert (Decimal(window["spentUsd"]), window["remainingUsd"]) == (spent, "0")


def test_a_threshold_of_an_observed_budget_is_told_once(new_tenant):
    tenant = new_tenant({"period": "quarterly", "amountUsd": "0.000000001", "mode": "OBSERVE", "thresholdBps": [10000]})
    for _ in range(2):
        assert call(tenant).status_code == 200
    path = f"/v1/admin/tenants/{tenant.tenant_id}/budgetevents"
    deadline = time.monotonic() + EVENT_SECONDS
    while not (events := tenant.http.get(path).json()["events"]):
        assert time.monotonic() < deadline, "no event"
        time.sleep(0.2)
    time.sleep(6)  # another look of the job
    (event,) = tenant.http.get(path).json()["events"]
    assert [event] == events
    assert (event["budgetId"], event["thresholdBps"], event["mode"]) == (tenant.budgets[0]["id"], 10000, "OBSERVE")
    assert Decimal(event["spentUsd"]) > 0
    assert event["limitUsd"] == "0.000000001"
