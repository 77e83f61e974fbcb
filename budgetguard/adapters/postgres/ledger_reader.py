"""Reads the usage ledger for people: rows newest first, and sums."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import orjson

from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.postgres.pool import Database, moment
from budgetguard.core.entities import LedgerFilter, LedgerRow, Page, UsageGroup, UsageSum
from budgetguard.core.errors import InvalidError
from budgetguard.core.operation import End
from budgetguard.core.usage import USAGE_KINDS, Usage

_COLUMNS = """
    operation_id, tenant_id, key_id, api, provider_id, model, stream, price_version, rate_tier, end_state AS "end",
    rank, sequence, delta_nanos, amount_nanos, hold_nanos, usage, status, detail, epoch_ms(held_at) AS held_at_ms,
    epoch_ms(ended_at) AS ended_at_ms, epoch_ms(recorded_at) AS recorded_at_ms, shard, event_id,
    tags, session_id, session_name, session_path, end_user, priced_model
"""

# Groups in one answer; a day, model, key ... each.
SUMS_MAX = 1_000

_GROUPS = {
    UsageGroup.DAY: "to_char(held_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    UsageGroup.MODEL: "model",
    UsageGroup.API_KEY: "key_id",
    UsageGroup.TAG: "tag",
    UsageGroup.SESSION: "session_id",
    UsageGroup.END_USER: "end_user",
    UsageGroup.PROVIDER: "provider_id",
}
# A row for each of its tags; a call without any is one row all the same.
_EACH_TAG = (
    "CROSS JOIN LATERAL jsonb_array_elements_text(CASE WHEN tags = '[]' THEN '[\"\"]' ELSE tags END) AS each (tag)"
)
_USAGE_SUMS = ", ".join(f"sum((usage ->> '{kind}')::numeric) AS {kind}" for kind in USAGE_KINDS)


class LedgerReader:
    """Lists and sums ledger rows."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(self, wanted: LedgerFilter, *, page_size: int = 0, page_token: str = "") -> Page[LedgerRow]:
        """List rows by admission, newest first; rows of one operation, the last word first.

        Raises:
            InvalidError: not a page token of this very listing, or a time out of range.
        """
        listing = f"ledger/{orjson.dumps(asdict(wanted)).decode()}"
        limit = page_limit(page_size)
        after = read_token(page_token, listing, [int, str, int, int])
        conditions, arguments = _conditions(wanted)
        if after is not None:
            numbers = [f"${len(arguments) + offset}" for offset in (1, 2, 3, 4)]
            conditions.append(f"(held_at, operation_id, rank, sequence) < ({', '.join(numbers)})")
            arguments += [_moment("page_token", after[0]), *after[1:]]
        where = " AND ".join(conditions) or "true"
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS} FROM usage_ledger WHERE {where}
                ORDER BY held_at DESC, operation_id DESC, rank DESC, sequence DESC LIMIT ${len(arguments) + 1}
                """,
                *arguments,
                limit + 1,
            )
        return make_page(
            [_row(row) for row in rows],
            limit=limit,
            listing=listing,
            position=lambda row: [row.held_at_ms, row.operation_id, row.rank, row.sequence],
        )

    async def standing(
        self, wanted: LedgerFilter, *, limit: int, but_at_nanos: int | None = None
    ) -> tuple[LedgerRow, ...]:
        """List how operations stand, newest first: of each its last row, if that is as wanted.

        ``but_at_nanos`` leaves out those that are corrected to this amount already.

        Raises:
            InvalidError: a time out of range.
        """
        conditions, arguments = _conditions(replace(wanted, end=None))
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                SELECT * FROM (
                    SELECT DISTINCT ON (held_at, operation_id) {_COLUMNS} FROM usage_ledger
                    WHERE {" AND ".join(conditions) or "true"}
                    ORDER BY held_at DESC, operation_id DESC, rank DESC, sequence DESC
                ) AS last
                WHERE (${len(arguments) + 1}::text IS NULL OR last."end" = ${len(arguments) + 1})
                    AND (last."end" <> 'CORRECTED' OR last.amount_nanos IS DISTINCT FROM ${len(arguments) + 2}::bigint)
                LIMIT ${len(arguments) + 3}
                """,
                *arguments,
                wanted.end,
                but_at_nanos,
                limit,
            )
        return tuple(_row(row) for row in rows)

    async def sums(self, wanted: LedgerFilter, *, by: UsageGroup) -> tuple[UsageSum, ...]:
        """Sum by day, model, key ..., in the group's order; at most ``SUMS_MAX`` groups (days: the newest ones).

        An operation of several rows counts once, with the usage of its last word; by tag, once for each of its tags.

        Raises:
            InvalidError: a time out of range.
        """
        conditions, arguments = _conditions(wanted)
        direction = "DESC" if by is UsageGroup.DAY else "ASC"
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                WITH operations AS (
                    SELECT {_GROUPS[by]} AS "group", sum(delta_nanos) AS cost_nanos,
                        (array_agg(usage ORDER BY rank DESC, sequence DESC))[1] AS usage
                    FROM usage_ledger {_EACH_TAG if by is UsageGroup.TAG else ""}
                    WHERE {" AND ".join(conditions) or "true"}
                    GROUP BY held_at, operation_id, 1
                )
                SELECT "group", count(*) AS operations, sum(cost_nanos) AS cost_nanos, {_USAGE_SUMS}
                FROM operations GROUP BY "group" ORDER BY "group" {direction} LIMIT {SUMS_MAX}
                """,
                *arguments,
            )
        sums = tuple(
            UsageSum(
                group=row["group"],
                operations=row["operations"],
                cost_nanos=int(row["cost_nanos"]),
                usage=Usage(**{kind: None if row[kind] is None else int(row[kind]) for kind in USAGE_KINDS}),
            )
            for row in rows
        )
        return sums[::-1] if by is UsageGroup.DAY else sums

    async def total(self, wanted: LedgerFilter) -> tuple[int, int]:
        """Count operations and sum their cost (nanos), each once, in whatever groups it is.

        Raises:
            InvalidError: a time out of range.
        """
        conditions, arguments = _conditions(wanted)
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                f"""
                SELECT count(DISTINCT (held_at, operation_id)) AS operations, coalesce(sum(delta_nanos), 0) AS nanos
                FROM usage_ledger WHERE {" AND ".join(conditions) or "true"}
                """,
                *arguments,
            )
        return int(row["operations"]), int(row["nanos"])


def _conditions(wanted: LedgerFilter) -> tuple[list[str], list[Any]]:
    given: list[tuple[str, Any]] = [
        ("tenant_id =", wanted.tenant_id or None),
        ("key_id =", wanted.key_id or None),
        ("model =", wanted.model or None),
        ("provider_id =", wanted.provider_id or None),
        ("tags ?", wanted.tag or None),
        ("session_id =", wanted.session_id or None),
        ("end_user =", wanted.end_user or None),
        ("operation_id =", wanted.operation_id or None),
        ("end_state =", wanted.end),
        ("held_at >=", None if wanted.from_ms is None else _moment("from_ms", wanted.from_ms)),
        ("held_at <", None if wanted.until_ms is None else _moment("until_ms", wanted.until_ms)),
    ]
    present = [(condition, value) for condition, value in given if value is not None]
    conditions = [f"{condition} ${number}" for number, (condition, _) in enumerate(present, 1)]
    return conditions, [value for _, value in present]


def _moment(field: str, milliseconds: int) -> Any:
    try:
        return moment(milliseconds)
    except OverflowError:
        raise InvalidError(field, "expected a time in the years 1 to 9999") from None


def _row(row: Mapping[str, Any]) -> LedgerRow:
    usage = row["usage"]
    told = {"end": End(row["end"]), "usage": None if usage is None else Usage(**usage), "tags": tuple(row["tags"])}
    return LedgerRow(**{**row, **told})
