from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.attempts import (
    FACTS_MAX,
    MESSAGE_CHARS_MAX,
    ROWS_A_MINUTE,
    TAGS_MAX,
    TEXT_CHARS_MAX,
    RefusedCall,
    attempt_of,
    attempt_to_json,
    minute_of,
)
from budgetguard.core.reasons import TELLING, Deny, Reason
from tests.plugins.attempts import MINUTE_MS, an_attempt

ROW = RefusedCall(attempt=an_attempt(), number=3)
TEXTS = st.text(st.characters(), max_size=2 * MESSAGE_CHARS_MAX)
FACTS = st.dictionaries(TEXTS, st.none() | st.booleans() | st.integers() | TEXTS, max_size=2 * FACTS_MAX)


@given(
    reason=st.sampled_from(Reason),
    detail=TEXTS,
    facts=FACTS,
    texts=st.tuples(*[TEXTS] * 4),
    tags=st.lists(TEXTS, max_size=3).map(tuple),
    number=st.integers(1, ROWS_A_MINUTE),
)
def test_whatever_a_caller_sends_the_record_survives_its_encoding(reason, detail, facts, texts, tags, number):
    model, session_id, end_user, operation_id = texts
    attempt = attempt_of(
        Deny(reason, detail, facts=facts),
        refused_at_ms=MINUTE_MS,
        tenant_id="acme",
        key_id="k",
        operation_id=operation_id,
        api="openai.chat",
        model=model,
        tags=tags,
        session_id=session_id,
        end_user=end_user,
    )
    row = RefusedCall(attempt=attempt, number=number)
    assert RefusedCall.from_fields(row.to_fields()) == row
    texts = (attempt.operation_id, attempt.message, attempt.model, attempt.session_id, attempt.end_user, *attempt.tags)
    for text in (*texts, *attempt.facts, *filter(lambda fact: isinstance(fact, str), attempt.facts.values())):
        assert "\x00" not in text, "Postgres would refuse it"
    assert attempt.status == TELLING[reason].http_status


def test_what_was_told_is_kept_word_for_word():
    facts = {"budget_id": "b1", "limit_usd": "0.02", "resets_at": None, "retryable": True, "needed_tokens": 2**63 - 1}
    attempt = attempt_of(
        Deny(Reason.BUDGET_EXCEEDED, "Budget b1 of é is exhausted.", facts=facts),
        refused_at_ms=MINUTE_MS + 5,
        tenant_id="acme",
        key_id="k",
        operation_id="op",
        api="openai.chat",
    )
    assert (attempt.reason, attempt.status) == (Reason.BUDGET_EXCEEDED, 402)
    assert (attempt.message, attempt.facts) == ("Budget b1 of é is exhausted.", facts)
    assert attempt.minute_ms == MINUTE_MS


def test_a_record_is_bounded_and_of_what_can_be_stored():
    attempt = attempt_of(
        Deny(
            Reason.POLICY_DENIED,
            "m" * 9_999,
            facts={"big": 2**70, "nul": "a\x00b", **{f"f{n}": n for n in range(99)}},
        ),
        refused_at_ms=MINUTE_MS,
        tenant_id="acme",
        key_id="k",
        operation_id="op",
        api="openai.chat",
        model="x" * 9_999,
        tags=("t\ud800",) * 999,
    )
    assert (len(attempt.message), len(attempt.model)) == (MESSAGE_CHARS_MAX, TEXT_CHARS_MAX)
    assert (len(attempt.tags), attempt.tags[0]) == (TAGS_MAX, "t?")
    assert len(attempt.facts) == FACTS_MAX
    assert (attempt.facts["big"], attempt.facts["nul"]) == (str(2**70), "a\ufffdb")


@pytest.mark.parametrize("field", ["attempt", "number"])
def test_an_entry_without_one_of_its_fields_is_malformed(field):
    fields = ROW.to_fields()
    del fields[field]
    with pytest.raises(ValueError, match="malformed refused call"):
        RefusedCall.from_fields(fields)


@pytest.mark.parametrize("number", ["0", "11", "x", ""])
def test_a_number_that_no_row_has_is_malformed(number):
    with pytest.raises(ValueError, match="malformed refused call"):
        RefusedCall.from_fields({**ROW.to_fields(), "number": number})


@pytest.mark.parametrize("text", ["", "x", "[]", "{}", "5", "null"])
def test_what_is_no_attempt_is_malformed(text):
    with pytest.raises(ValueError, match="malformed refused call"):
        RefusedCall.from_fields({**ROW.to_fields(), "attempt": text})


@pytest.mark.parametrize(
    "wrong",
    [
        {"refused_at_ms": "5"},
        {"refused_at_ms": True},
        {"reason": "NO_SUCH"},
        {"model": None},
        {"facts": []},
        {"facts": {"a": [1]}},
        {"facts": {"a": 1.5}},
        {"tags": "ab"},
        {"tags": [1]},
        {"color": "red"},
    ],
)
def test_an_attempt_with_a_wrong_field_is_malformed(wrong):
    raw = {**orjson.loads(attempt_to_json(ROW.attempt)), **wrong}
    with pytest.raises(ValueError, match="malformed refused call"):
        RefusedCall.from_fields({**ROW.to_fields(), "attempt": orjson.dumps(raw).decode()})


def test_a_minute_begins_in_utc():
    assert minute_of(MINUTE_MS) == minute_of(MINUTE_MS + 59_999) == MINUTE_MS
    assert minute_of(MINUTE_MS - 1) == MINUTE_MS - 60_000
    assert replace(ROW.attempt, refused_at_ms=MINUTE_MS + 60_000).minute_ms == MINUTE_MS + 60_000
