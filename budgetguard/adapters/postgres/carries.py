"""What calendar windows of budgets have left to the ones that followed them."""

from dataclasses import dataclass

from budgetguard.adapters.postgres.budgets import COLUMNS, budget_of, lock_budget
from budgetguard.adapters.postgres.journal import write_audit
from budgetguard.adapters.postgres.pool import Database, moment
from budgetguard.adapters.postgres.tenant_rows import raise_version
from budgetguard.core.entities import Budget
from budgetguard.core.errors import NotFoundError

CARRY = "carry"


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """Unused money that went into a window. ``limit_nanos`` was the budget's own limit when the one before closed."""

    window_starts_at_ms: int
    carried_nanos: int
    limit_nanos: int


class CarryRepository:
    """Carried money, by budget, specification and window."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def budgets(self, *, after: str, limit: int) -> tuple[Budget, ...]:
        """List the budgets that carry something over, by id, of tenants that are not deleted."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {COLUMNS} FROM budgets
                WHERE rollover_cap_nanos IS NOT NULL AND deleted_at IS NULL AND budget_id > $1
                    AND EXISTS (SELECT FROM tenants WHERE tenants.tenant_id = budgets.tenant_id
                        AND status <> 'DELETED')
                ORDER BY budget_id LIMIT $2
                """,
                after,
                limit,
            )
        return tuple(budget_of(row) for row in rows)

    async def read(self, budget: Budget, *, from_ms: int) -> dict[int, Carry]:
        """Return what went into the budget's windows that began at ``from_ms`` or later, by their start."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT epoch_ms(window_starts_at) AS window_starts_at_ms, carried_nanos, limit_nanos FROM budget_carries
                WHERE budget_id = $1 AND spec_version = $2 AND window_starts_at >= $3
                """,
                budget.budget_id,
                budget.spec_version,
                moment(from_ms),
            )
        return {row["window_starts_at_ms"]: Carry(**row) for row in rows}

    async def topped_up(self, budget_id: str, *, closed_at_ms: int) -> int:
        """Sum the top-ups that applied, in nanos, when a window closed; what happened to them later does not count."""
        async with self._database.transaction() as connection:
            total = await connection.fetchval(
                """
                SELECT coalesce(sum(amount_nanos), 0) FROM budget_top_ups
                WHERE budget_id = $1 AND starts_at < $2 AND created_at < $2
                    AND (expires_at >= $2) IS NOT false AND (removed_at >= $2) IS NOT false
                """,
                budget_id,
                moment(closed_at_ms),
            )
        return int(total)

    async def write(self, budget: Budget, carry: Carry, *, actor: str) -> bool:
        """Say what went into a window, and raise the tenant's version if that changes what calls may spend.

        ``False``: nothing changed, or the budget is another meanwhile, for which this was not computed.
        """
        async with self._database.transaction() as connection:
            try:
                standing = await lock_budget(connection, budget.budget_id)
            except NotFoundError:
                return False
            if standing.spec_version != budget.spec_version or standing.rollover_cap_nanos != budget.rollover_cap_nanos:
                return False
            before = await connection.fetchval(
                """
                SELECT carried_nanos FROM budget_carries
                WHERE budget_id = $1 AND spec_version = $2 AND window_starts_at = $3
                """,
                budget.budget_id,
                budget.spec_version,
                moment(carry.window_starts_at_ms),
            )
            if before == carry.carried_nanos:
                return False
            await connection.execute(
                """
                INSERT INTO budget_carries (budget_id, spec_version, window_starts_at, carried_nanos, limit_nanos)
                VALUES ($1, $2, $3, $4, $5)
                ON CONFLICT (budget_id, spec_version, window_starts_at)
                DO UPDATE SET carried_nanos = excluded.carried_nanos, updated_at = now()
                """,
                budget.budget_id,
                budget.spec_version,
                moment(carry.window_starts_at_ms),
                carry.carried_nanos,
                carry.limit_nanos,
            )
            # Nothing into a window that had nothing: no call is decided otherwise by it.
            changed = carry.carried_nanos != (before or 0)
            if changed:
                await write_audit(
                    connection,
                    actor=actor,
                    action=CARRY,
                    kind="budget",
                    resource_id=budget.budget_id,
                    tenant_id=budget.tenant_id,
                    after=carry,
                )
                await raise_version(connection, budget.tenant_id)
        return changed
