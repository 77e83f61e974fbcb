"""Admitting a call: the reference of ``reserve.lua``. Looks at everything first, then writes all or nothing."""

from dataclasses import dataclass
from typing import Any

from budgetguard.core.budget import (
    BACKLOG_MAX,
    TOO_LATE_MS,
    UNBOUNDED_TOKENS,
    AppliedLimit,
    Refusal,
    Reserve,
    Reserved,
    ReserveRefused,
)
from budgetguard.core.counter import CounterName, Unit, idle_before_ms, read_name, template_of
from budgetguard.core.counting import Counter, as_of, frees_at_ms, has_left, move
from budgetguard.core.extension import CounterLimit
from budgetguard.core.money import CALL_NANOS_MAX, ceil_div
from budgetguard.core.operation import LEASE_MS
from budgetguard.core.rate_limit import Look, Minute, count, look, reset_seconds, retry_after_ms
from budgetguard.core.shard import Operation, Shard
from budgetguard.core.snapshot import SubjectKind


def reserve(
    shard: Shard, request: Reserve, *, run_id: str, redis_ms: int, backlog_max: int = BACKLOG_MAX
) -> Reserved | ReserveRefused:
    """Admit one call or say why not, all or nothing."""
    tenant_id = request.facts.tenant_id
    operation_key = (tenant_id, request.facts.operation_id)
    known = shard.operations.get(operation_key)
    refused = _refused_outright(shard, request, known, run_id=run_id, redis_ms=redis_ms, backlog_max=backlog_max)
    if refused is not None:
        replayed = known if refused.kind is Refusal.REPLAYED else None
        if replayed is not None and replayed.told is not None:
            # The same question again, while it is still held: the same answer.
            is_same = (replayed.facts, replayed.asked) == (request.facts, request.asked)
            return replayed.told if is_same else refused
        return refused

    looks = _look_at_requests(shard, request)
    if isinstance(looks, ReserveRefused):
        return looks
    places = [_place(shard, tenant_id, limit) for limit in request.limits()]
    held = _hold_to_take(shard, request, places)
    if isinstance(held, ReserveRefused):
        return held

    hold_nanos, output_tokens = held
    hold_tokens = request.hold_tokens_for(output_tokens)
    told = Reserved(
        hold_nanos=hold_nanos,
        output_tokens=output_tokens,
        counters=tuple(place.limit.counter for place in places),
        **_tightest_requests(looks, request.now_ms),
        **_tightest_budget(places, hold_nanos),
        **_tightest_tokens(places, hold_tokens, request.now_ms),
    )

    # Writes.
    for place in places:
        _hold(shard, tenant_id, place, {Unit.NANOS: hold_nanos, Unit.TOKENS: hold_tokens}.get(place.limit.unit, 1))
        if place.limit.subjects_max is not None:
            _remember_subject(shard, tenant_id, place, request.now_ms)
    for minute, seen, _ in looks:
        count(minute, seen)
    shard.operations[operation_key] = Operation(
        hold_nanos=hold_nanos,
        tokens=hold_tokens,
        counters=told.counters,
        facts=request.facts,
        asked=request.asked,
        told=told,
        limits=tuple(CounterLimit.read(place.limit.limit, place.limit.whose) for place in places),
    )
    shard.leases[operation_key] = request.now_ms + LEASE_MS
    return told


def _look_at_requests(shard: Shard, request: Reserve) -> list[tuple[Minute, Look, int]] | ReserveRefused:
    tenant_id = request.facts.tenant_id
    looks: list[tuple[Minute, Look, int]] = []
    for scope, limit in request.request_limits():
        if not limit:
            continue
        names = (tenant_id,) if scope is SubjectKind.TENANT else (tenant_id, request.facts.key_id)
        minute = shard.requests.setdefault(names, Minute())
        seen = look(minute, request.now_ms)
        if seen.total >= limit:
            wait_ms = retry_after_ms(minute, limit=limit, now_ms=request.now_ms)
            return ReserveRefused(kind=Refusal.RATE, scope=scope, limit=limit, retry_after_ms=wait_ms)
        looks.append((minute, seen, limit))
    return looks


@dataclass(frozen=True, slots=True)
class _Place:
    """A limit and the counter that it looks at, as it stands."""

    limit: AppliedLimit
    name: CounterName
    counter: Counter

    @property
    def left(self) -> int:
        return self.counter.left_of(self.limit.limit)

    @property
    def template(self) -> str:
        return template_of(self.name)


def _place(shard: Shard, tenant_id: str, limit: AppliedLimit) -> _Place:
    # Reading a counter that is not there must not make it.
    name = read_name(limit.counter)
    return _Place(limit, name, as_of(shard.counters.get((tenant_id, name.key), Counter()), name))


def _has_room_for_subject(shard: Shard, request: Reserve, place: _Place) -> bool:
    if place.limit.subjects_max is None:
        return True
    seen = shard.subjects.get((request.facts.tenant_id, place.template), {})
    idle_before = idle_before_ms(place.name, request.now_ms)
    live = sum(seen_ms >= idle_before for seen_ms in seen.values())
    return place.limit.subject in seen or live < place.limit.subjects_max


def _remember_subject(shard: Shard, tenant_id: str, place: _Place, now_ms: int) -> None:
    seen = shard.subjects.setdefault((tenant_id, place.template), {})
    if place.limit.subject not in seen:
        idle_before = idle_before_ms(place.name, now_ms)
        for subject in [subject for subject, seen_ms in seen.items() if seen_ms < idle_before]:
            del seen[subject]
    seen[place.limit.subject] = max(seen.get(place.limit.subject, 0), now_ms)


def _hold_to_take(shard: Shard, request: Reserve, places: list[_Place]) -> tuple[int, int] | ReserveRefused:
    """Choose (hold, output tokens), or name the first limit that even the smallest hold does not fit."""
    full = next((place for place in places if not _has_room_for_subject(shard, request, place)), None)
    if full is not None:
        return no_more_subjects(request, full.limit)
    if any(place.left < 1 for place in places if place.limit.unit is Unit.CALLS):
        return _no_room(request, places)
    held = hold_that_fits(
        request,
        room_nanos=min((place.left for place in places if place.limit.unit is Unit.NANOS), default=CALL_NANOS_MAX),
        room_tokens=min((place.left for place in places if place.limit.unit is Unit.TOKENS), default=None),
        share=any(place.limit.enforced for place in places if place.limit.unit is Unit.NANOS),
    )
    return held or _no_room(request, places)


def no_more_subjects(request: Reserve, limit: AppliedLimit) -> ReserveRefused:
    """Refuse a subject that a template has no room for, until others leave or its window resets."""
    return ReserveRefused(
        kind=Refusal.SUBJECTS,
        scope=limit.scope,
        subject=limit.subject,
        budget_id=limit.budget_id,
        limit=limit.limit,
        needed=request.hold_nanos_min,
        starts_at_ms=limit.starts_at_ms,
        resets_at_ms=limit.resets_at_ms,
        subjects_max=limit.subjects_max,
    )


def _hold(shard: Shard, tenant_id: str, place: _Place, amount: int) -> None:
    if not has_left(place.counter, place.name):
        move(place.counter, place.name, spent=0, held=amount)
        shard.counters[(tenant_id, place.name.key)] = place.counter


def _refused_outright(
    shard: Shard, request: Reserve, known: Operation | None, *, run_id: str, redis_ms: int, backlog_max: int
) -> ReserveRefused | None:
    tenant_version = shard.records.get((request.facts.tenant_id,))
    key_version = shard.records.get((request.facts.tenant_id, request.facts.key_id))
    checks = (
        (shard.epoch != run_id, Refusal.NOT_READY, None),
        (redis_ms > request.now_ms + TOO_LATE_MS, Refusal.TOO_LATE, None),
        (known is not None, Refusal.REPLAYED, None),
        # Callers know the tenant from Redis, so Redis has lost it.
        (tenant_version is None, Refusal.NOT_READY, None),
        (tenant_version != request.tenant.version, Refusal.STALE, SubjectKind.TENANT),
        (key_version != request.key.version, Refusal.STALE, SubjectKind.API_KEY),
        (len(shard.events) >= backlog_max, Refusal.BACKLOG_FULL, None),
    )
    return next((ReserveRefused(kind=kind, scope=scope) for refuses, kind, scope in checks if refuses), None)


def hold_that_fits(
    request: Reserve, *, room_nanos: int, room_tokens: int | None, share: bool
) -> tuple[int, int] | None:
    """Choose (hold, output tokens): the wanted bound, or as much of it as fits, or the smallest, or ``None``.

    ``room_nanos`` and ``room_tokens`` (``None``: no limit) are what the tightest counters leave; ``share`` says that an
    enforced budget applies.
    """
    room_nanos = min(room_nanos, CALL_NANOS_MAX)
    token_nanos, tokens_min = request.token_nanos, request.output_tokens_min
    tokens = request.output_tokens
    part = request.tenant.unbounded_share
    if request.eighth and share and part and token_nanos:
        tokens = min(tokens, max(tokens_min, UNBOUNDED_TOKENS, room_nanos // part // token_nanos))
    if room_tokens is not None and request.choices and request.hold_tokens_for(tokens) > room_tokens:
        tokens = max((room_tokens - request.input_tokens) // request.choices, tokens_min)
    if request.hold_nanos_for(tokens) > room_nanos:
        fitting = (room_nanos - request.input_nanos) // token_nanos if token_nanos else 0
        tokens = max(fitting, tokens_min)
    hold_nanos = request.hold_nanos_for(tokens)
    if hold_nanos > room_nanos or (room_tokens is not None and request.hold_tokens_for(tokens) > room_tokens):
        return None
    return hold_nanos, tokens


def _no_room(request: Reserve, places: list[_Place]) -> ReserveRefused:
    """Name the first limit that even the smallest hold does not fit, with its numbers."""
    needs = {
        Unit.CALLS: 1,
        Unit.TOKENS: request.hold_tokens_for(request.output_tokens_min),
        Unit.NANOS: request.hold_nanos_min,
    }
    place = next(place for place in places if place.left < needs[place.limit.unit])
    limit, needed = place.limit, needs[place.limit.unit]
    frees_at = frees_at_ms(place.counter, place.name, limit=limit.limit, needed=needed)
    if limit.unit is Unit.CALLS:
        return ReserveRefused(kind=Refusal.CALLS, scope=limit.scope, limit=limit.limit)
    if limit.unit is Unit.TOKENS:
        wait_ms = (frees_at or 0) - request.now_ms
        return ReserveRefused(
            kind=Refusal.TOKENS, scope=limit.scope, limit=limit.limit, needed=needed, retry_after_ms=wait_ms
        )
    return ReserveRefused(
        kind=Refusal.BUDGET,
        scope=limit.scope,
        subject=limit.subject,
        budget_id=limit.budget_id,
        limit=limit.limit,
        spent=place.counter.spent,
        held=place.counter.held + place.counter.seed,
        needed=needed,
        starts_at_ms=limit.starts_at_ms,
        resets_at_ms=frees_at or limit.resets_at_ms,
    )


def _tightest_budget(places: list[_Place], hold_nanos: int) -> dict[str, Any]:
    enforced = [place for place in places if place.limit.unit is Unit.NANOS and place.limit.enforced]
    if not enforced:
        return {}
    tightest = min(enforced, key=lambda place: place.left)
    return {
        "budget_remaining_nanos": tightest.left - hold_nanos,
        "tightest_budget_id": tightest.limit.budget_id,
    }


def _tightest_tokens(places: list[_Place], hold_tokens: int, now_ms: int) -> dict[str, Any]:
    limited = [place for place in places if place.limit.unit is Unit.TOKENS]
    if not limited:
        return {}
    tightest = min(limited, key=lambda place: place.left)
    width_ms, number = tightest.name.buckets or (0, 0)
    return {
        "tokens_limit": tightest.limit.limit,
        "tokens_remaining": tightest.left - hold_tokens,
        "tokens_reset_seconds": ceil_div(((tightest.counter.last or 0) + number) * width_ms - now_ms, 1000),
    }


def _tightest_requests(looks: list[tuple[Minute, Look, int]], now_ms: int) -> dict[str, Any]:
    if not looks:
        return {}
    _, seen, limit = min(looks, key=lambda row: row[2] - row[1].total)
    return {
        "requests_limit": limit,
        "requests_remaining": limit - seen.total - 1,
        "requests_reset_seconds": reset_seconds(seen, now_ms),
    }
