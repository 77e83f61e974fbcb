"""Answers fed whole, byte by byte, at random cuts and cut short: usage and bytes must not depend on how they came."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.providers import REGISTRY, openai_readers, sse
from budgetguard.core.providers.openai_readers import JsonReader
from budgetguard.core.usage import Usage

CHAT = REGISTRY["/v1/chat/completions"]
RESPONSES = REGISTRY["/v1/responses"]
FOLDER = Path(__file__).parents[2] / "fixtures" / "openai"
CHAT_STREAM = (FOLDER / "chat_stream_with_usage.sse").read_bytes()
CHAT_STREAM_PLAIN = (FOLDER / "chat_stream.sse").read_bytes()
CHAT_JSON = (FOLDER / "chat.json").read_bytes()
RESPONSE_STREAM = (FOLDER / "response_stream.sse").read_bytes()
RESPONSE_JSON = (FOLDER / "response.json").read_bytes()
EMBEDDINGS_JSON = (FOLDER / "embeddings.json").read_bytes()
CHAT_USAGE = Usage(
    input_tokens=19,
    cache_read_tokens=4,
    input_audio_tokens=0,
    output_tokens=10,
    output_reasoning_tokens=2,
    output_audio_tokens=0,
)


def cuts(size):
    return st.lists(st.integers(0, size), max_size=12).map(sorted)


def feed(reader, text, places):
    """Feed in pieces, then the end; return what passed on, and at which piece the reader was complete."""
    passed, completed_at, start = [], None, 0
    for place in [*places, len(text)]:
        passed.append(reader.feed(text[start:place], end=False))
        if reader.complete and completed_at is None:
            completed_at = (start, place)
        start = place
    passed.append(reader.feed(b"", end=True))
    return b"".join(passed), completed_at


def stream_reader(api=CHAT, *, hides=False):
    return api.reader(stream=True, content_length=None, inject_usage=hides)


@given(cuts(len(CHAT_STREAM)))
def test_an_asked_for_usage_is_read_and_passes_unchanged(places):
    reader = stream_reader()
    passed, completed_at = feed(reader, CHAT_STREAM, places)
    assert passed == CHAT_STREAM
    assert reader.usage == CHAT_USAGE
    assert completed_at is not None
    assert completed_at[1] > CHAT_STREAM.index(b'"choices":[],')
    assert completed_at[0] < CHAT_STREAM.index(b"data: [DONE]")
    assert (reader.model, reader.service_tier, reader.error) == ("gpt-4o-mini-2024-07-18", "default", False)


@given(cuts(len(CHAT_STREAM)))
def test_a_hidden_usage_leaves_the_stream_that_would_have_been(places):
    reader = stream_reader(hides=True)
    passed, _ = feed(reader, CHAT_STREAM, places)
    assert passed == CHAT_STREAM_PLAIN
    assert reader.usage == CHAT_USAGE


def test_byte_by_byte():
    for api, text, hides, seen in (
        (CHAT, CHAT_STREAM, False, CHAT_STREAM),
        (CHAT, CHAT_STREAM, True, CHAT_STREAM_PLAIN),
        (CHAT, CHAT_STREAM.replace(b"\n", b"\r\n"), True, CHAT_STREAM_PLAIN.replace(b"\n", b"\r\n")),
        (CHAT, CHAT_STREAM.replace(b"\n", b"\r"), True, CHAT_STREAM_PLAIN.replace(b"\n", b"\r")),
        (RESPONSES, RESPONSE_STREAM, False, RESPONSE_STREAM),
    ):
        reader = stream_reader(api, hides=hides)
        passed, _ = feed(reader, text, range(len(text)))
        assert passed == seen
        assert reader.usage is not None


@pytest.mark.parametrize("hides", [False, True])
def test_cut_short_anywhere_nothing_fails_and_nothing_is_invented(hides):
    whole = CHAT_STREAM_PLAIN if hides else CHAT_STREAM
    for length in range(len(CHAT_STREAM)):
        reader = stream_reader(hides=hides)
        passed = reader.feed(CHAT_STREAM[:length], end=False) + reader.feed(b"", end=True)
        assert reader.usage in (None, CHAT_USAGE)
        assert reader.complete
        if not hides:
            assert whole.startswith(passed)


def test_output_is_counted_as_it_passes():
    reader = stream_reader()
    reader.feed(CHAT_STREAM[: CHAT_STREAM.index(b'"choices":[],')], end=False)
    assert reader.usage is None
    assert reader.output_tokens_seen >= len("Hello there!")
    responses = stream_reader(RESPONSES)
    responses.feed(RESPONSE_STREAM[: RESPONSE_STREAM.index(b"response.completed")], end=False)
    # The item that is written into counts too: a function's name is in no delta.
    assert responses.output_tokens_seen == len("Hi there") + len("msg_1messagein_progressassistant")


@given(cuts(len(RESPONSE_STREAM)))
def test_a_response_stream_ends_with_its_usage(places):
    reader = stream_reader(RESPONSES)
    passed, completed_at = feed(reader, RESPONSE_STREAM, places)
    assert passed == RESPONSE_STREAM
    assert reader.usage == Usage(input_tokens=37, cache_read_tokens=0, output_tokens=11, output_reasoning_tokens=0)
    assert completed_at is not None


@pytest.mark.parametrize("kind", ["incomplete", "failed"])
def test_a_response_that_ends_otherwise_has_usage_too(kind):
    text = RESPONSE_STREAM.replace(b"response.completed", b"response." + kind.encode())
    reader = stream_reader(RESPONSES)
    feed(reader, text, [])
    assert reader.usage is not None


def test_error_events_are_seen():
    reader = stream_reader(RESPONSES)
    reader.feed(b'event: error\ndata: {"type":"error","code":"x","message":"y"}\n\n', end=False)
    assert reader.error
    chat = stream_reader()
    chat.feed(b'data: {"error":{"message":"y"}}\n\n', end=False)
    assert chat.error


def test_a_running_total_is_overridden_and_does_not_end_the_stream():
    choices = b'"choices":[{"index":0,"delta":{"content":"a","tool_calls":[{"function":{"arguments":"{}"}}]}}]'
    chunk = b"data: {" + choices + b',"usage":{"prompt_tokens":5,"completion_tokens":%d}}\n\n'
    reader = stream_reader(hides=True)
    text = chunk % 1 + chunk % 2
    assert reader.feed(text, end=False) == text
    assert not reader.complete
    assert reader.usage == Usage(input_tokens=5, output_tokens=2)
    assert reader.output_tokens_seen == 2 * len("a{}")
    reader.feed(b"data: [DONE]\n\n", end=False)
    assert reader.complete


@pytest.mark.parametrize(
    ("sent", "passed"),
    [
        (b'{"a":1,"usage":null,"b":2}', b'{"a":1,"b":2}'),
        (b'{"a":1,"usage":null}', b'{"a":1}'),
        (b'{"usage":null,"a":1}', b'{"a":1}'),
        (b'{"a":{"b":1,"usage":null},"usage":null}', b'{"a":{"b":1,"usage":null}}'),
        (b'{"usage":null,"a":{"b":1,"usage":null}}', b'{"a":{"b":1,"usage":null}}'),
        (b'{"us\\u0061ge":null,"a":{"b":1,"usage":null}}', b'{"a":{"b":1,"usage":null}}'),
        (b'{"a":{"b":1,"usage":null},"usage" :null}', b'{"a":{"b":1,"usage":null}}'),
        (b'{"a":"\\",\\"usage\\":null","usage":null}', b'{"a":"\\",\\"usage\\":null"}'),
        (b'{"a":"usage","usage":null}', b'{"a":"usage"}'),
    ],
)
def test_the_chunk_s_own_null_usage_is_removed_and_no_other(sent, passed):
    assert stream_reader(hides=True).feed(b"data: " + sent + b"\n\n", end=False) == b"data: " + passed + b"\n\n"


def test_a_usage_chunk_that_cannot_be_read_is_kept_from_the_caller_and_reports_nothing():
    reader = stream_reader(hides=True)
    assert reader.feed(b'data: {"choices":[],"usage":{"prompt_tokens":"5"}}\n\n', end=False) == b""
    assert reader.usage is None
    assert not reader.complete
    assert reader.feed(b"data: [DONE]\n\n", end=False) == b"data: [DONE]\n\n"
    assert reader.complete


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["response.completed", "error", "x.delta", "\u00e9"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "response", "usage", "choices", "delta", "error", "tool_usage", "prompt_tokens"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(st.sampled_from([CHAT, RESPONSES]), JSON, st.booleans())
def test_no_answer_makes_a_reader_fail(api, value, hides):
    text = json.dumps(value).encode()
    streamed = stream_reader(api, hides=hides)
    passed = streamed.feed(b"data: " + text + b"\n\n", end=True)
    assert hides or passed == b"data: " + text + b"\n\n"
    plain = api.reader(stream=False, content_length=len(text), inject_usage=False)
    assert plain.feed(text, end=False) == text


def test_billed_searches_are_usage():
    response = {
        "usage": {"input_tokens": 1, "output_tokens": 2},
        "tool_usage": {"image_gen": {"input_tokens": 0}, "web_search": {"num_requests": 3}},
    }
    reader = RESPONSES.reader(stream=False, content_length=None, inject_usage=False)
    reader.feed(json.dumps(response).encode(), end=True)
    assert reader.usage == Usage(input_tokens=1, output_tokens=2, web_searches=3)
    streamed = stream_reader(RESPONSES)
    event = json.dumps({"type": "response.completed", "response": response}).encode()
    streamed.feed(b"event: response.completed\ndata: " + event + b"\n\n", end=False)
    assert streamed.usage == reader.usage


def test_a_null_usage_in_an_odd_place_is_removed_too():
    reader = stream_reader(hides=True)
    assert (
        reader.feed(b'data: {"usage": null, "choices": [1, {"delta":5}]}\n\n', end=False)
        == b'data: {"choices": [1, {"delta":5}]}\n\n'
    )
    # An event over several data lines is none that a provider sends: it passes as it is.
    odd = b'data: {"usage":null,\ndata: "choices":[]}\n\n'
    assert reader.feed(odd, end=False) == odd


def test_an_event_over_the_bound_passes_unread(monkeypatch):
    monkeypatch.setattr(sse, "EVENT_BYTES_MAX", 50)
    reader = stream_reader(hides=True)
    long = b'data: {"a":"' + b"x" * 40 + b'"\ndata: , "b":"' + b"y" * 200 + b'"}\n\n'
    after = b'data: {"a":1}\n\n'
    passed, _ = feed(reader, long + after, range(0, len(long + after), 7))
    assert passed == long + after
    whole = stream_reader(hides=True)
    assert feed(whole, long + after, [])[0] == long + after


def test_comments_marks_and_a_missing_last_line_are_read():
    reader = stream_reader()
    reader.feed(b"\xef\xbb\xbf: ping\n\nid: 1\nretry: 5\ndata:[DONE]", end=True)
    assert reader.complete
    empty = stream_reader()
    assert (
        empty.feed(b"\n\ndata: \n\ndata: {broken}\n\ndata: []\n\n", end=False)
        == b"\n\ndata: \n\ndata: {broken}\n\ndata: []\n\n"
    )
    assert empty.usage is None


@given(cuts(len(CHAT_JSON)))
def test_a_json_answer_is_read_when_its_length_is_reached(places):
    reader = CHAT.reader(stream=False, content_length=len(CHAT_JSON), inject_usage=False)
    passed, completed_at = feed(reader, CHAT_JSON, places)
    assert passed == CHAT_JSON
    assert completed_at is not None
    assert completed_at[1] == len(CHAT_JSON)
    assert reader.usage == CHAT_USAGE
    assert reader.service_tier == "default"


def test_a_json_answer_without_a_length_is_read_at_its_end():
    for api, text, usage in (
        (CHAT, CHAT_JSON, CHAT_USAGE),
        (
            RESPONSES,
            RESPONSE_JSON,
            Usage(input_tokens=36, cache_read_tokens=0, output_tokens=87, output_reasoning_tokens=0),
        ),
        (REGISTRY["/v1/embeddings"], EMBEDDINGS_JSON, Usage(input_tokens=8)),
    ):
        reader = api.reader(stream=False, content_length=None, inject_usage=False)
        assert reader.feed(text, end=False) == text
        assert not reader.complete
        reader.feed(b"", end=True)
        assert reader.usage == usage
        assert reader.feed(b"more", end=True) == b"more"


@pytest.mark.parametrize(
    "usage",
    [
        None,
        5,
        [],
        {},
        {"prompt_tokens": -1},
        {"prompt_tokens": "5"},
        {"prompt_tokens": True},
        {"prompt_tokens": 2**54},
        {"prompt_tokens": 1.5},
    ],
)
def test_usage_that_cannot_be_read_was_not_reported(usage):
    reader = JsonReader(content_length=None)
    reader.feed(json.dumps({"usage": usage}).encode(), end=True)
    assert reader.usage is None


def test_parts_that_cannot_be_read_are_left_out():
    reader = JsonReader(content_length=None)
    reader.feed(b'{"usage":{"prompt_tokens":5,"prompt_tokens_details":7,"completion_tokens":null}}', end=True)
    assert reader.usage == Usage(input_tokens=5)


@pytest.mark.parametrize("text", [b"", b"  ", b"not json", b"[1]", b'{"a":', b' {"error":{"message":"x"}}'])
def test_bodies_of_any_kind_pass(text):
    reader = JsonReader(content_length=None)
    assert reader.feed(text, end=True) == text
    assert reader.usage is None
    assert reader.error == (b"error" in text)


def test_a_body_over_the_bound_passes_unread(monkeypatch):
    monkeypatch.setattr(openai_readers, "BODY_BYTES_MAX", 10)
    reader = JsonReader(content_length=None)
    assert reader.feed(CHAT_JSON, end=True) == CHAT_JSON
    assert reader.usage is None
