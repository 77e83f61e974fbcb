"""Dead events: usage that was read from a stream and is in no ledger row, until an administrator ends it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import orjson

from budgetguard.core.api_key import TENANT_ID_PATTERN

# "17-1750000000000-0": the shard, then the id of its stream's entry.
_ID = re.compile(r"(\d{1,3})-(\d{1,20}-\d{1,20})", re.ASCII)


class DeadEventState(StrEnum):
    """How a dead event stands."""

    STANDING = "STANDING"
    RETRIED = "RETRIED"
    DISCARDED = "DISCARDED"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedDeadEvent:
    """A dead event, as it was put aside. ``fields`` are the stream entry's own.

    An empty ``tenant_id``: it does not tell, so it may be of any tenant of the shard. ``reason`` is why it was
    discarded. ``resolved_at_ms`` is ``None`` while it stands.
    """

    shard: int
    event_id: str
    tenant_id: str
    error: str
    fields: Mapping[str, str]
    recorded_at_ms: int
    state: DeadEventState
    reason: str
    resolved_at_ms: int | None

    @property
    def dead_event_id(self) -> str:
        """What administrators call it."""
        return f"{self.shard}-{self.event_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadEventFilter:
    """Which dead events; an empty field does not restrict."""

    tenant_id: str = ""
    shard: int | None = None
    state: DeadEventState | None = None


def split_dead_event_id(dead_event_id: str) -> tuple[int, str]:
    """Split into (shard, id of the stream's entry).

    Raises:
        ValueError: not an id of a dead event.
    """
    found = _ID.fullmatch(dead_event_id)
    if found is None:
        raise ValueError(dead_event_id)
    return int(found[1]), found[2]


def tenant_told(fields: Mapping[str, str]) -> str:
    """Return whose usage an entry says it is, also where the rest of it cannot be read; empty: it does not tell."""
    told = _fact(fields, "tenant_id")
    return told if TENANT_ID_PATTERN.fullmatch(told) else ""


def operation_told(fields: Mapping[str, str]) -> str:
    """Return which operation an entry says it is of, read as ``tenant_told`` reads; empty: none that can have rows."""
    told = _fact(fields, "operation_id")
    return "" if "\x00" in told else told


def _fact(fields: Mapping[str, str], name: str) -> str:
    try:
        facts = orjson.loads(fields.get("facts", ""))
    except ValueError:
        return ""
    told = facts.get(name) if isinstance(facts, dict) else None
    return told if isinstance(told, str) else ""
