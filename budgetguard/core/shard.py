"""One shard's state and its transitions: the reference that the Lua scripts are held against.

The programs run the scripts. This is the same thing as plain Python, small enough to be read and argued about; tests
drive both with the same events and compare every answer and the whole state. Admission is in ``core/reserving.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from budgetguard.core.budget import (
    FORGOTTEN_CHARGED_MS,
    LEASE_EXPIRED,
    NotReady,
    RememberedEnd,
    Reserved,
    Settled,
    Settlement,
    outranks,
)
from budgetguard.core.counter import CounterName, Unit, read_name
from budgetguard.core.counting import Counter, as_of, frees_at_ms, has_left, move, rewritten
from budgetguard.core.events import UsageEvent
from budgetguard.core.extension import CounterLimit, Extended, Extension, ExtensionRefused, NoHold
from budgetguard.core.money import CALL_NANOS_MAX, COUNTER_NANOS_MAX
from budgetguard.core.operation import LEASE_MS, End, OperationFacts
from budgetguard.core.pricing import DEFAULT_TIER
from budgetguard.core.rate_limit import Minute
from budgetguard.core.usage import Usage


@dataclass(slots=True, kw_only=True)
class Operation:
    """A hold while ``end`` is ``None``, then the marker of its end.

    ``counters`` are the names of the counters that it is counted in. ``facts``, ``asked`` and ``told`` (the question
    and the answer of its reserve) are kept by a hold only, and so are ``limits``: what each of its counters may reach.
    ``tokens`` are held while it is a hold, and used after.
    ``forgotten``: it ended when nothing was known of it.
    """

    hold_nanos: int
    counters: tuple[str, ...]
    tokens: int = 0
    facts: OperationFacts | None = None
    asked: str = ""
    told: Reserved | None = None
    limits: tuple[CounterLimit, ...] = ()
    end: End | None = None
    amount_nanos: int = 0
    sequence: int = 0
    forgotten: bool = False


@dataclass(slots=True)
class Shard:
    """Everything that Redis keeps for the tenants of one shard; keys are tuples of ids.

    ``epoch`` is the process that the shard is open for, or the name of the opening that it is in.
    ``subjects`` has, by template and window, when each subject was last seen, in Unix milliseconds.
    """

    epoch: str | None = None
    records: dict[tuple[str, ...], int] = field(default_factory=dict)
    counters: dict[tuple[str, str], Counter] = field(default_factory=dict)
    operations: dict[tuple[str, str], Operation] = field(default_factory=dict)
    leases: dict[tuple[str, str], int] = field(default_factory=dict)
    requests: dict[tuple[str, ...], Minute] = field(default_factory=dict)
    subjects: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    events: list[UsageEvent] = field(default_factory=list)


def publish(shard: Shard, record: tuple[str, ...], version: int) -> bool:
    """Store the version of a tenant, ``(tenant id,)``, or of a key, ``(tenant id, key id)``, if it is newer."""
    if shard.records.get(record, -1) >= version:
        return False
    shard.records[record] = version
    return True


def load_records(shard: Shard, *, tenant_id: str, key_id: str, run_id: str) -> tuple[int | None, int | None] | NotReady:
    """Return the versions of a tenant and of its key, ``None`` for none; the tenant's for a known key only."""
    if shard.epoch != run_id:
        return NotReady()
    key = shard.records.get((tenant_id, key_id))
    return None if key is None else shard.records.get((tenant_id,)), key


def renew(shard: Shard, *, tenant_id: str, operation_id: str, now_ms: int) -> bool:
    """Lengthen a hold's lease; ``False`` when the operation is not held."""
    operation = shard.operations.get((tenant_id, operation_id))
    if operation is None or operation.end is not None:
        return False
    lease_key = (tenant_id, operation_id)
    shard.leases[lease_key] = max(shard.leases[lease_key], now_ms + LEASE_MS)
    return True


def extend(shard: Shard, extension: Extension, *, run_id: str) -> Extended | ExtensionRefused | NoHold | NotReady:
    """Raise a hold in all of its counters, or say why not. A hold that is as large already stays as it is."""
    if shard.epoch != run_id:
        return NotReady()
    operation = shard.operations.get((extension.tenant_id, extension.operation_id))
    if operation is None or operation.end is not None:
        return NoHold()
    more_nanos = extension.hold_nanos - operation.hold_nanos
    if more_nanos <= 0:
        return Extended(hold_nanos=operation.hold_nanos)
    names = [read_name(counter) for counter in operation.counters]
    used = [as_of(shard.counters.get((extension.tenant_id, name.key), Counter()), name) for name in names]
    # Forced, it is held whatever the limits say; only the counter itself has an end.
    limits = [COUNTER_NANOS_MAX if extension.force else limit.limit_nanos for limit in operation.limits]
    # A limit of tokens paces what is admitted: it ends no stream.
    lefts = {
        index: counter.left_of(limit)
        for index, (limit, counter, name) in enumerate(zip(limits, used, names, strict=True))
        if name.unit is Unit.NANOS and not has_left(counter, name)
    }
    for index, left in lefts.items():
        if more_nanos > left:
            frees_at = frees_at_ms(used[index], names[index], limit=limits[index], needed=more_nanos)
            return ExtensionRefused(
                limit=replace(operation.limits[index], limit_nanos=limits[index]),
                resets_at_ms=frees_at or names[index].resets_at_ms,
                spent_nanos=used[index].spent,
                held_nanos=used[index].held + used[index].seed,
                needed_nanos=more_nanos,
                room_nanos=max(min(*lefts.values(), CALL_NANOS_MAX), -1),
            )

    # Writes.
    more_tokens = max(extension.hold_tokens - operation.tokens, 0)
    grows = {Unit.NANOS: more_nanos, Unit.TOKENS: more_tokens, Unit.CALLS: 0}
    for name, counter in zip(names, used, strict=True):
        if grows[name.unit] and not has_left(counter, name):
            move(counter, name, spent=0, held=grows[name.unit])
            shard.counters[(extension.tenant_id, name.key)] = counter
    operation.hold_nanos, operation.tokens = extension.hold_nanos, operation.tokens + more_tokens
    return Extended(hold_nanos=extension.hold_nanos)


def settle(shard: Shard, settlement: Settlement, *, now_ms: int, run_id: str) -> Settled | NotReady:
    """End an operation by rank. One that is not known is charged from the handoff, unless it is too old for that."""
    if shard.epoch != run_id:
        return NotReady()
    handoff = settlement.handoff
    operation_key = (handoff.facts.tenant_id, handoff.facts.operation_id)
    operation = shard.operations.get(operation_key)
    if operation is None:
        charged = now_ms - handoff.facts.held_at_ms < FORGOTTEN_CHARGED_MS
        operation = Operation(
            hold_nanos=handoff.hold_nanos,
            counters=handoff.counters if charged else (),
            sequence=settlement.replaces,
            forgotten=True,
        )
        tokens, held = handoff.tokens_bound, False
    elif operation.end is None:
        operation = replace(operation, sequence=settlement.replaces)
        tokens, held = operation.tokens, True
    elif _replaces(settlement, operation, operation.end):
        tokens, held = operation.tokens, False
    else:
        return Settled(end=operation.end, amount_nanos=operation.amount_nanos, sequence=operation.sequence)
    ending = _Ending(
        facts=operation.facts or handoff.facts,
        end=settlement.end,
        amount_nanos=settlement.amount_nanos,
        tokens=tokens if settlement.tokens is None else settlement.tokens,
        ended_at_ms=settlement.ended_at_ms,
        usage=settlement.usage,
        status=settlement.status,
        detail=settlement.detail,
        rate_tier=settlement.rate_tier,
    )
    return _end(shard, operation_key, operation, ending, held=held)


def _replaces(settlement: Settlement, operation: Operation, standing: End) -> bool:
    # A correction that was decided upon a row replaces that one and no other: it may have become better known since.
    return settlement.replaces == operation.sequence if settlement.replaces else outranks(settlement.end, standing)


def expire(shard: Shard, *, tenant_id: str, operation_id: str, now_ms: int, run_id: str) -> bool:
    """End a hold whose lease has run out, at its full amount; ``False`` when it is not due."""
    operation_key = (tenant_id, operation_id)
    operation = shard.operations.get(operation_key)
    if operation is None or operation.facts is None:
        return False  # not held
    if shard.epoch != run_id or shard.leases[operation_key] > now_ms:
        return False
    ending = _Ending(
        facts=operation.facts,
        end=End.EXPIRED,
        amount_nanos=operation.hold_nanos,
        tokens=operation.tokens,
        ended_at_ms=now_ms,
        detail=LEASE_EXPIRED,
    )
    _end(shard, operation_key, operation, ending, held=True)
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    facts: OperationFacts
    end: End
    amount_nanos: int
    tokens: int
    ended_at_ms: int
    usage: Usage | None = None
    status: int = 0
    detail: str = ""
    rate_tier: str = DEFAULT_TIER


def _end(shard: Shard, operation_key: tuple[str, str], operation: Operation, ending: _Ending, *, held: bool) -> Settled:
    delta_nanos = ending.amount_nanos - operation.amount_nanos
    # Of a hold, ``tokens`` are what is held; of an end, what it was charged.
    charged = operation.tokens if operation.end is not None else 0
    _free(shard, operation_key[0], operation, held=held, nanos=delta_nanos, tokens=ending.tokens - charged)
    sequence = operation.sequence + 1
    shard.operations[operation_key] = Operation(
        hold_nanos=operation.hold_nanos,
        counters=operation.counters,
        tokens=ending.tokens,
        end=ending.end,
        amount_nanos=ending.amount_nanos,
        sequence=sequence,
        forgotten=operation.forgotten,
    )
    shard.leases.pop(operation_key, None)
    shard.events.append(
        UsageEvent(
            facts=ending.facts,
            end=ending.end,
            sequence=sequence,
            delta_nanos=delta_nanos,
            amount_nanos=ending.amount_nanos,
            hold_nanos=operation.hold_nanos,
            usage=ending.usage,
            ended_at_ms=ending.ended_at_ms,
            status=ending.status,
            detail=ending.detail,
            rate_tier=ending.rate_tier,
            counters=operation.counters,
            forgotten=operation.forgotten,
        )
    )
    return Settled(end=ending.end, amount_nanos=ending.amount_nanos, sequence=sequence)


def _free(shard: Shard, tenant_id: str, operation: Operation, *, held: bool, nanos: int, tokens: int) -> None:
    """Move an operation's money in its counters: what it held, if it did, is free, and this much more is spent."""
    holds = {Unit.NANOS: operation.hold_nanos, Unit.TOKENS: operation.tokens, Unit.CALLS: 1}
    spends = {Unit.NANOS: nanos, Unit.TOKENS: tokens, Unit.CALLS: 0}
    for name in map(read_name, operation.counters):
        freed, spent = holds[name.unit] if held else 0, spends[name.unit]
        if not freed and not spent:
            continue
        counter = as_of(shard.counters.get((tenant_id, name.key), Counter()), name)
        if not has_left(counter, name):
            move(counter, name, spent=spent, held=-freed)
            shard.counters[(tenant_id, name.key)] = counter


class SignOff(Enum):
    """What became of opening a shard: ``BEHIND`` is to be rebuilt, ``LOST`` to be begun again."""

    OPENED = "OPENED"
    BEHIND = "BEHIND"
    LOST = "LOST"


def sign_off(
    shard: Shard,
    *,
    opening: str,
    began_with: str,
    run_id: str,
    newest_event: tuple[int, int],
    position: tuple[int, int],
    rebuilt: bool,
) -> SignOff:
    """Open a shard whose stream has come as far as the ledger, or whose counters were rebuilt from there.

    ``began_with`` is the process that the opening began with, ``run_id`` the one that is asked.
    """
    if shard.epoch != opening or began_with != run_id:
        return SignOff.LOST
    if newest_event < position and not rebuilt:
        return SignOff.BEHIND
    shard.epoch = run_id
    return SignOff.OPENED


def write_counter(shard: Shard, *, tenant_id: str, counter: str, spent: int | Mapping[int, int], opening: str) -> bool:
    """Set what a counter has spent, for a rebuild, by bucket if it rolls; ``False`` when it is not in this opening."""
    if shard.epoch != opening:
        return False
    name = read_name(counter)
    standing = as_of(shard.counters.get((tenant_id, name.key), Counter()), name)
    shard.counters[(tenant_id, name.key)] = rewritten(standing, name, spent)
    return True


def correct_counter(
    shard: Shard, *, tenant_id: str, counter: str, deltas: int | Mapping[int, int], seed: int, run_id: str
) -> bool:
    """Add what the ledger has and a counter has not, and say what older calls hold; ``False`` when it is not ready."""
    if shard.epoch != run_id:
        return False
    name = read_name(counter)
    standing = as_of(shard.counters.get((tenant_id, name.key), Counter()), name)
    standing.seed = seed
    for place, delta in [(name, deltas)] if isinstance(deltas, int) else _at_buckets(name, deltas):
        if delta and not has_left(standing, place):
            move(standing, place, spent=delta, held=0)
            standing.first = None if place.bucket is None else min(standing.first or place.bucket, place.bucket)
    shard.counters[(tenant_id, name.key)] = standing
    return True


def _at_buckets(name: CounterName, deltas: Mapping[int, int]) -> list[tuple[CounterName, int]]:
    return [(replace(name, bucket=bucket), delta) for bucket, delta in deltas.items()]


def remember_ended(shard: Shard, remembered: RememberedEnd, *, opening: str) -> bool:
    """Write the marker of an end that the ledger has, for a rebuild; ``False`` when the shard is not in this opening.

    A hold of that operation, which a rolled-back Redis has revived, is dropped.
    """
    if shard.epoch != opening:
        return False
    operation_key = (remembered.tenant_id, remembered.operation_id)
    operation = shard.operations.get(operation_key)
    is_held = operation is not None and operation.end is None
    if operation is not None and is_held:
        _free(shard, remembered.tenant_id, operation, held=True, nanos=0, tokens=0)
    shard.operations[operation_key] = Operation(
        hold_nanos=remembered.hold_nanos,
        counters=operation.counters if operation is not None and is_held else remembered.counters,
        tokens=remembered.tokens,
        end=remembered.end,
        amount_nanos=remembered.amount_nanos,
        sequence=remembered.sequence,
    )
    shard.leases.pop(operation_key, None)
    return True
