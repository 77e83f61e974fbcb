"""A gRPC client that does exactly what it is told, frame by frame: h2 over a Unix socket."""

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from struct import Struct
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events
import h2.settings

from tests.adapters.grpc_wire.frames import REQUEST

_PREFIX = Struct(">BI")


def framed(message, *, compressed=0):
    return _PREFIX.pack(compressed, len(message)) + message


@dataclass
class Answer:
    body: bytearray = field(default_factory=bytearray)
    headers: dict = field(default_factory=dict)
    ended: bool = False
    reset: int | None = None

    @property
    def status(self):
        return int(self.headers["grpc-status"])

    @property
    def message(self):
        return unquote(self.headers.get("grpc-message", ""))

    @property
    def messages(self):
        messages, body = [], bytes(self.body)
        while body:
            compressed, size = _PREFIX.unpack_from(body)
            assert not compressed
            messages.append(body[_PREFIX.size : _PREFIX.size + size])
            assert len(messages[-1]) == size
            body = body[_PREFIX.size + size :]
        return messages


class _PatientConnection(h2.connection.H2Connection):
    """Goes on with open streams behind a GOAWAY without an error, as the protocol wants it; h2 itself does not."""

    def _receive_goaway_frame(self, frame):
        state = self.state_machine.state
        result = super()._receive_goaway_frame(frame)
        if frame.error_code == 0:
            self.state_machine.state = state
        return result


class RawClient:
    """``window`` and ``frame_bytes_max`` are what it allows the server; it widens windows only when told."""

    def __init__(self, reader, writer, *, window=2**30, connection_window=2**30):
        self.reader, self.writer = reader, writer
        self.h2 = _PatientConnection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.h2.initiate_connection()
        if connection_window > 65_535:
            self.h2.increment_flow_control_window(connection_window - 65_535)
        self.answers = {}
        self.went_away = None
        self.closed = False
        self.pinged = self.ponged = 0

    @classmethod
    @asynccontextmanager
    async def connected(cls, path, **settings):
        reader, writer = await asyncio.open_unix_connection(path)
        client = cls(reader, writer, **settings)
        try:
            await client.until(lambda: client.h2.remote_settings.max_concurrent_streams < 2**31)
            yield client
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def flush(self):
        self.writer.write(self.h2.data_to_send())
        await self.writer.drain()

    def open(self, method, **headers):
        """Begin a call; nothing is sent before ``flush``."""
        stream_id = self.h2.get_next_available_stream_id()
        names = dict(REQUEST) | {":path": f"/test.Test/{method}"} | headers
        self.h2.send_headers(stream_id, list(names.items()))
        self.answers[stream_id] = Answer()
        return stream_id

    def send(self, stream_id, data=b"", *, end=False, frame_bytes=16_384):
        for start in range(0, len(data), frame_bytes):
            self.h2.send_data(stream_id, data[start : start + frame_bytes])
        if end:
            self.h2.end_stream(stream_id)

    async def ask(self, method, message, **headers):
        """Begin a call with its one message."""
        stream_id = self.open(method, **headers)
        self.h2.send_data(stream_id, framed(message), end_stream=True)
        await self.flush()
        return stream_id

    async def call(self, method, message, **headers):
        """Make a unary call; return its answer."""
        return await self.end_of(await self.ask(method, message, **headers))

    async def end_of(self, stream_id):
        answer = self.answers[stream_id]
        await self.until(lambda: answer.ended or answer.reset is not None)
        return answer

    async def until(self, holds):
        """Read until something holds."""
        async with asyncio.timeout(30):
            await self.flush()
            while not holds():
                assert not self.closed, "the server closed the connection"
                data = await self.reader.read(65_536)
                self.closed = not data
                for event in self.h2.receive_data(data):
                    self._take(event)
                await self.flush()

    def _take(self, event):
        match event:
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                self.answers[event.stream_id].headers |= dict(event.headers)
            case h2.events.DataReceived():
                self.answers[event.stream_id].body += event.data
            case h2.events.StreamEnded():
                self.answers[event.stream_id].ended = True
            case h2.events.StreamReset():
                self.answers[event.stream_id].reset = int(event.error_code)
            case h2.events.PingAckReceived():
                self.ponged += 1
            case h2.events.ConnectionTerminated():
                self.went_away = (event.last_stream_id, int(event.error_code))

    async def settled(self):
        """Wait until the server has acted on everything that was sent so far."""
        self.h2.ping(b"settled?")
        self.pinged += 1
        await self.until(lambda: self.pinged == self.ponged)
