"""A gRPC server for the data plane: unary and bidirectional methods over HTTP/2 on one event loop, and nothing else.

Every call passes here four times and more, so a millisecond is won or lost here: no thread, no queue between loops, one
write a turn. ``docs/decisions/015`` has the numbers and what was left out: compression, deadlines of the server's, TLS.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final, cast

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from budgetguard.adapters.grpc_wire.call import (
    ANSWER_HEADERS,
    MESSAGE_BYTES_MAX,
    TRAILERS_OK,
    WAITING_BYTES_MAX,
    Bidirectional,
    Call,
    RpcError,
    StatusCode,
    Unary,
    framed,
    trailers_of,
)
from budgetguard.adapters.grpc_wire.events import ConnectionFailedError, Data, Ended, ErrorCode, Event, Opened, Reset
from budgetguard.adapters.grpc_wire.http2 import Http2Connection
from budgetguard.adapters.serving import SOCKET_MODE, ListenError, remove_stale_socket, split_host_port, unix_path

logger = logging.getLogger(__name__)

# Envoy opens one stream a call and phase, all over one or two connections.
STREAMS_MAX: Final = 4096
DRAIN_SECONDS: Final = 20.0
# Between telling those who only watch that we go, and refusing calls: what they let pass before is still on its way.
NOTICE_SECONDS: Final = 0.3
# Behind the drain: for calls that were cancelled to clean up, and for peers to read what ends their connections.
CLOSE_SECONDS: Final = 1.0
# How long a bidirectional method may take to read what its peer had said before it gave up, and to end.
GIVEN_UP_SECONDS: Final = 1.0
# A peer that leaves more than this on its socket is not read either, until it reads.
UNREAD_BYTES_MAX: Final = MESSAGE_BYTES_MAX
# Answers whose peer may still say that it did not wait for them: half a second's worth at any rate we can reach.
ANSWERED_KEPT: Final = 1024

HEALTH_METHOD = "/grpc.health.v1.Health/Check"


class _Connection(asyncio.Protocol):
    """One peer."""

    def __init__(self, server: "WireServer") -> None:
        self._server = server
        self._http2 = Http2Connection(streams_max=STREAMS_MAX)
        self._calls: dict[int, Call] = {}
        self._answered: OrderedDict[int, Callable[[], None]] = OrderedDict()
        self._transport: asyncio.Transport | None = None

    # --- asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=UNREAD_BYTES_MAX)
        self._server.connection_made(self)
        if self._server.draining:  # it was accepted in the last turn before
            self.drain()
        else:
            self._send()

    def data_received(self, data: bytes) -> None:
        try:
            events = self._http2.receive(data)
        except ConnectionFailedError as error:
            logger.warning("a peer was cut off: %s", error)
            self._send()
            self.close()
            return
        for event in events:
            self._handle(event)
        self._send()

    def pause_writing(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        self._abandon_all()
        # Whether it had read its last answers nobody knows.
        self._answered.clear()
        self._server.connection_lost(self)

    # --- to the peer

    @property
    def greeted(self) -> bool:
        """Whether the peer speaks HTTP/2, or only watches whether we are there."""
        return self._http2.greeted

    def send_message(self, call: Call, message: bytes) -> bool:
        """Send one message of an answer; say whether there was still somebody to send it to."""
        put = self._put(call, message)
        self._send()
        return put

    def drain(self) -> None:
        """Take no new calls; the connection closes when the last one has ended and its answer is sent."""
        self._http2.go_away()
        self._send()

    def close(self) -> None:
        """Close, whatever is under way."""
        self._abandon_all()
        if self._transport is not None:
            self._transport.close()

    def cancel_calls(self) -> None:
        """Cancel what is under way."""
        for call in list(self._calls.values()):
            self._cancel(call)

    def abort(self) -> None:
        """Close without waiting for the peer to read what was sent."""
        if self._transport is not None:
            self._transport.abort()

    def _put(self, call: Call, message: bytes) -> bool:
        """Make a message ready to be sent, unless nobody would read it."""
        if self._transport is None or not self._http2.is_open(call.stream_id):
            return False  # the call's task hears of it by being cancelled
        if call.start_answer():
            self._http2.send_headers(call.stream_id, ANSWER_HEADERS)
        if self._http2.send_data(call.stream_id, framed(message)) > WAITING_BYTES_MAX:
            logger.warning("a peer was given up that does not read its answers")
            self._http2.reset(call.stream_id, ErrorCode.ENHANCE_YOUR_CALM)
            self._cancel(call)
            return False
        return True

    def _send(self) -> None:
        output = self._http2.take_output()
        if self._transport is None:
            return
        if output:
            self._transport.write(output)
        if self._server.draining and self._http2.idle:
            self.close()

    # --- calls

    def _handle(self, event: Event) -> None:
        stream_id = event.stream_id
        if isinstance(event, Opened):
            self._open(stream_id, event.headers)
            return
        call = self._calls.get(stream_id)
        if isinstance(event, Reset):
            self._give_up(stream_id, call)
        elif call is None:
            pass  # already answered
        elif isinstance(event, Ended):
            call.end()
        else:
            self._feed(call, event)

    def _feed(self, call: Call, event: Data) -> None:
        try:
            call.feed(event.data)
        except RpcError as error:
            self._cancel(call)
            self._end(call, trailers_of(error.code, error.text))

    def _open(self, stream_id: int, headers: Mapping[str, str]) -> None:
        if headers.get(":method") != "POST" or not headers.get("content-type", "").startswith("application/grpc"):
            self._http2.reset(stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        path = headers.get(":path", "")
        unary = self._server.unary.get(path)
        bidirectional = self._server.bidirectional.get(path)
        call = Call(self, stream_id, is_unary=unary is not None)
        if unary is not None:
            work = self._answer_unary(call, unary)
        elif bidirectional is not None:
            work = self._answer_bidirectional(call, bidirectional)
        else:
            self._end(call, trailers_of(StatusCode.UNIMPLEMENTED, f"no method {path}"))
            return
        self._calls[stream_id] = call
        call.task = asyncio.create_task(work)

    async def _answer_unary(self, call: Call, method: Unary) -> None:
        answered = False

        async def answer() -> None:
            nonlocal answered
            answered = self._put(call, await method(await call.read_only(), call))

        self._end(call, await _outcome(answer()))
        if call.unheard is None:
            return
        if not answered:
            call.unheard()
            return
        self._answered[call.stream_id] = call.unheard
        if len(self._answered) > ANSWERED_KEPT:
            self._answered.popitem(last=False)

    async def _answer_bidirectional(self, call: Call, method: Bidirectional) -> None:
        self._end(call, await _outcome(method(call)))

    def _end(self, call: Call, trailers: bytes) -> None:
        """Send the last word of a call."""
        self._calls.pop(call.stream_id, None)
        if self._http2.is_open(call.stream_id):
            if call.start_answer():
                trailers = ANSWER_HEADERS + trailers
            self._http2.send_headers(call.stream_id, trailers, end=True)
        self._send()

    def _give_up(self, stream_id: int, call: Call | None) -> None:
        unheard = self._answered.pop(stream_id, None)
        if call is not None:
            self._abandon(call)
        elif unheard is not None:
            unheard()

    def _abandon(self, call: Call) -> None:
        """End a call whose peer has given up.

        What a bidirectional method was told before is still read: it may be what binds it to do something about it, and
        a task that is cancelled before its first step would never hear of it. A unary method is cancelled: its answer
        is all that it was asked for.
        """
        self._calls.pop(call.stream_id, None)
        call.end(given_up=True)
        if call.task is not None:
            self._server.see_through(call.task, cancel_after_seconds=0.0 if call.is_unary else GIVEN_UP_SECONDS)

    def _cancel(self, call: Call) -> None:
        self._calls.pop(call.stream_id, None)
        if call.task is not None:
            self._server.see_through(call.task, cancel_after_seconds=0.0)

    def _abandon_all(self) -> None:
        for call in list(self._calls.values()):
            self._abandon(call)


async def _outcome(work: Awaitable[None]) -> bytes:
    """Await a method and spell how it ended. Any fault of it is its call's alone, and its text stays in the log."""
    try:
        await work
    except RpcError as error:
        return trailers_of(error.code, error.text)
    except Exception:
        logger.exception("call failed")
        return trailers_of(StatusCode.INTERNAL, "internal error")
    return TRAILERS_OK


class WireServer:
    """One gRPC server on one address, ``unix:/path.sock`` or ``host:port``, with grpc.health.v1 on it.

    ``unary`` and ``bidirectional`` map a method's path (``/package.Service/Method``) to who answers it.
    """

    def __init__(
        self,
        address: str,
        *,
        unary: Mapping[str, Unary] | None = None,
        bidirectional: Mapping[str, Bidirectional] | None = None,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        self.address = address
        self.unary: dict[str, Unary] = {HEALTH_METHOD: self._check_health, **(unary or {})}
        self.bidirectional: dict[str, Bidirectional] = {**(bidirectional or {})}
        self.draining = False
        self._drain_seconds = drain_seconds
        self._serving = False
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._without_connections = asyncio.Event()
        self._without_connections.set()
        # Calls that were given up and are cleaning up.
        self._given_up: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen and serve.

        Raises:
            ListenError: the address is in use, or may not be listened on.
        """
        loop = asyncio.get_running_loop()
        path = unix_path(self.address)
        try:
            if path is None:
                host, port = split_host_port(self.address)
                self._server = await loop.create_server(lambda: _Connection(self), host, port)
            else:
                await asyncio.to_thread(remove_stale_socket, path)
                self._server = await loop.create_unix_server(lambda: _Connection(self), str(path))
                await asyncio.to_thread(path.chmod, SOCKET_MODE)
        except ListenError:
            raise
        except OSError as error:
            raise ListenError(f"cannot listen on {self.address}: it is in use, or not ours to use") from error

    async def set_serving(self, *, serving: bool) -> None:
        """Tell health checks whether calls would succeed."""
        self._serving = serving

    async def stop(self) -> None:
        """Refuse new calls, let those in flight end, and cancel what is left after the drain time."""
        self._serving = False
        if self._server is not None:
            path = unix_path(self.address)
            if path is not None:
                # While we listen the path is ours; later it may be our successor's.
                await asyncio.to_thread(path.unlink, missing_ok=True)
            self._server.close()
            self._server = None
        watchers = [connection for connection in self._connections if not connection.greeted]
        for connection in watchers:
            connection.close()
        if watchers:
            await asyncio.sleep(NOTICE_SECONDS)
        self.draining = True
        for connection in list(self._connections):
            connection.drain()
        await self._connections_end(self._drain_seconds)
        for connection in list(self._connections):
            connection.cancel_calls()
            connection.close()
        if self._given_up:
            await asyncio.wait(self._given_up, timeout=GIVEN_UP_SECONDS + CLOSE_SECONDS)
        await self._connections_end(CLOSE_SECONDS)
        for connection in list(self._connections):
            connection.abort()
        await self._without_connections.wait()

    async def _connections_end(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._without_connections.wait(), seconds)

    # --- from connections

    def connection_made(self, connection: _Connection) -> None:
        """Note a peer."""
        self._connections.add(connection)
        self._without_connections.clear()

    def connection_lost(self, connection: _Connection) -> None:
        """Forget a peer."""
        self._connections.discard(connection)
        if not self._connections:
            self._without_connections.set()

    def see_through(self, task: "asyncio.Task[None]", *, cancel_after_seconds: float) -> None:
        """Wait for the end of a call that was given up, but not for ever."""
        self._given_up.add(task)
        task.add_done_callback(self._given_up.discard)
        if cancel_after_seconds:
            timer = asyncio.get_running_loop().call_later(cancel_after_seconds, task.cancel)
            task.add_done_callback(lambda _: timer.cancel())
        else:
            task.cancel()

    async def _check_health(self, message: bytes, _call: Call) -> bytes:
        if HealthCheckRequest.FromString(message).service:
            raise RpcError(StatusCode.NOT_FOUND, "unknown service")
        status = HealthCheckResponse.SERVING if self._serving else HealthCheckResponse.NOT_SERVING
        answer: bytes = HealthCheckResponse(status=status).SerializeToString()
        return answer
