"""One interceptor around every administrator's call: who may, what the body says, and how a fault is told."""

import hmac
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import DecodeError, Message
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, ResourceInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from budgetguard.adapters.redis.client import CountersUnavailableError
from budgetguard.core.errors import AdminKeyError, DependencyUnavailableError, DomainError, FieldViolation, InvalidError
from budgetguard.core.reasons import Deny, Reason
from control_plane.json_body import HTTP_BODY, read_http_body

logger = logging.getLogger(__name__)

# Generic in the stubs, plain classes at run time.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"

ADMIN_KEY = "x-admin-key"
DOMAIN = "budgetguard"
# What anybody may ask: liveness, and which methods there are.
OPEN_METHODS = frozenset(
    {
        "/budgetguard.v1.SystemService/CheckHealth",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.health.v1.Health/List",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    }
)
# What a tenant's own key is asked for instead, by the service itself.
TENANT_METHODS = frozenset({"/budgetguard.v1.QuoteService/Quote", "/budgetguard.v1.QuoteService/ListOwnBudgets"})
# The status travels in trailers, which a client may bound at 8 KiB, twice: as text and as details.
_MESSAGE_CHARS_MAX = 1_000
_FACT_CHARS_MAX = 200

# Members of a body that is asked about are spelled as the provider has them.
_QUOTED = "request."

# Where repositories and entities name a field otherwise than the public API does.
_PUBLIC_NAMES = {
    "limit_nanos": "amount_usd",
    "amount_nanos": "amount_usd",
    "zone": "time_zone",
    "rolling_ms": "rolling_period",
    "rollover_cap_nanos": "rollover_cap_usd",
    "requests_per_minute": "rate_limit_per_min",
    "tokens_per_minute": "tokens_per_min",
    "starts_at_ms": "start_date",
    "ends_at_ms": "end_date",
    "expires_at_ms": "expire_time",
    "subject": "api_key_id",
    "key_id": "api_key_id",
    "from_ms": "from",
    "until_ms": "until",
    "window": "period",
}


class DeniedError(DomainError):
    """What a call would be refused for, told to who asks about that call; ``field`` is the one at fault here."""

    def __init__(self, deny: Deny, *, field: str | None = None) -> None:
        super().__init__(deny.message, reason=deny.reason)
        self.metadata = {name: str(value) for name, value in deny.facts.items()}
        self.grpc_code = deny.telling.grpc_code
        named = field or deny.param
        if named is not None and self.grpc_code == "INVALID_ARGUMENT":
            # Where the message is told by itself it begins with the field, which stands beside it here.
            self.violations = (FieldViolation(named, deny.message.removeprefix(f"{deny.param}: ")),)


class AdminInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each unary method; the streams of health and reflection are open and pass as they are."""

    def __init__(self, admin_key: str) -> None:
        self._admin_key = admin_key.encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the method's handler, guarded."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.unary_unary is None:
            return handler
        # The stubs know handlers of the synchronous server only.
        inner: Any = handler.unary_unary
        deserialize: Any = handler.request_deserializer

        async def guarded(raw: bytes, context: Context) -> Message:
            # The body's own reader names fields as the caller spelled them.
            camel_case = False
            try:
                if method not in OPEN_METHODS | TENANT_METHODS:
                    self._check_admin_key(context)
                request = _parsed(raw, deserialize)
                from_rest = _has_http_body(request)
                read_http_body(request)
                camel_case = from_rest
                _refuse_nul(request)
                answer: Message = await inner(request, context)
            except DomainError as error:
                status = status_of(error, camel_case=camel_case)
            except CountersUnavailableError:
                status = status_of(DependencyUnavailableError("Redis"))
            except grpc.aio.AbortError:
                raise
            except Exception:
                correlation_id = _correlation_id(context)
                logger.exception("call failed", extra={"method": method, "correlation_id": correlation_id})
                status = _internal(correlation_id)
            else:
                return answer
            spelled: Any = rpc_status.to_status(status)
            await context.abort(spelled.code, spelled.details, spelled.trailing_metadata)
            raise AssertionError("abort raises")

        wrapped: Any = guarded
        return grpc.unary_unary_rpc_method_handler(
            wrapped,
            # In here, where a fault is told in our words: grpc.aio would tell the parser's.
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    def _check_admin_key(self, context: Context) -> None:
        given = [value for name, value in context.invocation_metadata() or () if name == ADMIN_KEY]
        if not given:
            raise AdminKeyError(missing=True)
        key = given[0] if isinstance(given[0], bytes) else given[0].encode()
        # Two keys would be two guesses in one call.
        if len(given) != 1 or not hmac.compare_digest(key, self._admin_key):
            raise AdminKeyError(missing=False)


def _parsed(raw: bytes, deserialize: Callable[[bytes], Message]) -> Message:
    try:
        return deserialize(raw)
    except DecodeError:
        # REST: a path or a query whose %-escapes are no UTF-8.
        raise InvalidError("(request)", "expected a message of this method, its texts in UTF-8") from None


def status_of(error: DomainError, *, camel_case: bool = False) -> Status:
    """Spell a domain error as google.rpc.Status with its details. ``camel_case``: for who wrote JSON."""
    status = Status(code=Code.Value(error.grpc_code), message=error.message[:_MESSAGE_CHARS_MAX])
    metadata = {name: value[:_FACT_CHARS_MAX] for name, value in error.metadata.items()}
    status.details.add().Pack(ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=metadata))
    if error.violations:
        named = [FieldViolation(_public_name(v.field, camel_case=camel_case), v.expected) for v in error.violations]
        status.message = "; ".join(f"{v.field}: {v.expected}" for v in named)[:_MESSAGE_CHARS_MAX]
        status.details.add().Pack(
            BadRequest(
                field_violations=[
                    BadRequest.FieldViolation(field=v.field, description=v.expected[:_FACT_CHARS_MAX]) for v in named
                ]
            )
        )
    if error.resource is not None:
        kind, resource_id = error.resource
        status.details.add().Pack(ResourceInfo(resource_type=kind, resource_name=resource_id[:_FACT_CHARS_MAX]))
    return status


def _public_name(field: str, *, camel_case: bool) -> str:
    path, dot, name = field.rpartition(".")
    if field.startswith(_QUOTED):
        return field
    public = path + dot + _PUBLIC_NAMES.get(name, name)
    if not camel_case:
        return public
    # Keys of maps, in brackets, are the caller's.
    return re.sub(r"\[[^]]*\]|_([a-z])", lambda found: found[1].upper() if found[1] else found[0], public)


def _correlation_id(context: Context) -> str:
    edge_id = dict(context.invocation_metadata() or ()).get("x-request-id")
    return edge_id if isinstance(edge_id, str) and 0 < len(edge_id) <= 64 else str(uuid.uuid4())


def _internal(correlation_id: str) -> Status:
    """Tell nothing but where in the log it stands."""
    status = Status(code=Code.INTERNAL, message=f"internal error; the log has it under {correlation_id}")
    status.details.add().Pack(ErrorInfo(reason=Reason.INTERNAL.value, domain=DOMAIN))
    status.details.add().Pack(RequestInfo(request_id=correlation_id))
    return status


def _has_http_body(request: Message) -> bool:
    return HTTP_BODY in request.DESCRIPTOR.fields_by_name and request.HasField(HTTP_BODY)


def _refuse_nul(message: Message, path: str = "") -> None:
    """Refuse U+0000, which JSON and protobuf can carry and Postgres cannot store."""
    for field, value in message.ListFields():
        here = f"{path}.{field.name}" if path else field.name
        if message.DESCRIPTOR.full_name == FieldMask.DESCRIPTOR.full_name:
            here = path  # of a mask, whoever sends it names no paths
        for index, item in enumerate(value if field.is_repeated else [value]):
            # Of a map, the keys: its values are amounts, read strictly later.
            if isinstance(item, str) and "\x00" in item:
                raise InvalidError(here, "expected text without NUL characters")
            if isinstance(item, Message):
                _refuse_nul(item, f"{here}[{index}]" if field.is_repeated else here)
