"""The same API as gRPC clients see it: typed, on the running server."""

import asyncio

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core.snapshot import KeyStatus, Status
from budgetguard.v1 import (
    api_key_pb2,
    api_key_pb2_grpc,
    budget_pb2,
    budget_pb2_grpc,
    refusal_pb2,
    refusal_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
    tenant_pb2,
    tenant_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from tests.services.control_plane.conftest import METADATA


def details(error: grpc.aio.AioRpcError) -> tuple[ErrorInfo, dict[str, str], str]:
    """Return the error's info, its field violations, and the kind of resource that it names."""
    status = rpc_status.from_call(error)
    info, violations, kind = ErrorInfo(), {}, ""
    for detail in status.details:
        if detail.Unpack(info):
            continue
        bad, resource = BadRequest(), ResourceInfo()
        if detail.Unpack(bad):
            violations = {one.field: one.description for one in bad.field_violations}
        elif detail.Unpack(resource):
            kind = resource.resource_type
    return info, violations, kind


async def test_a_tenant_with_a_budget_and_a_key(channel):
    tenants = tenant_pb2_grpc.TenantServiceStub(channel)
    tenant = await tenants.CreateTenant(tenant_pb2.CreateTenantRequest(name="Typed"), metadata=METADATA)
    assert (tenant.tenant_id, tenant.status, tenant.clamp) == ("typed", tenant_pb2.Tenant.ACTIVE, True)
    budgets = budget_pb2_grpc.BudgetServiceStub(channel)
    keys = api_key_pb2_grpc.ApiKeyServiceStub(channel)
    key = await keys.CreateApiKey(api_key_pb2.CreateApiKeyRequest(tenant_id="typed"), metadata=METADATA)
    assert key.published
    made = await budgets.CreateBudget(
        budget_pb2.CreateBudgetRequest(
            tenant_id="typed", period=budget_pb2.Budget.MONTHLY, amount_usd="0.000000001", api_key_id=key.id
        ),
        metadata=METADATA,
    )
    assert (made.amount_usd, made.api_key_id, made.window.remaining_usd) == ("0.000000001", key.id, "0.000000001")
    changed = await budgets.UpdateBudget(
        budget_pb2.UpdateBudgetRequest(
            budget_id=made.id,
            amount_usd="7",
            mode=budget_pb2.Budget.OBSERVE,
            update_mask=FieldMask(paths=["amount_usd"]),
            etag=made.etag,
        ),
        metadata=METADATA,
    )
    assert (changed.amount_usd, changed.mode) == ("7", budget_pb2.Budget.ENFORCE)
    assert changed.etag != made.etag


async def test_what_changed_is_known_to_the_data_plane_when_the_call_returns(channel, program):
    redis = RedisClient(program.environment["REDIS_URL"])
    counters = Counters(redis)
    tenants = tenant_pb2_grpc.TenantServiceStub(channel)
    keys = api_key_pb2_grpc.ApiKeyServiceStub(channel)
    await tenants.CreateTenant(tenant_pb2.CreateTenantRequest(name="seen"), metadata=METADATA)
    assert (await counters.load_tenant("seen")).status is Status.ACTIVE
    key = await keys.CreateApiKey(api_key_pb2.CreateApiKeyRequest(tenant_id="seen"), metadata=METADATA)
    assert (await counters.load_key("seen", key.id)).status is KeyStatus.ACTIVE
    await keys.RevokeApiKey(api_key_pb2.RevokeApiKeyRequest(api_key_id=key.id), metadata=METADATA)
    assert (await counters.load_key("seen", key.id)).status is KeyStatus.REVOKED
    await tenants.UpdateTenant(
        tenant_pb2.UpdateTenantRequest(tenant_id="seen", status=tenant_pb2.Tenant.SUSPENDED), metadata=METADATA
    )
    assert (await counters.load_tenant("seen")).status is Status.SUSPENDED
    await tenants.DeleteTenant(tenant_pb2.DeleteTenantRequest(tenant_id="seen"), metadata=METADATA)
    assert (await counters.load_tenant("seen")).status is Status.DELETED
    await redis.close()


async def test_pages_hold_each_row_once(channel):
    tenants = tenant_pb2_grpc.TenantServiceStub(channel)
    await tenants.CreateTenant(tenant_pb2.CreateTenantRequest(name="paged"), metadata=METADATA)
    keys = api_key_pb2_grpc.ApiKeyServiceStub(channel)
    made = await asyncio.gather(
        *(keys.CreateApiKey(api_key_pb2.CreateApiKeyRequest(tenant_id="paged"), metadata=METADATA) for _ in range(7))
    )
    seen, token, pages = [], "", 0
    while pages == 0 or token:
        request = api_key_pb2.ListApiKeysRequest(tenant_id="paged", page_size=3, page_token=token)
        page = await keys.ListApiKeys(request, metadata=METADATA)
        seen += [key.id for key in page.api_keys]
        token, pages = page.next_page_token, pages + 1
    assert pages == 3
    assert sorted(seen) == sorted(key.id for key in made)


@pytest.mark.parametrize(
    ("stub", "method", "request_", "field"),
    [
        (tenant_pb2_grpc.TenantServiceStub, "CreateTenant", tenant_pb2.CreateTenantRequest(), "name"),
        (tenant_pb2_grpc.TenantServiceStub, "CreateTenant", tenant_pb2.CreateTenantRequest(name="\0"), "name"),
        (
            tenant_pb2_grpc.TenantServiceStub,
            "CreateTenant",
            tenant_pb2.CreateTenantRequest(name="x", rate_limit_per_min=-1),
            "rate_limit_per_min",
        ),
        (
            tenant_pb2_grpc.TenantServiceStub,
            "ListTenants",
            tenant_pb2.ListTenantsRequest(page_size=-1),
            "page_size",
        ),
        (
            tenant_pb2_grpc.TenantServiceStub,
            "ListTenants",
            tenant_pb2.ListTenantsRequest(page_token="made up"),
            "page_token",
        ),
        (
            budget_pb2_grpc.BudgetServiceStub,
            "CreateBudget",
            budget_pb2.CreateBudgetRequest(tenant_id="x", period=77, amount_usd="1"),
            "period",
        ),
        (
            budget_pb2_grpc.BudgetServiceStub,
            "CreateBudget",
            budget_pb2.CreateBudgetRequest(tenant_id="x", period=budget_pb2.Budget.DAILY, amount_usd="1", mode=9),
            "mode",
        ),
        (
            api_key_pb2_grpc.ApiKeyServiceStub,
            "CreateApiKey",
            api_key_pb2.CreateApiKeyRequest(tenant_id="x", expire_time=Timestamp(seconds=2**60)),
            "expire_time",
        ),
        (
            usage_pb2_grpc.UsageServiceStub,
            "ListLedgerRows",
            usage_pb2.ListLedgerRowsRequest(end=99),
            "end",
        ),
        (
            usage_pb2_grpc.UsageServiceStub,
            "SumUsage",
            usage_pb2.SumUsageRequest(tenant_id="x", group_by=99),
            "group_by",
        ),
        (
            refusal_pb2_grpc.RefusalServiceStub,
            "ListRefusals",
            refusal_pb2.ListRefusalsRequest(reason="no such"),
            "reason",
        ),
        (
            refusal_pb2_grpc.RefusalServiceStub,
            "CountRefusals",
            refusal_pb2.CountRefusalsRequest(group_by=99),
            "group_by",
        ),
    ],
)
async def test_a_wrong_field_is_named(channel, stub, method, request_, field):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(stub(channel), method)(request_, metadata=METADATA)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    info, violations, _ = details(raised.value)
    assert (info.reason, info.domain) == ("FIELD_INVALID", "budgetguard")
    assert list(violations) == [field]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "ADMIN_KEY_MISSING"),
        ((("x-admin-key", ""),), "ADMIN_KEY_WRONG"),
        ((("x-admin-key", "wrong"),), "ADMIN_KEY_WRONG"),
        ((*METADATA, ("x-admin-key", "wrong")), "ADMIN_KEY_WRONG"),
    ],
)
async def test_every_method_asks_for_the_admin_key(channel, metadata, reason):
    for stub, method, request in (
        (tenant_pb2_grpc.TenantServiceStub, "ListTenants", tenant_pb2.ListTenantsRequest()),
        (refusal_pb2_grpc.RefusalServiceStub, "ListRefusals", refusal_pb2.ListRefusalsRequest()),
        (system_pb2_grpc.SystemServiceStub, "GetHealth", system_pb2.GetHealthRequest()),
        (system_pb2_grpc.SystemServiceStub, "GetMetrics", system_pb2.GetMetricsRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await getattr(stub(channel), method)(request, metadata=metadata)
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert details(raised.value)[0].reason == reason


async def test_health_and_reflection_are_open(channel):
    health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    answer = await system_pb2_grpc.SystemServiceStub(channel).CheckHealth(system_pb2.CheckHealthRequest())
    assert answer.status == "ok"
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    stream = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name async for one in stream for service in one.list_services_response.service}
    assert {f"budgetguard.v1.{name}Service" for name in ("Tenant", "ApiKey", "Budget", "Usage", "System")} <= names


async def test_an_unknown_method_is_unimplemented(channel):
    call = channel.unary_unary("/budgetguard.v1.TenantService/Nope")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(b"", metadata=METADATA)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_two_changes_under_one_etag_one_wins(channel):
    tenants = tenant_pb2_grpc.TenantServiceStub(channel)
    made = await tenants.CreateTenant(tenant_pb2.CreateTenantRequest(name="contested"), metadata=METADATA)
    results = await asyncio.gather(
        *(
            tenants.UpdateTenant(
                tenant_pb2.UpdateTenantRequest(tenant_id="contested", name=f"n{number}", etag=made.etag),
                metadata=METADATA,
            )
            for number in range(5)
        ),
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert len(refused) == 4
    for error in refused:
        assert error.code() is grpc.StatusCode.ABORTED
        info, _, kind = details(error)
        assert info.reason == "ETAG_MISMATCH"
        assert kind == "tenant"


async def test_the_same_create_at_once_makes_one(channel):
    tenants = tenant_pb2_grpc.TenantServiceStub(channel)
    request = tenant_pb2.CreateTenantRequest(name="just one", request_id="just-one")
    made = await asyncio.gather(*(tenants.CreateTenant(request, metadata=METADATA) for _ in range(5)))
    assert len({tenant.SerializeToString() for tenant in made}) == 1
