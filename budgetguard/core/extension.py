"""What is asked for a hold that must grow, and what is answered: ``extend`` in ``core/shard.py`` says how."""

from dataclasses import dataclass

from budgetguard.core.money import CALL_NANOS_MAX
from budgetguard.core.snapshot import SubjectKind


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterLimit:
    """What a counter may reach, as the budget said when the call was admitted: that moment decides.

    ``scope`` and ``subject`` say whose it is, as in ``AppliedLimit``.
    """

    limit_nanos: int
    budget_id: str
    scope: SubjectKind = SubjectKind.TENANT
    starts_at_ms: int = 0
    subject: str = ""

    @classmethod
    def read(cls, limit_nanos: int, whose: str) -> "CounterLimit":
        """Read what ``AppliedLimit.whose`` spelled."""
        # A subject may have spaces, the others have none.
        budget_id, scope, starts_at, subject = whose.split(" ", 3)
        return cls(
            limit_nanos=limit_nanos,
            budget_id=budget_id,
            scope=SubjectKind(scope),
            starts_at_ms=int(starts_at),
            subject=subject,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """Raise an operation's hold to ``hold_nanos`` and ``hold_tokens``, in each of its counters or in none.

    The whole hold is named, not the difference: asked twice, it is raised once. ``force``: whatever the limits say.

    Raises:
        ValueError: the hold is more than one call can carry.
    """

    tenant_id: str
    operation_id: str
    counters: tuple[str, ...]
    hold_nanos: int
    hold_tokens: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.hold_nanos <= CALL_NANOS_MAX:
            raise ValueError(f"expected a hold of 0 to {CALL_NANOS_MAX} nanos")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended:
    """Held: ``hold_nanos`` in all, which is more than was asked for when somebody asked for more before."""

    hold_nanos: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionRefused:
    """The first budget that has no room for ``needed_nanos`` more. ``room_nanos`` is what every budget would let pass.

    ``resets_at_ms``: when it has room again, if that is known. Nothing was written.
    """

    limit: CounterLimit
    resets_at_ms: int | None
    spent_nanos: int
    held_nanos: int
    needed_nanos: int
    room_nanos: int


@dataclass(frozen=True, slots=True)
class NoHold:
    """There is no such hold (any more): it has ended, or its lease ran out."""
