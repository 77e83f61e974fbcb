"""A usage event: one change of what an operation has cost, on its way from Redis to the ledger."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from budgetguard.core.operation import RANK, End, OperationFacts
from budgetguard.core.usage import Usage

# An event's free text, e.g. an upstream's error code: enough to explain, too little to fill Redis.
DETAIL_CHARS_MAX = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEvent:
    """One immutable row to be.

    ``delta_nanos`` (signed) is what this event adds to spent, ``amount_nanos`` the operation's cost after it.
    ``sequence`` counts an operation's events from 1. ``usage`` is ``None`` where nobody reported any. ``counters`` are
    the names of the counters that moved. ``status`` is the HTTP status told to the client, 0 when there was none.

    ``forgotten``: Redis no longer knew the operation when it ended, so ``delta_nanos`` assumes that nothing was charged
    before. Who writes the ledger knows better: there the delta is ``amount_nanos`` less the operation's rows so far,
    and nothing at all when a row of the same or a higher rank exists.
    """

    facts: OperationFacts
    end: End
    sequence: int
    delta_nanos: int
    amount_nanos: int
    hold_nanos: int
    usage: Usage | None
    ended_at_ms: int
    status: int
    detail: str
    rate_tier: str
    counters: tuple[str, ...]
    forgotten: bool = False

    @property
    def event_id(self) -> str:
        """An id that a replay cannot change."""
        return f"{self.facts.operation_id}:{self.sequence}"

    @property
    def rank(self) -> int:
        """The rank of its end."""
        return RANK[self.end]

    def to_fields(self) -> dict[str, str]:
        """Encode as the fields of a stream entry, as the scripts write them."""
        return {
            "facts": facts_to_json(self.facts),
            "end": self.end.value,
            "sequence": str(self.sequence),
            "delta": str(self.delta_nanos),
            "amount": str(self.amount_nanos),
            "hold": str(self.hold_nanos),
            "usage": usage_to_json(self.usage),
            "ended_at": str(self.ended_at_ms),
            "status": str(self.status),
            "detail": self.detail,
            "tier": self.rate_tier,
            "counters": join_counters(self.counters),
            "forgotten": "1" if self.forgotten else "0",
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> "UsageEvent":
        """Decode a stream entry.

        Raises:
            ValueError: a field is missing or malformed.
        """
        try:
            return cls(
                facts=facts_from_json(fields["facts"]),
                end=End(fields["end"]),
                sequence=int(fields["sequence"]),
                delta_nanos=int(fields["delta"]),
                amount_nanos=int(fields["amount"]),
                hold_nanos=int(fields["hold"]),
                usage=usage_from_json(fields["usage"]),
                ended_at_ms=int(fields["ended_at"]),
                status=int(fields["status"]),
                detail=fields["detail"],
                rate_tier=fields["tier"],
                counters=split_counters(fields["counters"]),
                forgotten=fields["forgotten"] == "1",
            )
        except (KeyError, TypeError, ValueError) as error:
            msg = "malformed usage event"
            raise ValueError(msg) from error


@dataclass(frozen=True, slots=True)
class MalformedEvent:
    """A stream entry that cannot be read as an event, as it is: for a person to judge, so that it blocks nobody."""

    fields: Mapping[str, str]


def facts_to_json(facts: OperationFacts) -> str:
    """Encode the facts of an operation; the same facts always give the same text."""
    return orjson.dumps(facts).decode()


def facts_from_json(text: str) -> OperationFacts:
    """Decode what ``facts_to_json`` wrote.

    Raises:
        ValueError: not JSON.
        TypeError: not the facts of an operation.
    """
    raw = orjson.loads(text)
    return OperationFacts(**{**raw, "tags": tuple(raw.get("tags", ()))})


def usage_to_json(usage: Usage | None) -> str:
    """Encode what was reported; empty when nothing was."""
    return "" if usage is None else orjson.dumps(usage.reported()).decode()


def usage_from_json(text: str) -> Usage | None:
    """Decode what ``usage_to_json`` wrote.

    Raises:
        ValueError: not usage.
    """
    return Usage.from_reported(orjson.loads(text)) if text else None


def join_counters(counters: Sequence[str]) -> str:
    """Spell counter names as one text, as holds and events keep them."""
    return "\n".join(counters)


def split_counters(text: str) -> tuple[str, ...]:
    """Undo ``join_counters``."""
    return tuple(text.split("\n")) if text else ()


def entry_order(entry_id: str) -> tuple[int, int]:
    """Split a stream entry's id into (ms, sequence), which compare as the stream orders.

    Raises:
        ValueError: not an entry id.
    """
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence)
