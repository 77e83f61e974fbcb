"""RefusalService."""

from typing import Any, Protocol

from budgetguard.core.attempts import RecordedAttempt, RefusalCount, RefusalFilter, RefusalGroup
from budgetguard.core.entities import Page
from budgetguard.core.errors import InvalidError
from budgetguard.core.reasons import Reason
from budgetguard.v1 import refusal_pb2, refusal_pb2_grpc
from control_plane.fields import instants_between
from control_plane.refusal_messages import REFUSAL_GROUPS, refusal_message


class Refusals(Protocol):
    """Where refused calls are read; see ``RefusalRepository`` for what each may raise."""

    async def list(
        self, wanted: RefusalFilter, *, page_size: int = 0, page_token: str = ""
    ) -> Page[RecordedAttempt]: ...
    async def counts(self, wanted: RefusalFilter, *, by: RefusalGroup) -> tuple[RefusalCount, ...]: ...
    async def total(self, wanted: RefusalFilter) -> int: ...


class RefusalService(refusal_pb2_grpc.RefusalServiceServicer):
    """Refused calls, read."""

    def __init__(self, *, refusals: Refusals) -> None:
        self._refusals = refusals

    async def ListRefusals(
        self, request: refusal_pb2.ListRefusalsRequest, _context: Any
    ) -> refusal_pb2.ListRefusalsResponse:
        from_ms, until_ms = instants_between(request)
        wanted = RefusalFilter(
            tenant_id=request.tenant_id,
            key_id=request.api_key_id,
            reason=_reason(request.reason),
            model=request.model,
            session_id=request.session_id,
            from_ms=from_ms,
            until_ms=until_ms,
        )
        page = await self._refusals.list(wanted, page_size=request.page_size, page_token=request.page_token)
        return refusal_pb2.ListRefusalsResponse(
            refusals=[refusal_message(recorded) for recorded in page.items], next_page_token=page.next_page_token
        )

    async def CountRefusals(
        self, request: refusal_pb2.CountRefusalsRequest, _context: Any
    ) -> refusal_pb2.CountRefusalsResponse:
        by = REFUSAL_GROUPS.get(request.group_by)
        if by is None:
            raise InvalidError("group_by", "expected REASON, API_KEY, DAY or MINUTE")
        from_ms, until_ms = instants_between(request)
        wanted = RefusalFilter(
            tenant_id=request.tenant_id,
            key_id=request.api_key_id,
            reason=_reason(request.reason),
            from_ms=from_ms,
            until_ms=until_ms,
        )
        counts = await self._refusals.counts(wanted, by=by)
        return refusal_pb2.CountRefusalsResponse(
            counts=[refusal_pb2.RefusalCount(group=one.group, count=one.count) for one in counts],
            total=await self._refusals.total(wanted),
        )


def _reason(text: str) -> Reason | None:
    try:
        return Reason(text) if text else None
    except ValueError:
        raise InvalidError("reason", f"expected a refusal's code, such as {Reason.BUDGET_EXCEEDED}") from None
