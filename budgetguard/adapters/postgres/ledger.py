"""The usage ledger: rows are only ever added, each a signed change of what was spent, unique by what it tells."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import orjson

from budgetguard.adapters.postgres.pool import POISON, Connection, Database, fetch_within, moment
from budgetguard.adapters.redis.keys import shard_of
from budgetguard.core.dead_events import RecordedDeadEvent, operation_told, tenant_told
from budgetguard.core.events import UsageEvent, entry_order
from budgetguard.core.operation import End, OperationFacts
from budgetguard.core.snapshot import SubjectKind

# One event on its way in: (shard, stream entry id, event).
Delivery = tuple[int, str, UsageEvent]

# As core/pricing.py's caseless().
_C = 'COLLATE "C"'
# How a subject's rows are found: a tenant's are all of them. The indexes of sessions and end users have only rows with
# one, so that it is one must be said, or a plan for whichever subject cannot use them.
SUBJECT_CONDITION = {
    SubjectKind.TENANT: "$2::text = ''",
    SubjectKind.API_KEY: "key_id = $2",
    SubjectKind.TAG: "tags ? $2",
    SubjectKind.SESSION: "session_id = $2 AND session_id <> ''",
    SubjectKind.END_USER: "end_user = $2 AND end_user <> ''",
    SubjectKind.MODEL: f"lower($2::text {_C}) IN (lower(model {_C}), lower(priced_model {_C}))",
    SubjectKind.PROVIDER: "provider_id = $2",
}

_INSERT_COLUMNS = (
    ("held_at", "timestamptz"),
    ("operation_id", "text"),
    ("rank", "smallint"),
    ("sequence", "integer"),
    ("end_state", "text"),
    ("tenant_id", "text"),
    ("key_id", "text"),
    ("api", "text"),
    ("provider_id", "text"),
    ("model", "text"),
    ("stream", "boolean"),
    ("price_version", "text"),
    ("rate_tier", "text"),
    ("delta_nanos", "bigint"),
    ("amount_nanos", "bigint"),
    ("hold_nanos", "bigint"),
    ("usage", "jsonb"),
    ("status", "integer"),
    ("detail", "text"),
    ("ended_at", "timestamptz"),
    ("shard", "smallint"),
    ("event_id", "text"),
    ("tags", "jsonb"),
    ("session_id", "text"),
    ("end_user", "text"),
    ("session_name", "text"),
    ("session_path", "text"),
    ("priced_model", "text"),
)
_NAMES = ", ".join(name for name, _ in _INSERT_COLUMNS)
# JSON goes in as an array of texts: a text array can hold NULLs beside JSON, whatever codec jsonb has.
_ARRAYS = ", ".join(
    f"${number}::{'text' if kind == 'jsonb' else kind}[]" for number, (_, kind) in enumerate(_INSERT_COLUMNS, 1)
)
_CASTS = ", ".join(f"{name}::jsonb" if kind == "jsonb" else name for name, kind in _INSERT_COLUMNS)

_INSERT = f"""
    INSERT INTO usage_ledger ({_NAMES})
    SELECT {_CASTS} FROM unnest({_ARRAYS}) AS event ({_NAMES})
    ON CONFLICT DO NOTHING
"""

# An operation that Redis had forgotten: the ledger knows what it has cost so far, and which end already stands.
_INSERT_FORGOTTEN = f"""
    INSERT INTO usage_ledger ({_NAMES})
    SELECT {_CASTS.replace("delta_nanos", "amount_nanos - standing.cost_nanos", 1)}
    FROM unnest({_ARRAYS}) AS event ({_NAMES}), LATERAL (
        SELECT coalesce(sum(row.delta_nanos), 0)::bigint AS cost_nanos, coalesce(max(row.rank), 0) AS rank_max,
            coalesce(max(row.sequence) FILTER (WHERE row.rank = 4), 0) AS sequence_max
        FROM usage_ledger AS row WHERE row.held_at = event.held_at AND row.operation_id = event.operation_id
    ) AS standing
    WHERE standing.rank_max < event.rank OR (event.rank = 4 AND standing.sequence_max = event.sequence - 1)
    ON CONFLICT DO NOTHING
"""

# What the rows of an event's operation sum to, and the amount that a word above the event's says, if there is one.
_STANDING_AND_LATER = """LATERAL (
        SELECT coalesce(sum(row.delta_nanos), 0)::bigint AS cost_nanos
        FROM usage_ledger AS row WHERE row.held_at = event.held_at AND row.operation_id = event.operation_id
    ) AS standing LEFT JOIN LATERAL (
        SELECT row.amount_nanos AS last_nanos FROM usage_ledger AS row
        WHERE row.held_at = event.held_at AND row.operation_id = event.operation_id
            AND (row.rank > event.rank OR (row.rank = event.rank AND (row.rank < 4 OR row.sequence >= event.sequence)))
        ORDER BY row.rank DESC, row.sequence DESC LIMIT 1
    ) AS later ON true"""

# One that was put aside, after others of the operation may have come: its cost is what the last word says, and what
# the rows lack of that is this one's. It is a row in any case, so that the stream can never bring it again.
_INSERT_LATE = f"""
    INSERT INTO usage_ledger ({_NAMES})
    SELECT {_CASTS.replace("delta_nanos", "coalesce(last_nanos, amount_nanos) - cost_nanos", 1)}
    FROM unnest({_ARRAYS}) AS event ({_NAMES}), {_STANDING_AND_LATER}
    ON CONFLICT DO NOTHING
"""

# A hold that ran out. A Redis that came back older may tell it of a call whose end is in the ledger, and the rows say
# what the end does: then nothing is lacking. Where they do not, this is what later ends have told their difference to:
# they came first, for a worker was killed that had taken it.
_INSERT_EXPIRED = f"""
    INSERT INTO usage_ledger ({_NAMES})
    SELECT {_CASTS} FROM unnest({_ARRAYS}) AS event ({_NAMES}), {_STANDING_AND_LATER}
    WHERE last_nanos IS NULL OR last_nanos <> cost_nanos
    ON CONFLICT DO NOTHING
"""

# What makes up for an event that will never be a row, where later ones told their difference to it. The event may be
# hardly readable, so the row is made like the operation's first one, which the ledger took, and stands before it: it is
# never the last word. It happened when the event did, for counters have it from there.
_MADE_UP = {
    "sequence": "least(sequence, 1) - 1",
    "delta_nanos": "last_nanos - cost_nanos",
    "amount_nanos": "last_nanos",
    "usage": "NULL",
    "event_id": "$3::text",
    "detail": "$4::text",
}
_MAKE_UP = f"""
    INSERT INTO usage_ledger ({_NAMES})
    SELECT {", ".join(_MADE_UP.get(name, name) for name, _ in _INSERT_COLUMNS)} FROM (
        SELECT DISTINCT ON (held_at) *, sum(delta_nanos) OVER call AS cost_nanos,
            first_value(amount_nanos) OVER (call ORDER BY rank DESC, sequence DESC) AS last_nanos
        FROM usage_ledger WHERE tenant_id = $1 AND operation_id = $2
        WINDOW call AS (PARTITION BY held_at)
        ORDER BY held_at, rank, sequence
    ) AS first
    WHERE cost_nanos <> last_nanos
"""

# Locks the shard's position until the commit, so two workers never write one shard's rows at the same time, and a
# forgotten operation's sum cannot miss a row. The position never goes back.
_MOVE_POSITION = """
    INSERT INTO drain_positions AS position (shard, stream_ms, stream_sequence) VALUES ($1, $2, $3)
    ON CONFLICT (shard) DO UPDATE SET updated_at = now(),
        stream_ms = CASE WHEN (position.stream_ms, position.stream_sequence)
            < (excluded.stream_ms, excluded.stream_sequence) THEN excluded.stream_ms ELSE position.stream_ms END,
        stream_sequence = CASE WHEN (position.stream_ms, position.stream_sequence)
            < (excluded.stream_ms, excluded.stream_sequence) THEN excluded.stream_sequence
            ELSE position.stream_sequence END
"""

# Row by row: a join of two sets may be planned as one over the whole ledger, this is a look at an index each.
_LAST_WORDS = """
    WITH wanted AS (
        SELECT held_at, operation_id FROM usage_ledger
        WHERE tenant_id = $1 AND held_at >= $2 AND recorded_at >= $3
        UNION
        SELECT held_at, operation_id FROM usage_ledger WHERE tenant_id = $1 AND operation_id = ANY($4::text[])
    )
    SELECT standing.*, epoch_ms(standing.held_at) AS held_at_ms FROM wanted, LATERAL (
        SELECT * FROM usage_ledger AS row
        WHERE row.held_at = wanted.held_at AND row.operation_id = wanted.operation_id
        ORDER BY rank DESC, sequence DESC LIMIT 1
    ) AS standing
    ORDER BY standing.held_at, standing.operation_id
"""

_FACTS = tuple(field.name for field in fields(OperationFacts))

ERROR_CHARACTERS_MAX = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Inserted:
    """What became of some events: new rows, and those that cannot be rows and were put aside now."""

    rows: int
    dead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadEvent:
    """An event that cannot become a row, as it came from the stream."""

    shard: int
    event_id: str
    fields: Mapping[str, str]
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWord:
    """How an operation stands: its row of the highest rank."""

    facts: OperationFacts
    end: End
    amount_nanos: int
    hold_nanos: int
    sequence: int


class LedgerRepository:
    """Adds rows, and sums what was spent. ``LedgerReader`` lists them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert_events(self, deliveries: Sequence[Delivery], *, dead: Sequence[DeadEvent] = ()) -> Inserted:
        """Write events and the drain positions of their shards in one transaction; what is there already is skipped.

        An event that Postgres refuses (out of range, a NUL character) is put aside with ``dead`` instead of blocking
        the ones behind it.

        Raises:
            DependencyUnavailableError: Postgres does not answer; the same deliveries may be given again.
        """
        rows, put_aside, refused = 0, 0, list(dead)
        async with self._database.transaction() as connection:
            await _move_positions(
                connection, [*((s, i) for s, i, _ in deliveries), *((d.shard, d.event_id) for d in dead)]
            )
            discarded = await _discarded(connection, deliveries)
            for statement, run in groupby(deliveries, key=lambda delivery: _statement(delivery, discarded)):
                added, wrong = await _insert(connection, list(run), statement=statement)
                rows += added
                refused += wrong
            if refused:
                put_aside = await _put_aside(connection, refused)
        return Inserted(rows=rows, dead=put_aside)

    async def positions(self) -> dict[int, tuple[int, int]]:
        """Return the newest stream entry that Postgres has of each shard, as (ms, sequence)."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch("SELECT shard, stream_ms, stream_sequence FROM drain_positions")
        return {row["shard"]: (row["stream_ms"], row["stream_sequence"]) for row in rows}

    async def spent(
        self, *, tenant_id: str, subject_kind: SubjectKind, subject: str, from_ms: int, until_ms: int | None
    ) -> int:
        """Sum what a budget's subject has spent by calls admitted in ``[from_ms, until_ms)``, in nanos, exactly."""
        async with self._database.transaction() as connection:
            total = await connection.fetchval(
                f"""
                SELECT coalesce(sum(delta_nanos), 0) FROM usage_ledger
                WHERE tenant_id = $1 AND {SUBJECT_CONDITION[subject_kind]}
                    AND held_at >= $3 {"" if until_ms is None else "AND held_at < $4"}
                """,
                tenant_id,
                subject,
                moment(from_ms),
                *(() if until_ms is None else (moment(until_ms),)),
            )
        return int(total)

    async def last_words(
        self,
        tenant_id: str,
        *,
        held_from_ms: int,
        recorded_from_ms: int,
        operation_ids: Collection[str] = (),
        within_s: float | None = None,
    ) -> tuple[LastWord, ...]:
        """List how operations of a tenant stand, by all of their rows, oldest first.

        Those that were admitted since ``held_from_ms`` and of which something was recorded since ``recorded_from_ms``:
        what was recorded lately may have ended long before. And those named, of whatever age. ``within_s``: the time
        that it may take.
        """
        async with self._database.transaction() as connection:
            rows = await fetch_within(
                connection,
                within_s,
                _LAST_WORDS,
                tenant_id,
                moment(held_from_ms),
                moment(recorded_from_ms),
                list(operation_ids),
            )
        return tuple(
            LastWord(
                facts=OperationFacts(**{**{name: row[name] for name in _FACTS}, "tags": tuple(row["tags"])}),
                end=End(row["end_state"]),
                amount_nanos=row["amount_nanos"],
                hold_nanos=row["hold_nanos"],
                sequence=row["sequence"],
            )
            for row in rows
        )

    async def alarms(self) -> dict[str, int]:
        """Count what should not be: rows in the DEFAULT partition, events put aside that nobody has ended."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                """
                SELECT (SELECT count(*) FROM usage_ledger_default) AS default_partition_rows,
                    (SELECT count(*) FROM dead_events WHERE state = 'STANDING') AS dead_events
                """
            )
        return dict(row)


async def insert_late(connection: Connection, delivery: Delivery) -> str:
    """Write an event that was put aside. Says why Postgres still refuses it; empty: it is written, or was before."""
    shard, event_id, _ = delivery
    # For its lock: nobody else writes a row of this operation meanwhile.
    await _move_positions(connection, [(shard, event_id)])
    try:
        await _insert_all(connection, _INSERT_LATE, [delivery])
    except POISON as error:
        return _refused(error)
    return ""


async def make_up(connection: Connection, dead: RecordedDeadEvent, *, operation_id: str) -> str:
    """Let the rows of a discarded event's operation say what their last word says; says why Postgres refuses that.

    Events of it that come later are seen to by whoever writes them.
    """
    # For its lock: what is not a row by now is written by somebody who sees that the event is discarded.
    await _move_positions(connection, [(dead.shard, dead.event_id)])
    detail = f"makes up for the dead event {dead.dead_event_id}, which was discarded"
    try:
        async with connection.transaction():
            await connection.execute(_MAKE_UP, dead.tenant_id, operation_id, dead.event_id, detail)
    except POISON as error:
        return _refused(error)
    return ""


async def _move_positions(connection: Connection, entries: Sequence[tuple[int, str]]) -> None:
    newest: dict[int, tuple[int, int]] = {}
    for shard, event_id in entries:
        newest[shard] = max(newest.get(shard, (0, 0)), entry_order(event_id))
    # In shard order, so that two workers cannot each wait for the other.
    await connection.executemany(_MOVE_POSITION, [(shard, *newest[shard]) for shard in sorted(newest)])


async def _discarded(connection: Connection, deliveries: Sequence[Delivery]) -> list[str]:
    """List operations of which an event was discarded: later ones may tell their difference to what no row has."""
    told = {operation_told(event.to_fields()) for _, _, event in deliveries if event.sequence > 1} - {""}
    if not told:
        return []  # as a rule: a call has one end
    rows = await connection.fetch(
        "SELECT DISTINCT operation_id FROM dead_events WHERE operation_id <> '' AND operation_id = ANY($1)", told
    )
    return [row["operation_id"] for row in rows]


def _statement(delivery: Delivery, discarded: Collection[str]) -> str:
    """Choose how an event is written: by what it says, or by what the ledger has of its operation.

    Not knowing the ledger, it may be told of an operation that Redis has forgotten.
    """
    _, _, event = delivery
    if event.forgotten:
        return _INSERT_FORGOTTEN
    if event.end is End.EXPIRED:
        return _INSERT_EXPIRED
    return _INSERT_LATE if event.sequence > 1 and event.facts.operation_id in discarded else _INSERT


async def _insert(
    connection: Connection, deliveries: Sequence[Delivery], *, statement: str
) -> tuple[int, list[DeadEvent]]:
    """Insert all at once; when one is refused, one by one. Those that look first may look at one another's rows."""
    if statement == _INSERT:
        try:
            return await _insert_all(connection, _INSERT, deliveries), []
        except POISON as error:
            if len(deliveries) == 1:
                return 0, [_dead(deliveries[0], error)]
    rows, dead = 0, []
    for delivery in deliveries:
        try:
            rows += await _insert_all(connection, statement, [delivery])
        except POISON as error:
            dead.append(_dead(delivery, error))
    return rows, dead


async def _insert_all(connection: Connection, statement: str, deliveries: Sequence[Delivery]) -> int:
    columns = [list(column) for column in zip(*map(_values, deliveries), strict=True)]
    async with connection.transaction():  # a savepoint: a refused statement leaves the outer one usable
        status: str = await connection.execute(statement, *columns)
    return int(status.rpartition(" ")[2])


def _values(delivery: Delivery) -> tuple[Any, ...]:
    shard, event_id, event = delivery
    facts = event.facts
    return (
        moment(facts.held_at_ms),
        facts.operation_id,
        event.rank,
        event.sequence,
        event.end.value,
        facts.tenant_id,
        facts.key_id,
        facts.api,
        facts.provider_id,
        facts.model,
        facts.stream,
        facts.price_version,
        event.rate_tier,
        event.delta_nanos,
        event.amount_nanos,
        event.hold_nanos,
        None if event.usage is None else orjson.dumps(event.usage.reported()).decode(),
        event.status,
        event.detail,
        moment(event.ended_at_ms),
        shard,
        event_id,
        orjson.dumps(facts.tags).decode(),
        facts.session_id,
        facts.end_user,
        facts.session_name,
        facts.session_path,
        facts.priced_model,
    )


def _dead(delivery: Delivery, error: Exception) -> DeadEvent:
    shard, event_id, event = delivery
    return DeadEvent(shard=shard, event_id=event_id, fields=event.to_fields(), error=_refused(error))


def _refused(error: Exception) -> str:
    # The kind of it, such as CheckViolationError: its text would quote the event.
    return f"refused by the ledger: {type(error).__name__}"


async def _put_aside(connection: Connection, dead: Sequence[DeadEvent]) -> int:
    """Keep events for a person to judge, and whose they are: of a tenant that there is, in that tenant's shard.

    One that has been put aside before stays as it is, also one that was ended. Answers how many were not.
    """
    told = [tenant_told(event.fields) for event in dead]
    status: str = await connection.execute(
        """
        INSERT INTO dead_events (shard, event_id, fields, error, tenant_id)
        SELECT shard, event_id, fields, error, coalesce(tenants.tenant_id, '')
        FROM unnest($1::smallint[], $2::text[], $3::bytea[], $4::text[], $5::text[])
            AS event (shard, event_id, fields, error, told) LEFT JOIN tenants ON tenants.tenant_id = event.told
        ON CONFLICT DO NOTHING
        """,
        [event.shard for event in dead],
        [event.event_id for event in dead],
        [orjson.dumps(dict(event.fields)) for event in dead],
        [event.error[:ERROR_CHARACTERS_MAX] for event in dead],
        [
            tenant_id if tenant_id and shard_of(tenant_id) == event.shard else ""
            for tenant_id, event in zip(told, dead, strict=True)
        ],
    )
    return int(status.rpartition(" ")[2])
