"""Who calls with a tenant's key, by the records that calls are decided by."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from budgetguard.core.budget import NotReady
from budgetguard.core.context import CallContext, Contexts
from budgetguard.core.identity import authenticate, read_credentials
from budgetguard.core.reasons import Deny
from budgetguard.core.refusals import COUNTERS_NOT_READY
from budgetguard.core.snapshot import CallerRecords, KeySnapshot, TenantSnapshot
from control_plane.errors import DeniedError

# Set by the edge alone (envoy/edge.yaml), which lets no client's own pass.
NOT_UTF8_HEADER = "x-budgetguard-not-utf8"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SentHeaders:
    """A call's headers: names in lower case, the values of one that was ``repeated`` joined by commas, as Envoy does.

    Of one that is ``not_utf8`` there is no value.
    """

    values: Mapping[str, str]
    not_utf8: Collection[str] = ()
    repeated: Collection[str] = ()


def read_headers(metadata: Iterable[tuple[str, str | bytes]]) -> SentHeaders:
    """Read a call's headers from its gRPC metadata.

    gRPC reads bytes that are no UTF-8 as Latin-1, which makes a text of them that nobody meant. The edge takes such a
    header out and names it instead: of several, the first that a call would be refused for.
    """
    values: dict[str, str] = {}
    repeated = []
    for name, value in metadata:
        if not isinstance(value, str):
            continue
        if name in values:
            repeated.append(name)
        values[name] = f"{values[name]},{value}" if name in values else value
    not_utf8 = values.pop(NOT_UTF8_HEADER, None)
    return SentHeaders(values=values, not_utf8=[] if not_utf8 is None else [not_utf8], repeated=repeated)


class Callers:
    """Finds callers. Always on fresh records: nobody quotes as often as calls are made."""

    def __init__(self, snapshots: Snapshots, *, now_ms: Callable[[], int]) -> None:
        self._snapshots = snapshots
        self._now_ms = now_ms
        self._contexts = Contexts()

    async def find(self, headers: SentHeaders) -> Caller:
        """Authenticate, and read the context.

        Raises:
            DeniedError: as the call itself would be refused.
        """
        credentials = read_credentials(headers.values)
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
        context = self._contexts.read(
            headers.values, tenant=tenant, key=key, not_utf8=headers.not_utf8, repeated=headers.repeated
        )
        if isinstance(context, Deny):
            raise DeniedError(context)
        return Caller(tenant=tenant, key=key, context=context)
