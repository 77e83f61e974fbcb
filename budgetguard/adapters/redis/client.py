"""The one seam to Redis: send commands, get plain replies, know one way to fail.

Why it is ours and not redis-py's: docs/decisions/014-thin-redis-client.md.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from budgetguard.adapters.redis.address import Address
from budgetguard.adapters.redis.connection import (
    Argument,
    Connection,
    CountersUnavailableError,
    NotRunError,
    RedisReplyError,
    Reply,
    packed,
)

__all__ = [
    "Argument",
    "CountersUnavailableError",
    "NotRunError",
    "PinnedConnection",
    "RedisClient",
    "RedisReplyError",
    "Reply",
]

# Longer than any script takes; callers on the data plane set tighter deadlines of their own around a call.
TIMEOUT_SECONDS = 1.0
# Each is one pinned; more callers than that wait, within the same timeout.
CONNECTIONS_MAX = 64

_CLOSED = "the client of Redis was closed"


def _plain(replies: list[Reply]) -> list[Reply]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


class PinnedConnection:
    """One connection to one Redis process: a reply and the next command cannot meet different processes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def command(self, *arguments: Argument) -> Reply:
        """Send one command and return its reply."""
        return _plain(await self._connection.ask(packed(arguments), 1))[0]

    async def pipeline(self, commands: Sequence[Sequence[Argument]]) -> list[Reply]:
        """Send several commands at once; an error reply is raised after all replies are read."""
        if not commands:
            return []
        return _plain(await self._connection.ask(packed(*commands), len(commands)))


class RedisClient:
    """One connection that all callers share, and a bounded pool of those that are pinned. Nothing is ever sent twice.

    A connection that was lost is made again by the next call, within a timeout of its own. Every method raises
    ``CountersUnavailableError``.
    """

    def __init__(
        self, url: str, *, timeout_seconds: float = TIMEOUT_SECONDS, connections_max: int = CONNECTIONS_MAX
    ) -> None:
        """Read ``redis://``, ``rediss://`` or ``unix://``; connects when first used.

        Raises:
            ValueError: not such a URL.
        """
        self._address = Address.from_url(url)
        self.timeout_seconds = timeout_seconds
        self._shared: Connection | None = None
        self._attempt: asyncio.Task[Connection] | None = None
        self._free = asyncio.Semaphore(connections_max)
        self._idle: list[Connection] = []
        self._closed = False

    @asynccontextmanager
    async def pinned(self) -> AsyncIterator[PinnedConnection]:
        """Borrow a connection that nobody else uses. The timeout covers the whole block."""
        try:
            async with asyncio.timeout(self.timeout_seconds), self._free:
                connection = await self._unused()
                try:
                    yield PinnedConnection(connection)
                finally:
                    # Also when cancelled: an unread reply must never answer the next command.
                    if connection.idle and not self._closed:
                        self._idle.append(connection)
                    else:
                        connection.break_off(_CLOSED)
        except TimeoutError as error:
            raise CountersUnavailableError(self._no_answer) from error

    async def command(self, *arguments: Argument) -> Reply:
        """Send one command and return its reply. One that blocks would stop every caller: it has to be pinned."""
        return _plain(await self._ask(packed(arguments), 1))[0]

    async def pipeline(self, commands: Sequence[Sequence[Argument]]) -> list[Reply]:
        """Send several commands in one trip and return their replies in order; of errors, the first is raised."""
        if not commands:
            return []
        return _plain(await self._ask(packed(*commands), len(commands)))

    async def close(self) -> None:
        """Close every connection now, and each pinned one when it is given back. Every later call fails."""
        self._closed = True
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait({self._attempt})
        if self._shared is not None:
            await self._shared.close(_CLOSED)
        while self._idle:
            await self._idle.pop().close(_CLOSED)

    async def _ask(self, sent: bytes, count: int) -> list[Reply]:
        if self._shared is not None and not self._shared.broken:
            return await self._shared.ask(sent, count)
        try:
            async with asyncio.timeout(self.timeout_seconds):
                connection = await self._reconnected()
        except TimeoutError as error:
            raise NotRunError(self._no_answer) from error
        return await connection.ask(sent, count)

    async def _reconnected(self) -> Connection:
        """Wait for the attempt to connect that is under way, or begin one. It outlives the caller who began it."""
        self._check_open()
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.create_task(self._connect_shared())
            # Somebody has to look at its error when every caller has given up before.
            self._attempt.add_done_callback(lambda attempt: attempt.cancelled() or attempt.exception())
        attempt = self._attempt
        await asyncio.wait({attempt})
        self._check_open()
        error = attempt.exception()
        if error is not None:
            raise NotRunError(str(error)) from error
        return attempt.result()

    async def _connect_shared(self) -> Connection:
        self._shared = await self._address.connect(timeout_seconds=self.timeout_seconds)
        return self._shared

    async def _unused(self) -> Connection:
        self._check_open()
        while self._idle:
            idle = self._idle.pop()
            if not idle.broken:
                return idle
        return await self._address.connect(timeout_seconds=self.timeout_seconds)

    def _check_open(self) -> None:
        if self._closed:
            raise NotRunError(_CLOSED)

    @property
    def _no_answer(self) -> str:
        return f"no answer from Redis within {self.timeout_seconds} s"
