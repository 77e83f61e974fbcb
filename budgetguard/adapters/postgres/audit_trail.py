"""Audit rows of changes that are not made in Postgres: corrected counters, corrected operations."""

from budgetguard.adapters.postgres.journal import write_audit
from budgetguard.adapters.postgres.pool import Database


class AuditTrail:
    """Writes audit rows by themselves."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(
        self,
        *,
        actor: str,
        action: str,
        kind: str,
        resource_id: str,
        tenant_id: str,
        after: object,
        before: object = None,
    ) -> None:
        """Record one change; ``before`` and ``after`` are what JSON can hold.

        Raises:
            DependencyUnavailableError: Postgres does not answer.
        """
        async with self._database.transaction() as connection:
            await write_audit(
                connection,
                actor=actor,
                action=action,
                kind=kind,
                resource_id=resource_id,
                tenant_id=tenant_id,
                before=before,
                after=after,
            )
