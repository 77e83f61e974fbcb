"""Corrects what operations cost: by a settlement of the highest rank, so that counters and ledger move together."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Protocol

from budgetguard.core.budget import NotReady, Settled, Settlement
from budgetguard.core.entities import PAGE_SIZE_MAX, LedgerFilter, LedgerRow, Page
from budgetguard.core.errors import DependencyUnavailableError, InvalidError, NotFoundError, OperationChangedError
from budgetguard.core.events import DETAIL_CHARS_MAX
from budgetguard.core.handoff import Handoff
from budgetguard.core.money import CALL_NANOS_MAX, format_usd
from budgetguard.core.operation import End, OperationFacts
from budgetguard.core.pricing import RateCard

# Operations of one call.
CORRECTIONS_MAX = 1_000
# Settlements under way at the same time.
_CONCURRENT = 32


class Ledger(Protocol):
    """How operations stand; see ``LedgerReader`` for what it may raise."""

    async def standing(
        self, wanted: LedgerFilter, *, limit: int, but_at_nanos: int | None = None
    ) -> tuple[LedgerRow, ...]:
        """Return the row of each operation that stands."""

    async def list(self, wanted: LedgerFilter, *, page_size: int = 0) -> Page[LedgerRow]:
        """Return rows, the newest first."""


class Settling(Protocol):
    """Ends operations by rank; raises ``CountersUnavailableError``."""

    async def settle(self, settlement: Settlement, *, now_ms: int) -> Settled | NotReady:
        """End an operation, or raise the rank of its end."""


class Counting(Protocol):
    """Brings counters to what the ledger says; see ``Reconciler``."""

    async def ledger_has_all(self, tenant_id: str) -> bool:
        """Wait until the ledger has what the counters have, and say whether it has."""

    async def follow(self, tenant_id: str) -> bool:
        """Bring the counters to the ledger, and say whether that was possible."""


class Audit(Protocol):
    """Writes down who changed what; see ``AuditTrail``."""

    async def write(
        self, *, actor: str, action: str, kind: str, resource_id: str, tenant_id: str, after: object
    ) -> None:
        """Write one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectedOne:
    """A correction: the row that it became, and the one that stood before."""

    row: LedgerRow
    before: LedgerRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """What became of operations: the rows that stood before, and by how much the tenant's spend changes (signed)."""

    before: tuple[LedgerRow, ...]
    moved_nanos: int
    more: bool


class Corrections:
    """Corrects operations whose end is in the ledger. ``now_ms`` is the clock in Unix milliseconds."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        counting: Counting,
        counters: Settling,
        audit: Audit,
        now_ms: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._counting = counting
        self._counters = counters
        self._audit = audit
        self._now_ms = now_ms

    async def correct_one(self, operation_id: str, *, amount_nanos: int, reason: str, actor: str) -> CorrectedOne:
        """Set what one operation cost. One that is corrected to this amount already is told, and left as it is.

        Raises:
            InvalidError: the amount or the reason cannot be.
            NotFoundError: no end of it is in the ledger.
            OperationChangedError: another correction, or a better known end, came first.
            DependencyUnavailableError, CountersUnavailableError: nothing was changed, or all was: send it again.
        """
        _check(amount_nanos, reason)
        standing = await self._ledger.standing(LedgerFilter(operation_id=operation_id), limit=1)
        if not standing:
            raise NotFoundError("ended operation", operation_id)
        (row,) = standing
        if (row.end, row.amount_nanos) == (End.CORRECTED, amount_nanos):
            return await self._as_recorded(operation_id, row.sequence)
        # Before the money moves: an intent that came to nothing harms less than a change that nobody can explain.
        await self._audit.write(
            actor=actor,
            action="correct",
            kind="operation",
            resource_id=operation_id,
            tenant_id=row.tenant_id,
            after={"amount_nanos": amount_nanos, "before_nanos": row.amount_nanos, "reason": reason},
        )
        answer = await self._correct(row, amount_nanos, reason)
        if (answer.end, answer.amount_nanos) != (End.CORRECTED, amount_nanos):
            # What came first is in the ledger by the time that somebody reads it; if not, the next try says this again.
            await self._counting.ledger_has_all(row.tenant_id)
            raise OperationChangedError(operation_id)
        await self._follow(row.tenant_id)
        return await self._as_recorded(operation_id, answer.sequence)

    async def _as_recorded(self, operation_id: str, sequence: int) -> CorrectedOne:
        """Tell a correction from the ledger, so that whoever sends it again is told the same."""
        rows = (await self._ledger.list(LedgerFilter(operation_id=operation_id), page_size=PAGE_SIZE_MAX)).items
        for row, before in pairwise(rows):  # the last word first
            if (row.end, row.sequence) == (End.CORRECTED, sequence):
                return CorrectedOne(row=row, before=before)
        raise DependencyUnavailableError("the ledger (what was corrected is not in it yet)")

    async def correct_all(
        self, wanted: LedgerFilter, *, amount_nanos: int, reason: str, actor: str, validate_only: bool
    ) -> Corrected:
        """Set what each operation cost whose last row is as wanted, ``CORRECTIONS_MAX`` at the most.

        Those that are corrected to this amount already are left out. The rows are there before this returns, so that
        asking again finds the others.

        Raises:
            InvalidError: the amount or the reason cannot be, or a time is out of range.
            DependencyUnavailableError, CountersUnavailableError: some are corrected; send it again for the others.
        """
        _check(amount_nanos, reason)
        found = await self._ledger.standing(wanted, limit=CORRECTIONS_MAX + 1, but_at_nanos=amount_nanos)
        rows = found[:CORRECTIONS_MAX]
        corrected = Corrected(
            before=rows,
            moved_nanos=sum(amount_nanos - row.amount_nanos for row in rows),
            more=len(found) > CORRECTIONS_MAX,
        )
        if validate_only or not rows:
            return corrected
        await self._audit.write(
            actor=actor,
            action="correct",
            kind="operations",
            resource_id=wanted.tenant_id,
            tenant_id=wanted.tenant_id,
            after={
                "wanted": asdict(wanted),
                "amount_nanos": amount_nanos,
                "operations": len(rows),
                "moved_usd": format_usd(corrected.moved_nanos),
                "reason": reason,
            },
        )
        answers: list[Settled] = []
        for start in range(0, len(rows), _CONCURRENT):
            part = rows[start : start + _CONCURRENT]
            answers += await asyncio.gather(*(self._correct(row, amount_nanos, reason) for row in part))
        await self._follow(wanted.tenant_id)
        # What became better known meanwhile stays as it is.
        rows = tuple(
            row
            for row, answer in zip(rows, answers, strict=True)
            if (answer.end, answer.amount_nanos) == (End.CORRECTED, amount_nanos)
        )
        moved_nanos = sum(amount_nanos - row.amount_nanos for row in rows)
        return replace(corrected, before=rows, moved_nanos=moved_nanos)

    async def _follow(self, tenant_id: str) -> None:
        """Wait until the rows are there, and every counter has them: also one that is younger than the call."""
        if not await self._counting.ledger_has_all(tenant_id):
            raise DependencyUnavailableError("the ledger (what was corrected is not in it yet)")
        # Otherwise (the counters are being rebuilt, or compared by others all the time) the next comparison does it.
        await self._counting.follow(tenant_id)

    async def _correct(self, row: LedgerRow, amount_nanos: int, reason: str) -> Settled:
        """Correct what this row says, and return what stands now: something else, if another row does."""
        facts = OperationFacts(**{field.name: getattr(row, field.name) for field in fields(OperationFacts)})
        settlement = Settlement(
            # Where it was counted, Redis knows, or the comparison with the ledger finds out.
            handoff=Handoff(
                facts=facts,
                counters=(),
                hold_nanos=row.hold_nanos,
                input_tokens_bound=0,
                output_tokens_bound=0,
                rate_card=RateCard(row.price_version, {}),
                service_tier=row.rate_tier,
            ),
            end=End.CORRECTED,
            amount_nanos=amount_nanos,
            usage=row.usage,
            ended_at_ms=self._now_ms(),
            status=row.status,
            detail=reason,
            rate_tier=row.rate_tier,
            replaces=row.sequence,
        )
        answer = await self._counters.settle(settlement, now_ms=self._now_ms())
        if isinstance(answer, NotReady):
            raise DependencyUnavailableError("the counters (they are being rebuilt)")
        return answer


def _check(amount_nanos: int, reason: str) -> None:
    if amount_nanos > CALL_NANOS_MAX:
        raise InvalidError(
            "amount_usd", f"expected at most {format_usd(CALL_NANOS_MAX)}, the most that a call can cost"
        )
    if not reason.strip():
        raise InvalidError("reason", "expected why it is corrected")
    if len(reason) > DETAIL_CHARS_MAX or "\x00" in reason:
        raise InvalidError("reason", f"expected at most {DETAIL_CHARS_MAX} characters, none of them NUL")
