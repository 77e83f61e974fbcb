from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.admission import HoldPlan
from budgetguard.core.asking import PricedModel, call_facts, clamped_to, model_unknown, plan_call, reserve_of
from budgetguard.core.budget import Refusal, Reserved, ReserveRefused
from budgetguard.core.context import CallContext
from budgetguard.core.counting import Counter
from budgetguard.core.pricing import shipped_rate_card
from budgetguard.core.providers.api import RequestFacts
from budgetguard.core.quoting import Remedy, Standing, remedy, verdict
from budgetguard.core.rate_limit import Minute
from budgetguard.core.reasons import Reason
from budgetguard.core.snapshot import SubjectKind, WindowKind
from tests.plugins.redis_calls import NOW_MS, a_budget, a_key, a_reserve, a_tenant

PRICED = PricedModel(
    model="gpt-4o-mini",
    rate_card=shipped_rate_card(provider_id="openai", model="gpt-4o-mini", at=datetime(2026, 11, 24, tzinfo=UTC)),
    context_window=128_000,
    output_tokens_largest=16_384,
)
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


def standing(*counters: Counter, **changes) -> Standing:
    return Standing(**{"ready": True, "backlog": 0, "counters": counters, **changes})


# 100 nanos of input, then a nano a token.
def asked(*budgets, tokens=100, smallest=None, **tenant):
    return a_reserve(
        a_tenant(*budgets, **tenant), output_femtos=10**6, output_tokens=tokens, output_tokens_min=smallest
    )


def test_what_is_asked_for_a_call_is_its_plan_and_its_context():
    tenant, key = a_tenant(), a_key()
    plan = plan_call(CHAT, tenant=tenant, provider_id="openai", priced=PRICED)
    assert isinstance(plan, HoldPlan)
    facts = call_facts(
        replace(CHAT, model="GPT-4o-mini"),
        operation_id="op-1",
        key=key,
        context=CallContext(tags=("eng",), session_id="s1", end_user="jo"),
        api="openai.chat",
        provider_id="openai",
        priced=PRICED,
        now_ms=NOW_MS,
    )
    request = reserve_of(CHAT, plan, facts=facts, tenant=tenant, key=key)
    assert (facts.tenant_id, facts.tags, facts.session_id, facts.end_user) == ("acme", ("eng",), "s1", "jo")
    assert (facts.model, facts.priced_model) == ("GPT-4o-mini", "gpt-4o-mini")
    assert facts.price_version == PRICED.rate_card.version
    assert (request.now_ms, request.hold_nanos, request.choices) == (NOW_MS, 100 * 150 + 500 * 600, 1)
    assert reserve_of(replace(CHAT, has_output=False), plan, facts=facts, tenant=tenant, key=key).choices == 0


def test_a_bound_is_written_where_it_is_another_than_the_caller_s():
    reserved = Reserved(hold_nanos=1, output_tokens=500, counters=())
    assert clamped_to(CHAT, None, reserved) is None
    assert clamped_to(replace(CHAT, output_tokens_max=None), None, reserved) == 500
    assert clamped_to(CHAT, None, replace(reserved, output_tokens=20)) == 20


def test_a_model_without_a_price_is_named():
    assert (model_unknown("nope").reason, model_unknown("nope").param) == (Reason.MODEL_UNKNOWN, "model")


def test_a_call_that_fits_is_told_its_hold_and_nothing_changes():
    request, counter, minute = asked(a_budget(), requests_per_minute=5), Counter(spent=100), Minute()
    stands = standing(counter, tenant_requests=minute)
    told = verdict(request, stands)
    assert isinstance(told, Reserved)
    assert (told.hold_nanos, told.budget_remaining_nanos, told.requests_remaining) == (200, 700, 4)
    assert verdict(request, stands) == told
    assert (counter, minute) == (Counter(spent=100), Minute())


def test_a_budget_that_refuses_tells_how_much_less_would_fit():
    request, stands = asked(a_budget()), standing(Counter(spent=850, held=10))
    refused = verdict(request, stands)
    assert isinstance(refused, ReserveRefused)
    assert (refused.kind, refused.needed) == (Refusal.BUDGET, 200)
    assert remedy(request, refused, stands) == Remedy(output_tokens=40, short_nanos=60)


def test_a_window_that_resets_helps_only_what_its_limit_can_hold():
    refused = ReserveRefused(kind=Refusal.BUDGET, limit=1000, spent=1000, needed=200, resets_at_ms=7)
    request, stands = asked(a_budget()), standing(Counter(spent=1000))
    assert remedy(request, refused, stands) == Remedy(not_before_ms=7, short_nanos=200)
    assert remedy(request, replace(refused, needed=1001), stands).not_before_ms is None


def test_a_rate_limit_tells_when():
    request = asked(requests_per_minute=1)
    second = NOW_MS // 1000
    stands = standing(tenant_requests=Minute(total=1, first=second, last=second, counts={second: 1}))
    refused = verdict(request, stands)
    assert isinstance(refused, ReserveRefused)
    assert refused.kind is Refusal.RATE
    assert remedy(request, refused, stands) == Remedy(not_before_ms=(second + 60) * 1000)


def test_a_token_limit_tells_when_unless_it_never_fits():
    request, stands = asked(tokens_per_minute=60), standing(Counter())
    refused = verdict(request, stands)
    assert isinstance(refused, ReserveRefused)
    assert (refused.kind, refused.needed) == (Refusal.TOKENS, 100)
    assert remedy(request, refused, stands) == Remedy(output_tokens=60)
    waits = remedy(request, replace(refused, needed=60, retry_after_ms=5), stands)
    assert waits == Remedy(output_tokens=60, not_before_ms=NOW_MS + 5)


@pytest.mark.parametrize(
    ("changes", "kind"), [({"ready": False}, Refusal.NOT_READY), ({"backlog": 100_000}, Refusal.BACKLOG_FULL)]
)
def test_counters_that_take_no_calls_say_so(changes, kind):
    request, stands = asked(a_budget()), standing(Counter(), **changes)
    refused = verdict(request, stands)
    assert isinstance(refused, ReserveRefused)
    assert (refused.kind, remedy(request, refused, stands)) == (kind, Remedy())


@pytest.mark.parametrize(
    ("full", "changes", "kind"),
    [
        (frozenset(), {}, None),
        ({0}, {}, Refusal.SUBJECTS),
        # As the script decides: subjects before money, after what takes no calls at all.
        ({0}, {"limit_nanos": 0}, Refusal.SUBJECTS),
        (frozenset(), {"limit_nanos": 0}, Refusal.BUDGET),
    ],
)
def test_a_full_template_refuses_a_subject_that_it_does_not_know(full, changes, kind):
    request = asked(a_budget(subject_kind=SubjectKind.API_KEY, each=True, subjects_max=2, **changes))
    told = verdict(request, standing(Counter(), full=frozenset(full)))
    assert (None if isinstance(told, Reserved) else told.kind) is kind
    unready = verdict(request, standing(Counter(), full=frozenset(full), ready=False))
    assert isinstance(unready, ReserveRefused)
    assert unready.kind is Refusal.NOT_READY


@pytest.mark.parametrize(
    ("changes", "waits"),
    [({"window": WindowKind.DAY}, True), ({"window": WindowKind.DAY, "limit_nanos": 0}, False), ({}, False)],
)
def test_a_full_template_has_room_again_when_its_window_resets(changes, waits):
    request = asked(a_budget(subject_kind=SubjectKind.API_KEY, each=True, subjects_max=2, **changes))
    full = standing(Counter(), full=frozenset({0}))
    told = verdict(request, full)
    assert isinstance(told, ReserveRefused)
    (limit,) = request.limits()
    assert (told.subjects_max, told.starts_at_ms, told.resets_at_ms) == (2, limit.starts_at_ms, limit.resets_at_ms)
    assert remedy(request, told, full) == Remedy(not_before_ms=limit.resets_at_ms if waits else None)


@given(st.integers(0, 1200), st.integers(0, 1200), st.integers(0, 300))
def test_the_largest_bound_told_fits_and_one_more_does_not(spent, held, tokens):
    request, stands = asked(a_budget(), tokens=tokens), standing(Counter(spent=spent, held=held))
    refused = verdict(request, stands)
    if isinstance(refused, Reserved):
        return
    found = remedy(request, refused, stands).output_tokens or 0
    for bound, passes in ((found, found > 0), (found + 1, False)):
        again = verdict(replace(request, output_tokens=bound, output_tokens_min=bound), stands)
        assert isinstance(again, Reserved) is passes or bound == 0 or bound > tokens
