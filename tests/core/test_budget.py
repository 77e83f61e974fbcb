from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.budget import UNBOUNDED_TOKENS, counted_subjects, outranks
from budgetguard.core.money import CALL_NANOS_MAX, COUNTER_NANOS_MAX, ceil_div
from budgetguard.core.operation import End
from budgetguard.core.reserving import hold_that_fits
from budgetguard.core.snapshot import Mode, SubjectKind, WindowKind
from tests.plugins.redis_calls import KEY_ID, a_budget, a_handoff, a_key, a_reserve, a_settlement, a_tenant, the_facts

TENANT = a_tenant()
AMOUNTS = st.one_of(st.integers(0, 10_000), st.integers(CALL_NANOS_MAX - 10_000, CALL_NANOS_MAX))


def test_a_hold_is_the_input_and_the_output_rounded_up_once():
    request = a_reserve(TENANT, input_nanos=7, output_femtos=1_500_001, output_tokens=3, output_tokens_min=1)
    assert (request.hold_nanos, request.hold_nanos_min, request.token_nanos) == (7 + 5, 7 + 2, 2)


def test_a_hold_is_at_most_what_one_call_can_carry():
    request = a_reserve(TENANT, input_nanos=CALL_NANOS_MAX, output_femtos=10**30, output_tokens=10)
    assert request.hold_nanos == request.hold_nanos_min == request.token_nanos == CALL_NANOS_MAX


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_nanos": -1},
        {"output_femtos": -1},
        {"output_tokens": 1, "output_tokens_min": -1},
        {"output_tokens": 1, "output_tokens_min": 2},
    ],
)
def test_nonsense_cannot_be_asked_for(wrong):
    with pytest.raises(ValueError, match="expected"):
        a_reserve(TENANT, **wrong)


@pytest.mark.parametrize(
    ("amount_nanos", "end"), [(-1, "CONFIRMED"), (CALL_NANOS_MAX + 1, "CONFIRMED"), (1, "RELEASED")]
)
def test_an_end_costs_what_a_call_can_cost(amount_nanos, end):
    with pytest.raises(ValueError, match="expected"):
        a_settlement(a_handoff(the_facts()), amount_nanos, End(end))


def test_only_budgets_of_the_tenant_or_of_this_key_apply_and_only_in_their_dates():
    tenant = a_tenant(
        a_budget("tenant", 5, mode=Mode.OBSERVE),
        a_budget("mine", 6, subject_kind=SubjectKind.API_KEY, subject=KEY_ID),
        a_budget("other", 7, subject_kind=SubjectKind.API_KEY, subject="other"),
        a_budget("over", 8, window=WindowKind.FIXED, starts_at_ms=1, ends_at_ms=2),
    )
    applied = a_reserve(tenant).budgets()
    assert [(b.budget_id, b.enforced, b.limit) for b in applied] == [
        ("tenant", False, COUNTER_NANOS_MAX),
        ("mine", True, 6),
    ]


def model_budgets(model, priced_model):
    tenant = a_tenant(
        a_budget("family", subject_kind=SubjectKind.MODEL, subject="gpt-4o-mini"),
        a_budget("snapshot", subject_kind=SubjectKind.MODEL, subject="gpt-4o-mini-2024-07-18"),
        a_budget("each", subject_kind=SubjectKind.MODEL, each=True),
    )
    request = a_reserve(tenant)
    facts = replace(request.facts, model=model, priced_model=priced_model)
    return [(limit.budget_id, limit.subject) for limit in replace(request, facts=facts).budgets()]


@pytest.mark.parametrize(
    ("model", "priced_model", "named"),
    [
        ("gpt-4o-mini", "gpt-4o-mini", ["family"]),
        ("GPT-4o-mini", "gpt-4o-mini", ["family"]),
        ("gpt-4o-mini-2024-07-18", "gpt-4o-mini", ["family", "snapshot"]),
        ("Gpt-4o-Mini-2024-07-18", "gpt-4o-mini", ["family", "snapshot"]),
        # Recorded before the priced model was.
        ("gpt-4o-mini", "", ["family"]),
    ],
)
def test_a_model_s_budget_counts_every_spelling_and_a_template_counts_them_as_one(model, priced_model, named):
    *found, each = model_budgets(model, priced_model)
    assert [budget_id for budget_id, _ in found] == named
    assert each == ("each", "gpt-4o-mini")


def test_another_model_is_in_no_budget_of_this_one():
    assert model_budgets("gpt-4o", "gpt-4o") == [("each", "gpt-4o")]
    assert model_budgets("gpt-4o-mini-2024-07-18", "") == [
        ("snapshot", "gpt-4o-mini-2024-07-18"),
        ("each", "gpt-4o-mini-2024-07-18"),
    ]


def test_a_call_is_counted_for_the_subjects_that_its_limits_name():
    facts = replace(the_facts(), tags=("a", "b"), model="GPT-4o-mini", priced_model="gpt-4o-mini")

    def counted(kind, subject="", *, each=False):
        return counted_subjects(a_budget(subject_kind=kind, subject=subject, each=each), facts)

    assert counted(SubjectKind.TENANT) == counted(SubjectKind.TAG, "a") == counted(SubjectKind.MODEL, facts.model)
    assert counted(SubjectKind.MODEL, "gpt-4o-mini") == ("",)
    assert (counted(SubjectKind.TAG, each=True), counted(SubjectKind.MODEL, each=True)) == (
        ("a", "b"),
        ("gpt-4o-mini",),
    )
    assert counted(SubjectKind.TAG, "c") == counted(SubjectKind.SESSION, each=True) == ()


def test_a_key_without_a_limit_of_its_own_is_unlimited():
    tenant = a_tenant(requests_per_minute=5)
    assert dict(a_reserve(tenant).request_limits()) == {SubjectKind.TENANT: 5, SubjectKind.API_KEY: 0}
    request = a_reserve(tenant, key=a_key(requests_per_minute=3))
    assert dict(request.request_limits()) == {SubjectKind.TENANT: 5, SubjectKind.API_KEY: 3}


def test_the_same_operation_asking_for_other_money_asks_something_else():
    assert a_reserve(TENANT).asked == a_reserve(TENANT).asked
    assert a_reserve(TENANT, input_nanos=99).asked != a_reserve(TENANT).asked


@pytest.mark.parametrize(
    ("end", "standing", "expected"),
    [
        ("CONFIRMED", "EXPIRED", True),
        ("CONFIRMED", "CONFIRMED", False),
        ("RELEASED", "CONFIRMED", False),
        ("EXPIRED", "ESTIMATED", False),
        ("CORRECTED", "RELEASED", True),
    ],
)
def test_only_a_higher_rank_replaces_an_end(end, standing, expected):
    assert outranks(End(end), End(standing)) is expected


@given(
    input_nanos=AMOUNTS,
    output_femtos=st.one_of(st.integers(0, 10**10), st.integers(0, 10**24)),
    tokens=st.tuples(st.integers(0, 5000), st.integers(0, 5000)).map(sorted),
    eighth=st.booleans(),
    share=st.booleans(),
    unbounded_share=st.sampled_from([0, 1, 2, 8, 100]),
    room_nanos=st.one_of(AMOUNTS, st.integers(-10, 0), st.just(COUNTER_NANOS_MAX)),
)
def test_a_hold_fits_pays_for_its_tokens_and_is_refused_only_when_the_smallest_does_not_fit(
    input_nanos, output_femtos, tokens, eighth, share, unbounded_share, room_nanos
):
    fewest, wanted = tokens
    request = a_reserve(
        replace(TENANT, unbounded_share=unbounded_share),
        input_nanos=input_nanos,
        output_femtos=output_femtos,
        output_tokens=wanted,
        output_tokens_min=fewest,
        eighth=eighth,
    )
    held = hold_that_fits(request, room_nanos=room_nanos, room_tokens=None, share=share)
    if held is None:
        assert request.hold_nanos_min > room_nanos
        return
    hold_nanos, output_tokens = held
    assert hold_nanos <= room_nanos
    assert fewest <= output_tokens <= wanted
    cost_nanos = input_nanos + ceil_div(output_tokens * output_femtos, 10**6)
    assert hold_nanos >= min(cost_nanos, CALL_NANOS_MAX)
    if request.hold_nanos <= room_nanos and not (eighth and share and unbounded_share):
        assert output_tokens == wanted or hold_nanos == request.hold_nanos
    if output_tokens < min(wanted, UNBOUNDED_TOKENS):  # only because no more fits
        assert request.hold_nanos_for(output_tokens + 1) > room_nanos or output_tokens == fewest


@pytest.mark.parametrize(
    ("room_nanos", "share", "expected"),
    [
        (100_000, True, (5100, 5000)),  # an eighth pays for all of it
        (16_000, True, (100 + 2000, 2000)),  # an eighth of what is left, for the output
        (8191, True, (100 + 1024, 1024)),  # at least that much
        (1124, True, (100 + 1024, 1024)),
        (1123, True, (1123, 1023)),  # unless it does not fit
        (116, True, (100 + 16, 16)),
        (115, True, None),
        (16_000, False, (5100, 5000)),  # no budget to take a part of
    ],
)
def test_a_call_without_a_bound_takes_an_eighth_of_what_is_left(room_nanos, share, expected):
    request = a_reserve(TENANT, output_femtos=10**6, output_tokens=5000, output_tokens_min=16, eighth=True)
    assert hold_that_fits(request, room_nanos=room_nanos, room_tokens=None, share=share) == expected


@pytest.mark.parametrize(("part", "tokens"), [(0, 5000), (1, 5000), (2, 4000), (4, 2000), (1000, 1024)])
def test_the_part_of_what_is_left_is_the_tenant_s_to_choose(part, tokens):
    request = a_reserve(
        replace(TENANT, unbounded_share=part),
        output_femtos=10**6,
        output_tokens=5000,
        output_tokens_min=16,
        eighth=True,
    )
    assert hold_that_fits(request, room_nanos=8000, room_tokens=None, share=True) == (100 + tokens, tokens)


@pytest.mark.parametrize(
    ("room_nanos", "expected"), [(1100, (1100, 1000)), (1099, (1099, 999)), (164, (164, 64)), (163, None)]
)
def test_a_bound_that_does_not_fit_is_clamped_to_all_that_is_left(room_nanos, expected):
    request = a_reserve(TENANT, output_femtos=10**6, output_tokens=1000, output_tokens_min=64)
    assert hold_that_fits(request, room_nanos=room_nanos, room_tokens=None, share=True) == expected
