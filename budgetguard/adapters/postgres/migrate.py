"""Brings a database to the schema that this code expects."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, pool
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

# The role that the programs log in as; it owns nothing.
APP_ROLE = "budgetguard_app"

CONNECT_TIMEOUT_S = 10.0

_MIGRATIONS = Path(__file__).parents[3] / "migrations"

# SCRAM verifiers are made by the server from the plaintext; a quote or backslash would need escaping in DDL.
_PASSWORD_PATTERN = re.compile(r"[!-&(-\[\]-~]{8,200}")


@asynccontextmanager
async def migrator(database_url: str) -> AsyncIterator[AsyncConnection]:
    """Connect as SQLAlchemy (which alembic speaks) would, but by the same URL spellings as the programs' pools."""

    async def connect() -> Any:
        return await asyncpg.connect(database_url, timeout=CONNECT_TIMEOUT_S)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=pool.NullPool)
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


async def migrate(database_url: str, *, app_password: str | None = None) -> None:
    """Upgrade to the newest schema, as the owning role. Doing it again changes nothing.

    Several processes may do it at once, one process must not: alembic's context is global.

    The role ``budgetguard_app`` is made when it is missing. Without ``app_password`` it has none: it can then log in
    only where the server trusts it (a Unix socket of our own).

    Raises:
        ValueError: the password has characters that DDL would have to escape.
        OSError, asyncpg.PostgresError, sqlalchemy.exc.DBAPIError: the database cannot be reached or refuses.
    """
    if app_password is not None and not _PASSWORD_PATTERN.fullmatch(app_password):
        raise ValueError(f"expected a password for {APP_ROLE} of 8 to 200 printable characters without quotes")
    async with migrator(database_url) as connection:
        await connection.run_sync(_run, "upgrade", "head")
        if app_password is not None:
            # DDL takes no parameters; the pattern above left nothing to escape.
            await connection.exec_driver_sql(f"ALTER ROLE {APP_ROLE} PASSWORD '{app_password}'")
        await connection.commit()


async def downgrade(database_url: str, revision: str) -> None:
    """Go back to a revision (``base``: an empty database). Refused while the ledger holds rows that it would lose."""
    async with migrator(database_url) as connection:
        await connection.run_sync(_run, "downgrade", revision)
        await connection.commit()


def _run(connection: Connection, direction: str, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    getattr(command, direction)(config, revision)
