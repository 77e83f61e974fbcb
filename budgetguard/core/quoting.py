"""What a call would be told if it came now: the reference's own answer, asked of a copy that nobody keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from budgetguard.core.budget import BACKLOG_MAX, Refusal, Reserve, Reserved, ReserveRefused
from budgetguard.core.counter import read_name
from budgetguard.core.counting import Counter
from budgetguard.core.rate_limit import Minute
from budgetguard.core.reserving import no_more_subjects, reserve
from budgetguard.core.shard import Shard

# Any will do, as long as the epoch of the copy is the same.
_RUN_ID = "quote"
# What reserve decides after it has looked at the subjects of templates.
_LATER = frozenset({Refusal.CALLS, Refusal.TOKENS, Refusal.BUDGET})


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the counters say of one call: all that decides it.

    ``counters`` stand in the order of the request's ``limits()``. ``full`` are the places in it of templates that have
    all the subjects they may, and not the call's. ``backlog`` is the number of events that wait to be drained.
    """

    ready: bool
    backlog: int
    counters: Sequence[Counter]
    tenant_requests: Minute = field(default_factory=Minute)
    key_requests: Minute = field(default_factory=Minute)
    full: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """What would make a refused call pass; of each ``None`` when that alone does not.

    ``output_tokens`` is the largest output bound that fits, ``not_before_ms`` when the limit has room again if nothing
    else comes, ``short_nanos`` what the budget that refused lacks.
    """

    output_tokens: int | None = None
    not_before_ms: int | None = None
    short_nanos: int | None = None


def verdict(request: Reserve, standing: Standing, *, backlog_max: int = BACKLOG_MAX) -> Reserved | ReserveRefused:
    """Say what a reserve of this request would answer. Changes nothing."""
    facts = request.facts
    if standing.backlog >= backlog_max and standing.ready:
        return ReserveRefused(kind=Refusal.BACKLOG_FULL)
    names = [read_name(limit.counter) for limit in request.limits()]
    shard = Shard(
        epoch=_RUN_ID if standing.ready else None,
        records={
            (facts.tenant_id,): request.tenant.version,
            (facts.tenant_id, facts.key_id): request.key.version,
        },
        counters={(facts.tenant_id, name.key): counter for name, counter in zip(names, standing.counters, strict=True)},
        requests={
            (facts.tenant_id,): replace(standing.tenant_requests),
            (facts.tenant_id, facts.key_id): replace(standing.key_requests),
        },
    )
    answer = reserve(shard, request, run_id=_RUN_ID, redis_ms=request.now_ms)
    if standing.full and (isinstance(answer, Reserved) or answer.kind in _LATER):
        return no_more_subjects(request, request.limits()[min(standing.full)])
    return answer


def remedy(request: Reserve, refused: ReserveRefused, standing: Standing) -> Remedy:
    """Say what would make a refused call pass."""
    if refused.kind is Refusal.RATE:
        return Remedy(not_before_ms=request.now_ms + (refused.retry_after_ms or 0))
    if refused.kind is Refusal.TOKENS:
        # What needs more than the limit never fits.
        waits = refused.needed <= refused.limit
        return Remedy(
            output_tokens=_largest_that_fits(request, standing),
            not_before_ms=request.now_ms + (refused.retry_after_ms or 0) if waits else None,
        )
    if refused.kind is Refusal.BUDGET:
        left = refused.limit - max(refused.spent, 0) - max(refused.held, 0)
        return Remedy(
            output_tokens=_largest_that_fits(request, standing),
            not_before_ms=refused.resets_at_ms if refused.needed <= refused.limit else None,
            short_nanos=refused.needed - left,
        )
    if refused.kind is Refusal.SUBJECTS:
        return Remedy(not_before_ms=refused.resets_at_ms if refused.needed <= refused.limit else None)
    return Remedy()


def _largest_that_fits(request: Reserve, standing: Standing) -> int | None:
    """Find the largest output bound that passes as it is named; ``None``: not even one token does."""
    fits, too_many = 0, request.output_tokens
    while too_many - fits > 1:
        tokens = (fits + too_many) // 2
        asked = replace(request, output_tokens=tokens, output_tokens_min=tokens, eighth=False)
        if isinstance(verdict(asked, standing), Reserved):
            fits = tokens
        else:
            too_many = tokens
    return fits or None
