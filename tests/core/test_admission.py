from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.admission import CONTEXT_WINDOW_UNKNOWN, OUTPUT_TOKENS_MIN, HoldPlan, plan_hold
from budgetguard.core.model_limits import output_tokens_largest, shows_all_it_writes
from budgetguard.core.pricing import RateCard, shipped_rate_card
from budgetguard.core.providers.api import RequestFacts
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.slices import StreamSlices
from budgetguard.core.snapshot import TenantSnapshot

MINI = shipped_rate_card(provider_id="openai", model="gpt-4o-mini", at=datetime(2026, 11, 24, tzinfo=UTC))
TENANT = TenantSnapshot(tenant_id="acme", version=1)
CHAT = RequestFacts(
    model="gpt-4o-mini",
    stream=False,
    input_tokens_bound=100,
    output_tokens_max=500,
    output_field="max_tokens",
    choices=1,
    has_output=True,
    usage_requested=False,
    wants_usage_injection=False,
    service_tier="default",
    audio=False,
    hosted_tools=False,
)


def plan(tenant=TENANT, card=MINI, window=128_000, largest=16_384, *, shows=True, **changes) -> HoldPlan:
    planned = plan_hold(
        replace(CHAT, **changes),
        tenant=tenant,
        rate_card=card,
        context_window=window,
        output_tokens_largest=largest,
        shows_all_it_writes=shows,
    )
    assert isinstance(planned, HoldPlan)
    return planned


def test_a_bounded_call_holds_what_it_can_cost():
    planned = plan()
    assert planned.hold_nanos == 100 * 150 + 500 * 600
    assert (planned.output_tokens, planned.output_tokens_min, planned.eighth) == (500, 16, False)


def test_choices_multiply_the_output_only():
    assert plan(choices=3).hold_nanos == 100 * 150 + 3 * 500 * 600


@given(st.integers(1, 128), st.integers(1, 10**6), st.integers(0, 10**5), st.integers(0, 10**4))
def test_n_choices_cost_n_times_one_choice_s_output(choices, tokens, input_tokens, extra):
    asked = {"output_tokens_max": tokens, "input_tokens_bound": input_tokens, "output_tokens_extra": extra}
    one, many = plan(**asked), plan(**asked, choices=choices)
    heard = MINI.input_nanos_max(min(input_tokens, 134_400))
    assert many.hold_nanos - heard == choices * (one.hold_nanos - heard)
    assert (many.output_tokens, many.output_tokens_min) == (one.output_tokens, one.output_tokens_min)


def test_a_large_bound_may_be_clamped_unless_the_tenant_says_no():
    assert plan(output_tokens_max=8000).output_tokens_min == OUTPUT_TOKENS_MIN
    assert plan(output_tokens_max=15).output_tokens_min == 15
    refusing = replace(TENANT, clamp=False)
    assert plan(tenant=refusing, output_tokens_max=8000).output_tokens_min == 8000


@pytest.mark.parametrize(
    ("largest", "default", "wanted", "smallest"),
    [(16_384, 4096, 4096, 16), (2048, 4096, 2048, 16), (None, 4096, 4096, 16), (16_384, 10, 10, 10)],
)
def test_a_call_without_a_bound_takes_the_smaller_of_the_model_s_and_the_tenant_s(largest, default, wanted, smallest):
    planned = plan(tenant=replace(TENANT, output_tokens_max=default), largest=largest, output_tokens_max=None)
    assert (planned.output_tokens, planned.output_tokens_min, planned.eighth) == (wanted, smallest, True)


def test_a_tenant_that_is_not_clamped_gets_1024_tokens_or_none():
    refusing = replace(TENANT, clamp=False)
    assert plan(tenant=refusing, output_tokens_max=None).output_tokens_min == 1024
    assert plan(tenant=replace(refusing, output_tokens_max=512), output_tokens_max=None).output_tokens_min == 512


def test_a_stream_without_a_bound_holds_a_slice_and_tops_up():
    tenant = replace(TENANT, stream_slice_tokens=2000, overrun=True)
    planned = plan(tenant=tenant, stream=True, output_tokens_max=None, choices=3)
    assert planned.hold_nanos == 100 * 150 + 3 * 2000 * 600
    assert (planned.output_tokens, planned.output_tokens_min, planned.eighth) == (2000, OUTPUT_TOKENS_MIN, False)
    assert planned.slices == StreamSlices(
        slice_tokens=2000, choices=3, output_femtos=3 * 600_000_000, output_tokens_largest=16_384, overrun=True
    )


def test_a_slice_is_no_larger_than_what_the_model_can_write():
    planned = plan(stream=True, output_tokens_max=None, largest=1500)
    assert (planned.output_tokens, planned.output_tokens_min) == (1500, 16)
    small = plan(stream=True, output_tokens_max=None, tenant=replace(TENANT, stream_slice_tokens=100))
    assert (small.output_tokens, small.output_tokens_min) == (100, 16)


DEAR = RateCard(version="v", rates={"default": {"output_tokens": ((-1, 10**18),)}})


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": False},
        {"output_tokens_max": 7000},
        {"shows": False},
        {"largest": None},
        {"hidden_output": True},
        {"audio": True},
        {"tenant": replace(TENANT, stream_slice_tokens=0)},
        # All that the model can write costs more than one call can be held for.
        {"card": DEAR},
    ],
)
def test_what_cannot_be_counted_as_it_passes_holds_as_any_other_call(changes):
    planned = plan(**{"stream": True, "output_tokens_max": None} | changes)
    assert planned.slices is None
    assert planned.eighth == ("output_tokens_max" not in changes)


def test_an_embedding_holds_its_input_alone():
    planned = plan(has_output=False, output_tokens_max=None, input_tokens_bound=500_000)
    assert (planned.hold_nanos, planned.output_tokens, planned.eighth) == (500_000 * 150, 0, False)


def test_input_that_cannot_be_seen_is_bounded_by_the_model_s_window():
    assert plan(input_tokens_bound=None).input_tokens_bound == 134_400
    assert plan(input_tokens_bound=None, window=None).input_tokens_bound == CONTEXT_WINDOW_UNKNOWN * 105 // 100
    assert plan(input_tokens_bound=10**6).input_tokens_bound == 134_400
    assert plan(input_tokens_bound=10**6, window=None).input_tokens_bound == 10**6


def test_service_tiers_have_their_own_prices_and_unpriced_ones_are_refused():
    assert plan(service_tier="priority").hold_nanos == 100 * 250 + 500 * 1000
    assert plan(service_tier="auto").hold_nanos == plan().hold_nanos
    bare = RateCard(version="v", rates={"default": {"input_tokens": ((-1, 10**6),)}})
    denied = plan_hold(
        replace(CHAT, service_tier="flex"),
        tenant=TENANT,
        rate_card=bare,
        context_window=None,
        output_tokens_largest=None,
    )
    assert isinstance(denied, Deny)
    assert (denied.reason, denied.param) == (Reason.REQUEST_INVALID, "service_tier")


def test_more_than_one_call_can_be_held_for_is_refused():
    denied = plan_hold(
        replace(CHAT, output_tokens_max=2**52),
        tenant=TENANT,
        rate_card=MINI,
        context_window=128_000,
        output_tokens_largest=16_384,
    )
    assert isinstance(denied, Deny)
    assert denied.param == "max_tokens"


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("gpt-4o-mini-2024-07-18", 16_384),
        ("gpt-4o-2024-05-13", 4_096),
        ("GPT-4", 8_192),
        ("gpt-4.1-nano", 32_768),
        ("ft:gpt-4o-mini:acme", 16_384),
        ("o3-mini", 100_000),
        ("davinci", None),
    ],
)
def test_the_largest_output_is_that_of_the_longest_prefix(model, tokens):
    assert output_tokens_largest(provider_id="openai", model=model) == tokens


def test_nothing_is_known_of_other_providers_models():
    assert output_tokens_largest(provider_id="other", model="gpt-4o") is None


def test_what_is_billed_beyond_the_window_is_not_capped_by_it():
    assert plan(input_tokens_bound=10**6, input_tokens_beyond_window=7).input_tokens_bound == 134_407
    assert plan(input_tokens_bound=None, input_tokens_beyond_window=7).input_tokens_bound == 134_407
    assert plan(input_tokens_beyond_window=7).hold_nanos == plan(input_tokens_bound=107).hold_nanos


def test_a_predicted_answer_is_held_on_top_for_each_choice():
    planned, plain = plan(output_tokens_extra=50, choices=2), plan(choices=2)
    assert planned.input_nanos == plain.input_nanos + 2 * 50 * 600
    assert (planned.output_tokens, planned.output_tokens_min) == (500, 16)


def test_tools_are_held_for_at_the_dearer_of_the_documented_and_our_own_price():
    asked = {"web_searches": 3, "tool_fee_nanos": 11}
    assert plan(**asked, web_search_nanos=25_000_000).input_nanos == plan().input_nanos + 3 * 25_000_000 + 11
    assert plan(**asked, web_search_nanos=1).input_nanos == plan().input_nanos + 3 * 10_000_000 + 11
    assert plan(**asked, web_search_nanos=25_000_000).search_nanos == 0
    assert plan(**asked, web_search_nanos=25_000_000, always_searches=True).search_nanos == 25_000_000
    unpriced = RateCard(version="v", rates={"default": {"input_tokens": ((-1, 10**6),), "output_tokens": ((-1, 0),)}})
    assert plan(card=unpriced, **asked, web_search_nanos=5).input_nanos == 100 + 15 + 11
    assert not shows_all_it_writes(provider_id="other", model="gpt-4o")


@pytest.mark.parametrize(
    ("model", "shows"),
    [
        ("gpt-4o-mini", True),
        ("GPT-4o-mini-2024-07-18", True),
        ("gpt-4-0613", True),
        ("gpt-4-turbo-preview", True),
        ("gpt-3.5-turbo-16k-0613", True),
        ("chatgpt-4o-latest", True),
        ("gpt-5-chat-latest", True),
        ("ft:gpt-4o-mini-2024-07-18:acme::id", True),
        ("gpt-4.1", True),
        ("gpt-4.1-nano-2025-04-14", True),
        ("gpt-4o-search-preview", False),
        ("gpt-4o-audio-preview", False),
        ("gpt-5", False),
        ("gpt-5.1-chat-latest", False),
        ("o3-mini", False),
        ("gpt-oss-120b", False),
        ("my-own", False),
    ],
)
def test_only_models_known_to_show_all_they_write_are_counted_as_they_pass(model, shows):
    assert shows_all_it_writes(provider_id="openai", model=model) is shows
    assert not shows or output_tokens_largest(provider_id="openai", model=model) is not None
