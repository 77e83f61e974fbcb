"""Tenants and API keys as this process knows them: cached, since ``reserve.lua`` tells when a record is stale."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from budgetguard.core.budget import NotReady
from budgetguard.core.snapshot import CallerRecords, KeySnapshot, TenantSnapshot

# About 1 KB a unit; the least recently used leave first.
TENANTS_WEIGHT_MAX = 100_000
KEYS_MAX = 100_000

Key = TypeVar("Key")
Record = TypeVar("Record")


class Snapshots(Protocol):
    """Where records come from; all raise ``CountersUnavailableError``."""

    async def load_tenant(self, tenant_id: str) -> TenantSnapshot | None:
        """Return a tenant, ``None`` when there is none here."""

    async def load_key(self, tenant_id: str, key_id: str) -> KeySnapshot | None:
        """Return an API key, ``None`` when there is none here."""

    async def load_records(self, tenant_id: str, key_id: str) -> CallerRecords | NotReady:
        """Return both as they are for sure, ``NotReady`` while that cannot be known."""


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

    async def find(self, *, tenant_id: str, key_id: str) -> CallerRecords:
        """Return what is cached, else what Redis has now: enough to admit a call by, not to refuse one."""
        key, tenant = self._keys.get((tenant_id, key_id)), self._tenants.get(tenant_id)
        if key is not None and tenant is not None:
            return CallerRecords(tenant=tenant, key=key)
        key = key or await self._snapshots.load_key(tenant_id, key_id)
        # Only for a known key: otherwise made-up tenants would each cost another trip.
        if key is not None and tenant is None:
            tenant = await self._snapshots.load_tenant(tenant_id)
        found = CallerRecords(tenant=tenant if key else None, key=key)
        self._keep(found, tenant_id=tenant_id, key_id=key_id)
        return found

    async def find_for_sure(self, *, tenant_id: str, key_id: str) -> CallerRecords | NotReady:
        """Ask Redis whatever is cached; ``NotReady`` while it may have lost records, or have old ones."""
        found = await self._snapshots.load_records(tenant_id, key_id)
        if not isinstance(found, NotReady):
            self._keep(found, tenant_id=tenant_id, key_id=key_id)
        return found

    def _keep(self, found: CallerRecords, *, tenant_id: str, key_id: str) -> None:
        if found.key is None:
            # Of such a key's tenant nothing was asked.
            self._keys.drop((tenant_id, key_id))
            return
        self._keys.put((tenant_id, key_id), found.key)
        if found.tenant is None:
            self._tenants.drop(tenant_id)
        else:
            self._tenants.put(tenant_id, found.tenant)
