"""Tags and sessions on the running product: from a header to a ledger row."""

from decimal import Decimal

import httpx
import pytest

from tests.e2e.admin import monthly

CHAT = {"model": "gpt-4o-mini", "max_tokens": 16, "messages": [{"role": "user", "content": "Say hello."}]}
TREE = ("company", "eng", "search", "ranking", "nightly")


@pytest.fixture
def tenant(new_tenant):
    tenant = new_tenant(monthly("10"))
    for parent, tag in zip(("", *TREE), (*TREE, "sales"), strict=True):
        made = admin(tenant, "POST", "/tags", tagId=tag, parentId="company" if tag == "sales" else parent)
        assert made["status"] == "ACTIVE"
    return tenant


def admin(tenant, method, path, **body):
    answer = tenant.http.request(method, f"/admin/tenant/{tenant.tenant_id}{path}", json=body or None)
    assert answer.status_code == 200, answer.text
    return answer.json()


def call(tenant, **headers):
    names = {name.replace("_", "-"): value.encode() for name, value in headers.items()}
    return httpx.post(
        f"{tenant.base_url}/v1/chat/completions", json=CHAT, headers={**tenant.headers, **names}, timeout=20
    )


def operation(answer) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-budgetguard-operation-id"]


def refusal(answer) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


def test_a_leaf_five_levels_down_is_booked_on_all_five_and_a_move_changes_later_calls_only(tenant):
    first = operation(call(tenant, X_Tags="nightly", X_User_Id="jo@example.org"))
    moved = admin(tenant, "POST", "/tags/search/move", parentId="sales")
    assert moved["path"] == "company/sales/search"
    assert admin(tenant, "GET", "/tags/nightly")["path"] == "company/sales/search/ranking/nightly"
    second = operation(call(tenant, X_Tags="nightly"))
    rows = {row["operationId"]: row for row in tenant.rows(at_least=2)}
    assert rows[first]["tags"] == sorted(TREE)
    assert rows[first]["endUser"] == "jo@example.org"
    assert rows[second]["tags"] == sorted(({*TREE} - {"eng"}) | {"sales"})


def test_a_fixed_tag_cannot_be_dropped(tenant):
    key = tenant.http.put(f"/admin/apikey/{tenant.key_id}", json={"tags": ["sales"]})
    assert key.json()["tags"] == ["sales"], key.text
    plain, other = operation(call(tenant)), operation(call(tenant, X_Tags="eng"))
    rows = {row["operationId"]: row["tags"] for row in tenant.rows(at_least=2)}
    assert rows == {plain: ["company", "sales"], other: ["company", "eng", "sales"]}


def test_a_missing_required_tag_is_named(tenant):
    changed = tenant.http.put(f"/admin/tenant/{tenant.tenant_id}", json={"requiredTags": ["eng"]})
    assert changed.status_code == 200, changed.text
    status, code, message = refusal(call(tenant, X_Tags="sales"))
    assert (status, code) == (400, "TAG_REQUIRED")
    assert "missing: eng." in message
    operation(call(tenant, X_Tags="sales,nightly"))


def test_an_unknown_and_a_deactivated_tag_are_refused_by_name(tenant):
    assert refusal(call(tenant, X_Tags="serach"))[:2] == (400, "TAG_UNKNOWN")
    operation(call(tenant, X_Tags="ranking"))
    assert admin(tenant, "DELETE", "/tags/search")["status"] == "INACTIVE"
    assert refusal(call(tenant, X_Tags="ranking")) == (
        400,
        "TAG_INACTIVE",
        "X-Tags: tag 'ranking' is below 'search', which is inactive.",
    )
    admin(tenant, "PUT", "/tags/search", status="ACTIVE")
    operation(call(tenant, X_Tags="ranking"))
    assert len(tenant.rows(at_least=2)) == 2


def test_a_session_appears_by_itself_and_is_closed_at_once(tenant):
    for step in ("/plan", "/act"):
        operation(call(tenant, X_Session_Id="run 7", X_Session_Name="Nächtlich", X_Session_Path=step))
    spent = sum(Decimal(row["deltaUsd"]) for row in tenant.rows(at_least=2))
    (session,) = admin(tenant, "GET", "/sessions")["sessions"]
    assert (session["sessionId"], session["calls"], Decimal(session["spentUsd"])) == ("run 7", "2", spent)
    assert (session["name"], session["path"]) == ("Nächtlich", "/act")
    assert session["firstCallTime"] < session["lastCallTime"]
    assert admin(tenant, "POST", "/sessions/deactivate", sessionId="run 7")["status"] == "INACTIVE"
    assert refusal(call(tenant, X_Session_Id="run 7"))[:2] == (403, "SESSION_INACTIVE")
    operation(call(tenant, X_Session_Id="run 8"))
    admin(tenant, "POST", "/sessions/reactivate", sessionId="run 7")
    operation(call(tenant, X_Session_Id="run 7"))


def test_two_tenants_may_use_the_same_ids(tenant, new_tenant):
    other = new_tenant(monthly("10"))
    admin(other, "POST", "/sessions/deactivate", sessionId="s1")
    operation(call(tenant, X_Session_Id="s1", X_Tags="eng"))
    assert refusal(call(other, X_Tags="eng"))[:2] == (400, "TAG_UNKNOWN")
    tenant.rows(at_least=1)
    (session,) = admin(other, "GET", "/sessions")["sessions"]
    assert session["calls"] == "0"
