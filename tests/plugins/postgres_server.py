"""A real PostgreSQL for tests: one server a session, one migrated template, and a fresh copy of it for each test."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import asyncpg
import pytest

from budgetguard.adapters.postgres.migrate import APP_ROLE, migrate
from budgetguard.adapters.postgres.pool import Database, open_database
from budgetguard.cli.local.postgres import EmbeddedPostgres

TEMPLATE = "template_migrated"
_numbers = count(1)


class TestDatabase:
    """One test's database, by its URLs: ``app_url`` is the programs' role, ``owner_url`` the migrating one."""

    __test__ = False

    def __init__(self, server: EmbeddedPostgres, name: str) -> None:
        self.name = name
        self.app_url = server.url(database=name, user=APP_ROLE)
        self.owner_url = server.url(database=name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[EmbeddedPostgres]:
    """The server that tests share. Nothing that is written to it survives them, so it does not wait for the disk."""
    folder = Path(tempfile.mkdtemp(prefix="bgpg", dir="/tmp"))
    folder.chmod(0o755)  # an unprivileged user goes through it when we are root
    server = EmbeddedPostgres(
        folder / "data",
        folder / "s",
        settings={"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "60"},
    )
    try:
        server.prepare()
        server.start()
        asyncio.run(_make_template(server))
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def _make_template(server: EmbeddedPostgres) -> None:
    await _execute(server, f"CREATE DATABASE {TEMPLATE}")
    await migrate(server.url(database=TEMPLATE))


async def _execute(server: EmbeddedPostgres, statement: str) -> None:
    connection = await asyncpg.connect(server.url(database="postgres"))
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
async def migrated_database(postgres_server: EmbeddedPostgres) -> AsyncIterator[TestDatabase]:
    """A fresh, migrated database."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    await _execute(postgres_server, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    yield TestDatabase(postgres_server, name)
    await _execute(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def empty_database(postgres_server: EmbeddedPostgres) -> AsyncIterator[TestDatabase]:
    """A fresh database that no migration has seen."""
    name = f"empty_{os.getpid()}_{next(_numbers)}"
    await _execute(postgres_server, f"CREATE DATABASE {name}")
    yield TestDatabase(postgres_server, name)
    await _execute(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def unicode_database(postgres_server: EmbeddedPostgres) -> AsyncIterator[Database]:
    """A pool to a migrated database whose own lower() knows all of Unicode, as those of most servers do."""
    name = f"unicode_{os.getpid()}_{next(_numbers)}"
    locale = "ENCODING 'UTF8' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"
    await _execute(postgres_server, f"CREATE DATABASE {name} TEMPLATE template0 {locale}")
    await migrate(postgres_server.url(database=name))
    pool = await open_database(postgres_server.url(database=name, user=APP_ROLE))
    yield pool
    await pool.close()
    await _execute(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database(migrated_database: TestDatabase) -> AsyncIterator[Database]:
    """A pool as the programs have it, in the programs' role."""
    pool = await open_database(migrated_database.app_url)
    yield pool
    await pool.close()


@pytest.fixture
async def owner(migrated_database: TestDatabase) -> AsyncIterator[asyncpg.Connection]:
    """A connection as the owning role, which is also the server's superuser."""
    connection = await asyncpg.connect(migrated_database.owner_url)
    yield connection
    await connection.close()


@pytest.fixture
async def app(migrated_database: TestDatabase) -> AsyncIterator[asyncpg.Connection]:
    """A connection as the programs' role."""
    connection = await asyncpg.connect(migrated_database.app_url)
    yield connection
    await connection.close()
