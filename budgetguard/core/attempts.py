"""A refused attempt: what is kept of a call that an authenticated key was not allowed to make. Nothing counts by it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import orjson

from budgetguard.core.reasons import Deny, Reason

Fact: TypeAlias = str | int | bool | None

# Of each minute, key and reason this many attempts are kept as rows; those beyond are only counted.
ROWS_A_MINUTE = 10
MINUTE_MS = 60_000

# A caller's own words (model, session ...) and ours, which may quote them: enough to explain, too little to fill Redis.
TEXT_CHARS_MAX = 200
MESSAGE_CHARS_MAX = 500
TAGS_MAX = 64
FACTS_MAX = 20

_INT64_MAX = 2**63 - 1
# Postgres takes no NUL in a text.
_NUL = "\x00"
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One refused call, as its caller was told.

    ``message`` and ``facts`` (budget, limit, spent, held, needed ...) are those of the answer. ``api`` is the route's.
    What was not known when it was refused, or not told by the caller, is empty. ``tags`` are the call's with all above
    them; where they could not be resolved, those that it sent.
    """

    refused_at_ms: int
    tenant_id: str
    key_id: str
    operation_id: str
    api: str
    reason: Reason
    status: int
    message: str
    facts: Mapping[str, Fact]
    provider_id: str = ""
    model: str = ""
    tags: tuple[str, ...] = ()
    session_id: str = ""
    end_user: str = ""

    @property
    def minute_ms(self) -> int:
        """When the minute that it belongs to began."""
        return minute_of(self.refused_at_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedCall:
    """An attempt that is kept, on its way to be a row; ``number``: 1 is the first of its minute, key and reason."""

    attempt: Attempt
    number: int

    def to_fields(self) -> dict[str, str]:
        """Encode as the fields of a stream entry, as ``refuse.lua`` writes them."""
        return {"attempt": attempt_to_json(self.attempt), "number": str(self.number)}

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> "RefusedCall":
        """Decode a stream entry.

        Raises:
            ValueError: a field is missing or malformed.
        """
        try:
            number = int(fields["number"])
            if not 1 <= number <= ROWS_A_MINUTE:
                raise ValueError(number)
            return cls(attempt=_attempt_of(orjson.loads(fields["attempt"])), number=number)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            msg = "malformed refused call"
            raise ValueError(msg) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedAttempt:
    """A row; ``refusal_id`` rises with the order of recording."""

    refusal_id: int
    attempt: Attempt
    recorded_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalFilter:
    """Which refusals; an empty field does not restrict. ``until_ms`` is exclusive."""

    tenant_id: str = ""
    key_id: str = ""
    reason: Reason | None = None
    model: str = ""
    session_id: str = ""
    from_ms: int | None = None
    until_ms: int | None = None


class RefusalGroup(StrEnum):
    """What refusals are counted by. A DAY is spelled YYYY-MM-DD, a MINUTE YYYY-MM-DDTHH:MMZ, both in UTC."""

    REASON = "REASON"
    API_KEY = "API_KEY"
    DAY = "DAY"
    MINUTE = "MINUTE"


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalCount:
    """How many refusals a group has."""

    group: str
    count: int


def minute_of(moment_ms: int) -> int:
    """Return when this moment's minute began."""
    return moment_ms - moment_ms % MINUTE_MS


def attempt_of(
    deny: Deny,
    *,
    refused_at_ms: int,
    tenant_id: str,
    key_id: str,
    operation_id: str,
    api: str,
    provider_id: str = "",
    model: str = "",
    tags: tuple[str, ...] = (),
    session_id: str = "",
    end_user: str = "",
) -> Attempt:
    """Make the record of a refusal: bounded, and of nothing that Postgres or JSON could not take."""
    facts = list(deny.facts.items())[:FACTS_MAX]
    return Attempt(
        refused_at_ms=refused_at_ms,
        tenant_id=tenant_id,
        key_id=key_id,
        operation_id=plain(operation_id),
        api=api,
        reason=deny.reason,
        status=deny.telling.http_status,
        message=plain(deny.message, MESSAGE_CHARS_MAX),
        facts={plain(name): _fact(value) for name, value in facts},
        provider_id=provider_id,
        model=plain(model),
        tags=tuple(plain(tag) for tag in tags[:TAGS_MAX]),
        session_id=plain(session_id),
        end_user=plain(end_user),
    )


def plain(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    """Cut a text, and replace what cannot be stored."""
    return text[:chars_max].encode(errors="replace").decode().replace(_NUL, _REPLACEMENT)


def attempt_to_json(attempt: Attempt) -> str:
    """Encode an attempt; the same one always gives the same text."""
    return orjson.dumps(asdict(attempt)).decode()


def _fact(value: Fact) -> Fact:
    if isinstance(value, str):
        return plain(value, MESSAGE_CHARS_MAX)
    if isinstance(value, int) and abs(value) > _INT64_MAX:
        return str(value)[:TEXT_CHARS_MAX]
    return value


# What each field of an attempt's JSON must be; a bool is an int to Python, but not to us.
_TYPES: Mapping[str, type] = {
    "refused_at_ms": int,
    "tenant_id": str,
    "key_id": str,
    "operation_id": str,
    "api": str,
    "reason": str,
    "status": int,
    "message": str,
    "facts": dict,
    "provider_id": str,
    "model": str,
    "tags": list,
    "session_id": str,
    "end_user": str,
}


def _attempt_of(raw: dict[str, Any]) -> Attempt:
    if {name: type(value) for name, value in raw.items()} != _TYPES:
        raise TypeError(raw)
    told, tags = raw["facts"].values(), raw["tags"]
    if any(isinstance(value, float | list | dict) for value in told) or any(type(tag) is not str for tag in tags):
        raise TypeError(raw)
    return Attempt(**{**raw, "reason": Reason(raw["reason"]), "tags": tuple(tags)})
