"""Where a Redis is, and a connection to it: greeted, so that the next command is a caller's."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

from redis.asyncio import connection as redis_py
from redis.exceptions import RedisError

from budgetguard.adapters.redis.connection import Argument, Connection, NotRunError, packed


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP host and port, or a Unix socket's path."""

    host: str
    port: int
    path: str | None
    tls: redis_py.RedisSSLContext | None
    # AUTH, CLIENT SETNAME and SELECT, as far as they are wanted. Holds the password.
    greeting: tuple[tuple[Argument, ...], ...] = field(repr=False)

    @classmethod
    def from_url(cls, url: str) -> "Address":
        """Read ``redis://``, ``rediss://`` or ``unix://`` with redis-py's options.

        Raises:
            ValueError: not such a URL.
        """
        options = cast("dict[str, Any]", redis_py.parse_url(url))
        try:
            known = options.pop("connection_class", redis_py.Connection)(**options)
        except (TypeError, RedisError) as error:
            raise ValueError(f"wrong option in the URL of Redis: {error}") from error
        greeting: list[tuple[Argument, ...]] = []
        if known.username:
            greeting.append(("AUTH", known.username, known.password or ""))
        elif known.password:
            greeting.append(("AUTH", known.password))
        if known.client_name:
            greeting.append(("CLIENT", "SETNAME", known.client_name))
        if known.db:
            greeting.append(("SELECT", known.db))
        tls = known.ssl_context if isinstance(known, redis_py.SSLConnection) else None
        if not isinstance(known, redis_py.UnixDomainSocketConnection):
            return cls(host=known.host, port=known.port, path=None, tls=tls, greeting=tuple(greeting))
        if not known.path:
            raise ValueError("expected a path in the unix:// URL of Redis")
        return cls(host="", port=0, path=known.path, tls=None, greeting=tuple(greeting))

    async def connect(self, *, timeout_seconds: float) -> Connection:
        """Connect and greet, both within the timeout, which is also that of each call.

        Raises:
            NotRunError: nobody there, not in time, or refused.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                connection = await self._open(timeout_seconds)
                try:
                    await self._greet(connection)
                except BaseException:
                    connection.break_off("Redis was not greeted")
                    raise
                return connection
        except TimeoutError as error:
            raise NotRunError(f"no connection to Redis within {timeout_seconds} s") from error
        except OSError as error:
            raise NotRunError(f"cannot connect to Redis: {error}") from error

    async def _open(self, timeout_seconds: float) -> Connection:
        def protocol() -> Connection:
            return Connection(timeout_seconds=timeout_seconds)

        loop = asyncio.get_running_loop()
        if self.path is not None:
            _, connection = await loop.create_unix_connection(protocol, self.path)
        else:
            tls = None if self.tls is None else self.tls.get()
            _, connection = await loop.create_connection(protocol, self.host, self.port, ssl=tls)
        return connection

    async def _greet(self, connection: Connection) -> None:
        if not self.greeting:
            return
        for reply in await connection.ask(packed(*self.greeting), len(self.greeting)):
            if isinstance(reply, Exception):
                raise NotRunError(f"Redis turns us away: {reply}") from reply
