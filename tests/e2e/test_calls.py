"""One real call and its kin, through the real edge, to the ledger row."""

import json
from decimal import Decimal

import httpx
import openai
import pytest

from tests.e2e.admin import monthly
from tests.e2e.http2 import post_over_http2

ASK = [{"role": "user", "content": "Say hello."}]
CHAT = {"model": "gpt-4o-mini", "max_tokens": 64, "messages": ASK}


def directive(**asked):
    return [{"role": "user", "content": "fake:" + json.dumps(asked)}]


@pytest.fixture
def tenant(new_tenant):
    return new_tenant(monthly("10"), rate=600)


@pytest.fixture
def post(tenant):
    with httpx.Client(base_url=tenant.base_url, timeout=20) as http:

        def send(path="/v1/chat/completions", *, headers=None, **body):
            return http.post(path, json=body, headers=tenant.headers if headers is None else headers)

        yield send


def test_a_call_is_answered_metered_and_booked_to_the_nano(tenant, post):
    answer = post(**CHAT)
    assert answer.status_code == 200
    usage = answer.json()["usage"]
    cost = Decimal(usage["prompt_tokens"] * 150 + usage["completion_tokens"] * 600) / 10**9
    held = Decimal(answer.headers["x-budgetguard-estimated-cost-usd"])
    assert held >= cost
    assert Decimal(answer.headers["x-budgetguard-budget-remaining-usd"]) == 10 - held
    assert answer.headers["x-ratelimit-limit-requests"] == "600"
    assert answer.headers["x-ratelimit-remaining-requests"] == "599"
    assert "x-budgetguard-clamped-max-tokens" not in answer.headers
    (row,) = tenant.rows(at_least=1)
    assert row["operationId"] == answer.headers["x-budgetguard-operation-id"]
    assert (row["end"], Decimal(row["amountUsd"]), Decimal(row["holdUsd"])) == ("CONFIRMED", cost, held)
    assert row["units"]["inputTokens"] == str(usage["prompt_tokens"])
    assert tenant.settled() == cost
    assert tenant.ledger_sum(at_least=1) == cost


def test_nothing_of_the_caller_or_of_ours_reaches_the_provider(post, tenant):
    made = tenant.http.post(f"/admin/tenant/{tenant.tenant_id}/tags", json={"tagId": "a"})
    assert made.status_code == 200, made.text
    headers = tenant.headers | {
        "X-Tenant-Id": tenant.tenant_id,
        "Authorization": "Bearer sk-caller",
        "X-Tags": "a",
        "X-Session-Id": "s",
        "X-Session-Name": "n",
        "X-Session-Path": "p",
        "X-User-Id": "u",
        "X-Budgetguard-Cluster": "provider-other",
        "X-Request-Id": "mine",
        "Cookie": "c=1",
        "Accept-Encoding": "gzip",
    }
    answer = post(headers=headers, **{**CHAT, "max_tokens": 1000, "messages": directive(echo=True)})
    assert answer.status_code == 200
    received = json.loads(answer.json()["choices"][0]["message"]["content"])
    names = {name.lower(): value for name, value in received["headers"].items()}
    assert names["authorization"] == "Bearer sk-caller"
    assert names["accept-encoding"] == "identity"
    leaked = [
        name
        for name in names
        if name.startswith(
            ("x-budgetguard", "x-tenant", "x-api", "x-request", "x-session", "x-tags", "x-user", "x-forwarded")
        )
    ]
    assert leaked == []
    assert "cookie" not in names
    assert json.loads(received["body"])["max_tokens"] == 1000
    assert answer.headers["x-budgetguard-operation-id"] != "mine"


def test_bytes_that_are_no_utf8_name_no_user(tenant, post):
    """As some clients spell a header by default: read as text, both would have been one user."""
    for user in ("jö", "jä"):
        answer = post(headers={**tenant.headers, "X-User-Id": user.encode("latin-1")}, **CHAT)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "REQUEST_INVALID", "X-User-Id")
        assert error["message"].startswith("X-User-Id: expected UTF-8")
    for user in ("jö", "j!"):
        assert post(headers={**tenant.headers, "X-User-Id": user.encode()}, **CHAT).status_code == 200
    assert {row["endUser"] for row in tenant.rows(at_least=2)} == {"jö", "j!"}


def test_a_tenant_key_as_bearer_is_not_passed_on(post, tenant):
    headers = {"Authorization": f"Bearer {tenant.key}"}
    answer = post(headers=headers, **{**CHAT, "messages": directive(echo=True)})
    received = json.loads(answer.json()["choices"][0]["message"]["content"])
    assert tenant.key not in json.dumps(received)


def test_without_a_bound_one_is_written_and_told(post):
    answer = post(model="gpt-4o-mini", messages=directive(echo=True))
    clamped = int(answer.headers["x-budgetguard-clamped-max-tokens"])
    received = json.loads(answer.json()["choices"][0]["message"]["content"])
    assert json.loads(received["body"])["max_tokens"] == clamped == 4096
    thinking = post(model="gpt-5", messages=directive(echo=True))
    received = json.loads(thinking.json()["choices"][0]["message"]["content"])
    assert json.loads(received["body"])["max_completion_tokens"] == 4096
    responses = post("/v1/responses", model="gpt-4o-mini", input="fake:" + json.dumps({"echo": True}))
    received = json.loads(responses.json()["output"][0]["content"][0]["text"])
    assert json.loads(received["body"])["max_output_tokens"] == 4096


def test_a_stream_s_usage_is_asked_for_and_kept_from_who_did_not(tenant, post):
    hidden = post(**CHAT, stream=True)
    assert hidden.status_code == 200
    assert "usage" not in hidden.text
    assert hidden.text.endswith("data: [DONE]\n\n")
    asked = post(**CHAT, stream=True, stream_options={"include_usage": True})
    assert '"usage":null' in asked.text
    assert '"completion_tokens"' in asked.text
    rows = tenant.rows(at_least=2)
    assert {row["end"] for row in rows} == {"CONFIRMED"}
    assert len({row["amountUsd"] for row in rows}) == 1


def sized(mebibytes):
    return {**CHAT, "messages": [{"role": "user", "content": "x" * mebibytes * 2**20}]}


@pytest.mark.parametrize("http2", [False, True])
def test_a_body_of_nine_mebibytes_passes(tenant, http2):
    with httpx.Client(base_url=tenant.base_url, http1=not http2, http2=http2, timeout=60) as http:
        assert http.post("/v1/chat/completions", json=sized(9), headers=tenant.headers).status_code == 200


def test_a_body_of_eleven_mebibytes_is_refused(tenant, post):
    refused = post(**sized(11))
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "BODY_TOO_LARGE")


def test_a_body_of_eleven_mebibytes_is_refused_over_http2(tenant):
    """Before all of it was sent, as HTTP/2 allows; httpx calls that a protocol error, so this client is h2 itself."""
    answer = post_over_http2(
        tenant.base_url, "/v1/chat/completions", headers=tenant.headers, body=json.dumps(sized(11)).encode()
    )
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (413, "BODY_TOO_LARGE")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"not json", 400, "REQUEST_INVALID"),
        (b"[]", 400, "REQUEST_INVALID"),
        (b"", 400, "REQUEST_INVALID"),
        (b'{"model":5,"messages":[1]}', 400, "REQUEST_INVALID"),
        (b'{"model":"gpt-4o-mini","messages":null}', 400, "REQUEST_INVALID"),
        (b'{"model":"gpt-4o-mini","messages":[1],"max_tokens":-1}', 400, "REQUEST_INVALID"),
        (b'{"model":"gpt-4o-mini","messages":[1],"max_tokens":1e309}', 400, "REQUEST_INVALID"),
        (b'{"model":"gpt-4o-mini","messages":[1],"max_tokens":"7"}', 400, "REQUEST_INVALID"),
        (b'{"model":"gpt-4o-mini","model":"gpt-4o","messages":[1]}', 400, "REQUEST_INVALID"),
        (b'{"model":"gpt-4o-mini","\\u006dodel":"gpt-4o","messages":[1]}', 400, "REQUEST_INVALID"),
        (b'{"model":"gpt-4o-mini","messages":' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "REQUEST_INVALID"),
        (b'{"model":"no-such-model","messages":[{}]}', 404, "MODEL_UNKNOWN"),
    ],
)
def test_bad_bodies_have_a_clear_error(tenant, body, status, code):
    answer = httpx.post(f"{tenant.base_url}/v1/chat/completions", content=body, headers=tenant.headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-budgetguard-operation-id"]


def test_bad_keys_and_routes_have_a_clear_error(new_tenant, tenant, post):
    other = new_tenant()
    cases = [
        ({}, 401, "API_KEY_MISSING"),
        ({"X-API-Key": "nonsense"}, 401, "API_KEY_UNKNOWN"),
        ({"X-API-Key": tenant.key[:-1] + ("A" if tenant.key[-1] != "A" else "B")}, 401, "API_KEY_UNKNOWN"),
        (other.headers | {"X-Tenant-Id": tenant.tenant_id}, 403, "TENANT_MISMATCH"),
        (tenant.headers | {"Content-Encoding": "gzip"}, 415, "BODY_ENCODED"),
    ]
    for headers, status, code in cases:
        answer = post(headers=headers, **CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    # Relative to the base URL httpx would take two slashes for a host.
    merged = httpx.post(f"{tenant.base_url}//v1//chat/completions", json=CHAT, headers=tenant.headers)
    assert merged.status_code == 200
    for path in ("/v1/completions", "/v1/models", "/v1/files", "/", "/v1/chat/completions/x"):
        answer = post(path, **CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "ROUTE_UNKNOWN")


def test_a_new_key_works_and_a_revoked_one_stops_with_the_next_call(tenant, post):
    made = tenant.http.post(f"/admin/tenant/{tenant.tenant_id}/apikeys", json={}).json()
    headers = {"X-API-Key": made["key"]}
    assert post(headers=headers, **CHAT).status_code == 200
    assert tenant.http.delete(f"/admin/apikey/{made['id']}").status_code == 200
    answer = post(headers=headers, **CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "API_KEY_REVOKED")
    assert post(**CHAT).status_code == 200


def test_a_rate_limit_says_when_to_come_back(new_tenant):
    tenant = new_tenant(rate=3)
    answers = [
        httpx.post(f"{tenant.base_url}/v1/chat/completions", json=CHAT, headers=tenant.headers) for _ in range(4)
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers.get("x-ratelimit-remaining-requests") for answer in answers[:3]] == ["2", "1", "0"]
    assert 1 <= int(answers[3].headers["retry-after"]) <= 60
    assert answers[3].json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"


def test_an_exhausted_budget_explains_itself(new_tenant):
    tenant = new_tenant(monthly("0.00001"))
    answer = httpx.post(f"{tenant.base_url}/v1/chat/completions", json=CHAT, headers=tenant.headers)
    assert answer.status_code == 402
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "BUDGET_EXCEEDED")
    assert (error["budget_id"], error["limit_usd"]) == (tenant.budgets[0]["id"], "0.00001")
    assert (error["spent_usd"], error["held_usd"], error["retryable"]) == ("0", "0", False)
    assert error["resets_at"].endswith("-01T00:00:00Z")


def test_upstream_errors_cost_nothing(tenant, post):
    for status in (400, 429, 500):
        assert post(**{**CHAT, "messages": directive(status=status)}).status_code == status
    rows = tenant.rows(at_least=3)
    assert {(row["end"], row["amountUsd"]) for row in rows} == {("RELEASED", "0")}
    assert tenant.settled() == 0


def test_unknown_usage_is_estimated_and_never_free(tenant, post):
    answer = post(**{**CHAT, "messages": directive(no_usage=True)})
    assert answer.status_code == 200
    held = Decimal(answer.headers["x-budgetguard-estimated-cost-usd"])
    with pytest.raises(httpx.RemoteProtocolError):
        post(**{**CHAT, "messages": directive(cut_after_chunks=2, chunk_delay_ms=50), "stream": True})
    reset = post(**{**CHAT, "messages": directive(reset=True)})
    assert reset.status_code == 503
    rows = tenant.rows(at_least=3)
    assert {row["end"] for row in rows} == {"ESTIMATED"}
    assert all(Decimal(row["amountUsd"]) > 0 for row in rows)
    whole = {row["operationId"]: row for row in rows}[answer.headers["x-budgetguard-operation-id"]]
    assert Decimal(whole["amountUsd"]) == held
    assert tenant.settled() == tenant.ledger_sum(at_least=3)


async def test_the_official_sdk(tenant):
    async with openai.AsyncOpenAI(base_url=f"{tenant.base_url}/v1", api_key=tenant.key, max_retries=0) as client:
        chat = await client.chat.completions.create(model="gpt-4o-mini", messages=ASK)
        assert chat.usage.completion_tokens > 0
        stream = await client.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True)
        chunks = [chunk async for chunk in stream]
        assert all(chunk.usage is None for chunk in chunks)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat.choices[0].message.content
        response = await client.responses.create(model="gpt-4o-mini", input="Say hello.")
        assert response.output_text == chat.choices[0].message.content
        events = [event async for event in await client.responses.create(model="gpt-4o-mini", input="Hi", stream=True)]
        assert events[-1].type == "response.completed"
        embedding = await client.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
        assert len(embedding.data) == 2
    rows = tenant.rows(at_least=5)
    assert {row["end"] for row in rows} == {"CONFIRMED"}
    assert tenant.settled() == tenant.ledger_sum(at_least=5)


def test_the_official_sdk_without_async(tenant):
    with openai.OpenAI(base_url=f"{tenant.base_url}/v1", api_key=tenant.key, max_retries=0) as client:
        chat = client.chat.completions.create(model="gpt-4o-mini", messages=ASK)
        asked = {"stream": True, "stream_options": {"include_usage": True}}
        with client.chat.completions.create(model="gpt-4o-mini", messages=ASK, **asked) as stream:
            chunks = list(stream)
        assert chunks[-1].usage == chat.usage
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert text == chat.choices[0].message.content
        assert client.responses.create(model="gpt-4o-mini", input="Say hello.").output_text == text
        with client.responses.create(model="gpt-4o-mini", input="Hi", stream=True) as events:
            assert [event.type for event in events][-1] == "response.completed"
        assert client.embeddings.create(model="text-embedding-3-small", input="a").usage.prompt_tokens > 0
    rows = tenant.rows(at_least=5)
    assert {row["end"] for row in rows} == {"CONFIRMED"}
    assert tenant.settled() == tenant.ledger_sum(at_least=5)


def test_the_official_sdk_raises_its_own_exceptions(new_tenant, tenant):
    def call(tenant, key=None):
        with openai.OpenAI(base_url=f"{tenant.base_url}/v1", api_key=key or tenant.key, max_retries=0) as client:
            client.chat.completions.create(model="gpt-4o-mini", messages=ASK, max_tokens=8)

    call(tenant)
    with pytest.raises(openai.AuthenticationError):
        call(tenant, key="sk-nobody")
    with (
        pytest.raises(openai.NotFoundError),
        openai.OpenAI(base_url=f"{tenant.base_url}/v1", api_key=tenant.key, max_retries=0) as client,
    ):
        client.chat.completions.create(model="no-such-model", messages=ASK)
    limited = new_tenant(rate=1)
    call(limited)
    with pytest.raises(openai.RateLimitError):
        call(limited)
    poor = new_tenant(monthly("0.000001"))
    with pytest.raises(openai.APIStatusError) as raised:
        call(poor)
    assert raised.value.status_code == 402
    assert raised.value.body["budget_id"]
