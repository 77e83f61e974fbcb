"""Faults that an administrator's call can end in, raised by repositories and services, told by one interceptor.

    DomainError
    ├── InvalidError              a field's value is wrong: names the field and what was expected
    ├── NotFoundError             no such resource
    ├── AlreadyExistsError        the id is taken
    ├── EtagMismatchError         somebody else changed it since it was read
    ├── OperationChangedError     it was corrected, or ended otherwise, since its end was read
    ├── DeadEventResolvedError    it was ended the other way already
    ├── DeadEventRefusedError     the ledger still does not take it, or the row that its discard needs
    ├── RequestIdReusedError      the same request_id came with another request
    ├── AdminKeyError             no admin key, or a wrong one
    ├── NotPublishedError         stored, but the data plane does not know it yet
    └── DependencyUnavailableError  Postgres or Redis did not answer

Texts are safe to show. Anything else that is raised is a bug or an outage, and its text never leaves the process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from budgetguard.core.reasons import Reason


class AdminReason(StrEnum):
    """Why an administrator's call failed. Public names of ``error_reason.proto``, without their prefix."""

    FIELD_INVALID = "FIELD_INVALID"
    RESOURCE_NOT_FOUND = "RESOURCE_NOT_FOUND"
    RESOURCE_ALREADY_EXISTS = "RESOURCE_ALREADY_EXISTS"
    ETAG_MISMATCH = "ETAG_MISMATCH"
    OPERATION_CHANGED = "OPERATION_CHANGED"
    DEAD_EVENT_RESOLVED = "DEAD_EVENT_RESOLVED"
    DEAD_EVENT_REFUSED = "DEAD_EVENT_REFUSED"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    ADMIN_KEY_MISSING = "ADMIN_KEY_MISSING"
    ADMIN_KEY_WRONG = "ADMIN_KEY_WRONG"
    NOT_PUBLISHED = "NOT_PUBLISHED"
    DEPENDENCY_UNAVAILABLE = "DEPENDENCY_UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path as the caller spelled it (``budgets[0].amountUsd``) and what was expected."""

    field: str
    expected: str


class DomainError(Exception):
    """What is known and may be told. ``grpc_code`` is the name of a google.rpc.Code."""

    grpc_code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: AdminReason | Reason,
        resource: tuple[str, str] | None = None,
        **metadata: str,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        # (kind, id): "tenant", "acme".
        self.resource = resource
        self.metadata: Mapping[str, str] = metadata
        self.violations: tuple[FieldViolation, ...] = ()


class InvalidError(DomainError):
    """A field's value is wrong."""

    grpc_code = "INVALID_ARGUMENT"

    def __init__(self, field: str, expected: str) -> None:
        super().__init__(f"{field}: {expected}", reason=AdminReason.FIELD_INVALID)
        self.violations = (FieldViolation(field, expected),)

    @classmethod
    def of(cls, violations: tuple[FieldViolation, ...]) -> "InvalidError":
        """Make one error of several wrong fields (at least one)."""
        error = cls(violations[0].field, violations[0].expected)
        error.violations = violations
        error.message = "; ".join(f"{violation.field}: {violation.expected}" for violation in violations)
        error.args = (error.message,)
        return error


class NotFoundError(DomainError):
    """No such resource (or a deleted one)."""

    grpc_code = "NOT_FOUND"

    def __init__(self, kind: str, resource_id: str) -> None:
        super().__init__(
            f"{kind} {resource_id!r} does not exist",
            reason=AdminReason.RESOURCE_NOT_FOUND,
            resource=(kind, resource_id),
        )


class AlreadyExistsError(DomainError):
    """The id is taken."""

    grpc_code = "ALREADY_EXISTS"

    def __init__(self, kind: str, resource_id: str) -> None:
        super().__init__(
            f"{kind} {resource_id!r} exists already",
            reason=AdminReason.RESOURCE_ALREADY_EXISTS,
            resource=(kind, resource_id),
        )


class EtagMismatchError(DomainError):
    """The given etag is not the resource's current one."""

    grpc_code = "ABORTED"

    def __init__(self, kind: str, resource_id: str, *, etag: str) -> None:
        super().__init__(
            f"{kind} {resource_id!r} was changed since it was read: read it again and send its current etag",
            reason=AdminReason.ETAG_MISMATCH,
            resource=(kind, resource_id),
            etag=etag,
        )


class OperationChangedError(DomainError):
    """An operation's end is not the one that its correction was decided upon."""

    grpc_code = "ABORTED"

    def __init__(self, operation_id: str) -> None:
        super().__init__(
            f"operation {operation_id!r} was corrected, or its end became better known, while this was decided: "
            "read its rows in the ledger and, if it is still wrong, correct it again",
            reason=AdminReason.OPERATION_CHANGED,
            resource=("operation", operation_id),
        )


class DeadEventResolvedError(DomainError):
    """A dead event has one end, and it has another one already."""

    grpc_code = "ABORTED"

    def __init__(self, dead_event_id: str, *, state: str) -> None:
        super().__init__(
            f"dead event {dead_event_id!r} is {state} already, which nothing changes any more",
            reason=AdminReason.DEAD_EVENT_RESOLVED,
            resource=("dead event", dead_event_id),
            state=state,
        )


class DeadEventRefusedError(DomainError):
    """A dead event was ended before its cause was mended. It stands as it did."""

    grpc_code = "FAILED_PRECONDITION"

    def __init__(self, dead_event_id: str, *, error: str, discarding: bool = False) -> None:
        message = (
            f"dead event {dead_event_id!r} cannot be discarded yet, for the ledger does not take the row that makes up "
            f"for it ({error}): mend the cause, then retry or discard it"
            if discarding
            else f"dead event {dead_event_id!r} still cannot become a ledger row ({error}): "
            "mend the cause and retry it, or discard it"
        )
        super().__init__(
            message,
            reason=AdminReason.DEAD_EVENT_REFUSED,
            resource=("dead event", dead_event_id),
            error=error,
        )


class RequestIdReusedError(DomainError):
    """Same request_id, other request: a loud conflict."""

    grpc_code = "ALREADY_EXISTS"

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request_id {request_id!r} was already used for a different request",
            reason=AdminReason.REQUEST_ID_REUSED,
            resource=("request_id", request_id),
        )


class AdminKeyError(DomainError):
    """The call carries no admin key, or a wrong one."""

    grpc_code = "UNAUTHENTICATED"

    def __init__(self, *, missing: bool) -> None:
        if missing:
            super().__init__(
                "no admin key: send it as the X-Admin-Key header (x-admin-key metadata in gRPC)",
                reason=AdminReason.ADMIN_KEY_MISSING,
            )
        else:
            super().__init__("wrong admin key", reason=AdminReason.ADMIN_KEY_WRONG)


class NotPublishedError(DomainError):
    """The change is committed, but Redis did not take the new snapshot; the publishing job will bring it there."""

    grpc_code = "UNAVAILABLE"

    def __init__(self, kind: str, resource_id: str) -> None:
        super().__init__(
            f"{kind} {resource_id!r} is stored, but calls do not see the change yet: "
            "it is published as soon as Redis answers; reading it shows what is stored",
            reason=AdminReason.NOT_PUBLISHED,
            resource=(kind, resource_id),
            stored="true",
        )


class DependencyUnavailableError(DomainError):
    """A server that this call needs did not answer. Sent again (a create: with its request_id) it does no harm."""

    grpc_code = "UNAVAILABLE"

    def __init__(self, dependency: str) -> None:
        super().__init__(
            f"{dependency} does not answer: try again later",
            reason=AdminReason.DEPENDENCY_UNAVAILABLE,
            dependency=dependency,
        )
