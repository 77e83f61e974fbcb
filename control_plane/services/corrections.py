"""CorrectionService."""

from typing import Any

from budgetguard.core.entities import LedgerFilter
from budgetguard.core.errors import InvalidError
from budgetguard.core.money import format_usd
from budgetguard.v1 import correction_pb2, correction_pb2_grpc
from control_plane.corrections import Corrections
from control_plane.fields import dollars, instants_between
from control_plane.messages import ENDS, ENDS_BACK
from control_plane.services import ACTOR
from control_plane.services.tenants import Tenants


class CorrectionService(correction_pb2_grpc.CorrectionServiceServicer):
    """What operations truly cost."""

    def __init__(self, *, corrections: Corrections, tenants: Tenants) -> None:
        self._corrections = corrections
        self._tenants = tenants

    async def CorrectOperation(
        self, request: correction_pb2.CorrectOperationRequest, _context: Any
    ) -> correction_pb2.Correction:
        amount_nanos = _amount(request.amount_usd)
        corrected = await self._corrections.correct_one(
            request.operation_id, amount_nanos=amount_nanos, reason=request.reason, actor=ACTOR
        )
        row, before = corrected.row, corrected.before
        return correction_pb2.Correction(
            operation_id=row.operation_id,
            tenant_id=row.tenant_id,
            amount_usd=format_usd(row.amount_nanos),
            previous_usd=format_usd(before.amount_nanos),
            previous_end=ENDS[before.end],
            sequence=row.sequence,
        )

    async def CorrectOperations(
        self, request: correction_pb2.CorrectOperationsRequest, _context: Any
    ) -> correction_pb2.CorrectOperationsResponse:
        end = ENDS_BACK.get(request.end)
        if end is None:
            raise InvalidError("end", "expected EXPIRED, ESTIMATED, RELEASED, CONFIRMED or CORRECTED")
        tenant = await self._tenants.get(request.tenant_id)
        from_ms, until_ms = instants_between(request)
        corrected = await self._corrections.correct_all(
            LedgerFilter(
                tenant_id=tenant.tenant_id,
                end=end,
                from_ms=from_ms,
                until_ms=until_ms,
                key_id=request.api_key_id,
                model=request.model,
            ),
            amount_nanos=_amount(request.amount_usd),
            reason=request.reason,
            actor=ACTOR,
            validate_only=request.validate_only,
        )
        return correction_pb2.CorrectOperationsResponse(
            operations=len(corrected.before), moved_usd=format_usd(corrected.moved_nanos), more=corrected.more
        )


def _amount(text: str) -> int:
    if not text:
        raise InvalidError("amount_usd", "expected US dollars as a decimal number, got none")
    return dollars(text, field="amount_usd")
