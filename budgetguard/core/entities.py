"""What the control plane stores: the rows of Postgres as values. Secrets are never part of them.

Times are ``int`` milliseconds since 1970 UTC, amounts ``int`` nano-USD.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Generic, TypedDict, TypeVar

from budgetguard.core.operation import End
from budgetguard.core.snapshot import BudgetSpec, KeyStatus, Mode, Status, SubjectKind, TopUp, WindowKind
from budgetguard.core.usage import Usage

ItemT = TypeVar("ItemT")

# One page of any listing; what is asked above it is lowered to it, 0 asks for the default.
PAGE_SIZE_MAX = 1000
PAGE_SIZE_DEFAULT = 100

# A default output bound that no model reaches; keeps a typing error from making every call unaffordable.
OUTPUT_TOKENS_MAX = 10_000_000
REQUESTS_PER_MINUTE_MAX = 10_000_000
TOKENS_PER_MINUTE_MAX = 2_000_000_000
CONCURRENT_CALLS_MAX = 100_000
UNBOUNDED_SHARE_MAX = 1_000
# A smaller slice than the smallest clamp would top up with every chunk.
STREAM_SLICE_TOKENS_MIN = 16
NAME_CHARACTERS_MAX = 200
# Fixed on one key, and required by one tenant: as many as a call may send.
TAGS_LISTED_MAX = 16
# They travel to the data plane in the tenant's record.
CLOSED_SESSIONS_MAX = 1_000
BUDGETS_PER_TENANT_MAX = 1000

# Ids that callers choose: tags, sessions, end users, models.
SUBJECT_CHARACTERS_MAX = 256
# How a budget's subject is named, by its kind; a tenant's needs no name.
SUBJECT_FIELDS = {
    SubjectKind.API_KEY: "api_key_id",
    SubjectKind.TAG: "tag_id",
    SubjectKind.SESSION: "session_id",
    SubjectKind.END_USER: "end_user",
    SubjectKind.MODEL: "model",
    SubjectKind.PROVIDER: "provider_id",
}
# Of a template: each subject is a counter in Redis (about 200 bytes) in each window that it calls in.
SUBJECTS_MAX_DEFAULT = 10_000
SUBJECTS_MAX = 1_000_000
ROLLING_MS_MIN = 60_000
ROLLING_MS_MAX = 366 * 24 * 3_600_000
THRESHOLD_BPS_DEFAULT = (5_000, 8_000, 10_000)
THRESHOLD_BPS_MAX = 100_000
THRESHOLDS_MAX = 20
# They travel in the tenant's record, which every call's process reads. Expired and removed ones do not count.
TOP_UPS_PER_BUDGET_MAX = 100
REASON_CHARACTERS_MAX = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[ItemT]):
    """One page of a listing. ``next_page_token`` is empty on the last page, else opaque."""

    items: tuple[ItemT, ...]
    next_page_token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A paying unit. ``version`` rises with every change of the tenant or of what its record holds, and is its etag.

    See ``TenantSnapshot`` for its settings. Those with a default are younger than answers that were kept without them.
    """

    tenant_id: str
    name: str
    status: Status
    version: int
    requests_per_minute: int
    output_tokens_max: int
    clamp: bool
    created_at_ms: int
    updated_at_ms: int
    deleted_at_ms: int | None = None
    tokens_per_minute: int = 0
    concurrent_calls: int = 0
    unbounded_share: int = 8
    stream_slice_tokens: int = 4096
    overrun: bool = False
    required_tags: tuple[str, ...] = ()


class TenantChanges(TypedDict, total=False):
    """The fields of a tenant to set; an absent one stays. ``status`` is ACTIVE or SUSPENDED."""

    name: str
    status: Status
    requests_per_minute: int
    output_tokens_max: int
    clamp: bool
    tokens_per_minute: int
    concurrent_calls: int
    unbounded_share: int
    stream_slice_tokens: int
    overrun: bool
    required_tags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One API key of a tenant. A limit of ``None``: only the tenant's holds. ``tags`` are on each of its calls."""

    tenant_id: str
    key_id: str
    name: str
    status: KeyStatus
    version: int
    requests_per_minute: int | None
    expires_at_ms: int | None
    created_at_ms: int
    revoked_at_ms: int | None = None
    tokens_per_minute: int | None = None
    concurrent_calls: int | None = None
    tags: tuple[str, ...] = ()


class ApiKeyChanges(TypedDict, total=False):
    """The fields of an API key to set; an absent one stays."""

    name: str
    requests_per_minute: int | None
    expires_at_ms: int | None
    tokens_per_minute: int | None
    concurrent_calls: int | None
    tags: tuple[str, ...]


class TagStatus(StrEnum):
    """Whether calls may carry a tag. Above an active one all are active, or it is refused nevertheless."""

    ACTIVE = "ACTIVE"
    INACTIVE = "INACTIVE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """One tag of a tenant's tree. ``parent_id`` is empty at a root; ``path`` are the ids from the root to this one."""

    tenant_id: str
    tag_id: str
    name: str
    parent_id: str
    path: str
    status: TagStatus
    version: int
    created_at_ms: int
    updated_at_ms: int


class TagChanges(TypedDict, total=False):
    """The fields of a tag to set; an absent one stays. Its place in the tree changes by a move."""

    name: str
    status: TagStatus


class SessionStatus(StrEnum):
    """Whether calls of a session pass."""

    ACTIVE = "ACTIVE"
    INACTIVE = "INACTIVE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One session, as its calls in the ledger tell it; the last name and path that any of them gave.

    The times are those of admission, ``None`` when no call of it is in the ledger.
    """

    tenant_id: str
    session_id: str
    status: SessionStatus
    name: str = ""
    path: str = ""
    first_call_at_ms: int | None = None
    last_call_at_ms: int | None = None
    calls: int = 0
    spent_nanos: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetDraft:
    """A budget as its creator describes it; see ``BudgetSpec`` for the fields."""

    budget_id: str
    subject_kind: SubjectKind
    window: WindowKind
    limit_nanos: int
    subject: str = ""
    zone: str = "UTC"
    mode: Mode = Mode.ENFORCE
    starts_at_ms: int | None = None
    ends_at_ms: int | None = None
    each: bool = False
    subjects_max: int = SUBJECTS_MAX_DEFAULT
    anchor_day: int = 1
    anchor_month: int = 1
    rolling_ms: int | None = None
    rollover_cap_nanos: int | None = None
    threshold_bps: tuple[int, ...] = THRESHOLD_BPS_DEFAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One budget. ``version`` is its etag; ``spec_version`` rises only when what it counts changes.

    ``rollover_cap_nanos`` bounds what an unused window leaves to the next (``None``: nothing); only windows that end
    after ``carries_since_ms`` leave something. ``seeding``: its counters do not have the past yet; ``previous_spec``
    is what is enforced meanwhile (``None``: it is new). ``top_ups`` are those that have not expired.
    """

    budget_id: str
    tenant_id: str
    subject_kind: SubjectKind
    subject: str
    window: WindowKind
    zone: str
    mode: Mode
    limit_nanos: int
    spec_version: int
    version: int
    starts_at_ms: int | None
    ends_at_ms: int | None
    created_at_ms: int
    updated_at_ms: int
    deleted_at_ms: int | None = None
    each: bool = False
    subjects_max: int = SUBJECTS_MAX_DEFAULT
    anchor_day: int = 1
    anchor_month: int = 1
    rolling_ms: int | None = None
    rollover_cap_nanos: int | None = None
    threshold_bps: tuple[int, ...] = THRESHOLD_BPS_DEFAULT
    seeding: bool = False
    previous_spec: BudgetSpec | None = None
    carries_since_ms: int = 0
    carried_nanos: int = 0
    carried_into_ms: int | None = None
    top_ups: tuple[TopUp, ...] = ()

    def specs(self) -> tuple[BudgetSpec, ...]:
        """Return all that the data plane needs of it: while it is seeding, also what is enforced meanwhile."""
        if self.previous_spec is None:
            return (self.spec(),)
        # A budget that no longer refuses, or was topped up, must not go on refusing as it did.
        return (self.spec(), replace(self.previous_spec, mode=self.mode, top_ups=self.top_ups))

    def spec(self) -> BudgetSpec:
        """Return what it is to be, as the data plane needs it."""
        return BudgetSpec(
            budget_id=self.budget_id,
            subject_kind=self.subject_kind,
            subject=self.subject,
            window=self.window,
            zone=self.zone,
            mode=self.mode,
            limit_nanos=self.limit_nanos,
            spec_version=self.spec_version,
            starts_at_ms=self.starts_at_ms,
            ends_at_ms=self.ends_at_ms,
            each=self.each,
            subjects_max=self.subjects_max,
            seeding=self.seeding,
            anchor_day=self.anchor_day,
            anchor_month=self.anchor_month,
            rolling_ms=self.rolling_ms,
            carried_nanos=self.carried_nanos,
            carried_into_ms=self.carried_into_ms,
            top_ups=self.top_ups,
        )


class BudgetChanges(TypedDict, total=False):
    """The fields of a budget to set; an absent one stays. The subject of a budget never changes."""

    limit_nanos: int
    mode: Mode
    window: WindowKind
    zone: str
    starts_at_ms: int | None
    ends_at_ms: int | None
    subjects_max: int
    anchor_day: int
    anchor_month: int
    rolling_ms: int | None
    rollover_cap_nanos: int | None
    threshold_bps: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopUpDraft:
    """A top-up as its creator describes it; ``starts_at_ms`` ``None``: now."""

    top_up_id: str
    amount_nanos: int
    reason: str
    starts_at_ms: int | None = None
    expires_at_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetTopUp:
    """Money added to a budget once, and why. It applies from its start until it expires or is removed."""

    top_up_id: str
    budget_id: str
    tenant_id: str
    amount_nanos: int
    reason: str
    starts_at_ms: int
    expires_at_ms: int | None
    created_at_ms: int
    removed_at_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetEvent:
    """A threshold that a budget's spent money has crossed, once a window; amounts as they were when that was seen.

    ``subject`` is whose spend it is; empty: the tenant's.
    """

    event_id: int
    tenant_id: str
    budget_id: str
    subject: str
    threshold_bps: int
    spent_nanos: int
    limit_nanos: int
    mode: Mode
    window_starts_at_ms: int
    window_resets_at_ms: int | None
    happened_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A threshold found crossed; see ``BudgetEvent``, which it becomes unless it is one already."""

    budget: Budget
    subject: str
    threshold_bps: int
    spent_nanos: int
    limit_nanos: int
    window_starts_at_ms: int
    window_resets_at_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One upstream. ``base_url`` is ``https://host[:port][/path]``; ``api_key_env`` names the variable with its key."""

    provider_id: str
    kind: str
    base_url: str
    api_key_env: str
    enabled: bool = True
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """One change of spent money: ``delta_nanos`` is signed; the sum over an operation is what it cost.

    ``amount_nanos`` is the operation's cost after this row. ``usage`` ``None``: the provider reported none.
    ``status`` is the HTTP status that the caller got, 0 when it got none.
    """

    operation_id: str
    tenant_id: str
    key_id: str
    api: str
    provider_id: str
    model: str
    stream: bool
    price_version: str
    rate_tier: str
    end: End
    rank: int
    sequence: int
    delta_nanos: int
    amount_nanos: int
    hold_nanos: int
    usage: Usage | None
    status: int
    detail: str
    held_at_ms: int
    ended_at_ms: int
    recorded_at_ms: int
    shard: int
    event_id: str
    tags: tuple[str, ...] = ()
    session_id: str = ""
    session_name: str = ""
    session_path: str = ""
    end_user: str = ""
    priced_model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerFilter:
    """Which ledger rows; an empty field does not restrict. ``until_ms`` is exclusive; times are admission times."""

    tenant_id: str = ""
    key_id: str = ""
    model: str = ""
    provider_id: str = ""
    tag: str = ""
    session_id: str = ""
    end_user: str = ""
    operation_id: str = ""
    end: End | None = None
    from_ms: int | None = None
    until_ms: int | None = None


class UsageGroup(StrEnum):
    """What usage sums are told by. A DAY is a UTC day of admission, spelled YYYY-MM-DD."""

    DAY = "DAY"
    MODEL = "MODEL"
    API_KEY = "API_KEY"
    TAG = "TAG"
    SESSION = "SESSION"
    END_USER = "END_USER"
    PROVIDER = "PROVIDER"


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSum:
    """The calls of one group, their cost, and what they used (the last report of each call; ``None``: none did)."""

    group: str
    operations: int
    cost_nanos: int
    usage: Usage
