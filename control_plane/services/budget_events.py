"""BudgetEventService."""

from typing import Any, Protocol

from budgetguard.core.entities import BudgetEvent, Page
from budgetguard.v1 import budget_event_pb2, budget_event_pb2_grpc
from control_plane.messages import budget_event_message


class BudgetEvents(Protocol):
    """Where events are kept; see ``BudgetEventRepository`` for what it may raise."""

    async def list(
        self, *, tenant_id: str = "", budget_id: str = "", page_size: int = 0, page_token: str = ""
    ) -> Page[BudgetEvent]: ...


class BudgetEventService(budget_event_pb2_grpc.BudgetEventServiceServicer):
    """What has happened to budgets, read."""

    def __init__(self, *, events: BudgetEvents) -> None:
        self._events = events

    async def ListBudgetEvents(
        self, request: budget_event_pb2.ListBudgetEventsRequest, _context: Any
    ) -> budget_event_pb2.ListBudgetEventsResponse:
        page = await self._events.list(
            tenant_id=request.tenant_id,
            budget_id=request.budget_id,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return budget_event_pb2.ListBudgetEventsResponse(
            events=[budget_event_message(event) for event in page.items], next_page_token=page.next_page_token
        )
