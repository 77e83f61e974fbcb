"""TenantService and RateLimitService."""

from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty

from budgetguard.core.api_key import TENANT_ID_PATTERN, tenant_id_from_name
from budgetguard.core.entities import Page, Tenant, TenantChanges
from budgetguard.core.errors import InvalidError
from budgetguard.v1 import rate_limit_pb2, rate_limit_pb2_grpc, tenant_pb2, tenant_pb2_grpc
from control_plane.fields import etag_version, named_fields
from control_plane.messages import TENANT_STATUSES_BACK, rate_limit_message, tenant_message
from control_plane.services import ACTOR

OUTPUT_TOKENS_MAX_DEFAULT = 4096
UNBOUNDED_SHARE_DEFAULT = 8
STREAM_SLICE_TOKENS_DEFAULT = 4096


class Tenants(Protocol):
    """Where tenants are kept; see ``TenantRepository`` for what each may raise."""

    async def create(
        self,
        *,
        actor: str,
        tenant_id: str,
        name: str,
        request_id: str = "",
        requests_per_minute: int = 0,
        output_tokens_max: int = OUTPUT_TOKENS_MAX_DEFAULT,
        clamp: bool = True,
        tokens_per_minute: int = 0,
        concurrent_calls: int = 0,
        unbounded_share: int = UNBOUNDED_SHARE_DEFAULT,
        stream_slice_tokens: int = STREAM_SLICE_TOKENS_DEFAULT,
        overrun: bool = False,
    ) -> Tenant: ...
    async def get(self, tenant_id: str) -> Tenant: ...
    async def list(self, *, page_size: int = 0, page_token: str = "") -> Page[Tenant]: ...
    async def update(
        self, tenant_id: str, changes: TenantChanges, *, actor: str, expected_version: int | None = None
    ) -> Tenant: ...
    async def delete(self, tenant_id: str, *, actor: str, expected_version: int | None = None) -> Tenant: ...


class TenantPublisher(Protocol):
    """Tells the data plane of a tenant; raises ``NotPublishedError``."""

    async def tenant(self, tenant_id: str) -> None: ...


class TenantService(tenant_pb2_grpc.TenantServiceServicer):
    """Tenants."""

    def __init__(self, *, tenants: Tenants, publisher: TenantPublisher) -> None:
        self._tenants = tenants
        self._publisher = publisher

    async def CreateTenant(self, request: tenant_pb2.CreateTenantRequest, _context: Any) -> tenant_pb2.Tenant:
        if not request.name:
            raise InvalidError("name", "expected a name")
        tenant_id = request.tenant_id or tenant_id_from_name(request.name)
        if tenant_id is None:
            raise InvalidError("name", "expected at least one letter a-z or digit to make an id of, or a tenant_id")
        if not TENANT_ID_PATTERN.fullmatch(tenant_id):
            raise InvalidError("tenant_id", "expected 1 to 63 of a-z, 0-9 and inner hyphens")
        tenant = await self._tenants.create(
            actor=ACTOR,
            tenant_id=tenant_id,
            name=request.name,
            request_id=request.request_id,
            requests_per_minute=request.rate_limit_per_min,
            output_tokens_max=(
                request.output_tokens_max if request.HasField("output_tokens_max") else OUTPUT_TOKENS_MAX_DEFAULT
            ),
            clamp=request.clamp if request.HasField("clamp") else True,
            tokens_per_minute=request.tokens_per_min,
            concurrent_calls=request.concurrent_calls,
            unbounded_share=(
                request.unbounded_share if request.HasField("unbounded_share") else UNBOUNDED_SHARE_DEFAULT
            ),
            stream_slice_tokens=(
                request.stream_slice_tokens if request.HasField("stream_slice_tokens") else STREAM_SLICE_TOKENS_DEFAULT
            ),
            overrun=request.overrun,
        )
        await self._publisher.tenant(tenant.tenant_id)
        return tenant_message(tenant)

    async def GetTenant(self, request: tenant_pb2.GetTenantRequest, _context: Any) -> tenant_pb2.Tenant:
        return tenant_message(await self._tenants.get(request.tenant_id))

    async def ListTenants(
        self, request: tenant_pb2.ListTenantsRequest, _context: Any
    ) -> tenant_pb2.ListTenantsResponse:
        page = await self._tenants.list(page_size=request.page_size, page_token=request.page_token)
        return tenant_pb2.ListTenantsResponse(
            tenants=[tenant_message(tenant) for tenant in page.items], next_page_token=page.next_page_token
        )

    async def UpdateTenant(self, request: tenant_pb2.UpdateTenantRequest, _context: Any) -> tenant_pb2.Tenant:
        tenant = await self._tenants.update(
            request.tenant_id, _changes(request), actor=ACTOR, expected_version=etag_version(request.etag)
        )
        await self._publisher.tenant(tenant.tenant_id)
        return tenant_message(tenant)

    async def DeleteTenant(self, request: tenant_pb2.DeleteTenantRequest, _context: Any) -> Empty:
        await self._tenants.delete(request.tenant_id, actor=ACTOR, expected_version=etag_version(request.etag))
        await self._publisher.tenant(request.tenant_id)
        return Empty()


def _changes(request: tenant_pb2.UpdateTenantRequest) -> TenantChanges:
    named = named_fields(request, ("name", "status", *_LIMITS, "required_tags"))
    for field in named - {"status", "required_tags"}:
        if not request.HasField(field):  # type: ignore[arg-type] # those of the names above that have presence
            raise InvalidError(field, "expected a value")
    changes = TenantChanges()
    if "name" in named:
        changes["name"] = request.name
    if "status" in named:
        status = TENANT_STATUSES_BACK.get(request.status)
        if status is None:
            raise InvalidError("status", "expected ACTIVE or SUSPENDED")
        changes["status"] = status
    if "required_tags" in named:
        changes["required_tags"] = tuple(request.required_tags)
    for field, ours in _LIMITS.items():
        if field in named:
            changes[ours] = getattr(request, field)  # type: ignore[literal-required] # _LIMITS has its names only
    return changes


# Fields of the request that are set as they are, and what the entity calls them.
_LIMITS = {
    "rate_limit_per_min": "requests_per_minute",
    "output_tokens_max": "output_tokens_max",
    "clamp": "clamp",
    "tokens_per_min": "tokens_per_minute",
    "concurrent_calls": "concurrent_calls",
    "unbounded_share": "unbounded_share",
    "stream_slice_tokens": "stream_slice_tokens",
    "overrun": "overrun",
}


class RateLimitService(rate_limit_pb2_grpc.RateLimitServiceServicer):
    """A tenant's requests a minute, alone."""

    def __init__(self, *, tenants: Tenants, publisher: TenantPublisher) -> None:
        self._tenants = tenants
        self._publisher = publisher

    async def GetRateLimit(
        self, request: rate_limit_pb2.GetRateLimitRequest, _context: Any
    ) -> rate_limit_pb2.RateLimit:
        return rate_limit_message(await self._tenants.get(request.tenant_id))

    async def UpdateRateLimit(
        self, request: rate_limit_pb2.UpdateRateLimitRequest, _context: Any
    ) -> rate_limit_pb2.RateLimit:
        # 0 means unlimited, so a forgotten value must not.
        if not request.HasField("rate_limit_per_min"):
            raise InvalidError("rate_limit_per_min", "expected requests a minute, 0 for unlimited")
        tenant = await self._tenants.update(
            request.tenant_id,
            TenantChanges(requests_per_minute=request.rate_limit_per_min),
            actor=ACTOR,
            expected_version=etag_version(request.etag),
        )
        await self._publisher.tenant(tenant.tenant_id)
        return rate_limit_message(tenant)
