"""What the data plane knows of a tenant: a small record a tenant and one an API key, each with a version.

The control plane writes them to Redis as JSON; ext_authz caches them; ``reserve.lua`` compares the versions. Both sides
use this codec, so a field exists once.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import orjson


class Status(StrEnum):
    """Whether a tenant may call."""

    ACTIVE = "ACTIVE"
    SUSPENDED = "SUSPENDED"
    DELETED = "DELETED"


class KeyStatus(StrEnum):
    """Whether an API key may be used."""

    ACTIVE = "ACTIVE"
    REVOKED = "REVOKED"


class SubjectKind(StrEnum):
    """Whose spend a budget limits. A TAG's includes that of all tags below it."""

    TENANT = "TENANT"
    API_KEY = "API_KEY"
    TAG = "TAG"
    SESSION = "SESSION"
    END_USER = "END_USER"
    MODEL = "MODEL"
    PROVIDER = "PROVIDER"


class WindowKind(StrEnum):
    """How a budget's window moves: with the calendar of a zone, with the clock (ROLLING), or not at all."""

    DAY = "DAY"
    WEEK = "WEEK"
    MONTH = "MONTH"
    QUARTER = "QUARTER"
    YEAR = "YEAR"
    ROLLING = "ROLLING"
    FIXED = "FIXED"
    LIFETIME = "LIFETIME"


class Mode(StrEnum):
    """ENFORCE refuses above the limit; OBSERVE only counts."""

    ENFORCE = "ENFORCE"
    OBSERVE = "OBSERVE"


@dataclass(frozen=True, slots=True, kw_only=True)
class TopUp:
    """Money added to a budget from ``starts_at_ms`` until ``expires_at_ms`` (exclusive; ``None``: for good)."""

    amount_nanos: int
    starts_at_ms: int
    expires_at_ms: int | None = None

    def applies(self, now_ms: int) -> bool:
        """Whether it is there at this moment."""
        return self.starts_at_ms <= now_ms and (self.expires_at_ms is None or now_ms < self.expires_at_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSpec:
    """One budget as the data plane needs it.

    ``subject`` is the id of the key, tag, session, end user, model or provider; empty for ``TENANT``, and for a
    template: ``each`` gives every subject of that kind a counter of its own, up to ``subjects_max`` at a time.
    ``spec_version`` rises when what is counted changes (window, zone, subject) and is part of the counter's name: such
    a change counts afresh from the ledger, while an edited limit keeps what was spent. ``seeding``: its counters do not
    have the past yet, so they are counted but not enforced.

    ``anchor_day`` moves a calendar window's first day: 1 (Monday) to 7 for WEEK; a day of the month, 1 to 31, for
    MONTH, QUARTER and YEAR, the month's last day where it has no such day. ``anchor_month`` (1 to 12) is the month in
    which the YEAR, or one of the QUARTERs, begins. ``rolling_ms`` is set for ROLLING only, ``starts_at_ms`` and
    ``ends_at_ms`` (exclusive) for FIXED only. ``carried_nanos`` is unused money of the window before, added to the one
    that starts at ``carried_into_ms`` only.
    """

    budget_id: str
    subject_kind: SubjectKind
    window: WindowKind
    limit_nanos: int
    subject: str = ""
    zone: str = "UTC"
    mode: Mode = Mode.ENFORCE
    spec_version: int = 1
    starts_at_ms: int | None = None
    ends_at_ms: int | None = None
    each: bool = False
    subjects_max: int = 10_000
    seeding: bool = False
    anchor_day: int = 1
    anchor_month: int = 1
    rolling_ms: int | None = None
    carried_nanos: int = 0
    carried_into_ms: int | None = None
    top_ups: tuple[TopUp, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TagSpec:
    """One tag of a tenant's tree; ``parent_id`` is empty at a root.

    An inactive tag and all tags below it are refused; what was spent stays.
    """

    tag_id: str
    parent_id: str = ""
    active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSnapshot:
    """One tenant. Of its limits 0 is unlimited.

    ``output_tokens_max`` is the default output bound of a call that names none; ``clamp`` says whether a bound may be
    lowered to fit a budget (else the call is refused). ``unbounded_share``: a call without a bound holds at most this
    part of what its tightest budget has left (8: an eighth). ``stream_slice_tokens``: a stream without a bound holds
    that much output at a time and tops up (0: it holds as any other call); ``overrun``: one that cannot top up runs on.
    ``required_tags``: each call must carry each of these tags, or one below it. ``closed_sessions``: calls of these
    sessions are refused.
    """

    tenant_id: str
    version: int
    status: Status = Status.ACTIVE
    requests_per_minute: int = 0
    budgets: tuple[BudgetSpec, ...] = ()
    output_tokens_max: int = 4096
    clamp: bool = True
    tokens_per_minute: int = 0
    concurrent_calls: int = 0
    unbounded_share: int = 8
    stream_slice_tokens: int = 4096
    overrun: bool = False
    tags: tuple[TagSpec, ...] = ()
    required_tags: tuple[str, ...] = ()
    closed_sessions: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Encode for Redis."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes | str) -> "TenantSnapshot":
        """Decode what ``to_json`` wrote.

        Raises:
            ValueError: not a tenant record.
        """
        try:
            raw: dict[str, Any] = orjson.loads(text)
            budgets = tuple(
                BudgetSpec(
                    **{
                        **budget,
                        "subject_kind": SubjectKind(budget["subject_kind"]),
                        "window": WindowKind(budget["window"]),
                        "mode": Mode(budget["mode"]),
                        "top_ups": tuple(TopUp(**top_up) for top_up in budget.get("top_ups", ())),
                    }
                )
                for budget in raw.pop("budgets")
            )
            typed = {
                "status": Status(raw["status"]),
                "budgets": budgets,
                "tags": tuple(TagSpec(**tag) for tag in raw.get("tags", ())),
                "required_tags": tuple(raw.get("required_tags", ())),
                "closed_sessions": tuple(raw.get("closed_sessions", ())),
            }
            return cls(**{**raw, **typed})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            msg = "malformed tenant record"
            raise ValueError(msg) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySnapshot:
    """One API key. A limit of ``None`` means none of its own; ``expires_at_ms`` ``None``, never.

    ``tags`` are on every call of the key, whatever the caller sends.
    """

    tenant_id: str
    key_id: str
    version: int
    secret_sha256: str
    status: KeyStatus = KeyStatus.ACTIVE
    expires_at_ms: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_calls: int | None = None
    tags: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Encode for Redis."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes | str) -> "KeySnapshot":
        """Decode what ``to_json`` wrote.

        Raises:
            ValueError: not a key record.
        """
        try:
            raw: dict[str, Any] = orjson.loads(text)
            return cls(**{**raw, "status": KeyStatus(raw["status"]), "tags": tuple(raw.get("tags", ()))})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            msg = "malformed API key record"
            raise ValueError(msg) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerRecords:
    """A presented key's records, ``None`` where there is none. Of a key that is not known there is no tenant either."""

    tenant: TenantSnapshot | None
    key: KeySnapshot | None
