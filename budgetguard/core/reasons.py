"""Every way to refuse a call, and how each is told: one closed enum, one table."""

from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """Why a call was refused. The values are the public names of ``error_reason.proto``, without their prefix."""

    API_KEY_MISSING = "API_KEY_MISSING"
    API_KEY_UNKNOWN = "API_KEY_UNKNOWN"
    API_KEY_REVOKED = "API_KEY_REVOKED"
    API_KEY_EXPIRED = "API_KEY_EXPIRED"
    TENANT_MISMATCH = "TENANT_MISMATCH"
    TENANT_SUSPENDED = "TENANT_SUSPENDED"
    ROUTE_UNKNOWN = "ROUTE_UNKNOWN"
    BODY_TOO_LARGE = "BODY_TOO_LARGE"
    BODY_ENCODED = "BODY_ENCODED"
    REQUEST_INVALID = "REQUEST_INVALID"
    MODEL_UNKNOWN = "MODEL_UNKNOWN"
    TAG_UNKNOWN = "TAG_UNKNOWN"
    TAG_INACTIVE = "TAG_INACTIVE"
    TAG_REQUIRED = "TAG_REQUIRED"
    SESSION_INACTIVE = "SESSION_INACTIVE"
    POLICY_DENIED = "POLICY_DENIED"
    RATE_LIMIT_EXCEEDED = "RATE_LIMIT_EXCEEDED"
    TOKEN_LIMIT_EXCEEDED = "TOKEN_LIMIT_EXCEEDED"  # noqa: S105  # language models' tokens
    CONCURRENCY_LIMIT_EXCEEDED = "CONCURRENCY_LIMIT_EXCEEDED"
    BUDGET_EXCEEDED = "BUDGET_EXCEEDED"
    BUDGET_SUBJECTS_EXCEEDED = "BUDGET_SUBJECTS_EXCEEDED"
    POLICY_UNAVAILABLE = "POLICY_UNAVAILABLE"
    COUNTERS_UNAVAILABLE = "COUNTERS_UNAVAILABLE"
    COUNTERS_NOT_READY = "COUNTERS_NOT_READY"
    BACKLOG_FULL = "BACKLOG_FULL"
    TOO_LATE = "TOO_LATE"
    OPERATION_REPLAYED = "OPERATION_REPLAYED"
    PROVIDER_UNAVAILABLE = "PROVIDER_UNAVAILABLE"
    ADMISSION_UNAVAILABLE = "ADMISSION_UNAVAILABLE"
    METERING_UNAVAILABLE = "METERING_UNAVAILABLE"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Telling:
    """How a reason reaches a client."""

    http_status: int
    # Names of google.rpc.Code and of the OpenAI error object's "type".
    grpc_code: str
    openai_type: str
    # Whether the same call may pass later without anybody changing a setting.
    retryable: bool
    message: str


TELLING: dict[Reason, Telling] = {
    Reason.API_KEY_MISSING: Telling(
        401,
        "UNAUTHENTICATED",
        "authentication_error",
        retryable=False,
        message="No BudgetGuard API key. Send it as X-API-Key or as Authorization: Bearer.",
    ),
    Reason.API_KEY_UNKNOWN: Telling(
        401, "UNAUTHENTICATED", "authentication_error", retryable=False, message="Unknown BudgetGuard API key."
    ),
    Reason.API_KEY_REVOKED: Telling(
        401, "UNAUTHENTICATED", "authentication_error", retryable=False, message="This BudgetGuard API key was revoked."
    ),
    Reason.API_KEY_EXPIRED: Telling(
        401, "UNAUTHENTICATED", "authentication_error", retryable=False, message="This BudgetGuard API key has expired."
    ),
    Reason.TENANT_MISMATCH: Telling(
        403,
        "PERMISSION_DENIED",
        "permission_error",
        retryable=False,
        message="X-Tenant-Id names another tenant than the API key belongs to.",
    ),
    Reason.TENANT_SUSPENDED: Telling(
        403, "PERMISSION_DENIED", "permission_error", retryable=False, message="This tenant is suspended."
    ),
    Reason.ROUTE_UNKNOWN: Telling(
        404,
        "NOT_FOUND",
        "invalid_request_error",
        retryable=False,
        message="No such route. BudgetGuard forwards only routes that it can meter.",
    ),
    Reason.BODY_TOO_LARGE: Telling(
        413,
        "INVALID_ARGUMENT",
        "invalid_request_error",
        retryable=False,
        message="The request body is larger than 10 MiB.",
    ),
    Reason.BODY_ENCODED: Telling(
        415,
        "INVALID_ARGUMENT",
        "invalid_request_error",
        retryable=False,
        message="Compressed request bodies cannot be metered: send it without Content-Encoding.",
    ),
    Reason.REQUEST_INVALID: Telling(
        400, "INVALID_ARGUMENT", "invalid_request_error", retryable=False, message="The request is malformed."
    ),
    Reason.MODEL_UNKNOWN: Telling(
        404,
        "NOT_FOUND",
        "invalid_request_error",
        retryable=False,
        message="No price is known for this model, so it cannot be metered.",
    ),
    Reason.TAG_UNKNOWN: Telling(
        400, "INVALID_ARGUMENT", "invalid_request_error", retryable=False, message="X-Tags names an unknown tag."
    ),
    Reason.TAG_INACTIVE: Telling(
        400, "INVALID_ARGUMENT", "invalid_request_error", retryable=False, message="X-Tags names an inactive tag."
    ),
    Reason.TAG_REQUIRED: Telling(
        400, "INVALID_ARGUMENT", "invalid_request_error", retryable=False, message="X-Tags lacks a required tag."
    ),
    Reason.SESSION_INACTIVE: Telling(
        403, "PERMISSION_DENIED", "permission_error", retryable=False, message="This session was deactivated."
    ),
    Reason.POLICY_DENIED: Telling(
        403, "PERMISSION_DENIED", "permission_error", retryable=False, message="Denied by policy."
    ),
    Reason.RATE_LIMIT_EXCEEDED: Telling(
        429, "RESOURCE_EXHAUSTED", "rate_limit_error", retryable=True, message="Rate limit reached."
    ),
    Reason.TOKEN_LIMIT_EXCEEDED: Telling(
        429, "RESOURCE_EXHAUSTED", "rate_limit_error", retryable=True, message="Limit of tokens a minute reached."
    ),
    Reason.CONCURRENCY_LIMIT_EXCEEDED: Telling(
        429, "RESOURCE_EXHAUSTED", "rate_limit_error", retryable=True, message="Limit of concurrent calls reached."
    ),
    Reason.BUDGET_SUBJECTS_EXCEEDED: Telling(
        429,
        "RESOURCE_EXHAUSTED",
        "rate_limit_error",
        retryable=True,
        message="A budget that each of its subjects has for itself has as many subjects as it may.",
    ),
    Reason.BUDGET_EXCEEDED: Telling(
        402,
        "RESOURCE_EXHAUSTED",
        "insufficient_quota",
        retryable=False,
        message="Budget exhausted: this call could cost more than is left.",
    ),
    Reason.POLICY_UNAVAILABLE: Telling(
        503, "UNAVAILABLE", "server_error", retryable=True, message="The policy engine did not answer."
    ),
    Reason.COUNTERS_UNAVAILABLE: Telling(
        503, "UNAVAILABLE", "server_error", retryable=True, message="The budget counters did not answer."
    ),
    Reason.COUNTERS_NOT_READY: Telling(
        503,
        "UNAVAILABLE",
        "server_error",
        retryable=True,
        message="The budget counters are being rebuilt from the ledger.",
    ),
    Reason.BACKLOG_FULL: Telling(
        503, "UNAVAILABLE", "server_error", retryable=True, message="Too much usage waits to be written to the ledger."
    ),
    Reason.TOO_LATE: Telling(
        503, "UNAVAILABLE", "server_error", retryable=True, message="The call waited too long to be admitted."
    ),
    Reason.OPERATION_REPLAYED: Telling(
        409, "ABORTED", "invalid_request_error", retryable=False, message="This operation id was already used."
    ),
    Reason.PROVIDER_UNAVAILABLE: Telling(
        503, "UNAVAILABLE", "server_error", retryable=True, message="The provider could not be reached."
    ),
    Reason.ADMISSION_UNAVAILABLE: Telling(
        503,
        "UNAVAILABLE",
        "server_error",
        retryable=True,
        message="The admission service did not answer, so the call was not forwarded.",
    ),
    Reason.METERING_UNAVAILABLE: Telling(
        503,
        "UNAVAILABLE",
        "server_error",
        retryable=True,
        message="The metering service is away, so the call was not forwarded.",
    ),
    Reason.INTERNAL: Telling(500, "INTERNAL", "server_error", retryable=True, message="Internal error."),
}


@dataclass(frozen=True, slots=True)
class Deny:
    """A refusal: a value, not an exception.

    ``detail`` replaces the table's sentence where the call itself tells more (which field, what was expected); it must
    be safe to show. ``facts`` are the numbers that explain it (budget id, limit, spent, held ...), as JSON values.
    ``retry_after_seconds`` becomes Retry-After; ``param`` names the request's field at fault.
    """

    reason: Reason
    detail: str = ""
    param: str | None = None
    facts: dict[str, str | int | bool | None] = field(default_factory=dict)
    retry_after_seconds: int | None = None

    @property
    def telling(self) -> Telling:
        """The row of the table for this reason."""
        return TELLING[self.reason]

    @property
    def message(self) -> str:
        """The sentence that the client reads."""
        return self.detail or self.telling.message
