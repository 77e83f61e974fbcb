"""What a peer can say over HTTP/2, and the one way in which it can fail."""

from enum import IntEnum
from typing import NamedTuple, TypeAlias

Headers: TypeAlias = dict[str, str]


class ErrorCode(IntEnum):
    """RFC 9113, section 7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Opened(NamedTuple):
    """A request began."""

    stream_id: int
    headers: Headers


class Data(NamedTuple):
    """A piece of a request's body, never empty."""

    stream_id: int
    data: bytes


class Ended(NamedTuple):
    """The peer will send no more on this stream."""

    stream_id: int


class Reset(NamedTuple):
    """The peer has given up on a stream, perhaps on one that was answered already."""

    stream_id: int
    error_code: int


Event: TypeAlias = Opened | Data | Ended | Reset


class ConnectionFailedError(Exception):
    """The peer broke the protocol: nothing more can be read from it. ``take_output`` has the GOAWAY that says why."""

    def __init__(self, code: ErrorCode, detail: str) -> None:
        super().__init__(f"{code.name}: {detail}")
        self.code = code
