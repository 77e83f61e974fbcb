"""One connection to Redis: commands go out at once, replies come back in order, each to the call that waits for it.

CountersUnavailableError          Redis cannot be reached, or not in time: the command may or may not have run
  +-- RedisReplyError             Redis answered with an error
  +-- NotRunError                 the command did not run: it was not sent, or this Redis serves nobody
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, cast

import hiredis

# Strings, integers, ``None`` and lists of them.
Reply: TypeAlias = Any
# One command's argument.
Argument: TypeAlias = str | int | bytes

# At 40 us a script that is 160 ms of Redis' time: whoever came after it would hardly be answered within its deadline.
# The call that reaches the bound may pass it, so that no pipeline is too long for a Redis with nothing else to do.
REPLIES_OUTSTANDING_MAX = 4096

# When this process itself was busy for longer than the timeout, the reply may be here, unread: uvloop fires timers
# before it reads sockets. So an overdue call is looked at once more after that; a timer of zero would not let it read.
_LAST_LOOK_SECONDS = 0.001

# Errors that say nothing about the command: this Redis serves nobody, or not us, or not yet.
_NOT_SERVING = ("LOADING ", "NOAUTH ", "max number of clients reached")

_INCOMPLETE: Final = object()


class CountersUnavailableError(Exception):
    """Redis did not answer. A write may have happened: after a reserve, release its operation id."""


class RedisReplyError(CountersUnavailableError):
    """Redis answered with an error, e.g. out of memory."""

    def says(self, code: str) -> bool:
        """Whether the error begins with this code, e.g. NOSCRIPT."""
        return str(self).startswith(code)


class NotRunError(CountersUnavailableError):
    """The command that failed did not run and never will: after a reserve there is nothing to release."""


def _reply_error(text: str) -> CountersUnavailableError:
    text = text.removeprefix("ERR ")
    return NotRunError(f"Redis: {text}") if text.startswith(_NOT_SERVING) else RedisReplyError(text)


def packed(*commands: Sequence[Argument]) -> bytes:
    """Return what is sent for these commands."""
    return b"".join([hiredis.pack_command(tuple(command)) for command in commands])  # type: ignore[arg-type] # its stub names a tuple of one


@dataclass(slots=True)
class _Call:
    """One caller's commands on their way. The future ends when all their replies are here."""

    replied: "asyncio.Future[list[Reply]]"
    # On the loop's clock.
    deadline: float
    count: int
    replies: list[Reply] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """Asks and hears in order. Nothing is sent twice; once broken, it stays so.

    A reply has no id, its place alone says whose it is. So a call that was given up keeps its place, and its replies
    are dropped when they come. When places cannot be trusted any more, or the oldest call waits for longer than the
    timeout, the connection is closed and every call on it fails at once.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._loop = asyncio.get_running_loop()
        # Every text that this product writes is UTF-8. What else is in a reply is spelled \xff, which no JSON can have:
        # that one record is damaged, and the others of the reply are read.
        self._reader = hiredis.Reader(
            encoding="utf-8", errors="backslashreplace", replyError=_reply_error, notEnoughData=_INCOMPLETE
        )
        self._calls: deque[_Call] = deque()
        self._replies_outstanding = 0
        # Whether a timer is set. One for the oldest call, not one a call: it is set anew when it fires.
        self._looking = False
        self._overdue: _Call | None = None
        self._transport: asyncio.Transport
        self._lost = asyncio.Event()
        # Why nothing can be asked any more; empty while it can.
        self.broken = ""

    @property
    def idle(self) -> bool:
        """Whether the next reply would be the next caller's."""
        return not self.broken and not self._calls

    def ask(self, sent: bytes, count: int) -> "asyncio.Future[list[Reply]]":
        """Send ``count`` commands and return the future of their replies; errors are among them, not raised.

        Raises:
            NotRunError: nothing was sent. From the future, ``CountersUnavailableError``: it may have run.
        """
        if self.broken:
            raise NotRunError(self.broken)
        if self._replies_outstanding >= REPLIES_OUTSTANDING_MAX:
            raise NotRunError(f"Redis owes {self._replies_outstanding} replies already")
        call = _Call(self._loop.create_future(), self._loop.time() + self._timeout_seconds, count)
        self._calls.append(call)
        self._replies_outstanding += count
        if not self._looking:
            self._looking = True
            self._loop.call_later(self._timeout_seconds, self._look_at_oldest)
        self._transport.write(sent)
        return call.replied

    def break_off(self, reason: str) -> None:
        """Close the connection, whatever is still to be written or read; every call on it fails."""
        if self.broken:
            return
        self.broken = reason
        self._transport.abort()
        while self._calls:
            replied = self._calls.popleft().replied
            if not replied.done():
                replied.set_exception(CountersUnavailableError(reason))

    async def close(self, reason: str) -> None:
        """Break it off and return when that is done."""
        self.break_off(reason)
        await self._lost.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop, first."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop, last."""
        self.break_off(f"the connection to Redis was lost: {exc}" if exc else "Redis closed the connection")
        self._lost.set()

    def data_received(self, data: bytes) -> None:
        """Called by the loop with any piece of the replies."""
        self._reader.feed(data)
        while not self.broken:
            try:
                reply = self._reader.gets()
            except hiredis.ProtocolError as error:
                self.break_off(f"not what Redis speaks: {error}")
                return
            if reply is _INCOMPLETE:
                return
            if not self._calls:
                self.break_off(f"Redis said unasked: {reply!r:.100}")
                return
            call = self._calls[0]
            call.replies.append(reply)
            self._replies_outstanding -= 1
            if len(call.replies) == call.count:
                self._calls.popleft()
                if not call.replied.done():
                    call.replied.set_result(call.replies)

    def _look_at_oldest(self) -> None:
        self._looking = bool(self._calls)
        if not self._calls:
            return
        oldest = self._calls[0]
        left_seconds = oldest.deadline - self._loop.time()
        if left_seconds <= 0:
            if oldest is self._overdue:
                self.break_off(f"no answer from Redis within {self._timeout_seconds} s")
                return
            self._overdue, left_seconds = oldest, _LAST_LOOK_SECONDS
        self._loop.call_later(left_seconds, self._look_at_oldest)
