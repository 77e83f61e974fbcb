import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.providers import REGISTRY, InvalidRequestError, api_named, find_api
from budgetguard.core.reasons import Deny, Reason

CHAT = REGISTRY["/v1/chat/completions"]
RESPONSES = REGISTRY["/v1/responses"]
EMBEDDINGS = REGISTRY["/v1/embeddings"]
HELLO = [{"role": "user", "content": "hello"}]


def parse(api, **members):
    return api.parse_request(json.dumps(members).encode())


def chat(**members):
    return parse(CHAT, **{"model": "gpt-4o-mini", "messages": HELLO} | members)


def responses(**members):
    return parse(RESPONSES, **{"model": "gpt-4o-mini", "input": "hello"} | members)


def embeddings(**members):
    return parse(EMBEDDINGS, **{"model": "text-embedding-3-small"} | members)


def part(**members):
    """A chat request's members with one content part in its third message."""
    return {"messages": [*HELLO, *HELLO, {"role": "user", "content": [members]}]}


def test_routes():
    assert find_api("POST", "/v1/responses?x=1") is RESPONSES
    assert find_api("GET", "/v1/responses") is None
    assert find_api("POST", "/v1/completions") is None
    assert api_named("openai.chat") is CHAT
    assert api_named("nobody") is None


def test_a_chat_request_is_read():
    facts = chat(max_tokens=7, n=2, stream=True, service_tier="flex", tools=[{"type": "function", "function": {}}])
    assert (facts.model, facts.stream, facts.output_tokens_max, facts.output_field) == (
        "gpt-4o-mini",
        True,
        7,
        "max_tokens",
    )
    assert (facts.choices, facts.service_tier, facts.wants_usage_injection) == (2, "flex", True)
    assert not facts.hosted_tools


@pytest.mark.parametrize(
    ("members", "requested", "wanted"),
    [
        ({}, False, False),
        ({"stream": True}, False, True),
        ({"stream": True, "stream_options": None}, False, True),
        ({"stream": True, "stream_options": {"include_usage": False}}, False, True),
        ({"stream": True, "stream_options": {"include_usage": True}}, True, False),
        ({"stream": None}, False, False),
    ],
)
def test_usage_is_asked_for_where_the_caller_did_not(members, requested, wanted):
    facts = chat(**members)
    assert (facts.usage_requested, facts.wants_usage_injection) == (requested, wanted)


@pytest.mark.parametrize(
    ("model", "members", "field"),
    [
        ("gpt-4o", {}, "max_tokens"),
        ("o3-mini", {}, "max_completion_tokens"),
        ("gpt-5", {}, "max_completion_tokens"),
        ("gpt-4o", {"max_completion_tokens": 5}, "max_completion_tokens"),
        ("gpt-5", {"max_tokens": None}, "max_completion_tokens"),
        ("ft:o4-mini-2025-04-16:acme::x", {}, "max_completion_tokens"),
        ("ft:gpt-4o-mini-2024-07-18:acme::x", {}, "max_tokens"),
    ],
)
def test_the_bound_goes_into_the_model_s_own_field(model, members, field):
    assert chat(model=model, **members).output_field == field
    body = json.dumps({"model": model, "messages": HELLO, **members}).encode()
    written = json.loads(CHAT.rewrite_request(body, output_tokens=9, inject_usage=False))
    assert written == {"model": model, "messages": HELLO, **members, field: 9}


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"model": " "}, "model"),
        ({"model": "x" * 300}, "model"),
        ({"model": "a\nb"}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"max_completion_tokens": []}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": "x"}}, "include_usage"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"service_tier": 3}, "service_tier"),
        ({"tools": {}}, "tools"),
        ({"modalities": "audio"}, "modalities"),
        ({"best_of": "2"}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "function"}, {"type": ["function"]}]}, "tools[1].type"),
        ({"tools": [{"type": "code_interpreter", "container": 5}]}, "tools[0].container"),
        ({"tools": [{"type": "shell", "container": {"memory_limit": 5}}]}, "tools[0].container.memory_limit"),
        ({"web_search_options": "x"}, "web_search_options"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"prediction": "x"}, "prediction"),
        ({"prediction": {"content": 5}}, "prediction.content"),
        ({"messages": [*HELLO, None]}, "messages[1]"),
        ({"messages": [*HELLO, "hello"]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x", 5]}]}, "messages[0].content[1]"),
        ({"messages": [{"role": "user", "content": [{"type": 5}]}]}, "messages[0].content[0].type"),
        (part(type="image_url", image_url=5), "messages[2].content[0].image_url"),
        (part(type="image_url", image_url={"url": 5}), "messages[2].content[0].image_url.url"),
        (part(type="image_url", image_url={"url": "x", "detail": 1}), "messages[2].content[0].image_url.detail"),
        (part(type="input_audio", input_audio="x"), "messages[2].content[0].input_audio"),
        (part(type="input_audio", input_audio={"data": 5}), "messages[2].content[0].input_audio.data"),
    ],
)
def test_wrong_types_name_the_field(members, param):
    with pytest.raises(InvalidRequestError, match="expected") as raised:
        chat(**members)
    assert raised.value.param == param


def test_a_number_beyond_all_bounds_is_refused():
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        CHAT.parse_request(b'{"model":"m","messages":[1],"max_tokens":1e309}')


def test_a_long_wrong_value_is_not_shown():
    with pytest.raises(InvalidRequestError, match="got a string"):
        chat(max_tokens="x" * 100)
    with pytest.raises(InvalidRequestError, match="got a number"):
        chat(max_tokens=10**60)


@pytest.mark.parametrize(
    "member",
    [
        {"tools": [{"type": "web_search"}]},
        {"tools": [{}]},
        {"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]},
        {"web_search_options": {}},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    ],
)
def test_what_was_not_sent_has_no_bound(member):
    assert chat(**member).input_tokens_bound is None


def test_the_bound_counts_every_byte_of_text_and_no_base64():
    plain = chat().input_tokens_bound
    assert chat(messages=[{"role": "user", "content": "hello" + "é" * 10}]).input_tokens_bound == plain + 20
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10**6}}
    seen = chat(messages=[{"role": "user", "content": [image]}])
    assert (seen.input_tokens_bound < 100, seen.input_tokens_beyond_window) == (True, 2833 + 8 * 5667)
    low = {"type": "image_url", "image_url": {"url": "x", "detail": "low"}}
    assert chat(messages=[{"role": "user", "content": [low]}]).input_tokens_beyond_window == 2833
    seen = chat(model="gpt-4o", messages=[{"role": "user", "content": [image, low]}])
    assert (85 + 8 * 170 + 85 < seen.input_tokens_bound < 1600, seen.input_tokens_beyond_window) == (True, 0)
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 1600, "format": "mp3"}}
    heard = chat(messages=[{"role": "user", "content": [sound]}])
    assert heard.audio
    assert heard.input_tokens_bound < 200
    tools = chat(tools=[{"type": "function", "function": {"name": "f" * 100, "strict": True, "x": 2**70}}])
    assert tools.input_tokens_bound > plain + 100
    assert chat(user="u" * 1000, metadata={"a": "b" * 100}, temperature=0.5).input_tokens_bound == plain
    assert chat(system="s" * 50).input_tokens_bound == plain + 50


@pytest.mark.parametrize(
    "item",
    [
        {"type": "tool_search_call", "arguments": [[]] * 500},
        {"type": "tool_search_call", "arguments": {"\u4e2d" * 500: 1}},
        {"type": "shell_call", "action": {"commands": ["x" * 1000, "y" * 500]}},
        {"type": "function_call", "name": "f", "arguments": "z" * 1500},
        {"type": "function_call_output", "output": [[]] * 1500},
        {"type": "function_call_output", "output": [10**1500, True, None]},
    ],
)
def test_what_is_shown_as_json_counts_with_its_brackets_and_keys(item):
    assert responses(input=[item]).input_tokens_bound > 1500


def test_a_nano_model_may_read_a_low_detail_image_whole():
    low = [{"type": "input_image", "image_url": "https://x/y.png", "detail": "low"}]
    assert 3_779 < responses(model="gpt-5-nano", input=[{"role": "user", "content": low}]).input_tokens_bound < 4_000


@pytest.mark.parametrize(
    ("body", "audio"),
    [
        (b'{"messages":[{"content":[{"type":"\\u0069nput_audio","\\u0069nput_audio":{}}]}],', True),
        (b'{"messages":[{"content":[{"type":"input_audio","input_audio":{"data":"AAAA"}}]}],', True),
        (b'{"messages":[{"role":"assistant","audio":{"id":"audio_1"}}],', True),
        (b'{"messages":[{"content":"about \\"input_audio\\" and \\u0041"}],', False),
    ],
)
def test_sound_is_seen_however_it_is_spelled(body, audio):
    assert CHAT.parse_request(body + b'"model":"gpt-4o-audio-preview"}').audio is audio


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "auto", "function", "x", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "id", "audio", "image_url", "n"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
METERED = st.sampled_from(
    ["model", "messages", "input", "tools", "n", "stream", "stream_options", "max_tokens", "service_tier", "modalities"]
)


@given(st.sampled_from([CHAT, RESPONSES, EMBEDDINGS]), st.dictionaries(METERED, JSON), st.booleans())
def test_any_json_is_either_read_or_refused_with_an_answer_that_can_be_sent(api, members, named):
    body = json.dumps({"messages": HELLO, "input": "x", **members} | ({"model": "m"} if named else {})).encode()
    refused = None
    try:
        facts = api.parse_request(body)
    except InvalidRequestError as error:
        refused = Deny(Reason.REQUEST_INVALID, str(error), param=error.param)
    if refused is None:
        assert facts.model
    else:
        assert json.loads(api.error_body(refused))["error"]["message"] == refused.message


def test_a_responses_request_is_read():
    facts = responses(max_output_tokens=20, stream=True, instructions="be brief")
    assert (facts.output_tokens_max, facts.output_field, facts.stream) == (20, "max_output_tokens", True)
    assert not facts.wants_usage_injection
    assert facts.input_tokens_bound == responses().input_tokens_bound + len("be brief")


@pytest.mark.parametrize(
    "members",
    [
        {"previous_response_id": "r"},
        {"conversation": "c"},
        {"conversation": {"id": "c"}},
        {"conversation": {}},
        {"input": None, "prompt": {"id": "p"}},
        {"tools": [{"type": "web_search"}]},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"id": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "https://x/y.txt"}]}]},
        {"input": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "https://x/y"}}]}]},
        {"input": [{"type": "code_interpreter_call", "container_id": "c"}]},
    ],
)
def test_stored_input_has_no_bound(members):
    assert responses(**members).input_tokens_bound is None


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tool_calls": -1}, "max_tool_calls"),
        ({"max_tool_calls": True}, "max_tool_calls"),
        ({"truncation": 1}, "truncation"),
        ({"reasoning": "high"}, "reasoning"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"previous_response_id": 5}, "previous_response_id"),
        ({"conversation": 5}, "conversation"),
        ({"conversation": {"id": 5}}, "conversation.id"),
        ({"prompt": "p"}, "prompt"),
        ({"input": ["hello"]}, "input[0]"),
        ({"input": [{"type": "input_image", "detail": 5}]}, "input[0].detail"),
        ({"input": [{"content": [{"type": "input_file", "file_data": 5}]}]}, "input[0].content[0].file_data"),
        ({"input": [{"type": "image_generation_call", "result": 5}]}, "input[0].result"),
        ({"input": [{"type": "function_call_output", "output": {"type": 5}}]}, "input[0].output.type"),
    ],
)
def test_responses_that_cannot_be_metered_are_refused(members, param):
    with pytest.raises(InvalidRequestError) as raised:
        responses(**members)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("given", "tokens"),
    [("hello", 13), (["a", "bc"], 19), ([1, 2, 3], 3), ([[1, 2], [3]], 3)],
)
def test_an_embedding_s_input_is_bounded(given, tokens):
    facts = embeddings(input=given)
    assert (facts.input_tokens_bound, facts.has_output, facts.output_field) == (tokens, False, None)


@pytest.mark.parametrize("given", [None, 5, [], [[]], [1, "a"], [[1], "a"], [True], [1.5], {}])
def test_an_embedding_of_something_else_is_refused(given):
    with pytest.raises(InvalidRequestError, match="input"):
        embeddings(input=given)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m"}', b'{"stream_options":{"include_usage":true},"model":"m"}'),
        (b'{"stream_options":null,"a":1}', b'{"stream_options":{"include_usage":true},"a":1}'),
        (b'{"stream_options": {"include_usage": false} }', b'{"stream_options": {"include_usage": true} }'),
        (b'{"stream_options":{"x":1}}', b'{"stream_options":{"include_usage":true,"x":1}}'),
        (b'{"stream_options":{}}', b'{"stream_options":{"include_usage":true}}'),
    ],
)
def test_usage_is_asked_for_and_nothing_else_changes(body, expected):
    assert CHAT.rewrite_request(body, output_tokens=None, inject_usage=True) == expected


def test_rewrites_of_the_other_routes():
    body = b'{"model":"m", "max_output_tokens" : 99}'
    assert (
        RESPONSES.rewrite_request(body, output_tokens=5, inject_usage=True) == b'{"model":"m", "max_output_tokens" : 5}'
    )
    assert RESPONSES.rewrite_request(body, output_tokens=None, inject_usage=False) == body
    assert EMBEDDINGS.rewrite_request(body, output_tokens=5, inject_usage=True) == body


def test_a_refusal_is_openai_s_error_object():
    body = json.loads(CHAT.error_body(Deny(Reason.BUDGET_EXCEEDED, "spent", facts={"limit_usd": "1.5"})))
    assert body == {
        "error": {
            "message": "spent",
            "type": "insufficient_quota",
            "param": None,
            "code": "BUDGET_EXCEEDED",
            "limit_usd": "1.5",
        }
    }


def test_output_that_no_stream_shows_is_known():
    ask = {"model": "gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": "x"}]}
    assert not CHAT.parse_request(json.dumps(ask).encode()).hidden_output
    for hidden in ({"prediction": {"type": "content", "content": "x"}}, {"web_search_options": {}}):
        assert CHAT.parse_request(json.dumps(ask | hidden).encode()).hidden_output
    ask = {"model": "gpt-4o-mini", "stream": True, "input": "x"}
    assert not RESPONSES.parse_request(json.dumps(ask).encode()).hidden_output
    for hidden in ({"prompt": {"id": "p"}}, {"tools": [{"type": "web_search"}]}):
        assert RESPONSES.parse_request(json.dumps(ask | hidden).encode()).hidden_output
