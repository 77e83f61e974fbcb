"""How counters are spelled for the scripts, and how the scripts' answers are read."""

import re
from collections.abc import Mapping, Sequence

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import Argument
from budgetguard.core.budget import AppliedLimit, NotReady, Refusal, Reserve, Reserved, ReserveRefused
from budgetguard.core.counter import CounterName, Unit, read_name, template_of
from budgetguard.core.counting import Counter
from budgetguard.core.events import split_counters
from budgetguard.core.extension import CounterLimit, Extended, ExtensionRefused, NoHold
from budgetguard.core.reserving import no_more_subjects
from budgetguard.core.snapshot import SubjectKind

# How common.lua spells an operation.
HELD = "HELD"
_FIELD = "\x1f"
_HOLD = ("state", "hold", "tokens", "counters", "facts", "asked", "told", "limits")
_MARKER = ("state", "hold", "tokens", "counters", "amount", "sequence", "forgotten")

# What a rolling counter spent (s) or holds (h) in one bucket.
_BUCKET = re.compile(r"[sh][0-9]+")


def counter_arguments(name: CounterName, now_ms: int) -> tuple[Argument, ...]:
    """List what the scripts' ``read_counters`` takes of a counter."""
    kept_until_ms = name.kept_until_ms(now_ms)
    return (
        "" if kept_until_ms is None else kept_until_ms,
        name.unit.value,
        "" if name.bucket is None else name.bucket,
        "" if name.buckets is None else name.buckets.number,
    )


def limit_arguments(limit: AppliedLimit, name: CounterName, now_ms: int) -> tuple[Argument, ...]:
    """List what ``reserve.lua`` takes of a limit and its counter."""
    kept_until_ms, _, bucket, number = counter_arguments(name, now_ms)
    flags = f"{limit.enforced:d}{name.slides:d}{name.buckets is not None:d}"
    plain: tuple[Argument, ...] = (f"{name.unit.value}{flags}", kept_until_ms, limit.limit, limit.budget_id)
    return plain if name.buckets is None else (*plain, bucket, number, name.buckets.width_ms)


def commands_to_remember(tenant_id: str, name: CounterName, now_ms: int) -> list[tuple[Argument, ...]]:
    """List what makes a template's subject known that got a counter without a call; nothing for other counters."""
    if name.subject is None or name.unit is not Unit.NANOS:
        return []
    key, kept_until_ms = keys.subjects(tenant_id, template_of(name)), name.kept_until_ms(now_ms)
    known: tuple[Argument, ...] = ("ZADD", key, "NX", now_ms, name.subject)
    return [known] if kept_until_ms is None else [known, ("PEXPIREAT", key, kept_until_ms)]


def all_counter_arguments(names: Sequence[str], now_ms: int) -> list[Argument]:
    """List it of several, one after the other."""
    return [argument for name in names for argument in counter_arguments(read_name(name), now_ms)]


def fields_of(reply: Sequence[str]) -> dict[str, str]:
    """Read a reply of HGETALL."""
    return dict(zip(reply[::2], reply[1::2], strict=True))


def operation_of(text: str) -> dict[str, str]:
    """Read what the scripts keep of an operation: a hold, or the marker of its end."""
    state, *fields = text.split(_FIELD, len(_HOLD) - 1)
    return dict(zip(_HOLD if state == HELD else _MARKER, (state, *fields), strict=True))


def counter_of(fields: Mapping[str, str]) -> Counter:
    """Read the hash of a counter."""
    first, last = fields.get("first"), fields.get("last")
    places = {int(field[1:]) for field in fields if _BUCKET.fullmatch(field)}
    return Counter(
        spent=int(fields.get("spent", 0)),
        held=int(fields.get("held", 0)),
        seed=int(fields.get("seed", 0)),
        first=None if first is None else int(first),
        last=None if last is None else int(last),
        buckets={at: (int(fields.get(f"s{at}", 0)), int(fields.get(f"h{at}", 0))) for at in places},
    )


def reserve_answer(request: Reserve, limits: tuple[AppliedLimit, ...], reply: list[str]) -> Reserved | ReserveRefused:
    """Read what ``reserve.lua`` answers; ``limits`` are those of the request."""
    if reply[0] == "RESERVED":
        return _reserved(reply)
    if reply[0] == "NO_ROOM":
        return _no_room(request, limits[int(reply[1]) - 1], *reply[2:])
    kind = Refusal(reply[0])
    if kind is Refusal.RATE:
        _, scope, limit, wait_ms = reply
        return ReserveRefused(kind=kind, scope=SubjectKind(scope), limit=int(limit), retry_after_ms=int(wait_ms))
    if kind is Refusal.SUBJECTS:
        return no_more_subjects(request, limits[int(reply[1]) - 1])
    return ReserveRefused(kind=kind, scope=SubjectKind(reply[1]) if kind is Refusal.STALE else None)


def _reserved(reply: list[str]) -> Reserved:
    _, hold_nanos, output_tokens, names, *told = reply
    limit, remaining, reset, budget_remaining, tightest, tokens_limit, tokens_remaining, tokens_reset = told
    return Reserved(
        hold_nanos=int(hold_nanos),
        output_tokens=int(output_tokens),
        counters=split_counters(names),
        requests_limit=_int_or_none(limit),
        requests_remaining=_int_or_none(remaining),
        requests_reset_seconds=_int_or_none(reset),
        budget_remaining_nanos=_int_or_none(budget_remaining),
        tightest_budget_id=tightest or None,
        tokens_limit=_int_or_none(tokens_limit),
        tokens_remaining=_int_or_none(tokens_remaining),
        tokens_reset_seconds=_int_or_none(tokens_reset),
    )


def _no_room(request: Reserve, limit: AppliedLimit, spent: str, held: str, frees_at_ms: str) -> ReserveRefused:
    if limit.unit is Unit.CALLS:
        return ReserveRefused(kind=Refusal.CALLS, scope=limit.scope, limit=limit.limit)
    if limit.unit is Unit.TOKENS:
        return ReserveRefused(
            kind=Refusal.TOKENS,
            scope=limit.scope,
            limit=limit.limit,
            needed=request.hold_tokens_for(request.output_tokens_min),
            retry_after_ms=int(frees_at_ms) - request.now_ms,
        )
    return ReserveRefused(
        kind=Refusal.BUDGET,
        scope=limit.scope,
        subject=limit.subject,
        budget_id=limit.budget_id,
        limit=limit.limit,
        spent=int(spent),
        held=int(held),
        needed=request.hold_nanos_min,
        starts_at_ms=limit.starts_at_ms,
        resets_at_ms=int(frees_at_ms) if frees_at_ms else limit.resets_at_ms,
    )


def _int_or_none(text: str) -> int | None:
    return int(text) if text else None


def extend_answer(names: Sequence[str], reply: list[str]) -> Extended | ExtensionRefused | NoHold | NotReady:
    """Read what ``extend.lua`` answers; ``names`` are the counters that it was asked with."""
    if reply[0] == "EXTENDED":
        return Extended(hold_nanos=int(reply[1]))
    if reply[0] == "NO_HOLD":
        return NoHold()
    if reply[0] == "NOT_READY":
        return NotReady()
    _, position, whose, limit_nanos, spent_nanos, held_nanos, needed_nanos, room_nanos, frees_with = reply
    name = read_name(names[int(position) - 1])
    return ExtensionRefused(
        limit=CounterLimit.read(int(limit_nanos), whose),
        resets_at_ms=int(frees_with) * name.buckets.width_ms if frees_with and name.buckets else name.resets_at_ms,
        spent_nanos=int(spent_nanos),
        held_nanos=int(held_nanos),
        needed_nanos=int(needed_nanos),
        room_nanos=int(room_nanos),
    )
