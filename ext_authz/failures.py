"""What happens to a call when something it needs is down: one table, and one place that says so each time."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import Counter

from budgetguard.core.reasons import Deny, Reason

logger = logging.getLogger(__name__)

_FAILED = Counter(
    "budgetguard_admission_dependency_failures",
    "Calls that met a dependency that was down, slow or not ready, and what was done with them.",
    ("failure", "behaviour"),
)


class Failure(StrEnum):
    """A dependency and the step that needed it."""

    COUNTERS = "counters"  # Redis did not answer, when records were read or money was held
    CATALOG = "catalog"  # no provider is known, or none of the kind that the route needs
    PROVIDER_KEY = "provider_key"  # the provider's key is not in the environment
    POLICY = "policy"  # the policy engine is down, slow, or answered something else than a decision
    LARGE_BODIES = "large_bodies"  # too many large bodies wait to be read, or their process died
    METER = "meter"  # ext_proc does not run, so nobody could meter the call
    DEADLINE = "deadline"  # the whole decision took too long
    RECORDS = "records"  # tenant or key changed faster than they could be read


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Refuse with a reason, or (``None``) let the call pass without that step."""

    reason: Reason | None
    retry_after_seconds: int | None = 1


CLOSED: Mapping[Failure, Behaviour] = {
    Failure.COUNTERS: Behaviour(Reason.COUNTERS_UNAVAILABLE),
    Failure.CATALOG: Behaviour(Reason.PROVIDER_UNAVAILABLE),
    Failure.PROVIDER_KEY: Behaviour(Reason.PROVIDER_UNAVAILABLE, retry_after_seconds=None),
    Failure.POLICY: Behaviour(Reason.POLICY_UNAVAILABLE),
    Failure.LARGE_BODIES: Behaviour(Reason.TOO_LATE),
    Failure.METER: Behaviour(Reason.METERING_UNAVAILABLE),
    Failure.DEADLINE: Behaviour(Reason.TOO_LATE),
    Failure.RECORDS: Behaviour(Reason.COUNTERS_UNAVAILABLE),
}

# For those who would rather have calls than a policy: POLICY_FAILURE=skip.
POLICY_SKIPPED: Mapping[Failure, Behaviour] = {**CLOSED, Failure.POLICY: Behaviour(None)}


class Failures:
    """Applies the table."""

    def __init__(self, table: Mapping[Failure, Behaviour]) -> None:
        self._table = table

    def met(self, failure: Failure, *, operation_id: str, why: str, told: str = "") -> Deny | None:
        """Say what becomes of a call; ``None`` lets it pass. ``why`` goes to the log, ``told`` to the client."""
        behaviour = self._table[failure]
        name = "skip" if behaviour.reason is None else "refuse"
        _FAILED.labels(failure.value, name).inc()
        logger.warning(
            "%s failed: %s",
            failure.value,
            why,
            extra={"failure": failure.value, "behaviour": name, "operation_id": operation_id},
        )
        if behaviour.reason is None:
            return None
        return Deny(behaviour.reason, told, retry_after_seconds=behaviour.retry_after_seconds)
