"""Alembic's entry: runs the migrations over asyncpg, all of them in one transaction, one migrator at a time."""

import asyncio
import os

from alembic import context
from sqlalchemy import Connection, text

from budgetguard.adapters.postgres.migrate import migrator

# Any constant: two migrators of one database wait for each other.
MIGRATION_LOCK = 0x62675F6D

WAIT_FOR_OTHER_MIGRATOR = "120s"
# A migration that cannot get its lock at once would queue every later query of the table behind it.
LOCK_TIMEOUT = "5s"
STATEMENT_TIMEOUT = "60s"


def run(connection: Connection) -> None:
    context.configure(connection=connection, transaction_per_migration=False)
    with context.begin_transaction():
        connection.execute(text(f"SET LOCAL statement_timeout = '{WAIT_FOR_OTHER_MIGRATOR}'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
        connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'"))
        context.run_migrations()


async def run_by_hand() -> None:
    database_url = os.environ.get("MIGRATE_DATABASE_URL") or os.environ.get("DATABASE_URL")
    if not database_url:
        raise SystemExit("MIGRATE_DATABASE_URL: expected postgresql://..., got nothing")
    async with migrator(database_url) as connection:
        await connection.run_sync(run)
        await connection.commit()


given: Connection | None = context.config.attributes.get("connection")
if context.is_offline_mode():
    raise SystemExit("these migrations need a database: offline SQL is not supported")
if given is not None:
    run(given)
else:
    asyncio.run(run_by_hand())
