"""SessionService."""

from typing import Any, Protocol

from budgetguard.core.entities import Page, Session, SessionStatus
from budgetguard.v1 import session_pb2, session_pb2_grpc
from control_plane.messages import session_message
from control_plane.services import ACTOR


class Sessions(Protocol):
    """Where sessions are known; see ``SessionRepository`` for what each may raise."""

    async def get(self, tenant_id: str, session_id: str) -> Session: ...
    async def list(self, tenant_id: str, *, page_size: int = 0, page_token: str = "") -> Page[Session]: ...
    async def set_status(self, tenant_id: str, session_id: str, status: SessionStatus, *, actor: str) -> Session: ...


class TenantPublisher(Protocol):
    """Tells the data plane of a tenant and its closed sessions; raises ``NotPublishedError``."""

    async def tenant(self, tenant_id: str) -> None: ...


class SessionService(session_pb2_grpc.SessionServiceServicer):
    """Sessions."""

    def __init__(self, *, sessions: Sessions, publisher: TenantPublisher) -> None:
        self._sessions = sessions
        self._publisher = publisher

    async def GetSession(self, request: session_pb2.GetSessionRequest, _context: Any) -> session_pb2.Session:
        return session_message(await self._sessions.get(request.tenant_id, request.session_id))

    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, _context: Any
    ) -> session_pb2.ListSessionsResponse:
        page = await self._sessions.list(request.tenant_id, page_size=request.page_size, page_token=request.page_token)
        return session_pb2.ListSessionsResponse(
            sessions=[session_message(session) for session in page.items], next_page_token=page.next_page_token
        )

    async def DeactivateSession(
        self, request: session_pb2.DeactivateSessionRequest, _context: Any
    ) -> session_pb2.Session:
        return await self._set(request.tenant_id, request.session_id, SessionStatus.INACTIVE)

    async def ReactivateSession(
        self, request: session_pb2.ReactivateSessionRequest, _context: Any
    ) -> session_pb2.Session:
        return await self._set(request.tenant_id, request.session_id, SessionStatus.ACTIVE)

    async def _set(self, tenant_id: str, session_id: str, status: SessionStatus) -> session_pb2.Session:
        session = await self._sessions.set_status(tenant_id, session_id, status, actor=ACTOR)
        await self._publisher.tenant(tenant_id)
        return session_message(session)
