"""What keeps the database itself in order."""

from budgetguard.adapters.postgres.journal import forget_request_ids
from budgetguard.adapters.postgres.pool import Database

# A program that cannot reach its database for this long has other troubles.
MONTHS_AHEAD = 2


class MaintenanceRepository:
    """Partitions made ahead, old request ids dropped."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def make_partitions(self, *, months_ahead: int = MONTHS_AHEAD) -> dict[str, str]:
        """Make the ledger's partitions from last month on; returns month -> ``made``, ``exists`` or ``blocked``.

        Blocked: the DEFAULT partition holds rows of that month already; the owner runs ``rehome_ledger_default()``.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch("SELECT month, outcome FROM make_ledger_partitions($1)", months_ahead)
        return {row["month"].isoformat(): row["outcome"] for row in rows}

    async def forget_request_ids(self) -> int:
        """Drop request ids of long ago; returns how many."""
        async with self._database.transaction() as connection:
            return await forget_request_ids(connection)
