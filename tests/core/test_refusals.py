from dataclasses import replace

import pytest

from budgetguard.core.budget import Refusal, ReserveRefused
from budgetguard.core.reasons import Reason
from budgetguard.core.refusals import deny_of
from budgetguard.core.snapshot import SubjectKind

BUDGET = {"kind": Refusal.BUDGET, "budget_id": "b1", "limit": 10**9, "spent": 9 * 10**8, "needed": 2 * 10**8}
FULL = ReserveRefused(
    kind=Refusal.SUBJECTS,
    scope=SubjectKind.SESSION,
    budget_id="b1",
    subject="s",
    limit=5,
    needed=5,
    starts_at_ms=30_000,
    resets_at_ms=45_000,
    subjects_max=7,
)


def test_a_budget_tells_whose_it_is_and_when_it_resets():
    deny = deny_of(
        ReserveRefused(**BUDGET, scope=SubjectKind.TAG, subject="eng", held=5, starts_at_ms=0, resets_at_ms=86_400_000)
    )
    assert deny.reason is Reason.BUDGET_EXCEEDED
    assert deny.message == (
        "Budget b1 of eng is exhausted: limit $1, spent $0.9, held $0.000000005 by calls under way; this call needs "
        "up to $0.2. It resets at 1970-01-02T00:00:00Z."
    )
    assert deny.facts == {
        "budget_id": "b1",
        "subject_kind": "TAG",
        "subject": "eng",
        "limit_usd": "1",
        "spent_usd": "0.9",
        "held_usd": "0.000000005",
        "needed_usd": "0.2",
        "window_starts_at": "1970-01-01T00:00:00Z",
        "resets_at": "1970-01-02T00:00:00Z",
        "retryable": True,
    }


def test_a_budget_without_end_that_is_only_held_is_worth_a_retry():
    deny = deny_of(ReserveRefused(**{**BUDGET, "spent": 0, "held": 9 * 10**8}))
    assert (deny.facts["subject_kind"], deny.facts["resets_at"], deny.facts["retryable"]) == ("TENANT", None, True)
    assert "resets" not in deny.message
    assert " of " not in deny.message


@pytest.mark.parametrize(
    ("refused", "reason", "facts", "seconds"),
    [
        (
            ReserveRefused(kind=Refusal.RATE, scope=SubjectKind.TENANT, limit=60, retry_after_ms=1001),
            Reason.RATE_LIMIT_EXCEEDED,
            {"scope": "TENANT", "limit_requests_per_minute": 60, "retryable": True},
            2,
        ),
        (
            ReserveRefused(kind=Refusal.TOKENS, scope=SubjectKind.API_KEY, limit=60, needed=61, retry_after_ms=5),
            Reason.TOKEN_LIMIT_EXCEEDED,
            {"scope": "API_KEY", "limit_tokens_per_minute": 60, "retryable": False, "needed_tokens": 61},
            None,
        ),
        (
            ReserveRefused(kind=Refusal.TOKENS, scope=SubjectKind.API_KEY, limit=60, needed=60, retry_after_ms=5),
            Reason.TOKEN_LIMIT_EXCEEDED,
            {"scope": "API_KEY", "limit_tokens_per_minute": 60, "retryable": True, "needed_tokens": 60},
            1,
        ),
        (
            ReserveRefused(kind=Refusal.CALLS, limit=5),
            Reason.CONCURRENCY_LIMIT_EXCEEDED,
            {"scope": "", "limit_concurrent_calls": 5, "retryable": True},
            1,
        ),
        (
            FULL,
            Reason.BUDGET_SUBJECTS_EXCEEDED,
            {
                "budget_id": "b1",
                "subjects_max": 7,
                "resets_at": "1970-01-01T00:00:45Z",
                "retryable": True,
                "subject_kind": "SESSION",
                "subject": "s",
                "window_starts_at": "1970-01-01T00:00:30Z",
            },
            None,
        ),
        (ReserveRefused(kind=Refusal.NOT_READY), Reason.COUNTERS_NOT_READY, {}, 1),
        (ReserveRefused(kind=Refusal.REPLAYED), Reason.OPERATION_REPLAYED, {}, None),
    ],
)
def test_each_limit_tells_its_own_numbers(refused, reason, facts, seconds):
    deny = deny_of(refused)
    assert (deny.reason, deny.facts, deny.retry_after_seconds) == (reason, facts, seconds)


@pytest.mark.parametrize(
    ("changes", "retryable", "told"),
    [
        ({}, True, "It resets at 1970-01-01T00:00:45Z."),
        # Subjects that are idle leave, too.
        ({"resets_at_ms": None}, True, "A subject without calls for long enough leaves it."),
        ({"needed": 6}, False, "It resets at 1970-01-01T00:00:45Z."),
    ],
)
def test_a_subject_may_come_again_unless_its_call_never_fits(changes, retryable, told):
    deny = deny_of(replace(FULL, **changes))
    assert deny.facts["retryable"] is retryable
    assert deny.message.endswith(told)


@pytest.mark.parametrize(
    ("changes", "retryable"),
    [
        ({"spent": 0, "held": 10**9}, True),  # what is held comes back
        ({"resets_at_ms": 45_000}, True),  # a window resets, a rolling one frees what is needed by then
        ({}, False),  # nothing but another limit helps
        ({"needed": 10**9, "resets_at_ms": 45_000}, True),
        ({"needed": 10**9 + 1, "resets_at_ms": 45_000}, False),  # more than the limit never fits
    ],
)
def test_retryable_says_whether_the_call_can_pass_with_no_setting_changed(changes, retryable):
    assert deny_of(ReserveRefused(**{**BUDGET, **changes})).facts["retryable"] is retryable


def test_a_call_that_never_fits_is_not_told_to_wait():
    deny = deny_of(ReserveRefused(kind=Refusal.TOKENS, limit=60, needed=61, retry_after_ms=61_000))
    assert deny.message.startswith(
        "This call alone can take up to 61 tokens, more than the limit of 60 tokens a minute"
    )
    assert "again" not in deny.message
