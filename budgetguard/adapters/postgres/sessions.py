"""Sessions. The ledger tells what they did; stored is only which of them an administrator has closed."""

from collections.abc import Mapping
from typing import Any

from budgetguard.adapters.postgres.journal import write_audit
from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.postgres.pool import Connection, Database
from budgetguard.adapters.postgres.tenant_rows import living, lock_tenant, raise_version, read_tenant
from budgetguard.core.context import TEXT_CHARS_MAX, is_context_text
from budgetguard.core.entities import CLOSED_SESSIONS_MAX, Page, Session, SessionStatus
from budgetguard.core.errors import InvalidError, NotFoundError

SESSION = "session"

# The next ids after one, out of the index and without reading a session's other rows: each step jumps to a new id.
_NEXT_IDS = """
    WITH RECURSIVE called AS (
        (SELECT session_id FROM usage_ledger
            WHERE tenant_id = $1 AND session_id <> '' AND session_id > $2 ORDER BY session_id LIMIT 1)
        UNION ALL
        SELECT (SELECT row.session_id FROM usage_ledger AS row
            WHERE row.tenant_id = $1 AND row.session_id <> '' AND row.session_id > called.session_id
            ORDER BY row.session_id LIMIT 1)
        FROM called WHERE called.session_id IS NOT NULL
    ),
    known AS (
        SELECT session_id FROM sessions WHERE tenant_id = $1 AND session_id > $2 ORDER BY session_id LIMIT $3
    )
    SELECT session_id FROM (SELECT * FROM called LIMIT $3) AS first WHERE session_id IS NOT NULL
    UNION SELECT session_id FROM known
    ORDER BY session_id LIMIT $3
"""

_TOLD = """
    SELECT asked.session_id, coalesce(stored.status, 'ACTIVE') AS status, coalesce(row.name, '') AS name,
        coalesce(row.path, '') AS path, epoch_ms(row.first_call_at) AS first_call_at_ms,
        epoch_ms(row.last_call_at) AS last_call_at_ms, row.calls, row.spent_nanos
    FROM unnest($2::text[]) WITH ORDINALITY AS asked (session_id, position)
    LEFT JOIN sessions AS stored ON stored.tenant_id = $1 AND stored.session_id = asked.session_id
    CROSS JOIN LATERAL (
        SELECT min(held_at) AS first_call_at, max(held_at) AS last_call_at, count(DISTINCT operation_id) AS calls,
            coalesce(sum(delta_nanos), 0) AS spent_nanos,
            (array_agg(session_name ORDER BY held_at DESC) FILTER (WHERE session_name <> ''))[1] AS name,
            (array_agg(session_path ORDER BY held_at DESC) FILTER (WHERE session_path <> ''))[1] AS path
        FROM usage_ledger
        WHERE tenant_id = $1 AND usage_ledger.session_id = asked.session_id AND usage_ledger.session_id <> ''
    ) AS row
    ORDER BY asked.position
"""


class SessionRepository:
    """Sessions by tenant and id; one appears by itself with its first call."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, tenant_id: str, session_id: str) -> Session:
        """Return one session.

        Raises:
            NotFoundError: there is no such tenant, or no call of this session is in its ledger and nobody closed it.
        """
        async with self._database.transaction() as connection:
            living(await read_tenant(connection, tenant_id), tenant_id)
            stored = await _stored(connection, tenant_id, session_id)
            (session,) = await _told(connection, tenant_id, [session_id])
        if session.calls == 0 and stored is None:
            raise NotFoundError(SESSION, session_id)
        return session

    async def list(self, tenant_id: str, *, page_size: int = 0, page_token: str = "") -> Page[Session]:
        """List a tenant's sessions by id, closed ones too.

        Raises:
            NotFoundError: there is no such tenant.
            InvalidError: not a page token of this listing.
        """
        listing = f"{SESSION}/{tenant_id}"
        limit = page_limit(page_size)
        after = read_token(page_token, listing, [str])
        async with self._database.transaction() as connection:
            living(await read_tenant(connection, tenant_id), tenant_id)
            rows = await connection.fetch(_NEXT_IDS, tenant_id, after[0] if after else "", limit + 1)
            sessions = await _told(connection, tenant_id, [row["session_id"] for row in rows])
        return make_page(sessions, limit=limit, listing=listing, position=lambda session: [session.session_id])

    async def set_status(self, tenant_id: str, session_id: str, status: SessionStatus, *, actor: str) -> Session:
        """Close a session, known or not, or open it again. What is so already is not written.

        Raises:
            NotFoundError: there is no such tenant.
            InvalidError: the id cannot be one, or too many are closed.
        """
        if not session_id or not is_context_text(session_id) or session_id != session_id.strip():
            raise InvalidError("session_id", f"expected 1 to {TEXT_CHARS_MAX} characters, none of them a control one")
        async with self._database.transaction() as connection:
            await lock_tenant(connection, tenant_id)
            before = await _stored(connection, tenant_id, session_id)
            if status is not (before or SessionStatus.ACTIVE):
                await connection.execute(
                    """
                    INSERT INTO sessions (tenant_id, session_id, status) VALUES ($1, $2, $3)
                    ON CONFLICT (tenant_id, session_id) DO UPDATE SET status = excluded.status, updated_at = now()
                    """,
                    tenant_id,
                    session_id,
                    status,
                )
                if len(await closed_sessions(connection, tenant_id)) > CLOSED_SESSIONS_MAX:
                    expected = f"expected at most {CLOSED_SESSIONS_MAX} deactivated sessions a tenant"
                    raise InvalidError("session_id", f"{expected}: reactivate one that no longer calls")
                await write_audit(
                    connection,
                    actor=actor,
                    action="deactivate" if status is SessionStatus.INACTIVE else "reactivate",
                    kind=SESSION,
                    resource_id=session_id,
                    tenant_id=tenant_id,
                    before={"status": before or SessionStatus.ACTIVE},
                    after={"status": status},
                )
                await raise_version(connection, tenant_id)
            (session,) = await _told(connection, tenant_id, [session_id])
        return session


async def closed_sessions(connection: Connection, tenant_id: str) -> tuple[str, ...]:
    """Read which sessions of a tenant are closed."""
    rows = await connection.fetch(
        "SELECT session_id FROM sessions WHERE tenant_id = $1 AND status = 'INACTIVE' ORDER BY session_id", tenant_id
    )
    return tuple(row["session_id"] for row in rows)


async def _stored(connection: Connection, tenant_id: str, session_id: str) -> SessionStatus | None:
    status = await connection.fetchval(
        "SELECT status FROM sessions WHERE tenant_id = $1 AND session_id = $2", tenant_id, session_id
    )
    return None if status is None else SessionStatus(status)


async def _told(connection: Connection, tenant_id: str, session_ids: list[str]) -> list[Session]:
    rows = await connection.fetch(_TOLD, tenant_id, session_ids)
    return [_session(tenant_id, row) for row in rows]


def _session(tenant_id: str, row: Mapping[str, Any]) -> Session:
    changed = {"status": SessionStatus(row["status"]), "spent_nanos": int(row["spent_nanos"])}
    return Session(tenant_id=tenant_id, **{**row, **changed})
