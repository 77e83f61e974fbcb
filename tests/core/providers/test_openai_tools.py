"""Hosted tools: fees of developers.openai.com/api/docs/pricing, "Tools"."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.providers.openai_tools import TOOL_CALLS_UNNAMED, HostedTools, hosted_tools

CENT = 10**7


def tools(*kinds, model="gpt-5", **members):
    return hosted_tools({"tools": [{"type": kind} for kind in kinds], **members}, model=model)


def test_the_caller_s_own_tools_cost_nothing():
    assert tools("function", "custom", max_tool_calls=9) == hosted_tools({}, model="gpt-5") == tools()
    assert not tools().present


@given(st.integers(0, 1000))
def test_each_call_that_may_be_made_is_paid_for(calls):
    found = tools("web_search", "file_search", max_tool_calls=calls)
    assert found.present
    assert (found.web_searches, found.web_search_nanos, found.fee_nanos) == (calls, CENT, calls * CENT // 4)


def test_without_a_bound_some_calls_are_paid_for():
    assert tools("web_search_2025_08_26").web_searches == TOOL_CALLS_UNNAMED
    assert tools("file_search").fee_nanos == TOOL_CALLS_UNNAMED * CENT // 4


def test_the_preview_costs_more():
    """\"Web search preview (non-reasoning models): $25.00 / 1k calls\"."""
    assert tools("web_search", "web_search_preview").web_search_nanos == CENT * 5 // 2


@pytest.mark.parametrize("asked", [{}, {"web_search_options": {}}, {"web_search_options": None}])
@pytest.mark.parametrize(
    ("model", "nanos"),
    [
        ("gpt-4o-search-preview", CENT * 5 // 2),
        ("GPT-4o-mini-search-preview-2025-03-11", CENT * 5 // 2),
        ("gpt-5-search-api-2025-10-14", CENT),
    ],
)
def test_search_models_search_whether_or_not_they_are_asked_to(asked, model, nanos):
    """\"When using Chat Completions, the model always retrieves information from the web before responding\"."""
    found = hosted_tools(asked, model=model)
    assert (found.present, found.always_searches, found.web_searches, found.web_search_nanos) == (True, True, 1, nanos)


@pytest.mark.parametrize("model", ["gpt-4o-mini", "gpt-4o-audio-preview", "my-search-previews", "search-api"])
def test_other_models_search_only_when_they_are_asked_to(model):
    assert hosted_tools({}, model=model) == HostedTools()
    assert hosted_tools({"web_search_options": {}}, model=model).always_searches


@pytest.mark.parametrize(
    ("container", "cents"),
    [
        ({"type": "auto"}, 3),
        ({"type": "auto", "memory_limit": "4g"}, 12),
        ({"type": "auto", "memory_limit": "64g"}, 192),
        ({"type": "auto", "memory_limit": "1t"}, 192),
        ("cntr_1", 192),  # one that runs already, of a size that was told when it was made
        (None, 192),
    ],
)
def test_a_container_is_paid_for_by_its_memory(container, cents):
    """\"1 GB $0.03, 4 GB $0.12, 16 GB $0.48, 64 GB $1.92 per 20-minute session per container\"."""
    request = {"tools": [{"type": "code_interpreter", "container": container}], "max_tool_calls": 50}
    assert hosted_tools(request, model="gpt-5").fee_nanos == cents * CENT


@pytest.mark.parametrize(
    ("model", "block"), [("gpt-4o-mini", 8000), ("ft:gpt-4.1-mini-2025-04-14:a", 8000), ("gpt-4o", 0), ("gpt-4.1", 0)]
)
def test_some_models_bill_a_block_for_each_search(model, block):
    """\"search content tokens are billed as a fixed block of 8,000 input tokens per call\"."""
    assert tools("web_search", model=model, max_tool_calls=3).input_tokens == 3 * block
    assert tools("file_search", model=model, max_tool_calls=3).input_tokens == 0


def test_any_other_tool_reads_what_was_not_sent():
    for kind in ("mcp", "image_generation", "computer_use_preview", "tool of tomorrow"):
        assert tools(kind).present
        assert (tools(kind).fee_nanos, tools(kind).web_searches) == (0, 0)
    assert hosted_tools({"tools": [{}]}, model="m").present
