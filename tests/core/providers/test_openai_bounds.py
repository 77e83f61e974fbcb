"""What a whole request's contents come to: each kind of part by its own bound, wherever it stands."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.providers import REGISTRY
from tests.core.providers.test_image_size import png
from tests.core.providers.test_openai_audio import wav

CHAT = REGISTRY["/v1/chat/completions"]
RESPONSES = REGISTRY["/v1/responses"]
PNG = base64.b64encode(png(1024, 1024) + b"\0" * 300_000).decode()
URL = f"data:image/png;base64,{PNG}"
TILES = 85 + 4 * 170  # of 1024 by 1024 for gpt-4o


def chat(*parts, model="gpt-4o", **members):
    body = {"model": model, "messages": [{"role": "user", "content": list(parts)}], **members}
    return CHAT.parse_request(json.dumps(body).encode())


def responses(*items, model="gpt-4o", **members):
    return RESPONSES.parse_request(json.dumps({"model": model, "input": list(items), **members}).encode())


def said(*parts):
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    "bound",
    [
        lambda: chat({"type": "image_url", "image_url": {"url": URL}}).input_tokens_bound,
        lambda: chat({"type": "image_url", "image_url": {"url": URL, "detail": "high"}}).input_tokens_bound,
        lambda: chat({"type": "image_url", "image_url": URL, "detail": "auto"}).input_tokens_bound,
        lambda: responses(said({"type": "input_image", "image_url": URL})).input_tokens_bound,
        lambda: (
            responses(
                {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": URL}]}
            ).input_tokens_bound
        ),
        lambda: (
            responses(
                {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": URL}}
            ).input_tokens_bound
        ),
        lambda: responses({"type": "image_generation_call", "id": "i", "result": PNG}).input_tokens_bound,
    ],
)
def test_an_image_counts_by_its_size_wherever_it_stands(bound):
    assert TILES < bound() < TILES + 100


def test_an_image_kept_at_the_provider_is_the_largest():
    for image in ({"type": "input_image", "file_id": "f"}, {"type": "input_image", "image_url": "https://x/y"}):
        assert 1445 < responses(said(image)).input_tokens_bound < 1545
    assert 1445 < responses({"type": "image_generation_call", "id": "i"}).input_tokens_bound < 1545


def test_of_two_details_neither_is_trusted():
    def image(inner, outer):
        return chat({"type": "image_url", "image_url": {"url": URL, "detail": inner}, "detail": outer})

    assert image("low", "low").input_tokens_bound < 185
    assert image("low", None).input_tokens_bound < 185
    assert image(None, "low").input_tokens_bound < 185
    assert image("low", "high").input_tokens_bound > TILES
    assert image("high", "low").input_tokens_bound > TILES


def test_an_undocumented_spelling_counts_as_text_and_as_the_largest_image():
    assert chat({"image": "AAAA"}).input_tokens_bound > 85 + 8 * 170
    assert chat({"image": {"x": 1}}).input_tokens_bound < 85


def test_images_that_are_billed_beyond_the_window_are_told_apart():
    """gpt-4o-mini bills an image at gpt-4o's price: 33 times as many tokens (as the pictoken package documents)."""
    facts = chat({"type": "image_url", "image_url": {"url": URL}}, "hi", model="gpt-4o-mini")
    assert facts.input_tokens_bound < 100
    assert facts.input_tokens_beyond_window == 2833 + 4 * 5667
    assert chat("hi", model="gpt-4o-mini").input_tokens_beyond_window == 0


def test_sound_counts_by_its_length():
    sound = base64.b64encode(wav(5)).decode()
    facts = chat({"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}, model="gpt-audio")
    assert facts.audio
    assert 50 <= facts.input_tokens_bound < 120


def test_a_text_file_counts_by_its_size_and_a_pdf_by_the_window():
    text = base64.b64encode(b"x" * 1000).decode()
    plain = responses(said({"type": "input_file", "filename": "a.txt", "file_data": text}))
    assert 2000 < plain.input_tokens_bound < 2100
    for kept in ({"file_id": "f"}, {"file_url": "https://x/a.txt"}):
        named = {"type": "input_file", "filename": "a.txt", "file_data": text, **kept}
        assert responses(said(named)).input_tokens_bound is None
    pdf = {"type": "input_file", "filename": "a.pdf", "file_data": base64.b64encode(b"%PDF-1.7").decode()}
    assert responses(said(pdf)).input_tokens_bound is None


def test_choices_that_are_not_shown_are_written_too():
    assert [chat("x", **asked).choices for asked in ({}, {"n": 3}, {"best_of": 5}, {"n": 3, "best_of": 5})] == [
        1,
        3,
        5,
        5,
    ]
    assert chat("x", n=None, best_of=None).choices == 1


def test_a_predicted_answer_is_billed_as_output():
    for content in ("x" * 700, [{"type": "text", "text": "x" * 696}]):
        assert chat("x", prediction={"type": "content", "content": content}).output_tokens_extra == 700
    assert chat("x", prediction={}).output_tokens_extra == chat("x").output_tokens_extra == 0


def test_searches_are_paid_for_by_each_answer():
    facts = chat("x", model="gpt-4o-mini-search-preview", web_search_options={}, n=2)
    assert (facts.web_searches, facts.web_search_nanos, facts.hosted_tools) == (2, 25_000_000, True)
    assert facts.always_searches
    assert chat("x", model="gpt-4o-mini-search-preview", n=2) == facts
    assert (facts.input_tokens_bound, facts.input_tokens_beyond_window) == (None, 16_000)
    tools = [{"type": "web_search"}, {"type": "file_search"}]
    facts = responses(said("x"), tools=tools, max_tool_calls=3, model="gpt-5")
    assert (facts.web_searches, facts.web_search_nanos, facts.tool_fee_nanos) == (3, 10_000_000, 7_500_000)


NAMES = st.text("abcdefgh_", min_size=1, max_size=12)
PROPERTIES = st.dictionaries(
    NAMES,
    st.fixed_dictionaries(
        {"type": st.sampled_from(["string", "number", "array"]), "description": st.text(max_size=30)},
        optional={"enum": st.lists(st.text(max_size=8), min_size=1, max_size=5)},
    ),
    max_size=6,
)
FUNCTIONS = st.lists(
    st.fixed_dictionaries(
        {
            "name": NAMES,
            "description": st.text(max_size=60),
            "parameters": st.fixed_dictionaries({"type": st.just("object"), "properties": PROPERTIES}),
        }
    ),
    min_size=1,
    max_size=4,
)


def cookbook_tokens(functions):
    """Count as OpenAI's cookbook does ("How to count tokens with tiktoken", part 7), a token for each byte."""

    def size(text):
        return len(text.encode())

    tokens = 12
    for function in functions:
        tokens += 10 + size(function["name"] + ":" + function["description"])
        properties = function["parameters"]["properties"]
        tokens += 3 if properties else 0
        for name, told in properties.items():
            tokens += 3 + size(f"{name}:{told['type']}:{told['description']}")
            if "enum" in told:
                tokens += -3 + sum(3 + size(item) for item in told["enum"])
    return tokens


@given(FUNCTIONS)
def test_functions_are_bounded_above_what_the_cookbook_counts(functions):
    tools = [{"type": "function", "function": function} for function in functions]
    counted = chat("x", tools=tools).input_tokens_bound - chat("x").input_tokens_bound
    assert counted >= cookbook_tokens(functions)
