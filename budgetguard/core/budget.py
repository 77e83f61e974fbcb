"""What is asked of the counters and what they answer. ``core/shard.py`` says how each answer is found."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from budgetguard.core.counter import Unit, calls_counter_name, counter_name, tokens_counter_name
from budgetguard.core.handoff import Handoff
from budgetguard.core.limits import limit_nanos
from budgetguard.core.money import CALL_NANOS_MAX, COUNTER_NANOS_MAX, ceil_div
from budgetguard.core.operation import ENDED_KEPT_MS, RANK, End, OperationFacts
from budgetguard.core.pricing import DEFAULT_TIER, FEMTOS_PER_NANO, caseless
from budgetguard.core.snapshot import BudgetSpec, KeySnapshot, Mode, SubjectKind, TenantSnapshot
from budgetguard.core.usage import Usage
from budgetguard.core.window import Window, bounds

# A reserve that runs this long after its caller's "now" ran after its caller gave up.
TOO_LATE_MS = 1000

# Undrained usage events of one shard (about 500 bytes each) over which no new hold is taken.
BACKLOG_MAX = 100_000

# A settle that finds neither hold nor marker still charges the counters, but only while a marker of the same operation
# would surely still exist (it outlives any end, so also the admission, by ENDED_KEPT_MS). Later the operation may have
# been counted and forgotten: then the event alone goes out and the ledger, which forgets nothing, decides. The margin
# is for clocks that differ.
FORGOTTEN_CHARGED_MS = ENDED_KEPT_MS - 60_000

# A call that names no output bound asks for at least this much output, however small its share of what is left. Only
# when that does not fit it takes less. reserve.lua knows the same number.
UNBOUNDED_TOKENS = 1_024

# The detail of an EXPIRED event.
LEASE_EXPIRED = "the lease ran out: nobody saw the end"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedLimit:
    """One counter that a call is counted in, and what it may reach there: in nanos, tokens or calls by ``unit``.

    A budget names itself and, if it is a template, its ``subject``; a limit of the tenant or the key its ``scope``.
    """

    counter: str
    unit: Unit
    limit: int
    enforced: bool = True
    budget_id: str = ""
    scope: SubjectKind = SubjectKind.TENANT
    subject: str = ""
    starts_at_ms: int = 0
    resets_at_ms: int | None = None
    # Of a template: how many subjects may have counters at the same time.
    subjects_max: int | None = None

    @property
    def whose(self) -> str:
        """Spell, as one line that a hold keeps, what it is a limit of."""
        return f"{self.budget_id} {self.scope.value} {self.starts_at_ms} {self.subject}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Ask to admit one call.

    ``tenant`` and ``key`` are the snapshots that the caller decided by; their versions are compared with Redis'.
    ``input_nanos`` bounds the input's cost; ``output_femtos`` is the bound for one output token, times choices, in
    femto-USD. ``output_tokens`` is the wanted bound of one choice, ``output_tokens_min`` the smallest acceptable one
    (equal when the call must not be clamped). ``input_tokens`` and ``choices`` count the call for token limits.
    ``eighth``: the request named no bound, so it takes at most its tenant's share (``unbounded_share``; 0: all) of what
    the tightest enforced budget has left, yet ``UNBOUNDED_TOKENS`` if that is more and fits.

    Raises:
        ValueError: a negative count, or a smallest bound above the wanted one.
    """

    facts: OperationFacts
    tenant: TenantSnapshot
    key: KeySnapshot
    now_ms: int
    input_nanos: int
    output_femtos: int
    output_tokens: int
    output_tokens_min: int
    input_tokens: int = 0
    choices: int = 1
    eighth: bool = False

    def __post_init__(self) -> None:
        counts = (self.input_nanos, self.output_femtos, self.output_tokens_min, self.input_tokens, self.choices)
        if min(counts) < 0:
            raise ValueError("expected amounts and counts of 0 or more")
        if self.output_tokens_min > self.output_tokens:
            raise ValueError("expected output_tokens_min of at most output_tokens")

    @property
    def hold_nanos(self) -> int:
        """The whole hold, exact."""
        return self._exact_nanos(self.output_tokens)

    @property
    def hold_nanos_min(self) -> int:
        """The smallest acceptable hold, exact."""
        return self._exact_nanos(self.output_tokens_min)

    @property
    def token_nanos(self) -> int:
        """One output token's cost in whole nanos, rounded up: what a clamped hold is counted by in the script."""
        return min(ceil_div(self.output_femtos, FEMTOS_PER_NANO), CALL_NANOS_MAX)

    def hold_nanos_for(self, tokens: int) -> int:
        """Return the hold that pays for ``tokens``: exact at both ends, by whole nanos a token between them."""
        if tokens == self.output_tokens:
            return self.hold_nanos
        if tokens == self.output_tokens_min:
            return self.hold_nanos_min
        return min(self.hold_nanos, self.input_nanos + tokens * self.token_nanos)

    def hold_tokens_for(self, tokens: int) -> int:
        """Return the tokens of the whole call, input and all choices, when a choice has ``tokens``."""
        return self.input_tokens + tokens * self.choices

    def _exact_nanos(self, tokens: int) -> int:
        return min(self.input_nanos + ceil_div(tokens * self.output_femtos, FEMTOS_PER_NANO), CALL_NANOS_MAX)

    @property
    def asked(self) -> str:
        """What is asked for, as one text: the same operation asking again asks for the same."""
        asked = (self.input_nanos, self.output_femtos, self.output_tokens, self.output_tokens_min)
        return " ".join(map(str, (*asked, self.input_tokens, self.choices, int(self.eighth))))

    def request_limits(self) -> tuple[tuple[SubjectKind, int], ...]:
        """List the requests a minute that the tenant and this key may make; 0 is unlimited."""
        return (
            (SubjectKind.TENANT, self.tenant.requests_per_minute),
            (SubjectKind.API_KEY, self.key.requests_per_minute or 0),
        )

    def limits(self) -> tuple[AppliedLimit, ...]:
        """List all that this call is counted in, in the order in which a refusal names it: calls, tokens, budgets."""
        scopes = (
            (SubjectKind.TENANT, "", self.tenant.concurrent_calls, self.tenant.tokens_per_minute),
            (SubjectKind.API_KEY, self.key.key_id, self.key.concurrent_calls, self.key.tokens_per_minute),
        )
        calls = [
            AppliedLimit(counter=calls_counter_name(key_id), unit=Unit.CALLS, limit=calls, scope=scope)
            for scope, key_id, calls, _ in scopes
            if calls
        ]
        tokens = [
            AppliedLimit(counter=tokens_counter_name(key_id, self.now_ms), unit=Unit.TOKENS, limit=tokens, scope=scope)
            for scope, key_id, _, tokens in scopes
            if tokens
        ]
        return (*calls, *tokens, *self.budgets())

    def budgets(self) -> tuple[AppliedLimit, ...]:
        """List the budgets that apply to this call now, in the tenant's order."""
        return applied_budgets(self.tenant, self.facts, self.now_ms)


def applied_budgets(tenant: TenantSnapshot, facts: OperationFacts, at_ms: int) -> tuple[AppliedLimit, ...]:
    """List the budgets that apply to a call that is admitted at this moment, in the tenant's order."""
    subjects = subjects_of(facts)
    applied = []
    for spec in tenant.budgets:
        mine = _counted(spec, facts, subjects)
        window = bounds(spec, at_ms) if mine else None
        if window is not None:
            applied += [_applied(spec, window, subject, at_ms) for subject in mine]
    return tuple(applied)


def counted_subjects(spec: BudgetSpec, facts: OperationFacts) -> tuple[str, ...]:
    """List whose counters of a budget a call is counted in: a template's subjects, else "" if it limits the call."""
    return _counted(spec, facts, subjects_of(facts))


def _counted(
    spec: BudgetSpec, facts: OperationFacts, subjects: Mapping[SubjectKind, tuple[str, ...]]
) -> tuple[str, ...]:
    mine = subjects[spec.subject_kind]
    if spec.each:
        return mine
    if spec.subject_kind is SubjectKind.MODEL:
        # The family by any spelling, a snapshot by its own; a provider may take a name in any case.
        limited = caseless(spec.subject) in {caseless(name) for name in (facts.model, *mine)}
    else:
        limited = spec.subject in mine
    return ("",) if limited else ()


def subjects_of(facts: OperationFacts) -> dict[SubjectKind, tuple[str, ...]]:
    """Say whose spend a call is, by kind; empty where it has no subject of that kind.

    A model has many spellings and one price: its subject is the priced one.
    """
    return {
        SubjectKind.TENANT: ("",),
        SubjectKind.API_KEY: (facts.key_id,),
        SubjectKind.TAG: facts.tags,
        SubjectKind.SESSION: (facts.session_id,) if facts.session_id else (),
        SubjectKind.END_USER: (facts.end_user,) if facts.end_user else (),
        SubjectKind.MODEL: (facts.priced_model or facts.model,),
        SubjectKind.PROVIDER: (facts.provider_id,),
    }


def _applied(spec: BudgetSpec, window: Window, subject: str, now_ms: int) -> AppliedLimit:
    enforced = spec.mode is Mode.ENFORCE and not spec.seeding
    return AppliedLimit(
        counter=counter_name(spec, window, subject),
        unit=Unit.NANOS,
        # An observed budget never refuses; only the counter itself has an end.
        limit=limit_nanos(spec, window, now_ms) if enforced else COUNTER_NANOS_MAX,
        enforced=enforced,
        budget_id=spec.budget_id,
        scope=spec.subject_kind,
        subject=subject or spec.subject,
        starts_at_ms=window.starts_at_ms,
        resets_at_ms=window.resets_at_ms,
        subjects_max=spec.subjects_max if spec.each else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """Admitted: the money is held.

    ``output_tokens`` is the bound that the hold pays for. ``requests_*`` tell the tighter of the two request limits
    after this call (``None`` without a limit), ``tokens_*`` the tighter of the two token limits, and
    ``budget_remaining_nanos`` and ``tightest_budget_id`` the enforced budget with the least left after this hold.
    """

    hold_nanos: int
    output_tokens: int
    counters: tuple[str, ...]
    requests_limit: int | None = None
    requests_remaining: int | None = None
    requests_reset_seconds: int | None = None
    budget_remaining_nanos: int | None = None
    tightest_budget_id: str | None = None
    tokens_limit: int | None = None
    tokens_remaining: int | None = None
    tokens_reset_seconds: int | None = None


class Refusal(StrEnum):
    """Why a reserve was refused, in the order in which the script decides."""

    NOT_READY = "NOT_READY"
    TOO_LATE = "TOO_LATE"
    REPLAYED = "REPLAYED"
    STALE = "STALE"
    BACKLOG_FULL = "BACKLOG_FULL"
    RATE = "RATE"
    SUBJECTS = "SUBJECTS"
    CALLS = "CALLS"
    TOKENS = "TOKENS"
    BUDGET = "BUDGET"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReserveRefused:
    """Refused; nothing was written.

    STALE sets ``scope``: whose snapshot to load again. RATE, CALLS and TOKENS set ``scope``, ``limit`` (requests a
    minute, calls under way, tokens a minute) and ``retry_after_ms``. BUDGET sets ``limit`` to ``needed`` in nanos and
    names the budget, its window and when it has room again. SUBJECTS, a template that has all the subjects it may
    have (``subjects_max``), sets the same but ``spent`` and ``held``: this subject has none.
    """

    kind: Refusal
    scope: SubjectKind | None = None
    limit: int = 0
    spent: int = 0
    held: int = 0
    needed: int = 0
    retry_after_ms: int | None = None
    budget_id: str | None = None
    subject: str = ""
    starts_at_ms: int | None = None
    resets_at_ms: int | None = None
    subjects_max: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """End an operation at ``amount_nanos`` (0 for RELEASED). ``ended_at_ms`` is when the end was seen.

    ``replaces`` is the sequence of the row that a CORRECTED end was decided upon: that one is replaced and no other, so
    that a correction can be corrected, counts once when it is sent twice, and undoes nothing that it did not know of.
    0: any end of a lower rank.

    Raises:
        ValueError: the amount is negative, or more than one call can carry.
    """

    handoff: Handoff
    end: End
    amount_nanos: int
    usage: Usage | None
    ended_at_ms: int
    status: int
    detail: str = ""
    rate_tier: str = DEFAULT_TIER
    replaces: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.amount_nanos <= CALL_NANOS_MAX:
            raise ValueError(f"expected an amount of 0 to {CALL_NANOS_MAX} nanos")
        if self.end is End.RELEASED and self.amount_nanos:
            raise ValueError("expected a release to cost nothing")
        if self.replaces and self.end is not End.CORRECTED:
            raise ValueError("expected only a correction to replace a row")

    @property
    def tokens(self) -> int | None:
        """What was used of a token limit; ``None`` when nobody said, so that what was held stands."""
        if self.end is End.RELEASED:
            return 0
        if self.usage is None or self.usage.input_tokens is None:
            return None
        return self.usage.input_tokens + (self.usage.output_tokens or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """How the operation stands now. The same settlement sent again gets the same answer."""

    end: End
    amount_nanos: int
    sequence: int


@dataclass(frozen=True, slots=True)
class NotReady:
    """The counters wait for the control plane's sign-off. Nothing was written: keep it and send it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RememberedEnd:
    """An operation whose end the ledger has, for a rebuild: ``amount_nanos`` and ``sequence`` of its last row."""

    tenant_id: str
    operation_id: str
    end: End
    amount_nanos: int
    hold_nanos: int
    sequence: int
    counters: tuple[str, ...]
    tokens: int = 0


def outranks(end: End, standing: End) -> bool:
    """Whether a later end replaces the one that stands."""
    return RANK[end] > RANK[standing]
