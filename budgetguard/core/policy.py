"""What a policy is asked about a call, and what it may answer.

The question goes to ``data.budgetguard.decision`` of the Rego policies as ``input``; the answer is an object
``{"allow": bool, "reason": string}``, further members are ignored. Anything else is a fault of the policy, never a
silent allow or deny.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

# The document that both engines evaluate, as OPA's data API and as the embedded engine's entry point spell it.
DECISION_PATH = "budgetguard/decision"

# A reason is one sentence for a client, not a document.
REASON_CHARS_MAX = 500

# Engines hold integers as signed 64-bit or wider; beyond that the embedded one would wrap around in silence.
INTEGER_MAX = 2**63 - 1


class PolicyFault(StrEnum):
    """Why there is no decision; the values label the metric."""

    DOWN = "down"  # the engine cannot be reached, died, or is starting
    SLOW = "slow"  # no answer within the deadline
    BUSY = "busy"  # more decisions wait than the engine is given
    FAILED = "failed"  # the engine reports an error: a conflict of rules, a builtin that failed
    UNDEFINED = "undefined"  # no rule gives a decision for this input
    WRONG_TYPED = "wrong-typed"  # the decision has not the form above


class PolicyUnavailableError(Exception):
    """No decision can be had. ``detail`` is for the log: it may quote the policy, so it never reaches a client."""

    def __init__(self, fault: PolicyFault, detail: str) -> None:
        super().__init__(f"{fault}: {detail}")
        self.fault = fault
        self.detail = detail


class PolicyLoadError(Exception):
    """The policies cannot be used; the text says which file and why, for whoever starts the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInput:
    """One call, as policies see it.

    ``route`` is the API's name (``openai.chat``). ``model`` is as it was sent, ``priced_model`` the one whose price it
    is charged by. ``estimate_nanos`` is the most that the call can cost (what it would hold) and ``estimate_usd`` the
    same as an exact decimal string; ``output_tokens_bound`` is the output part of that bound, 0 where nothing is
    generated. ``tags`` are the call's tags and all their ancestors, sorted. ``session_id``
    is empty without a session. ``time`` is the admission time, RFC 3339 in UTC.
    """

    tenant_id: str
    key_id: str
    route: str
    model: str
    priced_model: str
    stream: bool
    estimate_usd: str
    estimate_nanos: int
    output_tokens_bound: int
    time: str
    tags: tuple[str, ...] = ()
    session_id: str = ""

    def __post_init__(self) -> None:
        """Refuse what an engine could not hold.

        Raises:
            ValueError: an integer below 0 or above ``INTEGER_MAX``.
        """
        for name in ("estimate_nanos", "output_tokens_bound"):
            if not 0 <= getattr(self, name) <= INTEGER_MAX:
                msg = f"{name}: expected 0 to 2**63-1, got {getattr(self, name)}"
                raise ValueError(msg)

    def to_input(self) -> dict[str, Any]:
        """Return Rego's ``input``: the names and types here are public, policies are written against them.

        ``time`` is given with a spelled offset (``2026-01-31T12:00:00.000+00:00``): the embedded engine's
        ``time.parse_rfc3339_ns`` does not read a ``Z``.
        """
        return {
            "tenant_id": self.tenant_id,
            "key_id": self.key_id,
            "route": self.route,
            "model": self.model,
            "priced_model": self.priced_model,
            "stream": self.stream,
            "estimate_usd": self.estimate_usd,
            "estimate_nanos": self.estimate_nanos,
            "output_tokens_bound": self.output_tokens_bound,
            "tags": list(self.tags),
            "session_id": self.session_id,
            "time": f"{self.time[:-1]}+00:00" if self.time.endswith("Z") else self.time,
        }


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """The policy's word. ``reason`` is shown to the client of a refused call; it may be empty."""

    allow: bool
    reason: str = ""

    @classmethod
    def from_result(cls, result: object) -> "PolicyDecision":
        """Read the value of ``data.budgetguard.decision``.

        Raises:
            PolicyUnavailableError: it is not ``{"allow": bool, "reason": string}``.
        """
        if not isinstance(result, dict):
            raise _wrong_typed("an object", result)
        allow, reason = result.get("allow"), result.get("reason")
        if not isinstance(allow, bool):
            raise _wrong_typed("a boolean in allow", allow)
        if not isinstance(reason, str):
            raise _wrong_typed("a string in reason", reason)
        return cls(allow=allow, reason=reason[:REASON_CHARS_MAX])


class Policy(Protocol):
    """An engine that decides. Its clock is its own: each decision has a deadline."""

    async def decide(self, question: PolicyInput) -> PolicyDecision:
        """Decide one call.

        Raises:
            PolicyUnavailableError: no decision can be had.
        """
        ...

    async def health(self) -> None:
        """Return if a decision could be had now.

        Raises:
            PolicyUnavailableError: it could not.
        """
        ...

    async def close(self) -> None:
        """Release connections and processes; calls in flight fail."""
        ...


def _wrong_typed(expected: str, got: object) -> PolicyUnavailableError:
    kind = "nothing" if got is None else type(got).__name__
    return PolicyUnavailableError(PolicyFault.WRONG_TYPED, f"expected {expected}, got {kind}")
