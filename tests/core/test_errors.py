import pytest

from budgetguard.core.errors import (
    AdminKeyError,
    AdminReason,
    AlreadyExistsError,
    DeadEventRefusedError,
    DeadEventResolvedError,
    DependencyUnavailableError,
    DomainError,
    EtagMismatchError,
    FieldViolation,
    InvalidError,
    NotFoundError,
    NotPublishedError,
    OperationChangedError,
    RequestIdReusedError,
)


@pytest.mark.parametrize(
    ("error", "code", "reason", "resource"),
    [
        (InvalidError("name", "expected a name"), "INVALID_ARGUMENT", AdminReason.FIELD_INVALID, None),
        (NotFoundError("tenant", "acme"), "NOT_FOUND", AdminReason.RESOURCE_NOT_FOUND, ("tenant", "acme")),
        (
            AlreadyExistsError("tenant", "acme"),
            "ALREADY_EXISTS",
            AdminReason.RESOURCE_ALREADY_EXISTS,
            ("tenant", "acme"),
        ),
        (EtagMismatchError("budget", "b1", etag="3"), "ABORTED", AdminReason.ETAG_MISMATCH, ("budget", "b1")),
        (OperationChangedError("op-1"), "ABORTED", AdminReason.OPERATION_CHANGED, ("operation", "op-1")),
        (
            DeadEventResolvedError("17-5-0", state="RETRIED"),
            "ABORTED",
            AdminReason.DEAD_EVENT_RESOLVED,
            ("dead event", "17-5-0"),
        ),
        (
            DeadEventRefusedError("17-5-0", error="malformed"),
            "FAILED_PRECONDITION",
            AdminReason.DEAD_EVENT_REFUSED,
            ("dead event", "17-5-0"),
        ),
        (RequestIdReusedError("r1"), "ALREADY_EXISTS", AdminReason.REQUEST_ID_REUSED, ("request_id", "r1")),
        (AdminKeyError(missing=True), "UNAUTHENTICATED", AdminReason.ADMIN_KEY_MISSING, None),
        (AdminKeyError(missing=False), "UNAUTHENTICATED", AdminReason.ADMIN_KEY_WRONG, None),
        (NotPublishedError("tenant", "acme"), "UNAVAILABLE", AdminReason.NOT_PUBLISHED, ("tenant", "acme")),
        (DependencyUnavailableError("Redis"), "UNAVAILABLE", AdminReason.DEPENDENCY_UNAVAILABLE, None),
    ],
)
def test_each_fault_says_what_it_is_about(error, code, reason, resource):
    assert isinstance(error, DomainError)
    assert (error.grpc_code, error.reason, error.resource) == (code, reason, resource)
    assert str(error) == error.message
    if resource is not None:
        assert resource[1] in error.message


def test_an_etag_mismatch_tells_the_current_etag():
    assert EtagMismatchError("budget", "b1", etag="3").metadata == {"etag": "3"}


def test_several_wrong_fields_are_one_error():
    violations = (FieldViolation("a", "expected 1"), FieldViolation("b", "expected 2"))
    error = InvalidError.of(violations)
    assert error.violations == violations
    assert str(error) == error.message == "a: expected 1; b: expected 2"
