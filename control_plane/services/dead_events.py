"""DeadEventService."""

from typing import Any, Protocol

from budgetguard.core.dead_events import DeadEventFilter, DeadEventState, RecordedDeadEvent
from budgetguard.core.entities import Page
from budgetguard.core.errors import InvalidError
from budgetguard.v1 import dead_event_pb2, dead_event_pb2_grpc
from control_plane.messages import timestamp
from control_plane.services import ACTOR

_SHARD_MAX = 255
_STATES = {state: dead_event_pb2.DeadEvent.State.Value(state) for state in DeadEventState}
_STATES_BACK = {number: state for state, number in _STATES.items()}


class DeadEvents(Protocol):
    """Where they are kept; see ``DeadEventRepository`` for what each may raise."""

    async def get(self, dead_event_id: str) -> RecordedDeadEvent: ...
    async def list(
        self, wanted: DeadEventFilter, *, page_size: int = 0, page_token: str = ""
    ) -> Page[RecordedDeadEvent]: ...
    async def retry(self, dead_event_id: str, *, actor: str) -> RecordedDeadEvent: ...
    async def discard(self, dead_event_id: str, *, reason: str, actor: str) -> RecordedDeadEvent: ...


class Counting(Protocol):
    """Brings a tenant's counters to what the ledger says; see ``Reconciler``."""

    async def follow(self, tenant_id: str) -> bool: ...


class DeadEventService(dead_event_pb2_grpc.DeadEventServiceServicer):
    """Usage that is in no ledger row: seen, and ended."""

    def __init__(self, *, events: DeadEvents, counting: Counting) -> None:
        self._events = events
        self._counting = counting

    async def ListDeadEvents(
        self, request: dead_event_pb2.ListDeadEventsRequest, _context: Any
    ) -> dead_event_pb2.ListDeadEventsResponse:
        state = _STATES_BACK.get(request.state)
        if request.state and state is None:
            raise InvalidError("state", f"expected {', '.join(DeadEventState)}")
        shard = request.shard if request.HasField("shard") else None
        if shard is not None and not 0 <= shard <= _SHARD_MAX:
            raise InvalidError("shard", f"expected 0 to {_SHARD_MAX}")
        wanted = DeadEventFilter(tenant_id=request.tenant_id, shard=shard, state=state)
        page = await self._events.list(wanted, page_size=request.page_size, page_token=request.page_token)
        return dead_event_pb2.ListDeadEventsResponse(
            dead_events=[_message(event) for event in page.items], next_page_token=page.next_page_token
        )

    async def GetDeadEvent(
        self, request: dead_event_pb2.GetDeadEventRequest, _context: Any
    ) -> dead_event_pb2.DeadEvent:
        return _message(await self._events.get(request.dead_event_id))

    async def RetryDeadEvent(
        self, request: dead_event_pb2.RetryDeadEventRequest, _context: Any
    ) -> dead_event_pb2.DeadEvent:
        return await self._followed(await self._events.retry(request.dead_event_id, actor=ACTOR))

    async def DiscardDeadEvent(
        self, request: dead_event_pb2.DiscardDeadEventRequest, _context: Any
    ) -> dead_event_pb2.DeadEvent:
        discarded = await self._events.discard(request.dead_event_id, reason=request.reason, actor=ACTOR)
        return await self._followed(discarded)

    async def _followed(self, event: RecordedDeadEvent) -> dead_event_pb2.DeadEvent:
        """Bring the counters there, also when it was ended before: whoever did that may not have come so far."""
        if event.tenant_id:
            # Otherwise (they are being rebuilt, or compared by others all the time) the next comparison does it.
            await self._counting.follow(event.tenant_id)
        return _message(event)


def _message(event: RecordedDeadEvent) -> dead_event_pb2.DeadEvent:
    return dead_event_pb2.DeadEvent(
        id=event.dead_event_id,
        shard=event.shard,
        tenant_id=event.tenant_id,
        error=event.error,
        fields=dict(event.fields),
        record_time=timestamp(event.recorded_at_ms),
        state=_STATES[event.state],
        reason=event.reason,
        resolve_time=None if event.resolved_at_ms is None else timestamp(event.resolved_at_ms),
    )
