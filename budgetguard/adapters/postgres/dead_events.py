"""Dead events, and their two ends: each is one transaction with its audit row, so it happens once or not at all."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import orjson

from budgetguard.adapters.postgres.journal import write_audit
from budgetguard.adapters.postgres.ledger import insert_late, make_up
from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.postgres.pool import Connection, Database
from budgetguard.adapters.postgres.tenant_rows import TENANT, read_tenant
from budgetguard.adapters.redis.events import event_of
from budgetguard.core.dead_events import (
    DeadEventFilter,
    DeadEventState,
    RecordedDeadEvent,
    operation_told,
    split_dead_event_id,
)
from budgetguard.core.entities import REASON_CHARACTERS_MAX, Page
from budgetguard.core.errors import DeadEventRefusedError, DeadEventResolvedError, InvalidError, NotFoundError

DEAD_EVENT = "dead event"

_COLUMNS = """
    shard, event_id, tenant_id, error, fields, epoch_ms(recorded_at) AS recorded_at_ms, state, reason,
    epoch_ms(resolved_at) AS resolved_at_ms
"""


class DeadEventRepository:
    """Dead events. ``actor`` names who ends one, for the audit."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, dead_event_id: str) -> RecordedDeadEvent:
        """Return one.

        Raises:
            NotFoundError: there is none of this id.
        """
        async with self._database.transaction() as connection:
            return await _read(connection, dead_event_id)

    async def list(
        self, wanted: DeadEventFilter, *, page_size: int = 0, page_token: str = ""
    ) -> Page[RecordedDeadEvent]:
        """List them, newest first.

        Raises:
            InvalidError: not a page token of this very listing.
            NotFoundError: there never was such a tenant; those of a deleted one are listed.
        """
        listing = f"dead-events/{orjson.dumps(asdict(wanted)).decode()}"
        limit = page_limit(page_size)
        after = read_token(page_token, listing, [int, int, str])
        async with self._database.transaction() as connection:
            if wanted.tenant_id and await read_tenant(connection, wanted.tenant_id) is None:
                raise NotFoundError(TENANT, wanted.tenant_id)
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS} FROM dead_events
                WHERE ($1 = '' OR tenant_id = $1) AND ($2::smallint IS NULL OR shard = $2)
                    AND ($3::text IS NULL OR state = $3)
                    AND ($4::bigint IS NULL OR (epoch_ms(recorded_at), shard, event_id) < ($4, $5::integer, $6::text))
                ORDER BY epoch_ms(recorded_at) DESC, shard DESC, event_id DESC LIMIT $7
                """,
                wanted.tenant_id,
                wanted.shard,
                wanted.state,
                *(after or (None, None, None)),
                limit + 1,
            )
        return make_page(
            [_event_of(row) for row in rows],
            limit=limit,
            listing=listing,
            position=lambda event: [event.recorded_at_ms, event.shard, event.event_id],
        )

    async def retry(self, dead_event_id: str, *, actor: str) -> RecordedDeadEvent:
        """Write it to the ledger, as the drain would; one that was retried already is told, and left as it is.

        Not by way of the stream: there it would get another id, and a kill in between would leave it twice or nowhere.

        Raises:
            NotFoundError: there is none of this id.
            DeadEventResolvedError: it was discarded.
            DeadEventRefusedError: it still cannot be a row; it stands as it did.
        """
        async with self._database.transaction() as connection:
            dead = await _read(connection, dead_event_id, lock=True)
            if dead.state is DeadEventState.RETRIED:
                return dead
            if dead.state is not DeadEventState.STANDING:
                raise DeadEventResolvedError(dead_event_id, state=dead.state)
            try:
                event = event_of(dead.shard, dead.fields)
            except ValueError:
                raise DeadEventRefusedError(dead_event_id, error="malformed") from None
            refused = await insert_late(connection, (dead.shard, dead.event_id, event))
            if refused:
                raise DeadEventRefusedError(dead_event_id, error=refused)
            return await _resolve(connection, dead, DeadEventState.RETRIED, actor=actor)

    async def discard(self, dead_event_id: str, *, reason: str, actor: str) -> RecordedDeadEvent:
        """Say that the ledger is right without it; one that was discarded already is told, and left as it is.

        From then on the rows of its operation sum to what their last word says, also those that are still to come.

        Raises:
            NotFoundError: there is none of this id.
            DeadEventResolvedError: it was retried, so the ledger has it.
            DeadEventRefusedError: the ledger does not take the row that this needs; it stands as it did.
            InvalidError: the reason cannot be.
        """
        if not reason.strip():
            raise InvalidError("reason", "expected why it is discarded")
        if len(reason) > REASON_CHARACTERS_MAX or not reason.isprintable():
            raise InvalidError("reason", f"expected at most {REASON_CHARACTERS_MAX} printable characters")
        async with self._database.transaction() as connection:
            dead = await _read(connection, dead_event_id, lock=True)
            if dead.state is DeadEventState.DISCARDED:
                return dead
            if dead.state is not DeadEventState.STANDING:
                raise DeadEventResolvedError(dead_event_id, state=dead.state)
            # Only of its own tenant: what tells none may be told to be of anybody's operation.
            operation_id = operation_told(dead.fields) if dead.tenant_id else ""
            if operation_id:
                refused = await make_up(connection, dead, operation_id=operation_id)
                if refused:
                    raise DeadEventRefusedError(dead_event_id, error=refused, discarding=True)
            return await _resolve(
                connection, dead, DeadEventState.DISCARDED, actor=actor, reason=reason, operation_id=operation_id
            )


async def _read(connection: Connection, dead_event_id: str, *, lock: bool = False) -> RecordedDeadEvent:
    try:
        shard, event_id = split_dead_event_id(dead_event_id)
    except ValueError:
        raise NotFoundError(DEAD_EVENT, dead_event_id) from None
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM dead_events WHERE shard = $1 AND event_id = $2 {'FOR UPDATE' if lock else ''}",
        shard,
        event_id,
    )
    if row is None:
        raise NotFoundError(DEAD_EVENT, dead_event_id)
    return _event_of(row)


async def _resolve(
    connection: Connection,
    dead: RecordedDeadEvent,
    state: DeadEventState,
    *,
    actor: str,
    reason: str = "",
    operation_id: str = "",
) -> RecordedDeadEvent:
    row = await connection.fetchrow(
        f"""
        UPDATE dead_events SET state = $3, reason = $4, operation_id = $5, resolved_at = now()
        WHERE shard = $1 AND event_id = $2
        RETURNING {_COLUMNS}
        """,
        dead.shard,
        dead.event_id,
        state,
        reason,
        operation_id,
    )
    await write_audit(
        connection,
        actor=actor,
        action="retry" if state is DeadEventState.RETRIED else "discard",
        kind=DEAD_EVENT,
        resource_id=dead.dead_event_id,
        tenant_id=dead.tenant_id or None,
        # Not its fields, which jsonb may not be able to hold: they stay where they are.
        before={"state": dead.state, "error": dead.error},
        after={"state": state, "reason": reason},
    )
    return _event_of(row)


def _event_of(row: Mapping[str, Any]) -> RecordedDeadEvent:
    told = {**row, "fields": orjson.loads(row["fields"]), "state": DeadEventState(row["state"])}
    return RecordedDeadEvent(**told)
