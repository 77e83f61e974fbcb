"""A stream that is ended on its way: by whole events, with a last one that its API documents."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.providers.openai import ChatCompletions, Embeddings, Responses
from budgetguard.core.providers.sse import EventSplitter
from budgetguard.core.reasons import Deny, Reason
from tests.core.providers.test_openai_answers import CHAT_STREAM, CHAT_STREAM_PLAIN, RESPONSE_STREAM

DENY = Deny(Reason.BUDGET_EXCEEDED, "Budget b1 is exhausted.", facts={"budget_id": "b1", "limit_usd": "1.00"})


def reader_of(api, *, hides=False):
    return api.reader(stream=True, content_length=None, inject_usage=hides, whole_events=True)


def events_of(text):
    splitter = EventSplitter()
    events = splitter.feed(text)
    assert splitter.rest() is None
    return [(event.kind, event.data) for event in events]


@given(st.integers(0, len(CHAT_STREAM)), st.booleans())
def test_a_chat_stream_ends_behind_a_whole_event_wherever_it_is_cut(cut, hides):
    reader = reader_of(ChatCompletions(), hides=hides)
    passed = reader.feed(CHAT_STREAM[:cut], end=False)
    before = events_of(passed)
    assert before == events_of(CHAT_STREAM_PLAIN if hides else CHAT_STREAM)[: len(before)]
    *_, (_, error), (_, done) = events_of(passed + reader.closing(DENY))
    assert done == b"[DONE]"
    assert json.loads(error) == {
        "error": {
            "message": "Budget b1 is exhausted.",
            "type": "insufficient_quota",
            "param": None,
            "code": "BUDGET_EXCEEDED",
            "budget_id": "b1",
            "limit_usd": "1.00",
        }
    }


def test_by_whole_events_everything_passes_in_the_end():
    for api, text in ((ChatCompletions(), CHAT_STREAM), (Responses(), RESPONSE_STREAM)):
        reader = reader_of(api)
        passed = b"".join(reader.feed(text[place : place + 1], end=False) for place in range(len(text)))
        assert passed + reader.feed(b"", end=True) == text
        torn = reader_of(api)
        assert torn.feed(text[:-1], end=False) + torn.feed(b"", end=True) == text[:-1]


def test_a_response_that_is_ended_has_failed():
    reader = reader_of(Responses())
    passed = reader.feed(RESPONSE_STREAM[: RESPONSE_STREAM.index(b"event: response.output_text.done")], end=False)
    *before, (kind, data) = events_of(passed + reader.closing(DENY))
    event = json.loads(data)
    assert (kind, event["type"]) == ("response.failed", "response.failed")
    assert event["sequence_number"] == json.loads(before[-1][1])["sequence_number"] + 1
    opened = json.loads(before[0][1])["response"]
    error = {"code": "BUDGET_EXCEEDED", "message": "Budget b1 is exhausted.", "budget_id": "b1", "limit_usd": "1.00"}
    assert event["response"] == opened | {"status": "failed", "error": error}


@pytest.mark.parametrize("seen", [b"", b'data: {"type":"response.created","response":7}\n\n'])
def test_a_response_that_was_never_opened_ends_with_an_error(seen):
    reader = reader_of(Responses())
    ((kind, data),) = events_of((reader.feed(seen, end=False) + reader.closing(DENY)).removeprefix(seen))
    assert kind == "error"
    assert json.loads(data) == {
        "type": "error",
        "code": "BUDGET_EXCEEDED",
        "message": "Budget b1 is exhausted.",
        "param": None,
        "budget_id": "b1",
        "limit_usd": "1.00",
        "sequence_number": 0,
    }


def test_nothing_is_added_to_a_json_answer():
    for api in (ChatCompletions(), Responses(), Embeddings()):
        assert api.reader(stream=False, content_length=None, inject_usage=False).closing(DENY) == b""
