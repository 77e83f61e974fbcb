"""Who calls with a tenant's key, by the records that calls are decided by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from budgetguard.core.context import CallContext, Contexts
from budgetguard.core.identity import Credentials, authenticate, read_credentials
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.snapshot import KeySnapshot, TenantSnapshot
from control_plane.errors import DeniedError


class Snapshots(Protocol):
    """Where records come from; both raise ``CountersUnavailableError``."""

    async def load_tenant(self, tenant_id: str) -> TenantSnapshot | None:
        """Return a tenant, ``None`` when there is none."""

    async def load_key(self, tenant_id: str, key_id: str) -> KeySnapshot | None:
        """Return an API key, ``None`` when there is none."""


class Readiness(Protocol):
    """Whether records are what they should be; raises ``CountersUnavailableError``."""

    async def generation(self, tenant_id: str) -> str:
        """Name the data that a tenant's records are part of; empty while they are not signed off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A tenant's key that is good now, and what its headers say of the call."""

    tenant: TenantSnapshot
    key: KeySnapshot
    context: CallContext


class Callers:
    """Finds callers. Always on fresh records: nobody quotes as often as calls are made."""

    def __init__(self, snapshots: Snapshots, *, readiness: Readiness, now_ms: Callable[[], int]) -> None:
        self._snapshots = snapshots
        self._readiness = readiness
        self._now_ms = now_ms
        self._contexts = Contexts()

    async def find(self, headers: Mapping[str, str]) -> Caller:
        """Authenticate, and read the context; header names are in lower case.

        Raises:
            DeniedError: as the call itself would be refused.
        """
        credentials = read_credentials(headers)
        if isinstance(credentials, Deny):
            raise DeniedError(credentials)
        tenant, key = await self._records(credentials)
        if tenant is None or key is None:
            tenant, key = await self._records_for_sure(credentials)
        deny = authenticate(credentials, tenant=tenant, key=key, now_ms=self._now_ms())
        if deny is not None:
            raise DeniedError(deny)
        if tenant is None or key is None:
            raise AssertionError("authenticate admits known ones only")
        context = self._contexts.read(headers, tenant=tenant, key=key)
        if isinstance(context, Deny):
            raise DeniedError(context)
        return Caller(tenant=tenant, key=key, context=context)

    async def _records(self, credentials: Credentials) -> tuple[TenantSnapshot | None, KeySnapshot | None]:
        presented = credentials.key
        key = await self._snapshots.load_key(presented.tenant_id, presented.key_id)
        return await self._snapshots.load_tenant(presented.tenant_id) if key else None, key

    async def _records_for_sure(self, credentials: Credentials) -> tuple[TenantSnapshot | None, KeySnapshot | None]:
        """Read again what was not there: a Redis that has lost its data knows no key, which makes none unknown.

        All records are there before a shard is signed off; and they were not lost meanwhile if its data are the same.

        Raises:
            DeniedError: the counters are not ready.
        """
        tenant_id = credentials.key.tenant_id
        before = await self._readiness.generation(tenant_id)
        records = await self._records(credentials)
        if not before or before != await self._readiness.generation(tenant_id):
            raise DeniedError(Deny(Reason.COUNTERS_NOT_READY))
        return records
