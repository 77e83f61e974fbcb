"""Connections to Postgres: a bounded pool, bounded statements, and one way to fail when the server does not answer."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import asyncpg
import orjson

from budgetguard.core.errors import DependencyUnavailableError

# asyncpg ships no types; a row behaves as a mapping and a sequence.
Connection: TypeAlias = Any
Row: TypeAlias = Any

CONNECTIONS_MAX = 10
CONNECT_TIMEOUT_S = 5.0
ACQUIRE_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_MS = 10_000
LOCK_TIMEOUT_MS = 5_000
# A program that stopped inside a transaction must not keep its locks.
IDLE_IN_TRANSACTION_TIMEOUT_MS = 15_000
# The server's own timeout answers first; this one, so much longer, is for a server that does not answer at all.
SILENCE_S = 5.0
COMMAND_TIMEOUT_S = STATEMENT_TIMEOUT_MS / 1000 + SILENCE_S

# The server cannot be reached, has gone meanwhile, is busy, or did not finish in time.
_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InternalClientError,
)

# What a single row can be wrong about: values out of range, not representable or too long for an index, or refused by a
# constraint.
POISON = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    OverflowError,
    ValueError,
    TypeError,
)


class Database:
    """A pool of connections as the role of its URL. Use ``open_database``."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Borrow a connection with an open transaction: committed at the end, rolled back by any exception.

        Raises:
            DependencyUnavailableError: the server does not answer. A commit may have arrived nevertheless.
        """
        try:
            async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection, connection.transaction():
                yield connection
        except asyncpg.DataError:
            raise  # an InterfaceError too when the client finds it, but a wrong value is no outage
        except _UNAVAILABLE as error:
            raise DependencyUnavailableError("Postgres") from error

    @asynccontextmanager
    async def exclusive(self, purpose: str) -> AsyncIterator[bool]:
        """Be the only one of all processes for this purpose; ``False``: another one is at it, leave it alone."""
        async with self.transaction() as connection:
            # It idles in its transaction while the work is done over other connections.
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield bool(await connection.fetchval("SELECT pg_try_advisory_xact_lock(hashtext($1))", purpose))

    async def ping(self) -> None:
        """Ask the server for an answer.

        Raises:
            DependencyUnavailableError: it gave none.
        """
        async with self.transaction() as connection:
            await connection.execute("SELECT 1")

    async def close(self) -> None:
        """Wait for borrowed connections to come back and close all."""
        await self._pool.close()


async def open_database(
    database_url: str, *, application: str = "budgetguard", connections_max: int = CONNECTIONS_MAX
) -> Database:
    """Make a pool. It connects when first used, so a server that is down does not keep a program from starting.

    Raises:
        ValueError: not a URL that asyncpg reads.
    """
    return Database(
        await asyncpg.create_pool(
            database_url,
            min_size=0,
            max_size=connections_max,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COMMAND_TIMEOUT_S,
            init=_prepare,
            server_settings={
                "application_name": application,
                "timezone": "UTC",
                "statement_timeout": str(STATEMENT_TIMEOUT_MS),
                "lock_timeout": str(LOCK_TIMEOUT_MS),
                "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_TIMEOUT_MS),
            },
        )
    )


async def fetch_within(connection: Connection, within_s: float | None, query: str, *arguments: object) -> list[Row]:
    """Fetch rows in a transaction, and give this query and those after it so much time; ``None``: the usual."""
    timeout_s = None
    if within_s is not None:
        # As SET LOCAL, which takes no parameters: it ends with the transaction.
        await connection.execute("SELECT set_config('statement_timeout', $1, true)", str(round(within_s * 1000)))
        timeout_s = within_s + SILENCE_S
    rows: list[Row] = await connection.fetch(query, *arguments, timeout=timeout_s)
    return rows


async def _prepare(connection: Connection) -> None:
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: orjson.dumps(value).decode(),
        decoder=orjson.loads,
    )


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# asyncpg writes it as -infinity, which comes back as no number of milliseconds. The last one it takes for infinity is
# finer than a millisecond.
_INFINITE = datetime.min.replace(tzinfo=UTC)


def moment(milliseconds: int) -> datetime:
    """Turn Unix milliseconds into what a timestamptz parameter takes, exactly.

    Raises:
        OverflowError: beyond the year 9999, or not after the beginning of the year 1.
    """
    found = _EPOCH + timedelta(milliseconds=milliseconds)
    if found == _INFINITE:
        msg = "the beginning of time is -infinity to Postgres"
        raise OverflowError(msg)
    return found


def moment_or_none(milliseconds: int | None) -> datetime | None:
    """Likewise, for a column that may be empty."""
    return None if milliseconds is None else moment(milliseconds)
