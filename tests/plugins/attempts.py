"""Refused attempts, spelled shortly for tests."""

from budgetguard.core.attempt_counts import Report, Tally
from budgetguard.core.attempts import Attempt
from budgetguard.core.reasons import Reason
from tests.plugins.redis_calls import KEY_ID

MINUTE_MS = 1_750_000_020_000


def an_attempt(operation_id: str = "op-1", **changes) -> Attempt:
    fields = {
        "refused_at_ms": MINUTE_MS + 1_234,
        "tenant_id": "acme",
        "key_id": KEY_ID,
        "operation_id": operation_id,
        "api": "openai.chat",
        "reason": Reason.BUDGET_EXCEEDED,
        "status": 402,
        "message": "Budget b1 is exhausted.",
        "facts": {"budget_id": "b1", "limit_usd": "1", "resets_at": None, "retryable": False},
        "provider_id": "openai",
        "model": "gpt-4o-mini",
        "tags": ("a", "b"),
        "session_id": "s 1",
        "end_user": "jo",
        **changes,
    }
    return Attempt(**fields)


def a_tally(**changes) -> Tally:
    fields = {
        "tenant_id": "acme",
        "key_id": KEY_ID,
        "reason": Reason.BUDGET_EXCEEDED,
        "minute_ms": MINUTE_MS,
        "source": "p.1",
        **changes,
    }
    return Tally(**fields)


def a_report(count: int, *attempts: Attempt, first_number: int = 1, **changes) -> Report:
    return Report(tally=a_tally(**changes), count=count, attempts=attempts, first_number=first_number)
