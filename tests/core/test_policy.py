import orjson
import pytest

from budgetguard.core.policy import (
    INTEGER_MAX,
    REASON_CHARS_MAX,
    PolicyDecision,
    PolicyFault,
    PolicyInput,
    PolicyUnavailableError,
)

CALL = {
    "tenant_id": "acme",
    "key_id": "k3j9x0a1b2c3d4e5",
    "route": "openai.chat",
    "model": "gpt-4o-mini-2024-07-18",
    "priced_model": "gpt-4o-mini",
    "stream": True,
    "estimate_usd": "0.00123",
    "estimate_nanos": 1_230_000,
    "output_tokens_bound": 4096,
    "time": "2026-01-31T12:00:00Z",
}


def test_input_has_the_documented_shape():
    question = PolicyInput(**CALL, tags=("team/search", "env/prod"), session_id="s-1")
    assert orjson.loads(orjson.dumps(question.to_input())) == {
        "tenant_id": "acme",
        "key_id": "k3j9x0a1b2c3d4e5",
        "route": "openai.chat",
        "model": "gpt-4o-mini-2024-07-18",
        "priced_model": "gpt-4o-mini",
        "stream": True,
        "estimate_usd": "0.00123",
        "estimate_nanos": 1_230_000,
        "output_tokens_bound": 4096,
        "tags": ["team/search", "env/prod"],
        "session_id": "s-1",
        "time": "2026-01-31T12:00:00+00:00",
    }


def test_members_without_a_value_are_empty_and_a_spelled_offset_stays():
    document = PolicyInput(**{**CALL, "time": "2026-01-31T12:00:00.250+00:00"}).to_input()
    assert document["tags"] == []
    assert document["session_id"] == ""
    assert document["time"] == "2026-01-31T12:00:00.250+00:00"


@pytest.mark.parametrize("name", ["estimate_nanos", "output_tokens_bound"])
def test_integers_that_an_engine_could_not_hold_are_refused(name):
    assert PolicyInput(**{**CALL, name: INTEGER_MAX}).to_input()[name] == INTEGER_MAX
    for value in (-1, INTEGER_MAX + 1):
        with pytest.raises(ValueError, match=f"{name}: expected 0 to"):
            PolicyInput(**{**CALL, name: value})


def test_a_decision_is_read():
    assert PolicyDecision.from_result({"allow": True, "reason": ""}) == PolicyDecision(allow=True)
    assert PolicyDecision.from_result({"allow": False, "reason": "no", "more": 1}) == PolicyDecision(
        allow=False, reason="no"
    )
    long = PolicyDecision.from_result({"allow": False, "reason": "x" * 10_000})
    assert long.reason == "x" * REASON_CHARS_MAX


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (None, "expected an object, got nothing"),
        (True, "expected an object, got bool"),
        ([], "expected an object, got list"),
        ({}, "expected a boolean in allow, got nothing"),
        ({"allow": 1, "reason": ""}, "expected a boolean in allow, got int"),
        ({"allow": "true", "reason": ""}, "expected a boolean in allow, got str"),
        ({"allow": True}, "expected a string in reason, got nothing"),
        ({"allow": False, "reason": 5}, "expected a string in reason, got int"),
    ],
)
def test_what_is_no_decision_is_a_fault(result, told):
    with pytest.raises(PolicyUnavailableError) as caught:
        PolicyDecision.from_result(result)
    assert caught.value.fault is PolicyFault.WRONG_TYPED
    assert str(caught.value) == f"wrong-typed: {told}"
