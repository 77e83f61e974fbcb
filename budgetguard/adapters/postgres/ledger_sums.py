"""What budgets have spent, by the ledger as of one event: what their counters are compared with."""

from collections.abc import Collection

from budgetguard.adapters.postgres.ledger import SUBJECT_CONDITION
from budgetguard.adapters.postgres.ledger_activity import SUBJECTS
from budgetguard.adapters.postgres.pool import Database, fetch_within, moment
from budgetguard.core.events import entry_order
from budgetguard.core.snapshot import BudgetSpec
from budgetguard.core.window import Window, buckets_of

# Rows of this age came from events that are before any that is looked at now, also when Redis' clock was set back.
_SETTLED_AGE = "1 hour"

# ``$4`` and ``$5``: the event, as (ms, sequence).
_UP_TO_EVENT = f"""(
    recorded_at < now() - interval '{_SETTLED_AGE}'
    OR (split_part(event_id, '-', 1)::bigint, split_part(event_id, '-', 2)::bigint) <= ($4::bigint, $5::bigint)
)"""


class LedgerSums:
    """Sums of the ledger's rows. Every method may raise ``DependencyUnavailableError``."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def spent(
        self,
        tenant_id: str,
        spec: BudgetSpec,
        window: Window,
        *,
        until_event: str | None = None,
        within_s: float | None = None,
    ) -> dict[tuple[str, int | None], int]:
        """Sum in nanos what a budget has spent by calls admitted in a window, by (subject, bucket).

        The subject is empty where the budget is no template, the bucket ``None`` where it does not roll.
        ``until_event``: only events up to this one, of the tenant's shard. ``within_s``: the time that it may take.
        """
        query, arguments = _spent_query(tenant_id, spec, window, until_event)
        async with self._database.transaction() as connection:
            rows = await fetch_within(connection, within_s, query, *arguments)
        # A call without a subject of the kind is counted for nobody.
        return {
            (row["subject"], row["bucket"]): int(row["spent_nanos"]) for row in rows if row["subject"] or not spec.each
        }

    async def ended(self, operation_ids: Collection[str], *, until_event: str) -> set[str]:
        """Say which operations have a row of an event up to this one."""
        event_ms, sequence = entry_order(until_event)
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT DISTINCT operation_id FROM usage_ledger WHERE operation_id = ANY($1) AND
                    (split_part(event_id, '-', 1)::bigint, split_part(event_id, '-', 2)::bigint)
                        <= ($2::bigint, $3::bigint)
                """,
                list(operation_ids),
                event_ms,
                sequence,
            )
        return {row["operation_id"] for row in rows}

    async def position(self, shard: int) -> tuple[int, int]:
        """Return the newest event that the ledger has of a shard, as (ms, sequence)."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                "SELECT stream_ms, stream_sequence FROM drain_positions WHERE shard = $1", shard
            )
        return (0, 0) if row is None else (row["stream_ms"], row["stream_sequence"])

    async def has_dead_events(self, tenant_id: str, *, shard: int) -> bool:
        """Whether usage of a tenant may be in no row, so that its counters may rightly have more than the ledger.

        Usage of its shard that does not tell whose it is may be its own.
        """
        async with self._database.transaction() as connection:
            found = await connection.fetchval(
                """
                SELECT EXISTS (
                    SELECT FROM dead_events WHERE shard = $1 AND state = 'STANDING' AND tenant_id IN ($2, '')
                )
                """,
                shard,
                tenant_id,
            )
        return bool(found)


def _spent_query(
    tenant_id: str, spec: BudgetSpec, window: Window, until_event: str | None
) -> tuple[str, tuple[object, ...]]:
    """Write out only the conditions that apply: one with "no value, or ..." in it keeps an index from being used."""
    width_ms = buckets_of(spec).width_ms if spec.rolling_ms is not None else None
    arguments: list[object] = [tenant_id, moment(window.starts_at_ms), width_ms]
    conditions = ["tenant_id = $1", "held_at >= $2"]

    def add(condition: str, *values: object) -> None:
        arguments.extend(values)
        conditions.append(condition)

    if until_event is not None:
        add(_UP_TO_EVENT, *entry_order(until_event))
    if window.resets_at_ms is not None:
        add(f"held_at < ${len(arguments) + 1}", moment(window.resets_at_ms))
    if not spec.each:
        add(SUBJECT_CONDITION[spec.subject_kind].replace("$2", f"${len(arguments) + 1}"), spec.subject)
    subject = SUBJECTS[spec.subject_kind] if spec.each else "''"
    query = f"""
        SELECT {subject} AS subject, epoch_ms(held_at) / $3::bigint AS bucket, sum(delta_nanos) AS spent_nanos
        FROM usage_ledger WHERE {" AND ".join(conditions)} GROUP BY 1, 2
    """
    return query, tuple(arguments)
