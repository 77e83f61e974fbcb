"""What has happened to budgets: thresholds crossed, each once a window. Rows are only ever added."""

from collections.abc import Mapping, Sequence
from typing import Any

from budgetguard.adapters.postgres.budgets import live_budgets
from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.postgres.pool import Database, moment, moment_or_none
from budgetguard.core.entities import Budget, BudgetEvent, Crossing, Page
from budgetguard.core.snapshot import Mode

_COLUMNS = """
    event_id, tenant_id, budget_id, subject, threshold_bps, spent_nanos, limit_nanos, mode,
    epoch_ms(window_starts_at) AS window_starts_at_ms, epoch_ms(window_resets_at) AS window_resets_at_ms,
    epoch_ms(happened_at) AS happened_at_ms
"""

_KNOWN = """
    SELECT budget_id, subject, epoch_ms(window_starts_at) AS window_starts_at_ms, threshold_bps FROM budget_events
    WHERE budget_id = ANY($1) AND window_starts_at = ANY($2)
"""

_INSERT = """
    INSERT INTO budget_events (tenant_id, budget_id, subject, threshold_bps, spent_nanos, limit_nanos, mode,
        window_starts_at, window_resets_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
    ON CONFLICT DO NOTHING
"""


class BudgetEventRepository:
    """Events by the order in which they were seen."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def budgets(self, tenant_id: str) -> tuple[Budget, ...]:
        """List a tenant's budgets that are not deleted."""
        async with self._database.transaction() as connection:
            return tuple(await live_budgets(connection, tenant_id))

    async def record(self, crossings: Sequence[Crossing]) -> int:
        """Record what is not recorded yet; returns how many events are new."""
        recorded = 0
        async with self._database.transaction() as connection:
            # What stays crossed is seen again and again; another watcher may record between this look and ours.
            rows = await connection.fetch(
                _KNOWN,
                list({crossing.budget.budget_id for crossing in crossings}),
                list({moment(crossing.window_starts_at_ms) for crossing in crossings}),
            )
            known = {tuple(row.values()) for row in rows}
            for crossing in crossings:
                if _identity(crossing) in known:
                    continue
                status = await connection.execute(_INSERT, *_values(crossing))
                recorded += int(status.rpartition(" ")[2])
        return recorded

    async def list(
        self, *, tenant_id: str = "", budget_id: str = "", page_size: int = 0, page_token: str = ""
    ) -> Page[BudgetEvent]:
        """List events, newest first; an empty filter does not restrict.

        Raises:
            InvalidError: not a page token of this listing.
        """
        listing = f"budget events/{tenant_id}/{budget_id}"
        limit = page_limit(page_size)
        after = read_token(page_token, listing, [int])
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS} FROM budget_events
                WHERE ($1 = '' OR tenant_id = $1) AND ($2 = '' OR budget_id = $2)
                    AND ($3::bigint IS NULL OR event_id < $3)
                ORDER BY event_id DESC LIMIT $4
                """,
                tenant_id,
                budget_id,
                after[0] if after else None,
                limit + 1,
            )
        return make_page(
            [_event_of(row) for row in rows], limit=limit, listing=listing, position=lambda event: [event.event_id]
        )


def _identity(crossing: Crossing) -> tuple[str, str, int, int]:
    return (
        crossing.budget.budget_id,
        crossing.subject,
        crossing.window_starts_at_ms,
        crossing.threshold_bps,
    )


def _values(crossing: Crossing) -> tuple[Any, ...]:
    return (
        crossing.budget.tenant_id,
        crossing.budget.budget_id,
        crossing.subject,
        crossing.threshold_bps,
        crossing.spent_nanos,
        crossing.limit_nanos,
        crossing.budget.mode,
        moment(crossing.window_starts_at_ms),
        moment_or_none(crossing.window_resets_at_ms),
    )


def _event_of(row: Mapping[str, Any]) -> BudgetEvent:
    return BudgetEvent(**{**row, "mode": Mode(row["mode"])})
