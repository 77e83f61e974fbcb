"""Who has spent lately: for jobs that look only where something has changed."""

from collections.abc import Mapping
from dataclasses import dataclass

from budgetguard.adapters.postgres.pool import Database, moment
from budgetguard.core.snapshot import SubjectKind

# A row may become visible up to a transaction's length after the time that it was recorded at.
OVERLAP_S = 60
# A call ends, and its row is recorded, at most this long after its admission, also when Postgres was away for days; a
# later correction is not looked after. It only bounds how many partitions are looked into.
HELD_BEFORE_S = 8 * 24 * 3600

# How a row names its subjects of a kind.
SUBJECTS = {
    SubjectKind.API_KEY: "key_id",
    SubjectKind.TAG: "jsonb_array_elements_text(tags)",
    SubjectKind.SESSION: "session_id",
    SubjectKind.END_USER: "end_user",
    # Rows from before it was recorded have none.
    SubjectKind.MODEL: "coalesce(nullif(priced_model, ''), model)",
    SubjectKind.PROVIDER: "provider_id",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Which tenants have new ledger rows, and when the oldest of the calls was admitted that they tell of.

    ``until_ms`` is Postgres' clock at that look: where the next one begins.
    """

    until_ms: int
    oldest_held_ms: Mapping[str, int]


class LedgerActivity:
    """The ledger's newest rows, by when they were recorded."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def since(self, since_ms: int | None, *, first_look_s: int) -> Activity:
        """Tell what was recorded since an earlier look; ``None``: the first one, which looks back ``first_look_s``."""
        async with self._database.transaction() as connection:
            now_ms = await connection.fetchval("SELECT epoch_ms(now())")
            since = moment((now_ms - first_look_s * 1000) if since_ms is None else (since_ms - OVERLAP_S * 1000))
            rows = await connection.fetch(
                """
                SELECT tenant_id, epoch_ms(min(held_at)) AS oldest_held_ms FROM usage_ledger
                WHERE recorded_at > $1 AND held_at > $1 - make_interval(secs => $2) GROUP BY tenant_id
                """,
                since,
                float(HELD_BEFORE_S),
            )
        return Activity(until_ms=now_ms, oldest_held_ms={row["tenant_id"]: row["oldest_held_ms"] for row in rows})

    async def spent_by_subject(
        self, *, tenant_id: str, kind: SubjectKind, from_ms: int, until_ms: int | None, active_since_ms: int
    ) -> dict[str, int]:
        """Sum what each subject of a kind has spent in a window, of those that have rows recorded since a moment."""
        expression = SUBJECTS[kind]
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                WITH active AS (
                    SELECT DISTINCT {expression} AS subject FROM usage_ledger
                    WHERE tenant_id = $1 AND recorded_at > $4 AND held_at > $4 - make_interval(secs => $5)
                ), rows AS (
                    SELECT {expression} AS subject, delta_nanos FROM usage_ledger
                    WHERE tenant_id = $1 AND held_at >= $2 AND ($3::timestamptz IS NULL OR held_at < $3)
                )
                SELECT subject, sum(delta_nanos)::bigint AS spent_nanos FROM rows JOIN active USING (subject)
                WHERE subject <> '' GROUP BY subject
                """,
                tenant_id,
                moment(from_ms),
                None if until_ms is None else moment(until_ms),
                moment(active_since_ms - OVERLAP_S * 1000),
                float(HELD_BEFORE_S),
            )
        return {row["subject"]: row["spent_nanos"] for row in rows}
