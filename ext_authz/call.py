"""One call as ext_authz sees it: what Envoy sends, and what it is told. Translates messages, decides nothing."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.service.auth.v3.attribute_context_pb2 import AttributeContext
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from google.rpc.code_pb2 import OK, PERMISSION_DENIED
from google.rpc.status_pb2 import Status

from budgetguard.core.budget import Reserved
from budgetguard.core.context import SESSION_ID, SESSION_NAME, SESSION_PATH, TAGS, USER_ID
from budgetguard.core.handoff import Handoff
from budgetguard.core.money import format_usd
from budgetguard.core.providers import ProviderApi
from budgetguard.core.reasons import Deny

OPERATION_ID_HEADER = "x-budgetguard-operation-id"
CLUSTER_HEADER = "x-budgetguard-cluster"

_OK = Status(code=OK)
_REFUSED = Status(code=PERMISSION_DENIED)

# What a decision reads. Envoy tells no other (`allowed_headers` in envoy/edge.yaml).
HEADERS_READ = (
    "x-request-id",
    "x-api-key",
    "authorization",
    "x-tenant-id",
    "content-encoding",
    TAGS,
    SESSION_ID,
    SESSION_NAME,
    SESSION_PATH,
    USER_ID,
)

# The client's own copies never reach a provider: they are ours, or say who is calling.
_REMOVED = (
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "x-tenant-id",
    "x-tags",
    "x-session-id",
    "x-session-name",
    "x-session-path",
    "x-user-id",
    "x-admin-key",
    "cookie",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingCall:
    """A client's call: header names in lower case, the path with its query, the whole body.

    ``headers`` has those of ``HEADERS_READ`` that came. Of one that is ``not_utf8`` it has what could be read; the
    values of one that was ``repeated`` are joined by commas.
    """

    operation_id: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    not_utf8: Collection[str] = ()
    repeated: Collection[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """Forward it: to which cluster and path, with which provider key (``None``: none), and what to tell."""

    handoff: Handoff
    reserved: Reserved
    cluster: str
    path: str
    authorization: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Answer it here, in the API's own error shape."""

    deny: Deny
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def decode(request: CheckRequest) -> IncomingCall:
    """Read what Envoy sends about a call."""
    http: AttributeContext.HttpRequest = request.attributes.request.http
    headers: dict[str, str] = {}
    not_utf8, repeated = [], []
    # As bytes, and each by itself: in strings Envoy writes "!" for what is no UTF-8, so that two users become one.
    for header in http.header_map.headers:
        name, value = header.key, header.raw_value
        try:
            text = value.decode()
        except UnicodeDecodeError:
            text = value.decode(errors="replace")
            not_utf8.append(name)
        if name in headers:
            text = f"{headers[name]},{text}"
            repeated.append(name)
        headers[name] = text
    return IncomingCall(
        operation_id=headers.get("x-request-id", ""),
        method=http.method,
        path=http.path,
        headers=headers,
        body=http.raw_body or http.body.encode(),
        not_utf8=not_utf8,
        repeated=repeated,
    )


def refuse(deny: Deny, *, call: IncomingCall, api: ProviderApi) -> Refused:
    """Spell a refusal for its client, in the shape of the API that it called."""
    headers = {"content-type": "application/json", "x-budgetguard-reason": deny.reason.value}
    if call.operation_id:
        headers[OPERATION_ID_HEADER] = call.operation_id
    if deny.retry_after_seconds is not None:
        headers["retry-after"] = str(deny.retry_after_seconds)
    return Refused(deny=deny, body=api.error_body(deny), headers=headers)


def encode(answer: Admitted | Refused) -> CheckResponse:
    """Spell an answer for Envoy."""
    return _encode_refused(answer) if isinstance(answer, Refused) else _encode_admitted(answer)


def _encode_refused(refused: Refused) -> CheckResponse:
    answer = CheckResponse(status=_REFUSED)
    answer.denied_response.status.code = refused.deny.telling.http_status
    answer.denied_response.body = refused.body.decode()
    _add(answer.denied_response.headers, refused.headers)
    return answer


def _encode_admitted(admitted: Admitted) -> CheckResponse:
    upstream = {CLUSTER_HEADER: admitted.cluster, ":path": admitted.path}
    removed = list(_REMOVED)
    if admitted.authorization is None:
        removed.append("authorization")
    else:
        upstream["authorization"] = admitted.authorization
    answer = CheckResponse(status=_OK)
    _add(answer.ok_response.headers, upstream)
    answer.ok_response.headers_to_remove.extend(removed)
    _add(answer.ok_response.response_headers_to_add, response_headers(admitted))
    # Field by field: Struct.update and HeaderValueOption's constructor take five times as long.
    fields = answer.dynamic_metadata.fields
    for name, value in admitted.handoff.to_metadata().items():
        fields[name].string_value = value
    return answer


def response_headers(admitted: Admitted) -> dict[str, str]:
    """List what the client is told about its budgets and limits, with the provider's answer."""
    handoff, reserved = admitted.handoff, admitted.reserved
    headers = {
        OPERATION_ID_HEADER: handoff.facts.operation_id,
        "x-budgetguard-estimated-cost-usd": format_usd(reserved.hold_nanos),
    }
    if handoff.clamped_output_tokens is not None:
        headers["x-budgetguard-clamped-max-tokens"] = str(handoff.clamped_output_tokens)
    if reserved.requests_limit is not None:
        headers["x-ratelimit-limit-requests"] = str(reserved.requests_limit)
        headers["x-ratelimit-remaining-requests"] = str(reserved.requests_remaining)
        headers["x-ratelimit-reset-requests"] = f"{reserved.requests_reset_seconds}s"
    if reserved.tokens_limit is not None:
        headers["x-ratelimit-limit-tokens"] = str(reserved.tokens_limit)
        headers["x-ratelimit-remaining-tokens"] = str(reserved.tokens_remaining)
        headers["x-ratelimit-reset-tokens"] = f"{reserved.tokens_reset_seconds}s"
    if reserved.budget_remaining_nanos is not None:
        headers["x-budgetguard-budget-remaining-usd"] = format_usd(reserved.budget_remaining_nanos)
    return headers


def _add(options: Any, headers: Mapping[str, str]) -> None:
    """Set headers, each replacing whatever had its name."""
    for name, value in headers.items():
        option = options.add()
        option.header.key = name
        option.header.value = value
        option.append_action = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
