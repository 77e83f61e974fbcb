"""Usage events, spelled shortly for tests."""

from datetime import UTC, datetime
from itertools import count

from budgetguard.core.events import UsageEvent
from budgetguard.core.operation import End, OperationFacts

_numbers = count(1)


def milliseconds(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


NOW_MS = int(datetime.now(UTC).timestamp() * 1000)


def an_event(operation_id: str = "op-1", **changes) -> UsageEvent:
    facts = {
        "operation_id": operation_id,
        "tenant_id": "acme",
        "key_id": "k" * 16,
        "held_at_ms": NOW_MS,
        "api": "openai.chat",
        "provider_id": "openai",
        "model": "gpt-4o-mini",
        "price_version": "test",
        "stream": False,
        "tags": (),
        "session_id": "",
        "end_user": "",
        "session_name": "",
        "session_path": "",
        "priced_model": "",
    }
    facts |= {name: changes.pop(name) for name in list(changes) if name in facts}
    fields = {
        "end": End.CONFIRMED,
        "sequence": 1,
        "delta_nanos": 100,
        "hold_nanos": 500,
        "usage": None,
        "ended_at_ms": facts["held_at_ms"] + 1000,
        "status": 200,
        "detail": "",
        "rate_tier": "default",
        "counters": (),
        **changes,
    }
    fields.setdefault("amount_nanos", fields["delta_nanos"])
    return UsageEvent(facts=OperationFacts(**facts), **fields)


def a_delivery(operation_id: str = "op-1", *, shard: int = 7, event_id: str | None = None, **changes):
    return (shard, event_id or f"{next(_numbers)}-0", an_event(operation_id, **changes))
