"""Refused calls: the first ten a minute, key and reason as rows, all of them in counts. No sum of money has them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar

import orjson

from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.postgres.pool import POISON, Connection, Database, moment
from budgetguard.core.attempt_counts import Tally
from budgetguard.core.attempts import (
    Attempt,
    RecordedAttempt,
    RefusalCount,
    RefusalFilter,
    RefusalGroup,
    RefusedCall,
    plain,
)
from budgetguard.core.entities import Page
from budgetguard.core.errors import InvalidError
from budgetguard.core.reasons import Reason

# (shard, name of the entry, what it is): of a stream, or a count that its source stands at.
Row: TypeAlias = tuple[int, str, RefusedCall]
Count: TypeAlias = tuple[int, str, tuple[Tally, int]]

EntryT = TypeVar("EntryT")

# Groups in one answer.
COUNTS_MAX = 1_000

_INSERT_ROW = """
    INSERT INTO refused_calls (tenant_id, key_id, reason, minute, number, refused_at, operation_id, api, provider_id,
        model, status, message, facts, tags, session_id, end_user)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
    ON CONFLICT DO NOTHING
"""
_INSERT_COUNT = """
    INSERT INTO refused_tallies AS tally (tenant_id, key_id, reason, minute, source, count)
    VALUES ($1, $2, $3, $4, $5, $6)
    ON CONFLICT (tenant_id, minute, key_id, reason, source)
        DO UPDATE SET count = excluded.count, recorded_at = now() WHERE tally.count < excluded.count
"""

_COLUMNS = """
    refusal_id, tenant_id, key_id, reason, epoch_ms(refused_at) AS refused_at_ms, operation_id, api, provider_id, model,
    status, message, facts, tags, session_id, end_user, epoch_ms(recorded_at) AS recorded_at_ms
"""

_GROUPS = {
    RefusalGroup.REASON: "reason",
    RefusalGroup.API_KEY: "key_id",
    RefusalGroup.DAY: "to_char(minute AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    RefusalGroup.MINUTE: "to_char(minute AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI\"Z\"')",
}
_BY_TIME = (RefusalGroup.DAY, RefusalGroup.MINUTE)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadRefusal:
    """An entry that cannot be recorded, as it came from Redis."""

    shard: int
    entry: str
    fields: Mapping[str, str]
    error: str


class RefusalRepository:
    """Refused calls, recorded and read."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, rows: Sequence[Row], counts: Sequence[Count], *, dead: Sequence[DeadRefusal] = ()) -> int:
        """Write rows and counts in one transaction; what is there already is skipped, and a lower count too.

        What Postgres refuses is put aside with ``dead`` instead of blocking the rest. Answers how many were.

        Raises:
            DependencyUnavailableError: Postgres does not answer; the same may be given again.
        """
        # By their keys, so that two workers cannot each wait for the other.
        rows = sorted(rows, key=lambda row: (_place(row[2].attempt), row[2].number))
        counts = sorted(counts, key=lambda count: (_place(count[2][0]), count[2][0].source))
        refused = list(dead)
        async with self._database.transaction() as connection:
            for one in await _insert(connection, _INSERT_ROW, [row for _, _, row in rows], _row_values):
                shard, entry, row = rows[one]
                refused.append(DeadRefusal(shard=shard, entry=entry, fields=row.to_fields(), error="refused"))
            for one in await _insert(connection, _INSERT_COUNT, [count for _, _, count in counts], _count_values):
                shard, entry, (_, number) = counts[one]
                fields = {"name": entry, "value": str(number)}
                refused.append(DeadRefusal(shard=shard, entry=entry, fields=fields, error="refused"))
            await connection.executemany(
                """
                INSERT INTO dead_refusals (shard, entry, fields, error) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING
                """,
                [(one.shard, plain(one.entry), orjson.dumps(dict(one.fields)), one.error) for one in refused],
            )
        return len(refused)

    async def list(self, wanted: RefusalFilter, *, page_size: int = 0, page_token: str = "") -> Page[RecordedAttempt]:
        """List rows, newest first.

        Raises:
            InvalidError: not a page token of this very listing, or a time out of range.
        """
        listing = f"refusals/{orjson.dumps(asdict(wanted)).decode()}"
        limit = page_limit(page_size)
        after = read_token(page_token, listing, [int, int])
        conditions, arguments = _conditions(wanted, at="refused_at")
        if after is not None:
            conditions.append(f"(refused_at, refusal_id) < (${len(arguments) + 1}, ${len(arguments) + 2})")
            arguments += [_moment("page_token", after[0]), after[1]]
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS} FROM refused_calls WHERE {" AND ".join(conditions) or "true"}
                ORDER BY refused_at DESC, refusal_id DESC LIMIT ${len(arguments) + 1}
                """,
                *arguments,
                limit + 1,
            )
        return make_page(
            [_recorded(row) for row in rows],
            limit=limit,
            listing=listing,
            position=lambda row: [row.attempt.refused_at_ms, row.refusal_id],
        )

    async def counts(self, wanted: RefusalFilter, *, by: RefusalGroup) -> tuple[RefusalCount, ...]:
        """Count refusals by group, in the group's order; at most ``COUNTS_MAX`` groups (times: the newest ones).

        A minute counts when it begins within the times. Nothing is known by model or session.

        Raises:
            InvalidError: a time out of range.
        """
        conditions, arguments = _conditions(wanted, at="minute")
        direction = "DESC" if by in _BY_TIME else "ASC"
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_GROUPS[by]} AS "group", sum(count)::bigint AS count
                FROM refused_tallies WHERE {" AND ".join(conditions) or "true"}
                GROUP BY 1 ORDER BY 1 {direction} LIMIT {COUNTS_MAX}
                """,
                *arguments,
            )
        counts = tuple(RefusalCount(group=row["group"], count=row["count"]) for row in rows)
        return counts[::-1] if by in _BY_TIME else counts

    async def total(self, wanted: RefusalFilter) -> int:
        """Count refusals, in whatever groups they are.

        Raises:
            InvalidError: a time out of range.
        """
        conditions, arguments = _conditions(wanted, at="minute")
        async with self._database.transaction() as connection:
            total = await connection.fetchval(
                f"""
                SELECT coalesce(sum(count), 0)::bigint FROM refused_tallies WHERE {" AND ".join(conditions) or "true"}
                """,
                *arguments,
            )
        return int(total)

    async def tenants(self, reason: Reason, *, within_s: float) -> tuple[str, ...]:
        """List the tenants that had a call refused for this reason lately, by the minute that it was refused in."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT DISTINCT tenant_id FROM refused_tallies
                WHERE minute > now() - make_interval(secs => $1) AND reason = $2 ORDER BY tenant_id
                """,
                within_s,
                reason.value,
            )
        return tuple(row["tenant_id"] for row in rows)

    async def forget(self) -> int:
        """Drop some of what is older than it is kept; answers how many went, 0 when nothing is left to drop."""
        async with self._database.transaction() as connection:
            return int(await connection.fetchval("SELECT forget_refusals()"))


async def _insert(
    connection: Connection,
    statement: str,
    entries: Sequence[EntryT],
    values_of: Callable[[EntryT], tuple[Any, ...]],
) -> list[int]:
    """Insert all at once; when one of them is refused, one by one. Answers which were refused."""
    try:
        async with connection.transaction():  # a savepoint: a refused statement leaves the outer one usable
            await connection.executemany(statement, [values_of(entry) for entry in entries])
    except POISON:
        pass
    else:
        return []
    refused = []
    for number, entry in enumerate(entries):
        try:
            async with connection.transaction():
                await connection.execute(statement, *values_of(entry))
        except POISON:
            refused.append(number)
    return refused


def _place(of: Attempt | Tally) -> tuple[str, int, str, str]:
    return of.tenant_id, of.minute_ms, of.key_id, of.reason.value


def _row_values(row: RefusedCall) -> tuple[Any, ...]:
    attempt = row.attempt
    return (
        attempt.tenant_id,
        attempt.key_id,
        attempt.reason.value,
        moment(attempt.minute_ms),
        row.number,
        moment(attempt.refused_at_ms),
        attempt.operation_id,
        attempt.api,
        attempt.provider_id,
        attempt.model,
        attempt.status,
        attempt.message,
        attempt.facts,
        attempt.tags,
        attempt.session_id,
        attempt.end_user,
    )


def _count_values(count: tuple[Tally, int]) -> tuple[Any, ...]:
    tally, number = count
    return (
        tally.tenant_id,
        tally.key_id,
        tally.reason.value,
        moment(tally.minute_ms),
        tally.source,
        number,
    )


def _conditions(wanted: RefusalFilter, *, at: str) -> tuple[list[str], list[Any]]:
    given: list[tuple[str, Any]] = [
        ("tenant_id =", wanted.tenant_id or None),
        ("key_id =", wanted.key_id or None),
        ("reason =", wanted.reason),
        ("model =", wanted.model or None),
        ("session_id =", wanted.session_id or None),
        (f"{at} >=", None if wanted.from_ms is None else _moment("from", wanted.from_ms)),
        (f"{at} <", None if wanted.until_ms is None else _moment("until", wanted.until_ms)),
    ]
    present = [(condition, value) for condition, value in given if value is not None]
    conditions = [f"{condition} ${number}" for number, (condition, _) in enumerate(present, 1)]
    return conditions, [value for _, value in present]


def _moment(field: str, milliseconds: int) -> Any:
    try:
        return moment(milliseconds)
    except OverflowError:
        raise InvalidError(field, "expected a time in the years 1 to 9999") from None


def _recorded(row: Mapping[str, Any]) -> RecordedAttempt:
    told = dict(row)
    refusal_id, recorded_at_ms = told.pop("refusal_id"), told.pop("recorded_at_ms")
    attempt = Attempt(**{**told, "reason": Reason(told["reason"]), "tags": tuple(told["tags"])})
    return RecordedAttempt(refusal_id=refusal_id, attempt=attempt, recorded_at_ms=recorded_at_ms)
