"""HTTP/2 frames made by hand, for what no decent client would send."""

from struct import Struct
from typing import NamedTuple

from hpack import Encoder

from budgetguard.adapters.grpc_wire.http2 import PREFACE, Http2Connection

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20

_HEAD = Struct(">HBBBI")
REQUEST = (
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "budgetguard"),
    (":path", "/test.Test/Unary"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


class Frame(NamedTuple):
    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def number(self):
        """The payload's last four bytes: an error code, or what a window grows by."""
        return int.from_bytes(self.payload[-4:], "big")


def frame(kind, flags=0, stream_id=0, payload=b""):
    return _HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream_id) + payload


def u32(number):
    return number.to_bytes(4, "big")


def setting(name, value):
    return name.to_bytes(2, "big") + u32(value)


def block(*more, headers=REQUEST):
    """Encode headers for a peer without a table: literals that are not remembered, and the size update at first."""
    encoder = Encoder()
    encoder.header_table_size = 0
    return encoder.encode([*headers, *more])


def request(stream_id, *, end=True):
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream_id, block())


def read_frames(output):
    """Split what was sent into its frames; it must end with a whole one."""
    frames = []
    while output:
        high, low, kind, flags, stream_id = _HEAD.unpack_from(output)
        end = _HEAD.size + (high << 8 | low)
        assert len(output) >= end
        frames.append(Frame(kind, flags, stream_id, output[_HEAD.size : end]))
        output = output[end:]
    return frames


GREETING = PREFACE + frame(SETTINGS)


def greeted(*, streams_max=100):
    """Return a connection behind the greetings of both sides."""
    connection = Http2Connection(streams_max=streams_max)
    assert connection.receive(GREETING + frame(SETTINGS, ACK)) == []
    connection.take_output()
    return connection
