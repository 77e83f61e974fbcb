"""Budgets of every subject and window, top-ups and events, over REST and gRPC through the real edge and program."""

import time
from datetime import UTC, datetime, timedelta

import grpc
import httpx
import pytest

from budgetguard.v1 import budget_pb2, budget_pb2_grpc, top_up_pb2, top_up_pb2_grpc
from tests.services.control_plane.conftest import ADMIN_KEY, METADATA
from tests.services.control_plane.test_rest import reason, violations


def create(rest, tenant_id, **body):
    return rest.post(f"/v1/admin/tenants/{tenant_id}/budgets", json={"period": "monthly", "amountUsd": "10", **body})


@pytest.fixture
def budget(rest, tenant_id):
    answer = create(rest, tenant_id)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="session")
def provider(edge_url):
    """A provider, whose models have prices."""
    body = {"kind": "openai", "baseUrl": "http://127.0.0.1:1", "apiKeyEnv": "OPENAI_API_KEY", "enabled": False}
    url = f"{edge_url}/v1/admin/providers/openai"
    answer = httpx.put(url, json=body, headers={"X-Admin-Key": ADMIN_KEY}, timeout=20)
    assert answer.status_code == 200, answer.text


@pytest.fixture
def team_a(rest, tenant_id):
    answer = rest.post(f"/admin/tenant/{tenant_id}/tags", json={"tagId": "team-a"})
    assert answer.status_code == 200, answer.text


@pytest.mark.usefixtures("provider", "team_a")
@pytest.mark.parametrize(
    "body",
    [
        {"tagId": "team-a"},
        {"sessionId": "s-1"},
        {"endUser": "ann@example.com"},
        {"model": "gpt-4o-mini"},
        {"providerId": "openai"},
        {"each": "EACH_SESSION", "subjectsMax": 1_000_000},
        {"each": "EACH_TAG"},
        {"period": "QUARTERLY", "anchorDay": 31, "anchorMonth": 2},
        {"period": "YEARLY", "timeZone": "Europe/Berlin", "anchorDay": 6, "anchorMonth": 4},
        {"period": "WEEKLY", "anchorDay": 7},
        {"period": "ROLLING", "rollingPeriod": "3600s"},
        {"period": "ROLLING", "rollingPeriod": "31622400s"},
        {"rolloverCapUsd": "2.5"},
        {"rolloverCapUsd": "0"},
        {"thresholdBps": [1, 9_999, 100_000]},
    ],
)
def test_what_is_given_is_told_again(rest, tenant_id, body):
    made = create(rest, tenant_id, **body)
    assert made.status_code == 200, made.text
    told = rest.get(f"/v1/admin/budgets/{made.json()['id']}").json()
    assert told == made.json()
    assert {field: told[field] for field in body} == body
    assert told["state"] == "ACTIVE"


def test_a_body_as_before_gets_the_defaults(budget):
    assert {field: budget[field] for field in ("timeZone", "anchorDay", "anchorMonth", "each", "subjectsMax")} == {
        "timeZone": "UTC",
        "anchorDay": 1,
        "anchorMonth": 1,
        "each": "EACH_UNSPECIFIED",
        "subjectsMax": 0,
    }
    assert budget["thresholdBps"] == [5000, 8000, 10000]
    assert budget["rolloverCapUsd"] == ""
    assert "rollingPeriod" not in budget or budget["rollingPeriod"] is None
    window = budget["window"]
    assert (window["effectiveLimitUsd"], window["carriedUsd"], window["toppedUpUsd"]) == ("10", "0", "0")


def test_thresholds_are_sorted_and_told_once(rest, tenant_id):
    assert create(rest, tenant_id, thresholdBps=[9000, 100, 9000]).json()["thresholdBps"] == [100, 9000]


@pytest.mark.parametrize(
    ("short", "seconds"), [("90d", "7776000s"), ("12h", "43200s"), ("1m", "60s"), ("366d", "31622400s")]
)
def test_a_rolling_period_may_be_written_in_days_hours_or_minutes(rest, tenant_id, short, seconds):
    made = create(rest, tenant_id, period="rolling", rollingPeriod=short)
    assert made.json()["rollingPeriod"] == seconds
    assert made.json()["window"]["startTime"]
    assert "resetTime" not in made.json()["window"] or made.json()["window"]["resetTime"] is None


def test_a_template_has_no_window_of_its_own(rest, tenant_id):
    made = create(rest, tenant_id, each="session").json()
    assert made["each"] == "EACH_SESSION"
    assert made["subjectsMax"] == 10_000
    assert made.get("window") is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tagId": "a", "model": "b"}, "model"),
        ({"tagId": "a", "each": "tag"}, "tagId"),
        ({"apiKeyId": "k", "sessionId": "s"}, "sessionId"),
        ({"sessionId": "x" * 201}, "sessionId"),
        ({"sessionId": " s"}, "sessionId"),
        ({"endUser": "a\nb"}, "endUser"),
        ({"endUser": " "}, "endUser"),
        ({"tagId": "typo"}, "tagId"),
        ({"tagId": "é☃🙂"}, "tagId"),
        ({"tagId": " "}, "tagId"),
        ({"providerId": "x"}, "providerId"),
        ({"model": "gpt-4o-mimi"}, "model"),
        ({"each": "tenant"}, "each"),
        ({"subjectsMax": 5}, "subjectsMax"),
        ({"each": "tag", "subjectsMax": 1_000_001}, "subjectsMax"),
        ({"each": "tag", "subjectsMax": -1}, "subjectsMax"),
        ({"tagId": "a\x00"}, "tagId"),
        ({"timeZone": "Mars/Olympus"}, "timeZone"),
        ({"timeZone": "localtime"}, "timeZone"),
        ({"timeZone": "posixrules"}, "timeZone"),
        ({"timeZone": "Factory"}, "timeZone"),
        ({"timeZone": "posix/Europe/Berlin"}, "timeZone"),
        ({"period": "custom", "startDate": "2026-01-01", "endDate": "2026-01-02", "timeZone": "X"}, "timeZone"),
        ({"anchorDay": 32}, "anchorDay"),
        ({"anchorDay": -1}, "anchorDay"),
        ({"period": "daily", "anchorDay": 2}, "anchorDay"),
        ({"anchorMonth": 2}, "anchorMonth"),
        ({"period": "yearly", "anchorMonth": 13}, "anchorMonth"),
        ({"period": "rolling"}, "rollingPeriod"),
        ({"period": "rolling", "rollingPeriod": "59s"}, "rollingPeriod"),
        ({"period": "rolling", "rollingPeriod": "367d"}, "rollingPeriod"),
        ({"period": "rolling", "rollingPeriod": "60.0000001s"}, "rollingPeriod"),
        ({"period": "rolling", "rollingPeriod": 3600}, "rollingPeriod"),
        ({"rollingPeriod": "1h"}, "rollingPeriod"),
        ({"rolloverCapUsd": -1}, "rolloverCapUsd"),
        ({"rolloverCapUsd": "some"}, "rolloverCapUsd"),
        ({"period": "lifetime", "rolloverCapUsd": 1}, "rolloverCapUsd"),
        ({"each": "model", "rolloverCapUsd": 1}, "rolloverCapUsd"),
        ({"thresholdBps": [0]}, "thresholdBps"),
        ({"thresholdBps": [100_001]}, "thresholdBps"),
        ({"thresholdBps": list(range(1, 22))}, "thresholdBps"),
        ({"thresholdBps": ["5000"]}, "thresholdBps[0]"),
        ({"state": "ACTIVE"}, "state"),
        ({"period": "hourly"}, "period"),
    ],
)
def test_what_cannot_be_is_refused_by_name(rest, tenant_id, body, field):
    assert list(violations(create(rest, tenant_id, **body))) == [field]
    many = {"budgets": [{"period": "daily", "amountUsd": 1}, {"period": "monthly", "amountUsd": 1, **body}]}
    answer = rest.put(f"/v1/admin/tenants/{tenant_id}/budgets", json=many)
    assert list(violations(answer)) == [f"budgets[1].{field}"]
    assert rest.get(f"/v1/admin/tenants/{tenant_id}/budgets").json()["budgets"] == []


def test_the_days_of_a_custom_period_are_those_of_its_zone(rest, tenant_id):
    days = {"period": "custom", "startDate": "2026-03-01", "endDate": "2026-03-31", "timeZone": "Europe/Berlin"}
    made = create(rest, tenant_id, **days).json()
    assert (made["startDate"], made["endDate"]) == ("2026-02-28T23:00:00Z", "2026-03-31T22:00:00Z")
    path = f"/v1/admin/budgets/{made['id']}"
    changed = rest.patch(path, json={"endDate": "2026-04-01"}).json()
    assert changed["endDate"] == "2026-04-01T22:00:00Z"
    moved = rest.patch(path, json={"startDate": "2026-03-01", "endDate": "2026-04-01", "timeZone": "Asia/Tokyo"}).json()
    assert (moved["startDate"], moved["endDate"]) == ("2026-02-28T15:00:00Z", "2026-04-01T15:00:00Z")
    assert moved["timeZone"] == "Asia/Tokyo"


@pytest.fixture
def custom(rest, tenant_id):
    days = {"period": "custom", "startDate": "2026-03-01", "endDate": "2026-03-31", "timeZone": "Europe/Berlin"}
    return create(rest, tenant_id, **days).json()


def test_the_zone_of_a_custom_period_changes_with_both_its_dates_only(rest, custom):
    path = f"/v1/admin/budgets/{custom['id']}"
    for body in ({}, {"startDate": "2026-03-01"}, {"endDate": "2026-03-31"}):
        told = violations(rest.patch(path, json={**body, "timeZone": "Asia/Tokyo"}))
        assert list(told) == ["timeZone"]
        assert "start_date and end_date" in told["timeZone"]
    assert rest.patch(path, json={"timeZone": "Europe/Berlin"}).json() == custom


@pytest.mark.parametrize("nothing", ["", None])
@pytest.mark.parametrize("field", ["startDate", "endDate"])
def test_a_date_that_is_taken_away_is_refused_by_its_name(rest, custom, budget, field, nothing):
    for one in (custom, budget):
        assert list(violations(rest.patch(f"/v1/admin/budgets/{one['id']}", json={field: nothing}))) == [field]


def test_every_term_can_be_changed_and_taken_back(rest, budget):
    path = f"/v1/admin/budgets/{budget['id']}"
    body = {
        "period": "YEARLY",
        "timeZone": "Asia/Tokyo",
        "anchorDay": 3,
        "anchorMonth": 5,
        "rolloverCapUsd": "7",
        "thresholdBps": [42],
    }
    changed = rest.patch(path, json=body)
    assert changed.status_code == 200, changed.text
    assert {field: changed.json()[field] for field in body} == body
    assert changed.json()["amountUsd"] == "10"
    back = rest.patch(
        path,
        json={"timeZone": "", "anchorDay": None, "anchorMonth": 0, "rolloverCapUsd": None, "thresholdBps": []},
    )
    assert back.status_code == 200, back.text
    assert back.json()["period"] == "YEARLY"
    for field in ("timeZone", "anchorDay", "anchorMonth", "rolloverCapUsd", "thresholdBps"):
        assert back.json()[field] == budget[field], field
    rolling = rest.patch(path, json={"period": "rolling", "rollingPeriod": "30d"}).json()
    assert (rolling["period"], rolling["rollingPeriod"]) == ("ROLLING", "2592000s")
    assert rest.patch(path, json={"rollingPeriod": "1h"}).json()["rollingPeriod"] == "3600s"
    assert list(violations(rest.patch(path, json={"rollingPeriod": None}))) == ["rollingPeriod"]
    assert list(violations(rest.patch(path, json={"sessionId": "s"}))) == ["sessionId"]


def test_setting_many_keeps_budgets_of_the_same_subject_and_window(rest, tenant_id):
    path = f"/v1/admin/tenants/{tenant_id}/budgets"
    budgets = [
        {"period": "daily", "amountUsd": 1},
        {"period": "daily", "amountUsd": 2, "timeZone": "Asia/Tokyo"},
        {"period": "daily", "amountUsd": 3, "each": "session", "subjectsMax": 9},
        {"period": "daily", "amountUsd": 4, "sessionId": "s"},
        {"period": "rolling", "amountUsd": 5, "rollingPeriod": "1h"},
    ]
    first = rest.put(path, json={"budgets": budgets})
    assert first.status_code == 200, first.text
    assert rest.put(path, json={"budgets": budgets}).json() == first.json()
    budgets[4]["rollingPeriod"] = "2h"
    second = rest.put(path, json={"budgets": budgets[::-1]}).json()["budgets"][::-1]
    same = [old["id"] == new["id"] for old, new in zip(first.json()["budgets"], second, strict=True)]
    assert same == [True, True, True, True, False]
    twice = [{"period": "daily", "amountUsd": 1}, {"period": "daily", "amountUsd": 2, "timeZone": "UTC"}]
    assert list(violations(rest.put(path, json={"budgets": twice}))) == ["budgets"]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_a_top_up_counts_from_the_answer_on(rest, budget):
    path = f"/v1/admin/budgets/{budget['id']}/topups"
    expires = datetime.now(UTC) + timedelta(days=3)
    added = rest.post(path, json={"amountUsd": 2.25, "reason": "launch", "expireTime": expires.isoformat()})
    assert added.status_code == 200, added.text
    top_up = added.json()
    assert (top_up["amountUsd"], top_up["reason"], top_up["budgetId"]) == ("2.25", "launch", budget["id"])
    assert abs(moment(top_up["expireTime"]) - expires) < timedelta(milliseconds=2)
    assert abs(moment(top_up["startTime"]) - datetime.now(UTC)) < timedelta(minutes=1)
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert rest.post(path, json={"amountUsd": 100, "reason": "later", "startTime": later}).status_code == 200
    window = rest.get(f"/v1/admin/budgets/{budget['id']}").json()["window"]
    assert {field: window[field] for field in ("effectiveLimitUsd", "toppedUpUsd", "remainingUsd")} == {
        "effectiveLimitUsd": "12.25",
        "toppedUpUsd": "2.25",
        "remainingUsd": "12.25",
    }
    assert [one["reason"] for one in rest.get(path).json()["topUps"]] == ["later", "launch"]
    removed = rest.delete(f"{path}/{top_up['id']}")
    assert removed.json()["removeTime"]
    assert rest.get(f"/v1/admin/budgets/{budget['id']}").json()["window"]["effectiveLimitUsd"] == "10"
    again = rest.delete(f"{path}/{top_up['id']}")
    assert (again.status_code, reason(again)) == (404, "RESOURCE_NOT_FOUND")
    page = rest.get(path, params={"page_size": 1}).json()
    rest_of_them = rest.get(path, params={"page_size": 1, "page_token": page["nextPageToken"]}).json()
    assert [one["reason"] for one in (*page["topUps"], *rest_of_them["topUps"])] == ["later", "launch"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"amountUsd": 1, "reason": "  "}, "reason"),
        ({"reason": "x"}, "amountUsd"),
        ({"amountUsd": 0, "reason": "x"}, "amountUsd"),
        ({"amountUsd": -1, "reason": "x"}, "amountUsd"),
        ({"amountUsd": 1}, "reason"),
        ({"amountUsd": 1, "reason": "x" * 501}, "reason"),
        ({"amountUsd": 1, "reason": "x", "expireTime": "2020-01-01T00:00:00Z"}, "expireTime"),
        ({"amountUsd": 1, "reason": "x", "startTime": "tomorrow"}, "startTime"),
        ({"amountUsd": 1, "reason": "x", "until": "2030-01-01"}, "until"),
    ],
)
def test_a_top_up_that_cannot_be(rest, budget, body, field):
    path = f"/v1/admin/budgets/{budget['id']}/topups"
    assert list(violations(rest.post(path, json=body))) == [field]
    assert rest.get(path).json()["topUps"] == []


def test_a_top_up_of_nothing_is_refused_in_dollars(rest, budget):
    told = violations(rest.post(f"/v1/admin/budgets/{budget['id']}/topups", json={"amountUsd": 0, "reason": "x"}))
    assert told == {"amountUsd": "expected US dollars, more than 0 and at most 9223372036.854775807"}


def test_top_ups_of_what_does_not_exist(rest):
    path = "/v1/admin/budgets/nothing/topups"
    for answer in (rest.post(path, json={"amountUsd": 1, "reason": "x"}), rest.get(path), rest.delete(f"{path}/t")):
        assert (answer.status_code, reason(answer)) == (404, "RESOURCE_NOT_FOUND")


def test_events_can_be_asked_for_by_tenant_and_budget(rest, budget, tenant_id):
    for path in (
        "/v1/admin/budgetevents",
        f"/v1/admin/tenants/{tenant_id}/budgetevents",
        f"/v1/admin/budgets/{budget['id']}/events",
    ):
        answer = rest.get(path, params={"page_size": 5})
        assert answer.status_code == 200, answer.text
    assert rest.get(f"/v1/admin/budgets/{budget['id']}/events").json() == {"events": [], "nextPageToken": ""}
    assert list(violations(rest.get("/v1/admin/budgetevents", params={"page_token": "x"}))) == ["page_token"]


def test_the_jobs_run_in_the_program(rest):
    deadline = time.monotonic() + 30
    for job in ("carry_over", "watch_thresholds"):
        while f'budgetguard_job_runs_total{{job="{job}",outcome="ok"}}' not in rest.get("/metrics").text:
            assert time.monotonic() < deadline, job
            time.sleep(0.2)


async def test_the_same_over_grpc(channel, tenant_id):
    budgets, top_ups = budget_pb2_grpc.BudgetServiceStub(channel), top_up_pb2_grpc.TopUpServiceStub(channel)
    request = budget_pb2.CreateBudgetRequest(
        tenant_id=tenant_id,
        period=budget_pb2.Budget.ROLLING,
        amount_usd="1",
        end_user="ann",
        threshold_bps=[7],
        request_id=f"{tenant_id}-r1",
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await budgets.CreateBudget(request, metadata=METADATA)
    assert "rolling_period" in refused.value.details()
    request.rolling_period.FromSeconds(3600)
    made = await budgets.CreateBudget(request, metadata=METADATA)
    assert made.rolling_period.seconds == 3600
    assert await budgets.CreateBudget(request, metadata=METADATA) == made
    change = budget_pb2.UpdateBudgetRequest(budget_id=made.id, threshold_bps=[9], time_zone="Asia/Tokyo")
    changed = await budgets.UpdateBudget(change, metadata=METADATA)
    assert (list(changed.threshold_bps), changed.time_zone, changed.end_user) == ([9], "Asia/Tokyo", "ann")
    adding = top_up_pb2.AddTopUpRequest(budget_id=made.id, amount_usd="1", reason="x", request_id=f"{tenant_id}-t1")
    added = await top_ups.AddTopUp(adding, metadata=METADATA)
    assert await top_ups.AddTopUp(adding, metadata=METADATA) == added
    listed = await top_ups.ListTopUps(top_up_pb2.ListTopUpsRequest(budget_id=made.id), metadata=METADATA)
    assert list(listed.top_ups) == [added]
    # Sent again after it was deleted, a create still answers what it made.
    await budgets.DeleteBudget(budget_pb2.DeleteBudgetRequest(budget_id=made.id), metadata=METADATA)
    assert (await budgets.CreateBudget(request, metadata=METADATA)).id == made.id
