"""gRPC over one HTTP/2 stream: messages in their frames, statuses, and one call as its method sees it."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from enum import IntEnum
from struct import Struct
from typing import Final, Protocol, TypeAlias
from urllib.parse import quote

# A legal call's body has 10 MiB; what surrounds it fits beside.
MESSAGE_BYTES_MAX: Final = 16 * 2**20
# Of one call, what may wait for its method, and what may wait for its peer's windows. Envoy sends the pieces of a body
# without waiting for our answers, but never more of it than it may hold itself, 1 MiB by default.
WAITING_BYTES_MAX: Final = 2 * MESSAGE_BYTES_MAX
# What a message takes beside its own bytes, so that the bound holds for empty ones too.
MESSAGE_OVERHEAD_BYTES: Final = 64

_PREFIX = Struct(">BI")  # compressed?, length


class StatusCode(IntEnum):
    """The codes of gRPC that are used here."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class RpcError(Exception):
    """Ends a call with a status. The text reaches the peer."""

    def __init__(self, code: StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Sender(Protocol):
    """Where a call's answers go."""

    def send_message(self, call: "Call", message: bytes) -> bool:
        """Send one message; say whether there was still somebody to send it to."""


class Call:
    """One call as its method sees it."""

    __slots__ = (
        "_connection",
        "_ended",
        "_given_up",
        "_messages",
        "_partial",
        "_started",
        "_waiter",
        "_waiting_bytes",
        "is_unary",
        "stream_id",
        "task",
        "unheard",
    )

    def __init__(self, connection: Sender, stream_id: int, *, is_unary: bool) -> None:
        self._connection = connection
        self._given_up = False
        self.is_unary = is_unary
        self._messages: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._partial = bytearray()
        self._ended = False
        self._started = False
        self._waiter: asyncio.Future[None] | None = None
        self.stream_id = stream_id
        self.task: asyncio.Task[None] | None = None
        # Called once, when the peer turns out not to have waited for the answer of a unary call. A method that is still
        # running then is cancelled instead.
        self.unheard: Callable[[], None] | None = None

    async def read(self) -> bytes | None:
        """Return the next message; ``None`` when the peer will send no more, or has given up.

        Raises:
            RpcError: the peer ended in the middle of a message.
        """
        while not self._messages:
            if self._ended:
                if self._partial and not self._given_up:
                    raise RpcError(StatusCode.INVALID_ARGUMENT, "the request ended in the middle of a message")
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message = self._messages.popleft()
        self._waiting_bytes -= len(message) + MESSAGE_OVERHEAD_BYTES
        return message

    async def read_only(self) -> bytes:
        """Return a request's one message, when the peer has ended it.

        Raises:
            RpcError: there are none or several, or half of one.
        """
        message = await self.read()
        if message is None or await self.read() is not None:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "a unary request has one message")
        return message

    def write(self, message: bytes) -> bool:
        """Send a message, as far as the peer takes it now; the rest when it does. False: the peer has given up."""
        return self._connection.send_message(self, message)

    def start_answer(self) -> bool:
        """Say whether the answer's headers are still to be sent, once."""
        started, self._started = self._started, True
        return not started

    # --- from the connection

    def feed(self, data: bytes) -> None:
        """Take bytes of the request.

        Raises:
            RpcError: what they begin is not a message that is taken here.
        """
        if not self._partial and len(data) >= _PREFIX.size:
            compressed, size = _PREFIX.unpack_from(data)
            if not compressed and len(data) == _PREFIX.size + size:  # the rule: one frame, one message
                self._take(data[_PREFIX.size :])
                return
        self._partial += data
        while len(self._partial) >= _PREFIX.size:
            compressed, size = _PREFIX.unpack_from(self._partial)
            if compressed:
                raise RpcError(StatusCode.UNIMPLEMENTED, "compressed messages are not taken")
            if size > MESSAGE_BYTES_MAX:
                raise RpcError(
                    StatusCode.RESOURCE_EXHAUSTED, f"a message of {size} bytes; at most {MESSAGE_BYTES_MAX} are taken"
                )
            end = _PREFIX.size + size
            if len(self._partial) < end:
                return
            message = bytes(self._partial[_PREFIX.size : end])
            del self._partial[:end]
            self._take(message)

    def _take(self, message: bytes) -> None:
        self._waiting_bytes += len(message) + MESSAGE_OVERHEAD_BYTES
        if self._waiting_bytes > WAITING_BYTES_MAX:
            raise RpcError(StatusCode.RESOURCE_EXHAUSTED, f"{len(self._messages)} messages wait")
        self._messages.append(message)
        self._wake()

    def end(self, *, given_up: bool = False) -> None:
        """Note that the peer will send no more."""
        self._ended = True
        self._given_up = given_up
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def framed(message: bytes) -> bytes:
    """Put a message in its frame."""
    return _PREFIX.pack(0, len(message)) + message


Unary: TypeAlias = Callable[[bytes, Call], Awaitable[bytes]]
Bidirectional: TypeAlias = Callable[[Call], Awaitable[None]]


def _literal(name: bytes, value: bytes) -> bytes:
    """Encode a header that is neither remembered nor compressed (RFC 7541, 6.2.2); the name has up to 126 bytes."""
    size, length = len(value), b""
    if size < 0x7F:
        length = bytes((size,))
    else:
        size -= 0x7F
        length = b"\x7f"
        while size >= 0x80:
            length += bytes((size & 0x7F | 0x80,))
            size >>= 7
        length += bytes((size,))
    return b"\x00" + bytes((len(name),)) + name + length + value


# 0x88 is ":status: 200" of HPACK's static table.
ANSWER_HEADERS = b"\x88" + _literal(b"content-type", b"application/grpc")
TRAILERS_OK = _literal(b"grpc-status", b"0")
_TEXT_CHARS_MAX = 500


def trailers_of(code: StatusCode, text: str) -> bytes:
    """Encode the last word of a call that failed."""
    encoded = quote(text[:_TEXT_CHARS_MAX], safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~", errors="replace").encode()
    return _literal(b"grpc-status", str(int(code)).encode()) + _literal(b"grpc-message", encoded)
