"""A quote tells what the very next call is told, on the running product."""

from decimal import Decimal
from urllib.parse import unquote

import grpc
import httpx
import pytest

from budgetguard.v1 import quote_pb2, quote_pb2_grpc
from tests.e2e.admin import monthly
from tests.e2e.http2 import post_over_http2

CHAT = {"model": "gpt-4o-mini", "max_tokens": 64, "messages": [{"role": "user", "content": "Say hello."}]}
ROUTE = "/v1/chat/completions"


def quote(tenant, request=CHAT, *, route=ROUTE, headers=None):
    return httpx.post(
        f"{tenant.base_url}/v1/budgetguard/quote",
        json={"route": route, "request": request},
        headers={**tenant.headers, **(headers or {})},
        timeout=20,
    )


def call(tenant, request=CHAT, **headers):
    return httpx.post(f"{tenant.base_url}{ROUTE}", json=request, headers={**tenant.headers, **headers}, timeout=20)


def told(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()


def error_info(answer):
    return next(detail for detail in answer.json()["details"] if detail["@type"].endswith("ErrorInfo"))


def same_refusal(quoted, answer):
    """Hold a quote's refusal against the error of the next call."""
    error, refusal = answer.json()["error"], quoted["refusal"]
    assert not quoted["wouldPass"]
    assert (refusal["reason"], refusal["httpStatus"]) == (error["code"], answer.status_code)
    return refusal["facts"]


def test_a_call_that_fits_is_held_for_what_was_quoted_and_a_quote_holds_nothing(new_tenant):
    tenant = new_tenant(monthly("10"))
    quoted = [told(quote(tenant)) for _ in range(3)]
    assert quoted[0] == quoted[1] == quoted[2]
    assert tenant.budget() == (0, 0)
    (quoted, *_) = quoted
    assert quoted["wouldPass"]
    assert "clampedMaxTokens" not in quoted
    answer = call(tenant)
    assert answer.status_code == 200, answer.text
    assert Decimal(answer.headers["x-budgetguard-estimated-cost-usd"]) == Decimal(quoted["holdUsd"])
    assert Decimal(quoted["costMinUsd"]) < Decimal(quoted["costMaxUsd"]) == Decimal(quoted["holdUsd"])
    assert len(tenant.rows(at_least=1)) == 1


def test_a_call_that_is_clamped_gets_the_bound_that_was_quoted(new_tenant):
    tenant = new_tenant(monthly("0.01"))
    request = {**CHAT, "max_tokens": 16_384 * 2}
    quoted = told(quote(tenant, request))
    assert quoted["wouldPass"]
    bound = int(quoted["clampedMaxTokens"])
    assert 16 <= bound < 32_768
    answer = call(tenant, request)
    # Each token of the bound is held at its price.
    assert Decimal(quoted["holdUsd"]) == Decimal(quoted["costMinUsd"]) + bound * Decimal("0.0000006")
    assert Decimal(answer.headers["x-budgetguard-estimated-cost-usd"]) == Decimal(quoted["holdUsd"])


def test_a_budget_that_refuses_is_named_with_the_facts_of_the_refusal(new_tenant):
    tenant = new_tenant(monthly("0.00003"))
    changed = tenant.http.put(f"/admin/tenant/{tenant.tenant_id}", json={"clamp": False})
    assert changed.status_code == 200, changed.text
    quoted = told(quote(tenant))
    facts = same_refusal(quoted, call(tenant))
    error = call(tenant).json()["error"]
    for name in ("budget_id", "subject_kind", "limit_usd", "spent_usd", "held_usd", "needed_usd", "resets_at"):
        assert facts[name] == error[name], error
    assert facts["budget_id"] == tenant.budgets[0]["id"]
    remedy = quoted["remedy"]
    assert Decimal(remedy["shortUsd"]) == Decimal(facts["needed_usd"]) - Decimal("0.00003")
    # More than the whole limit: no reset helps, a smaller bound does.
    assert "notBefore" not in remedy
    fits = int(remedy["maxTokens"])
    assert not told(quote(tenant, {**CHAT, "max_tokens": fits + 1}))["wouldPass"]
    assert told(quote(tenant, {**CHAT, "max_tokens": fits}))["wouldPass"]
    assert call(tenant, {**CHAT, "max_tokens": fits}).status_code == 200


def test_a_rate_limit_is_quoted(new_tenant):
    tenant = new_tenant(rate=1)
    assert told(quote(tenant))["wouldPass"]
    assert told(quote(tenant))["wouldPass"]
    assert call(tenant).status_code == 200
    quoted = told(quote(tenant))
    facts = same_refusal(quoted, call(tenant))
    assert facts["limit_requests_per_minute"] == "1"
    assert "notBefore" in quoted["remedy"]


def test_a_limit_of_tokens_a_minute_is_quoted(new_tenant):
    tenant = new_tenant()
    limited = tenant.http.put(f"/admin/tenant/{tenant.tenant_id}", json={"tokensPerMin": 5})
    assert limited.status_code == 200, limited.text
    facts = same_refusal(told(quote(tenant)), call(tenant))
    assert facts["limit_tokens_per_minute"] == "5"


def test_a_full_template_is_quoted(new_tenant):
    tenant = new_tenant({"period": "lifetime", "amountUsd": 2, "each": "session", "subjectsMax": 1})
    one, other = {"X-Session-Id": "s1"}, {"X-Session-Id": "s2"}
    assert told(quote(tenant, headers=other))["wouldPass"]
    assert call(tenant, **one).status_code == 200
    assert told(quote(tenant, headers=one))["wouldPass"]
    facts = same_refusal(told(quote(tenant, headers=other)), call(tenant, **other))
    assert (facts["subjects_max"], facts["retryable"]) == ("1", "true")


def test_a_full_template_tells_when_its_window_resets(new_tenant):
    tenant = new_tenant({"period": "monthly", "amountUsd": 2, "each": "session", "subjectsMax": 1})
    assert call(tenant, **{"X-Session-Id": "s1"}).status_code == 200
    other = {"X-Session-Id": "s2"}
    quoted = told(quote(tenant, headers=other))
    facts = same_refusal(quoted, call(tenant, **other))
    assert (facts["retryable"], facts["resets_at"]) == ("true", quoted["remedy"]["notBefore"])


@pytest.mark.parametrize(
    ("request_body", "headers", "field"),
    [
        ({**CHAT, "model": "gpt-nope"}, {}, None),
        ({**CHAT, "max_tokens": "many"}, {}, "request.max_tokens"),
        ({"model": 5, "messages": []}, {}, "request.model"),
        (CHAT, {"X-Tags": "serach"}, "X-Tags"),
    ],
)
def test_what_no_call_can_be_quoted_for_is_refused_as_the_call_is(new_tenant, request_body, headers, field):
    tenant = new_tenant(monthly("10"))
    quoted, answer = quote(tenant, request_body, headers=headers), call(tenant, request_body, **headers)
    assert quoted.status_code == answer.status_code
    assert error_info(quoted)["reason"] == answer.json()["error"]["code"]
    fields = [
        one["field"]
        for detail in quoted.json()["details"]
        if detail["@type"].endswith("BadRequest")
        for one in detail["fieldViolations"]
    ]
    assert fields == ([] if field is None else [field])


TAGS, SESSION, SESSION_NAME, SESSION_PATH, USER = (
    "X-Tags",
    "X-Session-Id",
    "X-Session-Name",
    "X-Session-Path",
    "X-User-Id",
)
LATIN_1 = "jö".encode("latin-1")


def quote_and_call(tenant, headers, *, same_words=True):
    """Send the same headers, in bytes, with a quote and with the call; both are refused for the same, or neither is."""
    sent = [*tenant.headers.items(), *headers]
    quoted = httpx.post(
        f"{tenant.base_url}/v1/budgetguard/quote", json={"route": ROUTE, "request": CHAT}, headers=sent, timeout=20
    )
    called = httpx.post(f"{tenant.base_url}{ROUTE}", json=CHAT, headers=sent, timeout=20)
    assert quoted.status_code == called.status_code, quoted.text
    if called.status_code == 200:
        assert quoted.json()["wouldPass"]
        return None
    error = called.json()["error"]
    assert error_info(quoted)["reason"] == error["code"]
    assert quoted.json()["message"] == error["message"] or not same_words
    violations = quoted.json()["details"][1]["fieldViolations"]
    assert [violation["field"] for violation in violations] == [error["param"]]
    return error["message"]


def make_tags(tenant, *tags):
    for tag in tags:
        made = tenant.http.post(f"/admin/tenant/{tenant.tenant_id}/tags", json={"tagId": tag})
        assert made.status_code == 200, made.text


@pytest.mark.parametrize("name", [TAGS, SESSION, SESSION_NAME, SESSION_PATH, USER])
def test_a_header_that_is_no_utf_8_is_refused_as_the_call_s_is(new_tenant, name):
    tenant = new_tenant(monthly("10"))
    make_tags(tenant, "s")
    session = [] if name == SESSION else [(SESSION, b"s")]
    # Latin-1; no encoding's; one of two; a surrogate; a zero in two bytes; past the last character.
    for value in (LATIN_1, b"\xff\xfe", "jö ".encode() + LATIN_1, b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"):
        told = quote_and_call(tenant, [*session, (name, value)])
        assert told == f"{name}: expected UTF-8, got bytes that are none."
    # The edge looks at each of several by itself, and a quote may be told of another fault of the same header.
    quote_and_call(tenant, [*session, (name, b"s"), (name, LATIN_1)], same_words=False)
    for text in ("jö", "Zürich 日本 😀", "\ud7ff\ue000\U0010ffff", "é" * 200):
        told = quote_and_call(tenant, [*session, (name, text.encode())])
        assert told is None or name == TAGS, told


@pytest.mark.parametrize("name", [SESSION, USER])
def test_a_header_that_comes_twice_is_refused_as_the_call_s_is(new_tenant, name):
    tenant = new_tenant(monthly("10"))
    told = quote_and_call(tenant, [(name, b"a"), (name, b"b")])
    assert told == f"{name}: expected it once, got it several times."
    assert quote_and_call(tenant, [(name, b"a,b")]) is None


def test_of_several_headers_the_same_one_is_blamed_as_the_call_s_is(new_tenant):
    tenant = new_tenant(monthly("10"))
    assert quote_and_call(tenant, [(USER, LATIN_1), (SESSION, LATIN_1)]).startswith(SESSION)
    assert quote_and_call(tenant, [(USER, LATIN_1), (SESSION, b"a"), (SESSION, b"b")]).startswith(SESSION)
    assert quote_and_call(tenant, [(USER, b"a"), (USER, b"b"), (TAGS, LATIN_1)]).startswith(TAGS)
    # Ours to set: a client's own says nothing.
    assert quote_and_call(tenant, [("X-BudgetGuard-Not-UTF8", b"x-user-id"), (USER, b"jo")]) is None


def test_tags_may_come_in_several_headers(new_tenant):
    tenant = new_tenant(monthly("10"))
    make_tags(tenant, "a", "b")
    assert quote_and_call(tenant, [(TAGS, b"a"), (TAGS, b"b")]) is None
    assert "'c'" in quote_and_call(tenant, [(TAGS, b"a"), (TAGS, b"c")])


@pytest.mark.parametrize("method", ["Quote", "ListOwnBudgets"])
def test_over_grpc_such_headers_are_refused_too(new_tenant, stack, method):
    tenant = new_tenant(monthly("10"))
    headers = {"content-type": "application/grpc", "te": "trailers", **tenant.headers}
    answer = post_over_http2(
        stack.base_url,
        f"/budgetguard.v1.QuoteService/{method}",
        headers={**headers, USER: LATIN_1},
        body=b"\0\0\0\0\0",
    )
    assert (answer.status, answer.headers["grpc-status"]) == (200, "3")
    assert unquote(answer.headers["grpc-message"]) == "X-User-Id: expected UTF-8, got bytes that are none."
    with grpc.insecure_channel(stack.base_url.removeprefix("http://")) as channel:
        stub = quote_pb2_grpc.QuoteServiceStub(channel)
        metadata = (("x-api-key", tenant.key), ("x-user-id", "a"), ("x-user-id", "b"))
        request = quote_pb2.QuoteRequest() if method == "Quote" else quote_pb2.ListOwnBudgetsRequest()
        with pytest.raises(grpc.RpcError) as refused:
            getattr(stub, method)(request, metadata=metadata, timeout=20)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details() == "X-User-Id: expected it once, got it several times."


def test_only_a_good_key_of_a_tenant_is_answered(new_tenant, stack):
    tenant = new_tenant(monthly("10"))
    paths = (("POST", "/v1/budgetguard/quote"), ("GET", "/v1/budgetguard/budgets"))
    for method, path in paths:
        for headers, reason in (
            ({"X-Admin-Key": stack.admin_key}, "API_KEY_MISSING"),
            ({"X-API-Key": tenant.key[:-1] + ("A" if tenant.key[-1] != "A" else "B")}, "API_KEY_UNKNOWN"),
        ):
            body = {"route": ROUTE, "request": CHAT} if method == "POST" else None
            answer = httpx.request(method, tenant.base_url + path, headers=headers, json=body, timeout=20)
            assert (answer.status_code, error_info(answer)["reason"]) == (401, reason)
    assert quote(tenant, headers={"X-Tenant-Id": "umbrella"}).status_code == 403
    gone = tenant.http.put(f"/admin/tenant/{tenant.tenant_id}", json={"status": "SUSPENDED"})
    assert gone.status_code == 200, gone.text
    answer = quote(tenant)
    assert (answer.status_code, error_info(answer)["reason"]) == (403, "TENANT_SUSPENDED")


def test_over_rest_and_grpc_the_same_bytes_are_asked_about(new_tenant, stack):
    tenant = new_tenant(monthly("10"))
    body = b'{ "model":"gpt-4o-mini",\n "max_tokens": 64, "messages":[{"role":"user","content":"Say \\u0068ello."}] }'
    answer = httpx.post(
        f"{tenant.base_url}/v1/budgetguard/quote",
        content=b'{"route":"/v1/chat/completions", "request" : ' + body + b"}",
        headers=tenant.headers,
        timeout=20,
    )
    with grpc.insecure_channel(stack.base_url.removeprefix("http://")) as channel:
        stub = quote_pb2_grpc.QuoteServiceStub(channel)
        request = quote_pb2.QuoteRequest(route=ROUTE, request=body)
        quoted = stub.Quote(request, metadata=(("x-api-key", tenant.key),), timeout=20)
        assert quoted.would_pass
        assert (quoted.cost_max_usd, quoted.hold_usd) == (told(answer)["costMaxUsd"], answer.json()["holdUsd"])
        with pytest.raises(grpc.RpcError) as refused:
            stub.Quote(request, metadata=(("x-admin-key", stack.admin_key),), timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        listed = stub.ListOwnBudgets(
            quote_pb2.ListOwnBudgetsRequest(), metadata=(("x-api-key", tenant.key),), timeout=20
        )
    assert [one.id for one in listed.budgets] == [tenant.budgets[0]["id"]]
    called = httpx.post(
        tenant.base_url + ROUTE,
        content=body,
        headers={**tenant.headers, "Content-Type": "application/json"},
        timeout=20,
    )
    assert Decimal(called.headers["x-budgetguard-estimated-cost-usd"]) == Decimal(quoted.hold_usd)


def test_own_budgets_are_those_that_a_call_counts_in(new_tenant):
    tenant = new_tenant(
        monthly("10"),
        {"period": "lifetime", "amountUsd": 2, "each": "session"},
        {"period": "daily", "amountUsd": 3, "model": "gpt-4o-mini", "mode": "OBSERVE"},
    )
    url = f"{tenant.base_url}/v1/budgetguard/budgets"
    plain = told(httpx.get(url, headers=tenant.headers))["budgets"]
    assert [(one["subjectKind"], one["limitUsd"], one["remainingUsd"]) for one in plain] == [("TENANT", "10", "10")]
    assert "resetsAt" in plain[0]
    in_session = {**tenant.headers, "X-Session-Id": "s1"}
    assert call(tenant, **{"X-Session-Id": "s1"}).status_code == 200
    tenant.rows(at_least=1)
    listed = told(httpx.get(url, headers=in_session, params={"model": "gpt-4o-mini"}))["budgets"]
    told_of = {one["subjectKind"]: one for one in listed}
    assert told_of.keys() == {"TENANT", "SESSION", "MODEL"}
    assert (told_of["SESSION"]["subject"], "resetsAt" in told_of["SESSION"]) == ("s1", False)
    assert (told_of["MODEL"]["mode"], told_of["MODEL"]["enforced"], told_of["MODEL"]["limitUsd"]) == (
        "OBSERVE",
        False,
        "3",
    )
    assert len({one["spentUsd"] for one in listed}) == 1
    assert all(Decimal(one["spentUsd"]) > 0 and Decimal(one["heldUsd"]) == 0 for one in listed)
