"""Who calls with a tenant's key, by the records that calls are decided by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from budgetguard.core.budget import NotReady
from budgetguard.core.context import CallContext, Contexts
from budgetguard.core.identity import authenticate, read_credentials
from budgetguard.core.reasons import Deny
from budgetguard.core.refusals import COUNTERS_NOT_READY
from budgetguard.core.snapshot import CallerRecords, KeySnapshot, TenantSnapshot
from control_plane.errors import DeniedError


class Snapshots(Protocol):
    """Where records come from; raises ``CountersUnavailableError``."""

    async def load_records(self, tenant_id: str, key_id: str) -> CallerRecords | NotReady:
        """Return an API key and its tenant as they are for sure, ``NotReady`` while that cannot be known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A tenant's key that is good now, and what its headers say of the call."""

    tenant: TenantSnapshot
    key: KeySnapshot
    context: CallContext


class Callers:
    """Finds callers. Always on fresh records: nobody quotes as often as calls are made."""

    def __init__(self, snapshots: Snapshots, *, now_ms: Callable[[], int]) -> None:
        self._snapshots = snapshots
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
        found = await self._snapshots.load_records(credentials.key.tenant_id, credentials.key.key_id)
        if isinstance(found, NotReady):
            raise DeniedError(COUNTERS_NOT_READY)
        tenant, key = found.tenant, found.key
        deny = authenticate(credentials, tenant=tenant, key=key, now_ms=self._now_ms())
        if deny is not None:
            raise DeniedError(deny)
        if tenant is None or key is None:
            raise AssertionError("authenticate admits known ones only")
        context = self._contexts.read(headers, tenant=tenant, key=key)
        if isinstance(context, Deny):
            raise DeniedError(context)
        return Caller(tenant=tenant, key=key, context=context)
