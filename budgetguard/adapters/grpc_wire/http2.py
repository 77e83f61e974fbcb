"""The server's half of HTTP/2 (RFC 9113), sans I/O: bytes in, events out, and bytes to send. What gRPC needs of it.

Whoever owns the socket feeds ``receive`` and sends what ``take_output`` returns, after anything it called here.
"""

from collections.abc import Callable
from struct import Struct
from typing import ClassVar, Final

from hpack import Decoder, HPACKError

from budgetguard.adapters.grpc_wire.events import (
    ConnectionFailedError,
    Data,
    Ended,
    ErrorCode,
    Event,
    Headers,
    Opened,
    Reset,
)

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# What a peer may send in one frame: the protocol's own default.
FRAME_BYTES_MAX: Final = 16_384
# Of one call's headers, as they are encoded.
HEADER_BLOCK_BYTES_MAX: Final = 65_536
# A message of 16 MiB arrives without waiting for us; so do many at once.
STREAM_WINDOW: Final = 2**25
CONNECTION_WINDOW: Final = 2**30
# Windows may not pass this, whatever is added to them.
_WINDOW_MAX: Final = 2**31 - 1
_WINDOW_DEFAULT: Final = 65_535
# Calls of one peer carry the same few header blocks (but for a deadline): decoded once each.
_BLOCKS_KEPT: Final = 64

_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = range(10)
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_SETTING_HEADER_TABLE, _SETTING_PUSH, _SETTING_STREAMS, _SETTING_WINDOW, _SETTING_FRAME, _SETTING_HEADER_LIST = range(
    1, 7
)

_HEAD = Struct(">HBBBI")  # length (high 16 bits, low 8), type, flags, stream
_SETTING = Struct(">HI")
_NUMBER = Struct(">I")


class _Stream:
    __slots__ = ("end_block", "local_ended", "pending", "receive_left", "remote_ended", "send_window")

    def __init__(self, send_window: int) -> None:
        self.send_window = send_window
        self.receive_left = STREAM_WINDOW
        self.remote_ended = False
        self.local_ended = False
        # Data that waits for room in the peer's windows, and the trailers to send behind it.
        self.pending = bytearray()
        self.end_block: bytes | None = None


class Http2Connection:
    """One connection. At most ``streams_max`` calls at a time; more are refused one by one."""

    def __init__(self, *, streams_max: int) -> None:
        self._streams_max = streams_max
        self._streams: dict[int, _Stream] = {}
        # The last stream that was opened, and the last one of them that was not refused.
        self._last_stream_id = 0
        self._last_taken_id = 0
        self._input = b""
        self._greeted = False
        self._output: list[bytes] = []
        self._decoder = Decoder(max_header_list_size=HEADER_BLOCK_BYTES_MAX)
        self._decoded: dict[bytes, Headers] = {}
        # Stream and flags of a HEADERS frame whose CONTINUATIONs are still to come, and the block so far.
        self._continued: tuple[int, int] | None = None
        self._block = bytearray()
        self._send_window = _WINDOW_DEFAULT
        self._stream_send_window = _WINDOW_DEFAULT
        self._peer_frame_bytes_max = FRAME_BYTES_MAX
        self._receive_left = CONNECTION_WINDOW
        self._going_away = False
        settings = (
            # No memory of earlier headers: then equal blocks mean equal headers.
            (_SETTING_HEADER_TABLE, 0),
            (_SETTING_STREAMS, streams_max),
            (_SETTING_WINDOW, STREAM_WINDOW),
            (_SETTING_HEADER_LIST, HEADER_BLOCK_BYTES_MAX),
        )
        self._send(_SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings))
        self._send(_WINDOW_UPDATE, 0, 0, _NUMBER.pack(CONNECTION_WINDOW - _WINDOW_DEFAULT))

    # --- to the peer

    def take_output(self) -> bytes:
        """Return what is to be sent, and forget it."""
        output = b"".join(self._output)
        self._output.clear()
        return output

    @property
    def greeted(self) -> bool:
        """Whether the peer has said anything: one that has not only watches whether we are there."""
        return self._greeted

    @property
    def idle(self) -> bool:
        """No call is under way, and nothing that was said to end one waits for the peer's windows."""
        return not self._streams

    def is_open(self, stream_id: int) -> bool:
        """Say whether anything can still be sent on a stream."""
        stream = self._streams.get(stream_id)
        return stream is not None and not stream.local_ended

    def send_headers(self, stream_id: int, block: bytes, *, end: bool = False) -> None:
        """Send an encoded header block of at most one frame; with ``end`` it is the last word, behind pending data."""
        stream = self._streams[stream_id]
        if not end:
            self._send(_HEADERS, _END_HEADERS, stream_id, block)
            return
        stream.end_block = block
        stream.local_ended = True
        self._flush(stream_id, stream)

    def send_data(self, stream_id: int, data: bytes) -> int:
        """Send data as far as the peer's windows allow now, the rest as they open; return how many bytes wait."""
        stream = self._streams[stream_id]
        size = len(data)
        if not stream.pending and size <= min(stream.send_window, self._send_window, self._peer_frame_bytes_max):
            stream.send_window -= size
            self._send_window -= size
            self._send(_DATA, 0, stream_id, data)
            return 0
        stream.pending += data
        self._flush(stream_id, stream)
        return len(stream.pending)

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        """Give up on a stream."""
        if self._streams.pop(stream_id, None) is not None:
            self._send(_RST_STREAM, 0, stream_id, _NUMBER.pack(code))

    def go_away(self, code: ErrorCode = ErrorCode.NO_ERROR) -> None:
        """Take no new streams; those that are open go on."""
        self._going_away = True
        self._send(_GOAWAY, 0, 0, _NUMBER.pack(self._last_taken_id) + _NUMBER.pack(code))

    def _send(self, kind: int, flags: int, stream_id: int, payload: bytes = b"") -> None:
        size = len(payload)
        self._output.append(_HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream_id))
        self._output.append(payload)

    def _flush(self, stream_id: int, stream: _Stream) -> None:
        while stream.pending:
            size = min(len(stream.pending), stream.send_window, self._send_window, self._peer_frame_bytes_max)
            if size <= 0:
                return
            piece = bytes(stream.pending[:size])
            del stream.pending[:size]
            stream.send_window -= size
            self._send_window -= size
            self._send(_DATA, 0, stream_id, piece)
        if stream.end_block is not None:
            self._send(_HEADERS, _END_HEADERS | _END_STREAM, stream_id, stream.end_block)
            del self._streams[stream_id]
            if not stream.remote_ended:
                # Answered before all of the request was here: the rest is of no use (RFC 9113, 8.1).
                self._send(_RST_STREAM, 0, stream_id, _NUMBER.pack(ErrorCode.NO_ERROR))

    # --- from the peer

    def receive(self, data: bytes) -> list[Event]:
        """Take the next bytes; return what they mean.

        Raises:
            ConnectionFailedError: they break the protocol.
        """
        data = self._input + data if self._input else data
        position = 0
        events: list[Event] = []
        try:
            if not self._greeted:
                if data[: len(PREFACE)] != PREFACE[: len(data)]:
                    raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "not HTTP/2")
                if len(data) < len(PREFACE) + _HEAD.size:
                    self._input = data
                    return events
                if data[len(PREFACE) + 3] != _SETTINGS:
                    raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "no SETTINGS behind the preface")
                self._greeted = True
                position = len(PREFACE)
            end = len(data)
            while end - position >= _HEAD.size:
                high, low, kind, flags, stream_id = _HEAD.unpack_from(data, position)
                size = high << 8 | low
                if size > FRAME_BYTES_MAX:
                    raise ConnectionFailedError(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
                start = position + _HEAD.size
                if end - start < size:
                    break
                position = start + size
                self._frame(kind, flags, stream_id & 0x7FFFFFFF, data[start:position], events)
        except ConnectionFailedError as error:
            self.go_away(error.code)
            raise
        self._input = data[position:]
        return events

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if self._continued is not None and (kind != _CONTINUATION or stream_id != self._continued[0]):
            raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted")
        handler = self._HANDLERS.get(kind)
        if handler is not None:  # kinds that are not known are to be ignored
            handler(self, flags, stream_id, payload, events)

    def _on_data(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        self._refuse_idle(stream_id)
        self._receive_left -= len(payload)
        if self._receive_left < 0:
            raise ConnectionFailedError(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        if self._receive_left < CONNECTION_WINDOW // 2:
            self._send(_WINDOW_UPDATE, 0, 0, _NUMBER.pack(CONNECTION_WINDOW - self._receive_left))
            self._receive_left = CONNECTION_WINDOW
        stream = self._streams.get(stream_id)
        if stream is None:
            return  # we have given up on it, or answered it, and the peer has not heard of that yet
        if stream.remote_ended:
            raise ConnectionFailedError(ErrorCode.STREAM_CLOSED, "data behind the end of a stream")
        stream.receive_left -= len(payload)
        if stream.receive_left < 0:
            raise ConnectionFailedError(ErrorCode.FLOW_CONTROL_ERROR, "more data than a stream's window")
        data = _unpadded(payload) if flags & _PADDED else payload
        if data:
            events.append(Data(stream_id, data))
        if flags & _END_STREAM:
            stream.remote_ended = True
            events.append(Ended(stream_id))
        elif stream.receive_left < STREAM_WINDOW // 2:
            self._send(_WINDOW_UPDATE, 0, stream_id, _NUMBER.pack(STREAM_WINDOW - stream.receive_left))
            stream.receive_left = STREAM_WINDOW

    def _on_headers(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if stream_id % 2 == 0:
            raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "a client's streams have odd numbers")
        block = _unpadded(payload) if flags & _PADDED else payload
        if flags & _WITH_PRIORITY:
            if len(block) < 5:
                raise ConnectionFailedError(ErrorCode.FRAME_SIZE_ERROR, "HEADERS without its priority")
            block = block[5:]
        if flags & _END_HEADERS:
            self._headers(stream_id, flags, block, events)
            return
        self._continued = (stream_id, flags)
        self._block[:] = block

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if self._continued is None:
            raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of nothing")
        if not payload and not flags & _END_HEADERS:
            raise ConnectionFailedError(ErrorCode.ENHANCE_YOUR_CALM, "CONTINUATION that adds nothing")
        self._block += payload
        if len(self._block) > HEADER_BLOCK_BYTES_MAX:
            raise ConnectionFailedError(ErrorCode.ENHANCE_YOUR_CALM, "a header block beyond its bound")
        if flags & _END_HEADERS:
            (_, first_flags), self._continued = self._continued, None
            self._headers(stream_id, first_flags, bytes(self._block), events)

    def _headers(self, stream_id: int, flags: int, block: bytes, events: list[Event]) -> None:
        # Also of streams that are refused or closed: the peer's table, if it has one, moves on.
        headers = self._decode(block)
        ends = flags & _END_STREAM
        stream = self._streams.get(stream_id)
        if stream is not None:  # trailers, which gRPC's clients have none of
            if stream.remote_ended or not ends:
                raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "headers in the middle of a stream")
            stream.remote_ended = True
            events.append(Ended(stream_id))
            return
        if stream_id <= self._last_stream_id:
            if not ends:
                raise ConnectionFailedError(ErrorCode.STREAM_CLOSED, "headers on a closed stream")
            return  # trailers of a stream that we have given up on
        self._last_stream_id = stream_id
        if self._going_away or len(self._streams) >= self._streams_max:
            self._send(_RST_STREAM, 0, stream_id, _NUMBER.pack(ErrorCode.REFUSED_STREAM))
            return
        self._last_taken_id = stream_id
        stream = self._streams[stream_id] = _Stream(self._stream_send_window)
        events.append(Opened(stream_id, headers))
        if ends:
            stream.remote_ended = True
            events.append(Ended(stream_id))

    def _decode(self, block: bytes) -> Headers:
        known = self._decoded.get(block)
        if known is not None:
            return known
        try:
            # Not every value is UTF-8: some may come from a client, by way of tracing.
            headers = {
                bytes(name).decode("latin-1"): bytes(value).decode("latin-1")
                for name, value in self._decoder.decode(block, raw=True)
            }
        except HPACKError as error:
            raise ConnectionFailedError(ErrorCode.COMPRESSION_ERROR, "a header block that cannot be decoded") from error
        if self._decoder.header_table_size:
            # While the peer uses a table, a block's meaning depends on the ones before it, and theirs on it.
            self._decoded.clear()
        elif len(block) < FRAME_BYTES_MAX:
            if len(self._decoded) >= _BLOCKS_KEPT:
                self._decoded.clear()
            self._decoded[block] = headers
        return headers

    def _on_priority(self, _flags: int, stream_id: int, payload: bytes, _events: list[Event]) -> None:
        if stream_id == 0:
            raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "PRIORITY of the connection")
        if len(payload) != 5:
            raise ConnectionFailedError(ErrorCode.FRAME_SIZE_ERROR, "malformed PRIORITY")

    def _on_rst_stream(self, _flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != _NUMBER.size:
            raise ConnectionFailedError(ErrorCode.FRAME_SIZE_ERROR, "malformed RST_STREAM")
        self._refuse_idle(stream_id)
        self._streams.pop(stream_id, None)
        events.append(Reset(stream_id, _NUMBER.unpack(payload)[0]))

    def _on_settings(self, flags: int, stream_id: int, payload: bytes, _events: list[Event]) -> None:
        if stream_id != 0:
            raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % _SETTING.size or (flags & _ACK and payload):
            raise ConnectionFailedError(ErrorCode.FRAME_SIZE_ERROR, "malformed SETTINGS")
        if flags & _ACK:
            return
        # Before whatever they make room for: a peer holds us to its old settings until it has read this.
        self._send(_SETTINGS, _ACK, 0)
        for name, value in _SETTING.iter_unpack(payload):
            if name == _SETTING_WINDOW:
                self._stream_windows_changed(value)
            elif name == _SETTING_FRAME:
                if not FRAME_BYTES_MAX <= value < 2**24:
                    raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, f"a largest frame of {value} bytes")
                self._peer_frame_bytes_max = value
            elif name == _SETTING_PUSH and value > 1:
                raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, f"pushing is {value}")

    def _stream_windows_changed(self, window: int) -> None:
        """Change every stream's window by the difference; it may become negative."""
        change, self._stream_send_window = window - self._stream_send_window, window
        if window > _WINDOW_MAX or any(s.send_window + change > _WINDOW_MAX for s in self._streams.values()):
            raise ConnectionFailedError(ErrorCode.FLOW_CONTROL_ERROR, "a window beyond its bound")
        for stream_id, stream in list(self._streams.items()):
            stream.send_window += change
            if stream.pending:
                self._flush(stream_id, stream)

    def _on_ping(self, flags: int, stream_id: int, payload: bytes, _events: list[Event]) -> None:
        if stream_id != 0:
            raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ConnectionFailedError(ErrorCode.FRAME_SIZE_ERROR, "malformed PING")
        if not flags & _ACK:
            self._send(_PING, _ACK, 0, payload)

    def _on_goaway(self, _flags: int, stream_id: int, payload: bytes, _events: list[Event]) -> None:
        if stream_id != 0:
            raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise ConnectionFailedError(ErrorCode.FRAME_SIZE_ERROR, "malformed GOAWAY")
        # The peer opens no more streams; its open ones go on.

    def _on_window_update(self, _flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != _NUMBER.size:
            raise ConnectionFailedError(ErrorCode.FRAME_SIZE_ERROR, "malformed WINDOW_UPDATE")
        added = _NUMBER.unpack(payload)[0] & 0x7FFFFFFF
        if stream_id == 0:
            self._send_window += added
            if not added or self._send_window > _WINDOW_MAX:
                code = ErrorCode.FLOW_CONTROL_ERROR if added else ErrorCode.PROTOCOL_ERROR
                raise ConnectionFailedError(code, f"a window widened by {added}")
            for waiting_id, waiting in [(i, s) for i, s in self._streams.items() if s.pending]:
                self._flush(waiting_id, waiting)
            return
        self._refuse_idle(stream_id)
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.send_window += added
        if not added or stream.send_window > _WINDOW_MAX:
            self.reset(stream_id, ErrorCode.FLOW_CONTROL_ERROR if added else ErrorCode.PROTOCOL_ERROR)
            events.append(Reset(stream_id, ErrorCode.PROTOCOL_ERROR))
        elif stream.pending:
            self._flush(stream_id, stream)

    def _refuse_idle(self, stream_id: int) -> None:
        """Refuse what belongs to a stream that was never opened, or to the connection."""
        if stream_id % 2 == 0 or stream_id > self._last_stream_id:
            raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, f"a frame on idle stream {stream_id}")

    def _on_push(self, _flags: int, _stream_id: int, _payload: bytes, _events: list[Event]) -> None:
        raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "a client cannot push")

    _HANDLERS: ClassVar[dict[int, Callable[["Http2Connection", int, int, bytes, list[Event]], None]]] = {
        _DATA: _on_data,
        _HEADERS: _on_headers,
        _PRIORITY: _on_priority,
        _RST_STREAM: _on_rst_stream,
        _SETTINGS: _on_settings,
        _PUSH: _on_push,
        _PING: _on_ping,
        _GOAWAY: _on_goaway,
        _WINDOW_UPDATE: _on_window_update,
        _CONTINUATION: _on_continuation,
    }


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ConnectionFailedError(ErrorCode.PROTOCOL_ERROR, "padding longer than its frame")
    return payload[1 : len(payload) - payload[0]]
