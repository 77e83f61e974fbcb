"""A budget of a model holds for every name that the model is called by."""

import time
from decimal import Decimal

import httpx
import pytest

FAMILY, SNAPSHOT, ODD = "gpt-4o-mini", "gpt-4o-mini-2024-07-18", "GPT-4o-mini"
SPELLINGS = [FAMILY, SNAPSHOT, ODD]
TOO_LITTLE = "0.000001"


def call(tenant, model) -> httpx.Response:
    body = {"model": model, "max_tokens": 64, "messages": [{"role": "user", "content": "Say hello."}]}
    return httpx.post(f"{tenant.base_url}/v1/chat/completions", json=body, headers=tenant.headers, timeout=20)


def lifetime(amount_usd="10", **subject):
    return {"period": "lifetime", "amountUsd": amount_usd, **subject}


@pytest.mark.parametrize("model", SPELLINGS)
def test_a_model_s_budget_refuses_every_spelling(new_tenant, model):
    tenant = new_tenant(lifetime(TOO_LITTLE, model=FAMILY))
    refused = call(tenant, model)
    assert refused.status_code == 402, refused.text
    assert refused.json()["error"]["budget_id"] == tenant.budgets[0]["id"]
    assert call(tenant, "gpt-4o").status_code == 200


def test_a_snapshot_s_budget_refuses_the_snapshot_only(new_tenant):
    tenant = new_tenant(lifetime(TOO_LITTLE, model=SNAPSHOT))
    assert [call(tenant, model).status_code for model in SPELLINGS] == [200, 402, 200]


def test_all_spellings_have_one_share_of_a_template_and_a_budget_made_later_counts_them(new_tenant):
    tenant = new_tenant(lifetime(each="model"))
    for model in SPELLINGS:
        assert call(tenant, model).status_code == 200
    rows = tenant.rows(at_least=3)
    assert {row["model"] for row in rows} == set(SPELLINGS)
    assert {row["pricedModel"] for row in rows} == {FAMILY}
    spent = sum(Decimal(row["deltaUsd"]) for row in rows)
    made = tenant.http.post(f"/v1/admin/tenants/{tenant.tenant_id}/budgets", json=lifetime(model=FAMILY))
    assert made.status_code == 200, made.text
    deadline = time.monotonic() + 20
    while tenant.http.get(f"/v1/admin/budgets/{made.json()['id']}").json()["state"] == "SEEDING":
        assert time.monotonic() < deadline, "it never got its past"
    url = f"{tenant.base_url}/v1/budgetguard/budgets"
    for model in SPELLINGS:
        listed = httpx.get(url, headers=tenant.headers, params={"model": model}, timeout=20).json()["budgets"]
        assert {one["subject"] for one in listed} == {FAMILY}
        assert [(Decimal(one["spentUsd"]), Decimal(one["heldUsd"])) for one in listed] == [(spent, 0)] * 2
