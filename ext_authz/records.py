"""Tenants and API keys as this process knows them: cached, since ``reserve.lua`` tells when a record is stale."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from budgetguard.core.snapshot import KeySnapshot, TenantSnapshot

# About 1 KB a unit; the least recently used leave first.
TENANTS_WEIGHT_MAX = 100_000
KEYS_MAX = 100_000

Key = TypeVar("Key")
Record = TypeVar("Record")


class Snapshots(Protocol):
    """Where records come from; both raise ``CountersUnavailableError``."""

    async def load_tenant(self, tenant_id: str) -> TenantSnapshot | None:
        """Return a tenant, ``None`` when there is none."""

    async def load_key(self, tenant_id: str, key_id: str) -> KeySnapshot | None:
        """Return an API key, ``None`` when there is none."""


class _Recent(Generic[Key, Record]):
    """A bounded map that forgets what was not used for longest."""

    def __init__(self, weight_max: int, *, weigh: Callable[[Record], int] = lambda _: 1) -> None:
        self._weight_max = weight_max
        self._weigh = weigh
        self._weight = 0
        self._entries: OrderedDict[Key, Record] = OrderedDict()

    def get(self, key: Key) -> Record | None:
        record = self._entries.get(key)
        if record is not None:
            self._entries.move_to_end(key)
        return record

    def put(self, key: Key, record: Record) -> None:
        self.drop(key)
        self._entries[key] = record
        self._weight += self._weigh(record)
        while self._weight > self._weight_max:
            self.drop(next(iter(self._entries)))

    def drop(self, key: Key) -> None:
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self._weight -= self._weigh(dropped)


def weight_of(tenant: TenantSnapshot) -> int:
    """Say how heavy a record is, in about 1 KB: a budget takes half of one, a tag with its index a third."""
    return 1 + len(tenant.budgets) // 2 + (len(tenant.tags) + len(tenant.closed_sessions)) // 3


class Records:
    """Cached records. That nothing is known is never cached: a new key works at once."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._tenants: _Recent[str, TenantSnapshot] = _Recent(TENANTS_WEIGHT_MAX, weigh=weight_of)
        self._keys: _Recent[tuple[str, str], KeySnapshot] = _Recent(KEYS_MAX)

    async def tenant(self, tenant_id: str, *, fresh: bool) -> TenantSnapshot | None:
        """Return a tenant; ``fresh`` asks Redis whatever is cached."""
        cached = None if fresh else self._tenants.get(tenant_id)
        if cached is not None:
            return cached
        loaded = await self._snapshots.load_tenant(tenant_id)
        if loaded is None:
            self._tenants.drop(tenant_id)
        else:
            self._tenants.put(tenant_id, loaded)
        return loaded

    async def key(self, *, tenant_id: str, key_id: str, fresh: bool) -> KeySnapshot | None:
        """Return an API key; ``fresh`` asks Redis whatever is cached."""
        cached = None if fresh else self._keys.get((tenant_id, key_id))
        if cached is not None:
            return cached
        loaded = await self._snapshots.load_key(tenant_id, key_id)
        if loaded is None:
            self._keys.drop((tenant_id, key_id))
        else:
            self._keys.put((tenant_id, key_id), loaded)
        return loaded
