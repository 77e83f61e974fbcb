"""What is asked in a quote's body."""

import pytest

from control_plane.services.quotes import spelled_members
from tests.services.control_plane.test_rest import violations


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
        (b'{"route":"/v1/nope","request":{}}', "route"),
        (b'{"route":"/v1/embeddings"}', "request"),
        (b'{"route":"/v1/embeddings","request":[]}', "request"),
        (b'{"route":"/v1/embeddings","request":{},"request":{}}', "request"),
        (b'{"route":"/v1/embeddings","request":{},"model":"x"}', "model"),
        (b"[]", "(body)"),
    ],
)
def test_a_wrong_body_is_refused_by_field(rest, key, content, field):
    assert list(violations(asks(rest, key, content))) == [field]


def test_members_keep_their_spelling():
    text = ' {"a" : {"b":[1, 2.50 ]} ,"\\u0063":"}" }\n'
    assert spelled_members(text) == {"a": '{"b":[1, 2.50 ]}', "c": '"}"'}
    assert spelled_members("{}") == {}
