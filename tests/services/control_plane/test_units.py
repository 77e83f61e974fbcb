"""Services and their interceptor without sockets: grpcio-testing calls them by their descriptors."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import grpc
import grpc_testing
import pytest
from google.api.httpbody_pb2 import HttpBody
from google.rpc.error_details_pb2 import ErrorInfo, RequestInfo, ResourceInfo
from google.rpc.status_pb2 import Status as RpcStatus
from prometheus_client import CollectorRegistry

from budgetguard.adapters.redis.client import CountersUnavailableError
from budgetguard.core.attempts import RecordedAttempt
from budgetguard.core.entities import ApiKey, Budget, Page, Tenant
from budgetguard.core.errors import DependencyUnavailableError, NotFoundError
from budgetguard.core.snapshot import KeyStatus, Mode, Status, SubjectKind, WindowKind
from budgetguard.v1 import api_key_pb2, budget_pb2, refusal_pb2, system_pb2, tenant_pb2
from control_plane.errors import AdminInterceptor
from control_plane.health import PostgresState, RedisState, SystemState
from control_plane.publisher import Publisher
from control_plane.services.api_keys import ApiKeyService
from control_plane.services.budgets import BudgetService
from control_plane.services.refusals import RefusalService
from control_plane.services.system import SystemService
from control_plane.services.tenants import TenantService
from tests.plugins.attempts import an_attempt

ADMIN = (("x-admin-key", "secret-admin-key"),)
NOW_MS = 1_767_225_600_000 + 3_600_000  # 2026-01-01T01:00:00Z
TENANT = Tenant(
    tenant_id="acme",
    name="Acme",
    status=Status.ACTIVE,
    version=3,
    requests_per_minute=0,
    output_tokens_max=4096,
    clamp=True,
    created_at_ms=NOW_MS,
    updated_at_ms=NOW_MS,
)
BUDGET = Budget(
    budget_id="b1",
    tenant_id="acme",
    subject_kind=SubjectKind.TENANT,
    subject="",
    window=WindowKind.DAY,
    zone="UTC",
    mode=Mode.ENFORCE,
    limit_nanos=10**9,
    spec_version=1,
    version=1,
    starts_at_ms=None,
    ends_at_ms=None,
    created_at_ms=NOW_MS,
    updated_at_ms=NOW_MS,
)


class AsyncContext:
    """What grpc.aio gives a handler, on top of grpcio-testing's synchronous context."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata()

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> None:
        self._context.set_trailing_metadata(tuple(trailing_metadata))
        self._context.set_code(code)
        self._context.set_details(details)
        raise grpc.aio.AbortError


class Guarded:
    """A servicer as the server runs it, behind the interceptor; grpcio-testing knows synchronous ones only."""

    def __init__(self, servicer: Any, service: Any) -> None:
        self._servicer = servicer
        self._service = service

    def __getattr__(self, name: str) -> Any:
        method = self._service.methods_by_name[name]
        request_type, answer_type = method.input_type._concrete_class, method.output_type._concrete_class

        class Details:
            method = f"/{self._service.full_name}/{name}"

        async def continuation(_details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                getattr(self._servicer, name), request_deserializer=request_type.FromString
            )

        def call(request: Any, context: Any) -> Any:
            async def run() -> Any:
                handler = await AdminInterceptor("secret-admin-key").intercept_service(continuation, Details())
                # The interceptor parses requests itself.
                return await handler.unary_unary(request.SerializeToString(), AsyncContext(context))

            try:
                return asyncio.run(run())
            except grpc.aio.AbortError:
                return answer_type()

        return call


def call(servicer: Any, service: Any, method: str, request: Any, *, metadata: Any = ADMIN) -> tuple[Any, Any, Any, str]:
    """Return answer, details by type, code, message."""
    server = grpc_testing.server_from_dictionary({service: Guarded(servicer, service)}, grpc_testing.strict_real_time())
    rpc = server.invoke_unary_unary(service.methods_by_name[method], metadata, request, None)
    answer, trailers, code, message = rpc.termination()
    found = {}
    for name, value in trailers or ():
        if name == "grpc-status-details-bin":
            for detail in RpcStatus.FromString(value).details:
                for kind in (ErrorInfo, RequestInfo, ResourceInfo):
                    if detail.Is(kind.DESCRIPTOR):
                        found[kind.__name__] = kind.FromString(detail.value)
    return answer, found, code, message


class Answering:
    """A dependency whose every method answers the same, or raises it."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        async def method(*_arguments: Any, **_named: Any) -> Any:
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

        return method


TENANTS = tenant_pb2.DESCRIPTOR.services_by_name["TenantService"]
BUDGETS = budget_pb2.DESCRIPTOR.services_by_name["BudgetService"]
KEYS = api_key_pb2.DESCRIPTOR.services_by_name["ApiKeyService"]
REFUSALS = refusal_pb2.DESCRIPTOR.services_by_name["RefusalService"]
SYSTEM = system_pb2.DESCRIPTOR.services_by_name["SystemService"]


def budgets_with(counters: Any) -> BudgetService:
    return BudgetService(
        budgets=Answering(BUDGET),
        counters=counters,
        publisher=Answering(),
        new_id=lambda: "b1",
        now_ms=lambda: NOW_MS,
    )


def test_a_budget_tells_its_open_window():
    service = budgets_with(Answering([(250_000_000, 50_000_000)]))
    answer, _, code, _ = call(service, BUDGETS, "GetBudget", budget_pb2.GetBudgetRequest(budget_id="b1"))
    assert code is grpc.StatusCode.OK
    window = answer.window
    assert (window.spent_usd, window.held_usd, window.remaining_usd) == ("0.25", "0.05", "0.7")
    assert window.start_time.ToJsonString() == "2026-01-01T00:00:00Z"
    assert window.reset_time.ToJsonString() == "2026-01-02T00:00:00Z"


def test_an_overdrawn_budget_has_nothing_left():
    service = budgets_with(Answering([(2 * 10**9, 0)]))
    answer, _, _, _ = call(service, BUDGETS, "GetBudget", budget_pb2.GetBudgetRequest(budget_id="b1"))
    assert (answer.window.spent_usd, answer.window.remaining_usd) == ("2", "0")


def test_while_counters_are_rebuilt_a_budget_says_so_instead_of_a_figure():
    request = budget_pb2.GetBudgetRequest(budget_id="b1")
    answer, _, code, _ = call(budgets_with(Answering(None)), BUDGETS, "GetBudget", request)
    assert code is grpc.StatusCode.OK
    assert (answer.HasField("window"), answer.state) == (False, budget_pb2.Budget.REBUILDING)


def test_a_budget_is_told_without_its_window_when_redis_is_down():
    service = budgets_with(Answering(CountersUnavailableError("down")))
    answer, _, code, _ = call(service, BUDGETS, "GetBudget", budget_pb2.GetBudgetRequest(budget_id="b1"))
    assert code is grpc.StatusCode.OK
    assert answer.amount_usd == "1"
    assert not answer.HasField("window")


@pytest.mark.parametrize("fault", [CountersUnavailableError("x"), DependencyUnavailableError("Postgres")])
def test_what_is_stored_but_not_published_is_said_so(fault):
    publisher = Publisher(snapshots=Answering(fault), catalog=Answering(fault))
    service = TenantService(tenants=Answering(TENANT), publisher=publisher)
    request = tenant_pb2.CreateTenantRequest(name="Acme")
    _, found, code, message = call(service, TENANTS, "CreateTenant", request)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert found["ErrorInfo"].reason == "NOT_PUBLISHED"
    assert found["ErrorInfo"].metadata["stored"] == "true"
    assert found["ResourceInfo"].resource_name == "acme"
    assert "is stored" in message


def test_a_new_key_is_shown_even_when_redis_is_down():
    key = ApiKey(
        tenant_id="acme",
        key_id="k" * 16,
        name="k",
        status=KeyStatus.ACTIVE,
        version=1,
        requests_per_minute=None,
        expires_at_ms=None,
        created_at_ms=NOW_MS,
    )
    down = Answering(CountersUnavailableError("down"))
    service = ApiKeyService(
        api_keys=Answering(key),
        publisher=Publisher(snapshots=down, catalog=down),
        new_id=lambda: "k" * 16,
        new_secret=lambda: bytes(32),
    )
    request = api_key_pb2.CreateApiKeyRequest(tenant_id="acme")
    answer, _, code, _ = call(service, KEYS, "CreateApiKey", request)
    assert code is grpc.StatusCode.OK
    assert answer.key == f"bg_acme_{'k' * 16}_{'A' * 43}"
    assert not answer.published


def test_a_refused_call_is_told_with_the_very_facts_that_its_caller_got():
    facts = {"budget_id": "b1", "limit_usd": "0.02", "resets_at": None, "retryable": False, "needed_tokens": 5}
    recorded = RecordedAttempt(refusal_id=1, attempt=an_attempt("op-7", facts=facts), recorded_at_ms=NOW_MS)
    service = RefusalService(refusals=Answering(Page(items=(recorded,), next_page_token="more")))
    answer, _, code, _ = call(service, REFUSALS, "ListRefusals", refusal_pb2.ListRefusalsRequest())
    assert (code, answer.next_page_token) == (grpc.StatusCode.OK, "more")
    (refused,) = answer.refusals
    assert (refused.operation_id, refused.reason, refused.http_status) == ("op-7", "BUDGET_EXCEEDED", 402)
    assert {name: refused.facts[name] for name in refused.facts} == facts
    assert (list(refused.tags), refused.session_id, refused.end_user) == (["a", "b"], "s 1", "jo")
    assert refused.refuse_time.ToMilliseconds() == recorded.attempt.refused_at_ms
    assert refused.record_time.ToMilliseconds() == NOW_MS


@pytest.mark.parametrize("method", ["ListRefusals", "CountRefusals"])
def test_a_reason_that_is_none_is_refused_by_name(method):
    service = RefusalService(refusals=Answering())
    request = REFUSALS.methods_by_name[method].input_type._concrete_class(reason="TOO_EXPENSIVE")
    _, details, code, message = call(service, REFUSALS, method, request)
    assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert message == "reason: expected a refusal's code, such as BUDGET_EXCEEDED"


def test_an_unknown_fault_tells_nothing_but_where_the_log_has_it(caplog):
    service = TenantService(tenants=Answering(RuntimeError("password=hunter2")), publisher=Answering())
    metadata = (*ADMIN, ("x-request-id", "abc-123"))
    request = tenant_pb2.GetTenantRequest(tenant_id="acme")
    with caplog.at_level(logging.ERROR):
        _, found, code, message = call(service, TENANTS, "GetTenant", request, metadata=metadata)
    assert code is grpc.StatusCode.INTERNAL
    assert "hunter2" not in message
    assert found["RequestInfo"].request_id == "abc-123"
    assert found["ErrorInfo"].reason == "INTERNAL"
    assert any(getattr(record, "correlation_id", "") == "abc-123" for record in caplog.records)


@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        (NotFoundError("tenant", "x" * 5000), grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND"),
        (DependencyUnavailableError("Postgres"), grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE"),
        (CountersUnavailableError("redis://u:p@h"), grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE"),
    ],
)
def test_faults_are_told_by_their_reason_within_what_trailers_hold(fault, code, reason):
    service = TenantService(tenants=Answering(fault), publisher=Answering())
    _, found, got, message = call(service, TENANTS, "GetTenant", tenant_pb2.GetTenantRequest(tenant_id="x"))
    assert got is code
    assert found["ErrorInfo"].reason == reason
    assert len(message) <= 1000
    assert "u:p" not in message


def test_a_rest_body_is_read_only_after_the_admin_key():
    service = TenantService(tenants=Answering(TENANT), publisher=Answering())
    request = tenant_pb2.CreateTenantRequest(http_body=HttpBody(data=b"not json"))
    _, found, code, _ = call(service, TENANTS, "CreateTenant", request, metadata=())
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert found["ErrorInfo"].reason == "ADMIN_KEY_MISSING"


WELL = SystemState(
    postgres=PostgresState(reachable=True, server_version="18"),
    redis=RedisState(reachable=True, server_version="6.2", shards_ready=256),
    failing_jobs={},
)


@pytest.mark.parametrize(
    ("state", "code", "problem"),
    [
        (WELL, grpc.StatusCode.OK, None),
        # Calls go on without Postgres.
        (replace(WELL, postgres=PostgresState()), grpc.StatusCode.OK, "Postgres does not answer"),
        (replace(WELL, redis=RedisState()), grpc.StatusCode.UNAVAILABLE, "Redis does not answer"),
        (replace(WELL, redis=replace(WELL.redis, shards_ready=255)), grpc.StatusCode.UNAVAILABLE, "1 of 256 shards"),
        (replace(WELL, redis=replace(WELL.redis, faults=("no AOF",))), grpc.StatusCode.OK, "no AOF"),
        (replace(WELL, failing_jobs={"drain_usage": 4}), grpc.StatusCode.OK, "drain_usage failed 4 times"),
        (
            replace(WELL, postgres=replace(WELL.postgres, default_partition_rows=2, dead_events=1)),
            grpc.StatusCode.OK,
            "2 ledger rows are in the default partition",
        ),
    ],
)
def test_health_says_whether_calls_are_admitted_and_what_needs_attention(state, code, problem):
    service = SystemService(probe=Answering(state), registry=CollectorRegistry(), version="1")
    _, _, got, _ = call(service, SYSTEM, "CheckHealth", system_pb2.CheckHealthRequest(), metadata=())
    assert got is code
    answer, _, _, _ = call(service, SYSTEM, "GetHealth", system_pb2.GetHealthRequest())
    assert answer.ready is (code is grpc.StatusCode.OK)
    assert (problem is None) == (list(answer.problems) == [])
    assert problem is None or problem in " ".join(answer.problems)
