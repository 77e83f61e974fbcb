"""How a refusal of the counters is told: its reason, its sentence and its numbers."""

from budgetguard.core.budget import Refusal, ReserveRefused
from budgetguard.core.moments import rfc3339
from budgetguard.core.money import ceil_div, format_usd
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.snapshot import SubjectKind

# Nobody can say yet who calls, or what is left: not a reason to give up.
COUNTERS_NOT_READY = Deny(Reason.COUNTERS_NOT_READY, retry_after_seconds=1)


def deny_of(refused: ReserveRefused) -> Deny:
    """Tell why the counters refused, with their numbers."""
    if refused.kind is Refusal.BUDGET:
        return _budget_exceeded(refused)
    if refused.kind is Refusal.NOT_READY:
        return COUNTERS_NOT_READY
    if refused.kind in _LIMITS:
        return _limit_reached(refused)
    if refused.kind is Refusal.SUBJECTS:
        return _subjects_exceeded(refused)
    return Deny(_REFUSED_AS[refused.kind], retry_after_seconds=None if refused.kind is Refusal.REPLAYED else 1)


# What is limited, the fact that tells how much, and the reason.
_LIMITS = {
    Refusal.RATE: ("requests a minute", "limit_requests_per_minute", Reason.RATE_LIMIT_EXCEEDED),
    Refusal.TOKENS: ("tokens a minute", "limit_tokens_per_minute", Reason.TOKEN_LIMIT_EXCEEDED),
    Refusal.CALLS: ("concurrent calls", "limit_concurrent_calls", Reason.CONCURRENCY_LIMIT_EXCEEDED),
}


def _limit_reached(refused: ReserveRefused) -> Deny:
    seconds = max(1, ceil_div(refused.retry_after_ms or 0, 1000))
    scope = "" if refused.scope is None else refused.scope.value
    limited, fact, reason = _LIMITS[refused.kind]
    facts: dict[str, str | int | bool | None] = {"scope": scope, fact: refused.limit, "retryable": True}
    needs = ""
    if refused.kind is Refusal.TOKENS:
        facts["needed_tokens"] = refused.needed
        if refused.needed > refused.limit:
            return Deny(
                reason,
                f"This call alone can take up to {refused.needed} tokens, more than the limit of {refused.limit} "
                f"{limited}: it never fits. Ask for less output, or send less input.",
                facts={**facts, "retryable": False},
            )
        needs = f"; this call can take up to {refused.needed} tokens"
    limit = "Rate limit" if refused.kind is Refusal.RATE else "Limit"
    return Deny(
        reason,
        f"{limit} of {refused.limit} {limited} reached{needs}. Try again in {seconds} s.",
        facts=facts,
        retry_after_seconds=seconds,
    )


_REFUSED_AS = {
    Refusal.TOO_LATE: Reason.TOO_LATE,
    Refusal.REPLAYED: Reason.OPERATION_REPLAYED,
    Refusal.BACKLOG_FULL: Reason.BACKLOG_FULL,
}


def _subjects_exceeded(refused: ReserveRefused) -> Deny:
    resets_at = None if refused.resets_at_ms is None else rfc3339(refused.resets_at_ms)
    resets = f" It resets at {resets_at}." if resets_at else " A subject without calls for long enough leaves it."
    return Deny(
        Reason.BUDGET_SUBJECTS_EXCEEDED,
        f"Budget {refused.budget_id} counts each subject by itself, and has the {refused.subjects_max} that it may."
        f"{resets}",
        facts={
            "budget_id": refused.budget_id,
            "subjects_max": refused.subjects_max,
            "resets_at": resets_at,
            # Subjects leave, with the window or when they are idle; what is more than the limit never fits.
            "retryable": refused.needed <= refused.limit,
            "subject_kind": "TENANT" if refused.scope is None else refused.scope.value,
            "subject": refused.subject,
            "window_starts_at": None if refused.starts_at_ms is None else rfc3339(refused.starts_at_ms),
        },
    )


def budget_facts(
    *,
    budget_id: str | None,
    scope: SubjectKind | None,
    subject: str,
    limit: int,
    spent: int,
    held: int,
    needed: int,
    starts_at_ms: int | None,
    resets_at_ms: int | None,
    own: int = 0,
) -> dict[str, str | int | bool | None]:
    """Spell a budget, whose it is and its numbers, in nanos, that has no room for what is needed.

    ``own`` is held by the very call that needs more: it will be spent, and does not come back.
    """
    # Money that is only held comes back when those calls end; what is spent leaves with the window, which resets or
    # rolls on. What is more than the limit never fits.
    fits_ever, fits_when_calls_end = own + needed <= limit, spent + own + needed <= limit
    return {
        "budget_id": budget_id,
        "limit_usd": format_usd(limit),
        "spent_usd": format_usd(spent),
        "held_usd": format_usd(held),
        "needed_usd": format_usd(needed),
        "resets_at": None if resets_at_ms is None else rfc3339(resets_at_ms),
        "retryable": fits_ever and (fits_when_calls_end or resets_at_ms is not None),
        "subject_kind": "TENANT" if scope is None else scope.value,
        "subject": subject,
        "window_starts_at": None if starts_at_ms is None else rfc3339(starts_at_ms),
    }


def _budget_exceeded(refused: ReserveRefused) -> Deny:
    facts = budget_facts(
        budget_id=refused.budget_id,
        scope=refused.scope,
        subject=refused.subject,
        limit=refused.limit,
        spent=refused.spent,
        held=refused.held,
        needed=refused.needed,
        starts_at_ms=refused.starts_at_ms,
        resets_at_ms=refused.resets_at_ms,
    )
    whose = f" of {refused.subject}" if refused.subject else ""
    resets = f" It resets at {facts['resets_at']}." if facts["resets_at"] else ""
    return Deny(
        Reason.BUDGET_EXCEEDED,
        f"Budget {refused.budget_id}{whose} is exhausted: limit ${facts['limit_usd']}, spent ${facts['spent_usd']}, "
        f"held ${facts['held_usd']} by calls under way; this call needs up to ${facts['needed_usd']}.{resets}",
        facts=facts,
    )
