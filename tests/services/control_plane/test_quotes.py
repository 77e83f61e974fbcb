"""What is asked in a quote's body."""

import pytest

from control_plane.services.quotes import spelled_members
from tests.services.control_plane.test_rest import reason, violations


@pytest.fixture
def key(rest, tenant_id):
    made = rest.post(f"/admin/tenant/{tenant_id}/apikeys", json={})
    assert made.status_code == 200, made.text
    return made.json()["key"]


def asks(rest, key, content):
    return rest.post("/v1/budgetguard/quote", content=content, headers={"X-API-Key": key})


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"", "route"),
        (b'{"route":5,"request":{}}', "route"),
        (b'{"route":"","request":{}}', "route"),
        (b'{"route":"/v1/embeddings"}', "request"),
        (b'{"route":"/v1/embeddings","request":[]}', "request"),
        (b'{"route":"/v1/embeddings","request":{},"request":{}}', "request"),
        (b'{"route":"/v1/embeddings","request":{},"model":"x"}', "model"),
        (b"[]", "(body)"),
    ],
)
def test_a_wrong_body_is_refused_by_field(rest, key, content, field):
    assert list(violations(asks(rest, key, content))) == [field]


@pytest.mark.parametrize("route", ["/v1/audio/speech", "/v1/models", "nonsense"])
def test_a_route_that_no_call_can_take_is_refused_as_the_call_is(rest, key, route):
    answer = asks(rest, key, b'{"route":"%s","request":{}}' % route.encode())
    assert (answer.status_code, reason(answer)) == (404, "ROUTE_UNKNOWN")


def test_a_body_that_is_too_large_is_told_in_our_words(rest, key):
    answer = asks(rest, key, b'{"route":"/v1/embeddings","request":{"input":"' + b"a" * 2**21 + b'"}}')
    assert answer.status_code == 413
    assert answer.json() == {"code": 3, "message": "The request body is larger than 1 MiB."}


def test_a_field_of_the_call_is_named_once(rest, key):
    body = {"model": "gpt-4o-mini", "n": 0, "messages": [{"role": "user", "content": "a"}]}
    answer = rest.post(
        "/v1/budgetguard/quote", json={"route": "/v1/chat/completions", "request": body}, headers={"X-API-Key": key}
    )
    assert violations_of(answer).keys() == {"request.n"}
    assert answer.json()["message"].startswith("request.n: expected "), answer.text
    tagged = rest.get("/v1/budgetguard/budgets", headers={"X-API-Key": key, "X-Tags": "serach"})
    assert violations_of(tagged) == {"X-Tags": "there is no tag 'serach'."}
    assert tagged.json()["message"] == "X-Tags: there is no tag 'serach'."


def violations_of(answer) -> dict[str, str]:
    assert answer.status_code == 400, answer.text
    found = next(detail for detail in answer.json()["details"] if detail["@type"].endswith("BadRequest"))
    return {one["field"]: one["description"] for one in found["fieldViolations"]}


def test_members_keep_their_spelling():
    text = ' {"a" : {"b":[1, 2.50 ]} ,"\\u0063":"}" }\n'
    assert spelled_members(text) == {"a": '{"b":[1, 2.50 ]}', "c": '"}"'}
    assert spelled_members("{}") == {}
