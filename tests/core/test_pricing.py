from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal

import pytest
from genai_prices import Usage as PricedUsage
from genai_prices import data_snapshot
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.money import CALL_NANOS_MAX
from budgetguard.core.pricing import (
    PriceOverride,
    PriceUnknownError,
    RateCard,
    caseless,
    load_shipped_prices,
    shipped_context_window,
    shipped_model,
    shipped_rate_card,
)
from budgetguard.core.usage import Usage

AT = datetime(2026, 11, 24, 12, tzinfo=UTC)
MODELS = [
    "gpt-4o-mini",
    "gpt-4o",
    "gpt-5",
    "gpt-5.4",
    "gpt-6-sol",
    "gpt-audio",
    "o3",
    "text-embedding-3-small",
    "gpt-5.5-cyber",
]


def card(model="gpt-4o-mini", at=AT):
    return shipped_rate_card(provider_id="openai", model=model, at=at)


def nanos(usd: Decimal) -> int:
    return int((usd * 10**9).to_integral_value(rounding=ROUND_CEILING))


@given(
    st.sampled_from(MODELS),
    st.integers(0, 2_000_000),
    st.integers(0, 2_000_000),
    st.integers(0, 1_000_000),
    st.integers(0, 200_000),
    st.sampled_from([None, "flex", "priority"]),
)
def test_costs_agree_with_the_price_data_s_own_arithmetic(model, cached, fresh, output, audio, tier):
    context = {"service_tier": tier} if tier else None
    reported = {
        "input_tokens": cached + fresh + audio,
        "cache_read_tokens": cached,
        "input_audio_tokens": audio,
        "output_tokens": output,
    }
    provider, found = data_snapshot.get_snapshot().find_provider_model(model, None, "openai", None)
    theirs = found.calc_price(
        PricedUsage(**reported), provider, genai_request_timestamp=AT, price_context=context
    ).total_price
    assert card(model).cost_nanos(Usage(**reported), tier=tier or "default") == nanos(theirs)


def test_a_cost_by_hand():
    # gpt-4o-mini: $0.15 and $0.60 a million tokens, $0.075 cached.
    assert card().cost_nanos(Usage(input_tokens=10, output_tokens=5)) == 10 * 150 + 5 * 600
    assert card().cost_nanos(Usage(input_tokens=10, cache_read_tokens=4, output_tokens=5)) == 6 * 150 + 4 * 75 + 5 * 600


def test_a_fraction_of_a_nano_rounds_up_once_for_the_call():
    rates = RateCard(
        version="t", rates={"default": {"input_tokens": ((-1, 500_000),), "output_tokens": ((-1, 500_000),)}}
    )
    assert rates.cost_nanos(Usage(input_tokens=1)) == 1
    assert rates.cost_nanos(Usage(input_tokens=1, output_tokens=1)) == 1
    assert rates.cost_nanos(Usage(input_tokens=2, output_tokens=1)) == 2


def test_parts_above_their_total_are_charged_in_full():
    assert card().cost_nanos(Usage(input_tokens=3, cache_read_tokens=10)) == 10 * 75


def test_nothing_reported_costs_nothing():
    assert card().cost_nanos(Usage()) == 0


def test_one_call_carries_no_more_than_a_double_can():
    assert card().cost_nanos(Usage(output_tokens=2**60)) == CALL_NANOS_MAX
    assert card().input_nanos_max(2**60) == CALL_NANOS_MAX


@given(
    st.sampled_from(MODELS),
    st.integers(0, 600_000),
    st.integers(0, 200_000),
    st.integers(0, 600_000),
    st.integers(0, 200_000),
    st.sampled_from(["default", "flex", "priority"]),
)
def test_the_bound_is_never_below_the_cost(model, input_bound, output_bound, input_tokens, output_tokens, tier):
    rates = card(model)
    used = Usage(
        input_tokens=min(input_tokens, input_bound),
        cache_write_tokens=min(input_tokens, input_bound) // 2,
        input_audio_tokens=min(input_tokens, input_bound) // 3,
        output_tokens=min(output_tokens, output_bound),
        output_audio_tokens=min(output_tokens, output_bound) // 2,
    )
    bound = rates.input_nanos_max(input_bound, tier=tier, audio=True)
    bound += -(-output_bound * rates.output_femtos_max(input_bound, tier=tier, audio=True) // 10**6)
    assert rates.cost_nanos(used, tier=tier) <= bound


@pytest.mark.parametrize("model", MODELS)
def test_a_rate_card_survives_its_journey(model):
    assert RateCard.from_json(card(model).to_json()) == card(model)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"v":"x","r":{}}', "null", '{"v":"x","r":[]}', '{"v":"x","r":{"default":[]}}'),
        '{"v":"x","r":{"default":{"input_tokens":5}}}',
        '{"v":"x","r":{"default":{"input_tokens":{}}}}',
        '{"v":"x","r":{"default":{"input_tokens":[[-1,5.5]]}}}',
        '{"v":"x","r":{"default":{"input_tokens":[["-1",5]]}}}',
        '{"v":"x","r":{"default":{"input_tokens":[[-1,true]]}}}',
        '{"v":1,"r":{"default":{"input_tokens":[[-1,5]]}}}',
    ],
)
def test_what_is_no_rate_card_is_refused(text):
    with pytest.raises(ValueError, match="malformed rate card"):
        RateCard.from_json(text)


def test_dated_prices_change_on_their_day():
    before = card("gpt-5.5-cyber", datetime(2026, 10, 18, 23, 59, tzinfo=UTC))
    after = card("gpt-5.5-cyber", datetime(2026, 10, 19, tzinfo=UTC))
    assert "cache_read_tokens" not in before.rates["default"]
    assert after.cost_nanos(Usage(input_tokens=1, cache_read_tokens=1)) == 1250


def test_unknown_models_and_models_without_a_token_price_are_refused():
    for model in ("no-such-model", "whisper-1", "moderation"):
        with pytest.raises(PriceUnknownError):
            card(model)
    with pytest.raises(PriceUnknownError):
        shipped_rate_card(provider_id="nobody", model="gpt-4o", at=AT)
    with pytest.raises(PriceUnknownError):
        shipped_context_window(provider_id="openai", model="no-such-model")
    assert shipped_context_window(provider_id="openai", model="gpt-4o") == 128_000


@pytest.mark.parametrize(
    ("model", "record"),
    [
        ("gpt-4o-mini", "gpt-4o-mini"),
        ("gpt-4o-mini-2024-07-18", "gpt-4o-mini"),
        ("GPT-4o-Mini-2024-07-18", "gpt-4o-mini"),
        ("gpt-4o-2024-11-20", "gpt-4o"),
    ],
)
def test_a_price_record_is_one_for_all_spellings_of_its_model(model, record):
    assert shipped_model(provider_id="openai", model=model) == record


def test_a_model_that_is_not_listed_has_no_price_record():
    with pytest.raises(PriceUnknownError):
        shipped_model(provider_id="openai", model="gpt-4o-mini-2031-01-01")


def test_the_case_of_ascii_alone_is_ignored():
    assert caseless("GPT-4o-\u00c9\u212a") == "gpt-4o-\u00c9\u212a"


def test_an_override_prices_its_units_and_no_others():
    override = PriceOverride(
        price_id="p1",
        provider_id="openai",
        model="own",
        usd={"input_tokens": Decimal("2.5"), "web_searches": Decimal(10)},
    )
    rates = override.rate_card()
    assert rates.version == "price/p1"
    assert rates.cost_nanos(Usage(input_tokens=2, output_tokens=7, web_searches=1)) == 2 * 2500 + 10_000_000
    assert not rates.has_tier("flex")
    assert card().has_tier("priority")


def test_loading_the_shipped_prices_beforehand_changes_no_price():
    before = shipped_rate_card(provider_id="openai", model="gpt-4o-mini", at=datetime(2026, 1, 1, tzinfo=UTC))
    load_shipped_prices()
    assert shipped_rate_card(provider_id="openai", model="gpt-4o-mini", at=datetime(2026, 1, 1, tzinfo=UTC)) == before
