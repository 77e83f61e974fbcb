"""Why a stream that cannot top up is ended: what its client reads, and what its ledger row says."""

from dataclasses import dataclass

from budgetguard.core.extension import ExtensionRefused
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.refusals import budget_facts


@dataclass(frozen=True, slots=True)
class Closing:
    """``deny`` is told to the client, ``detail`` to the ledger."""

    deny: Deny
    detail: str


def budget_exhausted(refused: ExtensionRefused, *, hold_nanos: int) -> Closing:
    """A budget has no room for more output. ``hold_nanos`` is what the stream itself holds, and will have cost."""
    limit = refused.limit
    facts = budget_facts(
        budget_id=limit.budget_id,
        scope=limit.scope,
        subject=limit.subject,
        limit=limit.limit_nanos,
        spent=refused.spent_nanos,
        held=refused.held_nanos,
        needed=refused.needed_nanos,
        starts_at_ms=limit.starts_at_ms,
        resets_at_ms=refused.resets_at_ms,
        own=hold_nanos,
    )
    whose = f" of {limit.subject}" if limit.subject else ""
    resets = f" It resets at {facts['resets_at']}." if facts["resets_at"] else ""
    deny = Deny(
        Reason.BUDGET_EXCEEDED,
        f"Budget {limit.budget_id}{whose} is exhausted, so this stream was ended: limit ${facts['limit_usd']}, spent "
        f"${facts['spent_usd']}, held ${facts['held_usd']} by calls under way, this one among them; to go on it needs "
        f"up to ${facts['needed_usd']} more.{resets}",
        facts=facts,
    )
    return Closing(deny, f"stream closed: budget {limit.budget_id} is exhausted")


def counters_unavailable(reason: Reason) -> Closing:
    """Nobody could be asked for more, or the hold itself is gone."""
    deny = Deny(reason, "The budget counters could not hold more for this stream, so it was ended.")
    return Closing(deny, f"stream closed: no top-up, {reason.value}")
