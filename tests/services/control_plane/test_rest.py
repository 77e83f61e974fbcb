"""REST as the first BudgetGuard's users know it, through the real edge."""

import httpx
import pytest


def violations(answer) -> dict[str, str]:
    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert body["code"] == 3
    details = {detail["@type"].rpartition(".")[2]: detail for detail in body["details"]}
    assert details["ErrorInfo"]["reason"] == "FIELD_INVALID"
    assert details["ErrorInfo"]["domain"] == "budgetguard"
    return {one["field"]: one["description"] for one in details["BadRequest"]["fieldViolations"]}


def reason(answer) -> str:
    return next(d["reason"] for d in answer.json()["details"] if d["@type"].endswith("ErrorInfo"))


def test_the_calls_of_the_first_budgetguard(rest):
    tenant = rest.post("/admin/tenant", json={"name": "Acme & Sons, Inc."})
    assert tenant.status_code == 200, tenant.text
    assert tenant.json()["tenantId"] == "acme-sons-inc"
    assert rest.get("/admin/tenant/acme-sons-inc").json()["name"] == "Acme & Sons, Inc."

    budgets = {"budgets": [{"period": "monthly", "amountUsd": 25.5}, {"period": "daily", "amountUsd": "3"}]}
    made = rest.post("/admin/tenant/acme-sons-inc/budgets", json=budgets)
    assert made.status_code == 200, made.text
    monthly, daily = made.json()["budgets"]
    assert (monthly["amountUsd"], monthly["period"]) == ("25.5", "MONTHLY")
    assert (daily["amountUsd"], daily["period"]) == ("3", "DAILY")
    assert monthly["window"]["spentUsd"] == monthly["window"]["heldUsd"] == "0"
    assert monthly["window"]["remainingUsd"] == "25.5"

    key = rest.post("/admin/tenant/acme-sons-inc/apikeys", json={})
    assert key.status_code == 200, key.text
    assert key.json()["key"].startswith(f"bg_acme-sons-inc_{key.json()['id']}_")

    limit = rest.put("/admin/tenant/acme-sons-inc/ratelimit", json={"rateLimitPerMin": 60})
    assert limit.json()["rateLimitPerMin"] == 60
    assert rest.get("/admin/tenant/acme-sons-inc/ratelimit").json()["rateLimitPerMin"] == 60

    listed = rest.get("/admin/tenant/acme-sons-inc/apikeys").json()["apiKeys"]
    assert [one["id"] for one in listed] == [key.json()["id"]]
    assert "secret" not in str(listed).lower()
    assert rest.delete(f"/admin/apikey/{key.json()['id']}").json()["status"] == "REVOKED"

    assert rest.put(f"/admin/budget/{daily['id']}", json={"amountUsd": 4}).json()["amountUsd"] == "4"
    assert rest.delete(f"/admin/budget/{daily['id']}").status_code == 200
    left = rest.get("/admin/tenant/acme-sons-inc/budgets").json()["budgets"]
    assert [one["id"] for one in left] == [monthly["id"]]
    assert rest.get("/admin/tenant/acme-sons-inc/usage").json()["totalUsd"] == "0"
    assert rest.get("/admin/tenant/acme-sons-inc/usage/ledger").json()["rows"] == []
    assert "acme-sons-inc" in [one["tenantId"] for one in rest.get("/admin/tenant").json()["tenants"]]


@pytest.mark.parametrize(
    ("spelled", "amount_usd"),
    [
        ("25.5", "25.5"),
        ("0.1", "0.1"),
        ("123456789.123456789", "123456789.123456789"),
        ("9223372036.854775807", "9223372036.854775807"),
        ("0.000000001", "0.000000001"),
        ("1e-9", "0.000000001"),
        ("1E3", "1000"),
        ("100", "100"),
        ('"0.3"', "0.3"),
        ('"123456789.123456789"', "123456789.123456789"),
        ("0", "0"),
    ],
)
def test_an_amount_keeps_every_digit(rest, tenant_id, spelled, amount_usd):
    body = f'{{"budgets":[{{"period":"lifetime","amountUsd":{spelled}}}]}}'
    answer = rest.post(f"/admin/tenant/{tenant_id}/budgets", content=body)
    assert answer.status_code == 200, answer.text
    (budget,) = rest.get(f"/admin/tenant/{tenant_id}/budgets").json()["budgets"]
    assert budget["amountUsd"] == amount_usd


@pytest.mark.parametrize(
    "spelled", ["0.0000000001", "-1", "9223372036.854775808", "1e999999999", '"lots"', '""', "true", "[]", "{}", "null"]
)
def test_an_amount_that_cannot_be_is_refused_by_name(rest, tenant_id, spelled):
    body = f'{{"budgets":[{{"period":"daily","amountUsd":1}},{{"period":"lifetime","amountUsd":{spelled}}}]}}'
    answer = rest.post(f"/admin/tenant/{tenant_id}/budgets", content=body)
    assert list(violations(answer)) == ["budgets[1].amountUsd"]
    assert rest.get(f"/admin/tenant/{tenant_id}/budgets").json()["budgets"] == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"name":"x","auth":1}', "auth"),
        ('{"name":5}', "name"),
        ('{"name":null}', "name"),
        ('{"name":""}', "name"),
        ('{"name":"\\u0000"}', "name"),
        ('{"name":"\\ud800"}', "name"),
        ('{"name":"x","name":"y"}', "name"),
        ('{"name":"x","tenantId":"a","tenant_id":"b"}', "tenant_id"),
        ('{"name":"x","tenantId":"A_B"}', "tenantId"),
        ('{"name":"x","clamp":"yes"}', "clamp"),
        ('{"name":"x","rateLimitPerMin":"60"}', "rateLimitPerMin"),
        ('{"name":"x","rateLimitPerMin":1.5}', "rateLimitPerMin"),
        ('{"name":"x","rateLimitPerMin":-1}', "rateLimitPerMin"),
        ('{"name":"x","rateLimitPerMin":99999999999}', "rateLimitPerMin"),
        ('{"name":"x","outputTokensMax":0}', "outputTokensMax"),
        ('{"name":"x","requestId":[]}', "requestId"),
        ('{"name":"x","httpBody":{}}', "httpBody"),
        ('{"name":"***"}', "name"),
        ("", "name"),
        ("{", "(body)"),
        ("[]", "(body)"),
        ('"x"', "(body)"),
        ('{"name":NaN}', "(body)"),
        ("[" * 100_000, "(body)"),
        (b"\xff\xfe", "(body)"),
    ],
)
def test_a_wrong_body_is_refused_by_name(rest, body, field):
    assert list(violations(rest.post("/admin/tenant", content=body))) == [field]


def test_nested_unknown_and_mistyped_fields_are_all_named(rest, tenant_id):
    body = {"budgets": [{"period": "hourly", "amountUsd": 1, "rollover": True}, 7], "extra": 1}
    answer = rest.post(f"/admin/tenant/{tenant_id}/budgets", json=body)
    assert set(violations(answer)) == {"budgets[0].period", "budgets[0].rollover", "budgets[1]", "extra"}


@pytest.mark.parametrize(
    ("budget", "field"),
    [
        ({"amountUsd": 1}, "period"),
        ({"period": "daily"}, "amountUsd"),
        ({"period": "custom", "amountUsd": 1}, "startDate"),
        ({"period": "custom", "amountUsd": 1, "startDate": "2026-01-01"}, "endDate"),
        ({"period": "custom", "amountUsd": 1, "startDate": "2026-02-01", "endDate": "2026-01-01"}, "endDate"),
        ({"period": "custom", "amountUsd": 1, "startDate": "01.02.2026", "endDate": "2026-01-01"}, "startDate"),
        ({"period": "custom", "amountUsd": 1, "startDate": "2026-02-30", "endDate": "2026-03-01"}, "startDate"),
        (
            {"period": "custom", "amountUsd": 1, "startDate": "2026-01-01T00:00:00", "endDate": "2027-01-01"},
            "startDate",
        ),
        ({"period": "daily", "amountUsd": 1, "startDate": "2026-01-01"}, "startDate"),
        ({"period": "daily", "amountUsd": 1, "mode": "LOOSE"}, "mode"),
    ],
)
def test_a_budget_that_cannot_be(rest, tenant_id, budget, field):
    answer = rest.post(f"/admin/tenant/{tenant_id}/budgets", json={"budgets": [budget]})
    assert list(violations(answer)) == [f"budgets[0].{field}"]


def test_custom_dates_include_both_days(rest, tenant_id):
    budget = {"period": "custom", "amountUsd": 1, "startDate": "2026-01-01", "endDate": "2026-01-31"}
    (made,) = rest.post(f"/admin/tenant/{tenant_id}/budgets", json={"budgets": [budget]}).json()["budgets"]
    assert (made["startDate"], made["endDate"]) == ("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z")


def test_the_same_budgets_again_change_nothing_and_others_are_removed(rest, tenant_id):
    path = f"/admin/tenant/{tenant_id}/budgets"
    first = rest.post(path, json={"budgets": [{"period": "daily", "amountUsd": 1}]}).json()["budgets"]
    both = [{"period": "weekly", "amountUsd": 2}, {"period": "DAILY", "amount_usd": "5"}]
    second = rest.post(path, json={"budgets": both}).json()["budgets"]
    assert second[1]["id"] == first[0]["id"]
    assert second[1]["amountUsd"] == "5"
    assert rest.post(path, json={"budgets": both}).json() == {"budgets": second}
    third = rest.post(path, json={"budgets": both[:1]}).json()["budgets"]
    assert [one["id"] for one in third] == [second[0]["id"]]
    assert rest.get(path).json()["budgets"] == third
    assert rest.post(path, json={"deleteAll": True}).json()["budgets"] == []
    assert rest.get(path).json()["budgets"] == []


@pytest.mark.parametrize("path", ["/admin/tenant/{}/budgets", "/v1/admin/tenants/{}/budgets"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("", "budgets"),
        ("{}", "budgets"),
        ('{"budgets": null}', "budgets"),
        ('{"budgets": []}', "budgets"),
        ('{"deleteAll": false}', "budgets"),
        ('{"deleteAll": true, "budgets": [{"period": "daily", "amountUsd": 1}]}', "deleteAll"),
    ],
)
def test_budgets_are_deleted_on_purpose_only(rest, tenant_id, path, body, field):
    kept = rest.post(f"/admin/tenant/{tenant_id}/budgets", json={"budgets": [{"period": "weekly", "amountUsd": 2}]})
    method = "PUT" if path.startswith("/v1") else "POST"
    assert list(violations(rest.request(method, path.format(tenant_id), content=body))) == [field]
    assert rest.get(f"/admin/tenant/{tenant_id}/budgets").json()["budgets"] == kept.json()["budgets"]


def test_the_path_decides_and_a_body_may_not_contradict_it(rest, tenant_id):
    path = f"/admin/tenant/{tenant_id}/ratelimit"
    assert rest.put(path, json={"tenantId": tenant_id, "rateLimitPerMin": 5}).status_code == 200
    assert list(violations(rest.put(path, json={"tenantId": "other", "rateLimitPerMin": 6}))) == ["tenantId"]
    assert rest.get(path).json()["rateLimitPerMin"] == 5


def test_a_forgotten_limit_does_not_become_unlimited(rest, tenant_id):
    path = f"/admin/tenant/{tenant_id}/ratelimit"
    assert rest.put(path, json={"rateLimitPerMin": 5}).status_code == 200
    for body in ({}, {"rateLimitPerMin": None}):
        assert list(violations(rest.put(path, json=body))) == ["rateLimitPerMin"]
    assert rest.get(path).json()["rateLimitPerMin"] == 5
    assert rest.put(path, json={"rateLimitPerMin": 0}).json()["rateLimitPerMin"] == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/tenant/nobody"),
        ("GET", "/admin/tenant/nobody/budgets"),
        ("GET", "/admin/tenant/nobody/apikeys"),
        ("GET", "/admin/tenant/nobody/ratelimit"),
        ("GET", "/admin/tenant/nobody/usage"),
        ("POST", "/admin/tenant/nobody/apikeys"),
        ("POST", "/admin/tenant/nobody/budgets?delete_all=true"),
        ("DELETE", "/admin/budget/nothing"),
        ("DELETE", "/admin/apikey/nothing"),
        ("DELETE", "/admin/tenant/nobody"),
    ],
)
def test_what_does_not_exist(rest, method, path):
    answer = rest.request(method, path)
    assert answer.status_code == 404, answer.text
    assert reason(answer) == "RESOURCE_NOT_FOUND"
    assert any(detail["@type"].endswith("ResourceInfo") for detail in answer.json()["details"])


def test_a_name_that_is_taken(rest, tenant_id):
    answer = rest.post("/admin/tenant", json={"name": "Other", "tenantId": tenant_id})
    assert answer.status_code == 409
    assert reason(answer) == "RESOURCE_ALREADY_EXISTS"


@pytest.mark.parametrize("path", ["/admin/tenant", "/v1/admin/tenants", "/admin/health", "/v1/admin/metrics"])
def test_no_admin_key_and_a_wrong_one(rest, path):
    for headers, expected in (({}, "ADMIN_KEY_MISSING"), ({"X-Admin-Key": "guess"}, "ADMIN_KEY_WRONG")):
        request = rest.build_request("GET", path)
        del request.headers["X-Admin-Key"]
        request.headers.update(headers)
        answer = rest.send(request)
        assert answer.status_code == 401, answer.text
        assert reason(answer) == expected


def test_health_needs_no_key_and_the_long_form_does(rest):
    assert rest.get("/health", headers={"X-Admin-Key": "wrong"}).json() == {"status": "ok"}
    health = rest.get("/admin/health").json()
    assert health["ready"] is True
    assert health["postgres"]["reachable"] is True
    assert health["redis"]["shardsReady"] == health["redis"]["shardsTotal"] == 256


def test_metrics_as_prometheus_reads_them(rest):
    answer = rest.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'budgetguard_job_runs_total{job="publish_snapshots",outcome="ok"}' in answer.text


def test_an_unknown_query_parameter_is_refused(rest, tenant_id):
    answer = rest.get("/admin/tenant", params={"color": "red"})
    assert answer.status_code == 400
    assert answer.json()["code"] == 3
    assert "color" in answer.json()["message"]
    assert rest.get(f"/admin/tenant/{tenant_id}/usage", params={"groupBy": "weekday"}).status_code == 400


def test_a_path_that_no_method_has(rest):
    answer = rest.get("/admin/nope")
    assert (answer.status_code, answer.json()["code"]) == (404, 5)


def test_usage_is_filtered_by_query(rest, tenant_id):
    for group in ("DAY", "model", "api_key"):
        answer = rest.get(f"/admin/tenant/{tenant_id}/usage", params={"groupBy": group, "from": "2026-01-01"})
        assert answer.status_code == 200, answer.text
    bad = rest.get("/admin/usage/ledger", params={"from": "yesterday"})
    assert list(violations(bad)) == ["from"]
    answer = rest.get("/admin/usage/ledger", params={"end": "confirmed", "until": "2026-01-01T00:00:00Z"})
    assert answer.json()["rows"] == []
    assert list(violations(rest.get("/admin/usage/ledger", params={"page_size": -1}))) == ["page_size"]


def test_a_span_of_no_time_is_refused(rest, tenant_id):
    for path in ("/admin/usage/ledger", f"/admin/tenant/{tenant_id}/usage", "/v1/admin/refusals"):
        for since in ("2026-01-02", "2026-01-01", "2026-01-01T00:00:00Z"):
            answer = rest.get(path, params={"from": since, "until": "2026-01-01"})
            assert list(violations(answer)) == ["from"], since
        assert rest.get(path, params={"from": "2025-12-31", "until": "2026-01-01"}).status_code == 200


def test_a_nul_is_blamed_on_the_field_that_was_sent(rest, tenant_id):
    body = {"name": "x", "updateMask": "na\x00me"}
    assert list(violations(rest.put(f"/admin/tenant/{tenant_id}", json=body))) == ["updateMask"]
    tags = {"requiredTags": ["a", "b\x00"]}
    assert list(violations(rest.put(f"/admin/tenant/{tenant_id}", json=tags))) == ["requiredTags"]


@pytest.mark.parametrize("path", ["/v1/admin/refusals", "/v1/admin/tenants/{}/refusals", "/admin/tenant/{}/refusals"])
def test_refusals_are_filtered_by_query(rest, tenant_id, path):
    path = path.format(tenant_id)
    wanted = {"reason": "BUDGET_EXCEEDED", "apiKeyId": "k" * 16, "from": "2026-01-01", "until": "2026-01-02T00:00:00Z"}
    listed = rest.get(path, params={**wanted, "model": "gpt-4o", "sessionId": "s 1", "pageSize": 5})
    assert listed.json() == {"refusals": [], "nextPageToken": ""}, listed.text
    for group in ("REASON", "api_key", "day", "MINUTE"):
        counted = rest.get(f"{path}/counts", params={**wanted, "groupBy": group})
        assert counted.json() == {"counts": [], "total": "0"}, counted.text
    for wrong in ({"reason": "budget"}, {"from": "yesterday"}, {"page_size": -1}, {"page_token": "made up"}):
        assert list(violations(rest.get(path, params=wrong))) == list(wrong)
    for where in (path, f"{path}/counts"):
        unknown = rest.get(where, params={"color": "red"})
        assert (unknown.status_code, "color" in unknown.json()["message"]) == (400, True)


def test_a_change_under_an_old_etag_is_refused(rest, tenant_id):
    budgets = {"budgets": [{"period": "daily", "amountUsd": 1}]}
    (budget,) = rest.post(f"/admin/tenant/{tenant_id}/budgets", json=budgets).json()["budgets"]
    path = f"/admin/budget/{budget['id']}"
    changed = rest.put(path, json={"amountUsd": 2, "etag": budget["etag"]})
    assert changed.status_code == 200, changed.text
    for etag in (budget["etag"], "nonsense"):
        late = rest.put(path, json={"amountUsd": 3, "etag": etag})
        assert late.status_code == 409
        assert reason(late) == "ETAG_MISMATCH"
        assert rest.delete(path, params={"etag": etag}).status_code == 409
    assert rest.get(path).json()["amountUsd"] == "2"


def test_an_update_sets_what_is_given_and_nothing_else(rest, tenant_id):
    path = f"/admin/tenant/{tenant_id}"
    before = rest.get(path).json()
    after = rest.put(path, json={"clamp": False, "status": "suspended"}).json()
    assert after == {
        **before,
        "clamp": False,
        "status": "SUSPENDED",
        "etag": after["etag"],
        "updateTime": after["updateTime"],
    }
    assert list(violations(rest.put(path, json={}))) == ["updateMask"]
    assert list(violations(rest.put(path, json={"status": "deleted"}))) == ["status"]
    assert list(violations(rest.put(path, json={"clamp": None}))) == ["clamp"]
    masked = rest.put(path, json={"clamp": True, "name": "not this", "updateMask": "clamp"}).json()
    assert masked["clamp"] is True
    assert masked["name"] == before["name"]
    assert list(violations(rest.put(path, json={"name": "x", "updateMask": "etag,tenantId"}))) == ["updateMask"]


def test_a_key_limit_can_be_taken_away_again(rest, tenant_id):
    body = {"name": "app", "rateLimitPerMin": 5, "expireTime": "2030-01-01T00:00:00Z"}
    made = rest.post(f"/admin/tenant/{tenant_id}/apikeys", json=body).json()
    path = f"/admin/apikey/{made['id']}"
    assert rest.get(path).json()["rateLimitPerMin"] == 5
    changed = rest.put(path, json={"rateLimitPerMin": None, "expireTime": None})
    assert changed.status_code == 200, changed.text
    assert "rateLimitPerMin" not in changed.json() or changed.json()["rateLimitPerMin"] is None
    assert changed.json().get("expireTime") is None
    assert changed.json()["name"] == "app"
    for bad in ("tomorrow", 5, "2026-13-01T00:00:00Z"):
        assert list(violations(rest.put(path, json={"expireTime": bad}))) == ["expireTime"]


def test_a_request_id_makes_a_create_safe_to_repeat(rest, tenant_id):
    body = {"name": "app", "requestId": f"once-{tenant_id}"}
    path = f"/admin/tenant/{tenant_id}/apikeys"
    first = rest.post(path, json=body).json()
    again = rest.post(path, json=body).json()
    assert again["id"] == first["id"]
    assert first["key"]
    assert again["key"] == ""
    other = rest.post(path, json={**body, "name": "other"})
    assert other.status_code == 409
    assert reason(other) == "REQUEST_ID_REUSED"


def test_a_request_id_makes_a_create_without_a_name_safe_to_repeat(rest, tenant_id):
    path, body = f"/admin/tenant/{tenant_id}/apikeys", {"requestId": f"nameless-{tenant_id}"}
    first, again = rest.post(path, json=body), rest.post(path, json=body)
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.json()["id"] == first.json()["id"]


@pytest.mark.parametrize("path", ["/admin/tenant/%ff", "/admin/budget/%ff", "/admin/apikey/%fe%fe"])
def test_a_path_that_is_no_utf_8_is_told_in_our_words(rest, path):
    for method in ("GET", "DELETE"):
        answer = rest.request(method, path)
        if answer.status_code != 404:  # there is no such method on this path
            assert answer.status_code == 400
            assert list(violations(answer)) == ["(request)"]
        assert "DecodeError" not in answer.text
    without_key = httpx.get(f"{rest.base_url}{path}")
    assert without_key.status_code in (401, 404)


def test_a_deleted_tenant_is_gone_and_its_id_stays_taken(rest, tenant_id):
    assert rest.delete(f"/admin/tenant/{tenant_id}").status_code == 200
    assert rest.get(f"/admin/tenant/{tenant_id}").status_code == 404
    assert rest.post("/admin/tenant", json={"name": "x", "tenantId": tenant_id}).status_code == 409


def test_providers_reach_the_edge_and_prices_are_kept(rest, program):
    body = {"kind": "openai", "baseUrl": "http://127.0.0.1:9", "apiKeyEnv": "OPENAI_API_KEY"}
    made = rest.put("/admin/provider/local", json=body)
    assert made.status_code == 200, made.text
    assert "provider-local" in program.clusters_path.read_text()
    assert "local" in [one["providerId"] for one in rest.get("/admin/provider").json()["providers"]]
    for field, value in (("kind", "smtp"), ("baseUrl", "ftp://x"), ("apiKeyEnv", "a b")):
        assert list(violations(rest.put("/admin/provider/local", json={**body, field: value}))) == [field]

    price = {"providerId": "local", "model": "m", "usd": {"input_tokens": 0.15, "output_tokens": "0.6"}}
    first = rest.put("/admin/price/m-1", json=price)
    assert first.status_code == 200, first.text
    assert first.json()["usd"] == {"input_tokens": "0.15", "output_tokens": "0.6"}
    assert rest.put("/admin/price/m-1", json=price).json() == first.json()
    assert first.json() in rest.get("/admin/price").json()["prices"]
    assert rest.post("/admin/price", json=price).json()["id"]
    for usd, field in (
        ({}, "usd"),
        ({"input_tokens": "x"}, "usd[input_tokens]"),
        ({"input_tokens": 1, "smiles": 1}, "usd[smiles]"),
        ({"input_tokens": "1e99999"}, "usd[input_tokens]"),
        ({"input_tokens": "1e-99999"}, "usd[input_tokens]"),
    ):
        assert list(violations(rest.post("/admin/price", json={**price, "usd": usd}))) == [field]


def test_a_body_over_a_mebibyte_is_refused(rest):
    answer = rest.post("/admin/tenant", content=b" " * (2**20 + 1))
    assert answer.status_code == 413
    assert answer.json()["message"]
