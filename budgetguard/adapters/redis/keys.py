"""Every Redis key, spelled once. All keys of a tenant share one hash tag, so that a script finds them on one node."""

import re
from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from urllib.parse import quote, unquote

from budgetguard.core.counter import read_name

SHARDS = 256
# Who reads the usage streams.
LEDGER_GROUP = "ledger"
_PLAIN = re.compile(r"[A-Za-z0-9._~-]*")


def shard_of(tenant_id: str) -> int:
    """Return the tenant's shard, 0 to 255; it never changes."""
    return sha256(tenant_id.encode()).digest()[0]


def epoch(shard: int) -> str:
    """String: the run id of the Redis process that the control plane has signed off, or the name of an opening."""
    return f"bg:{{{shard:02x}}}:epoch"


def generation(shard: int) -> str:
    """String: another one with each sign-off, so that what was read before a rebuild is not written after it."""
    return f"bg:{{{shard:02x}}}:generation"


def usage(shard: int) -> str:
    """Stream: usage events on their way to the ledger."""
    return f"bg:{{{shard:02x}}}:usage"


def leases(shard: int) -> str:
    """Sorted set: ``lease_member`` by the millisecond at which the hold's lease runs out."""
    return f"bg:{{{shard:02x}}}:leases"


def tenant(tenant_id: str) -> str:
    """Hash: the tenant's snapshot and its version."""
    return _of(tenant_id, "tenant")


def api_key(tenant_id: str, key_id: str) -> str:
    """Hash: an API key's snapshot and its version."""
    return _of(tenant_id, "key", key_id)


@lru_cache(maxsize=16_384)  # the same few budgets and windows with every call
def counter(tenant_id: str, name: str) -> str:
    """Hash: what was spent and is held in the counter of this name (``core/counter.py``), whatever its bucket."""
    return _of(tenant_id, "counter", read_name(name).key)


def subjects(tenant_id: str, template: str) -> str:
    """Sorted set: the subjects that a template has counters of, by the millisecond at which each was last seen."""
    return _of(tenant_id, "subjects", template)


def counters(tenant_id: str, names: Iterable[str]) -> list[str]:
    """Return the key of each counter."""
    return [counter(tenant_id, name) for name in names]


def operation(tenant_id: str, operation_id: str) -> str:
    """String, JSON: a hold, and after its end the marker of it."""
    return _of(tenant_id, "operation", operation_id)


def tenant_requests(tenant_id: str) -> str:
    """Hash: the tenant's requests of the last minute, by second."""
    return _of(tenant_id, "requests")


def key_requests(tenant_id: str, key_id: str) -> str:
    """Hash: an API key's requests of the last minute, by second."""
    return _of(tenant_id, "key-requests", key_id)


def refusals(shard: int) -> str:
    """Stream: refused attempts on their way to Postgres."""
    return f"bg:{{{shard:02x}}}:refusals"


def refusal_counts(shard: int) -> str:
    """Hash: counts of refused attempts on their way to Postgres, by ``refusal_count``."""
    return f"bg:{{{shard:02x}}}:refusal-counts"


def refusal_numbers(tenant_id: str, minute_ms: int) -> str:
    """Hash: how many attempts of the tenant's minute have become rows, by ``refusal_group``."""
    return _of(tenant_id, "refusal-numbers", str(minute_ms))


def refusal_group(key_id: str, reason: str) -> str:
    """Name a key's refusals of one reason within a tenant's minute."""
    return f"{_escape(key_id)}:{_escape(reason)}"


def refusal_count(*parts: str) -> str:
    """Name a count within its shard, by what identifies it."""
    return ":".join(map(_escape, parts))


def split_refusal_count(name: str) -> list[str]:
    """Undo ``refusal_count``."""
    return [unquote(part) for part in name.split(":")]


def catalog() -> str:
    """Hash: the catalog of providers and prices and its version; a key that belongs to no tenant."""
    return "bg:catalog"


def incarnation() -> str:
    """String: another one whenever Redis has lost its data, so that who remembers the last settlements sends them."""
    return "bg:incarnation"


def lease_member(tenant_id: str, operation_id: str) -> str:
    """Name a hold within its shard."""
    return f"{_escape(tenant_id)}:{_escape(operation_id)}"


def split_lease_member(member: str) -> tuple[str, str]:
    """Undo ``lease_member``."""
    tenant_id, _, operation_id = member.partition(":")
    return unquote(tenant_id), unquote(operation_id)


@lru_cache(maxsize=4096)
def _prefix(tenant_id: str, kind: str) -> str:
    return f"bg:{{{shard_of(tenant_id):02x}}}:{kind}:{_escape(tenant_id)}"


def _of(tenant_id: str, kind: str, *parts: str) -> str:
    escaped = "".join(f":{_escape(part)}" for part in parts)
    return _prefix(tenant_id, kind) + escaped


def _escape(part: str) -> str:
    # Leaves letters, digits and -._~ as they are; a colon or a brace in an id cannot reach another key.
    return part if _PLAIN.fullmatch(part) else quote(part, safe="")
