"""Brings the database to this version's schema: ``python -m budgetguard.cli.migrate``.

    MIGRATE_DATABASE_URL   the owning role's URL (DATABASE_URL when it is not set)
    DATABASE_URL           the programs' URL: when it logs in as budgetguard_app with a password, that is set

The database itself is made when the server has none of that name.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit, urlunsplit

import asyncpg
from sqlalchemy.exc import SQLAlchemyError

from budgetguard.adapters.postgres.migrate import APP_ROLE, CONNECT_TIMEOUT_S, migrate
from budgetguard.adapters.settings import Environment, SettingsError

_SCHEMES = ("postgresql", "postgres")
# The server may be starting beside us.
_ATTEMPTS = 10
_ATTEMPT_SECONDS = 1.0


async def run(variables: Mapping[str, str]) -> None:
    """Migrate, making the database first when it is missing.

    Raises:
        SettingsError: a URL is missing or malformed.
        OSError, asyncpg.PostgresError, SQLAlchemyError, ValueError: the database cannot be reached or refuses.
    """
    environment = Environment(variables)
    app_url = environment.url("DATABASE_URL", environment.optional("MIGRATE_DATABASE_URL"), schemes=_SCHEMES)
    url = environment.url("MIGRATE_DATABASE_URL", app_url, schemes=_SCHEMES)
    await _ensure_database(url)
    await migrate(url, app_password=app_password(app_url))


def app_password(url: str) -> str | None:
    """Return the password that the programs will log in with; ``None`` when they need none."""
    parts = urlsplit(url)
    return unquote(parts.password) if parts.username == APP_ROLE and parts.password else None


async def _ensure_database(url: str) -> None:
    try:
        await (await _connect(url)).close()
    except asyncpg.InvalidCatalogNameError:
        parts = urlsplit(url)
        name = unquote(parts.path.lstrip("/"))
        server = await _connect(urlunsplit(parts._replace(path="/postgres")))
        try:
            quoted = name.replace('"', '""')
            await server.execute(f'CREATE DATABASE "{quoted}"')
        finally:
            await server.close()


async def _connect(url: str) -> asyncpg.Connection:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return await asyncpg.connect(url, timeout=CONNECT_TIMEOUT_S)
        except asyncpg.CannotConnectNowError:
            if attempt == _ATTEMPTS:
                raise
        await asyncio.sleep(_ATTEMPT_SECONDS)
    raise AssertionError("unreachable")


def main() -> int:
    """Migrate; what goes wrong is one sentence and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        asyncio.run(run(os.environ))
    except (SettingsError, ValueError) as error:
        sys.stderr.write(f"migrate: {error}\n")
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, SQLAlchemyError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"migrate: the database cannot be brought up to date: {said}\n")
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
