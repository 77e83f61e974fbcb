"""What no decent peer sends: each broken frame ends the connection with its reason, and nothing else ever escapes."""

import pytest
from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetguard.adapters.grpc_wire.http2 import (
    CONNECTION_WINDOW,
    FRAME_BYTES_MAX,
    HEADER_BLOCK_BYTES_MAX,
    PREFACE,
    STREAM_WINDOW,
    ConnectionFailedError,
    Data,
    Ended,
    ErrorCode,
    Http2Connection,
    Opened,
    Reset,
)
from tests.adapters.grpc_wire.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    GREETING,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    REQUEST,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    block,
    frame,
    greeted,
    read_frames,
    request,
    setting,
    u32,
)

PROTOCOL, SIZE, FLOW = ErrorCode.PROTOCOL_ERROR, ErrorCode.FRAME_SIZE_ERROR, ErrorCode.FLOW_CONTROL_ERROR
CLOSED, COMPRESSION, CALM = ErrorCode.STREAM_CLOSED, ErrorCode.COMPRESSION_ERROR, ErrorCode.ENHANCE_YOUR_CALM
OPEN = request(1, end=False)
HALF = frame(HEADERS, 0, 1, block()[:10])
TOO_LONG = block(*((f"x-{number}", "v" * 2000) for number in range(40)))
# Small on the wire, huge when it is decoded: one long value, remembered, and pointed at again and again.
BOMB = b"\x3f\xe1\x1f" + b"\x40\x01x\x7f\x81\x0f" + b"v" * 2048 + b"\xbe" * 5000

BROKEN = {
    "a frame longer than allowed": (frame(PING, payload=bytes(FRAME_BYTES_MAX + 1)), SIZE),
    "an unknown frame longer than allowed": (frame(0xEE, payload=bytes(FRAME_BYTES_MAX + 1)), SIZE),
    "data on the connection": (frame(DATA, 0, 0, b"x"), PROTOCOL),
    "data on an idle stream": (frame(DATA, 0, 1, b"x"), PROTOCOL),
    "data on an idle stream beyond the last": (OPEN + frame(DATA, 0, 3, b"x"), PROTOCOL),
    "data on an even stream": (request(3) + frame(DATA, 0, 2, b"x"), PROTOCOL),
    "data behind the end": (request(1) + frame(DATA, 0, 1, b"x"), CLOSED),
    "data padded beyond its end": (OPEN + frame(DATA, PADDED, 1, b"\x05four"), PROTOCOL),
    "data padded without a length": (OPEN + frame(DATA, PADDED, 1), PROTOCOL),
    "headers on the connection": (frame(HEADERS, END_HEADERS, 0, block()), PROTOCOL),
    "headers on an even stream": (frame(HEADERS, END_HEADERS, 2, block()), PROTOCOL),
    "headers padded beyond their end": (frame(HEADERS, END_HEADERS | PADDED, 1, b"\x09\x88"), PROTOCOL),
    "headers padded without a length": (frame(HEADERS, END_HEADERS | PADDED, 1), PROTOCOL),
    "headers with half of a priority": (frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, b"\0\0\0"), SIZE),
    "headers in the middle of a stream": (OPEN + OPEN, PROTOCOL),
    "trailers behind the end": (request(1) + request(1), PROTOCOL),
    "headers on a closed stream": (OPEN + frame(RST_STREAM, 0, 1, u32(8)) + OPEN, CLOSED),
    "a header block interrupted by a ping": (HALF + frame(PING, payload=bytes(8)), PROTOCOL),
    "a header block interrupted by an unknown frame": (HALF + frame(0xEE), PROTOCOL),
    "a header block interrupted by another": (HALF + request(3), PROTOCOL),
    "a header block continued on another stream": (HALF + frame(CONTINUATION, END_HEADERS, 3, b"\x88"), PROTOCOL),
    "a continuation of nothing": (frame(CONTINUATION, END_HEADERS, 1, block()), PROTOCOL),
    "a continuation of a whole block": (OPEN + frame(CONTINUATION, END_HEADERS, 1, block()), PROTOCOL),
    "continuations that add nothing": (HALF + frame(CONTINUATION, 0, 1), CALM),
    "continuations without end": (HALF + 5 * frame(CONTINUATION, 0, 1, bytes(FRAME_BYTES_MAX)), CALM),
    "a header block cut short": (frame(HEADERS, END_HEADERS, 1, block()[:-1]), COMPRESSION),
    "a header of no table": (frame(HEADERS, END_HEADERS, 1, b"\xff\x80\x7f"), COMPRESSION),
    "a header at index zero": (frame(HEADERS, END_HEADERS, 1, b"\x80"), COMPRESSION),
    "a name that is badly packed": (frame(HEADERS, END_HEADERS, 1, b"\x00\x84\xff\xff\xff\xff\x00"), COMPRESSION),
    "a table larger than allowed": (frame(HEADERS, END_HEADERS, 1, b"\x3f\xe2\x1f" + block()), COMPRESSION),
    "headers beyond their bound": (
        frame(HEADERS, 0, 1, TOO_LONG[:16_000])
        + b"".join(
            frame(CONTINUATION, 0, 1, TOO_LONG[start : start + 16_000]) for start in range(16_000, 80_000, 16_000)
        )
        + frame(CONTINUATION, END_HEADERS, 1, TOO_LONG[80_000:]),
        CALM if len(TOO_LONG) > HEADER_BLOCK_BYTES_MAX else COMPRESSION,
    ),
    "headers beyond their bound once they are decoded": (frame(HEADERS, END_HEADERS, 1, BOMB), COMPRESSION),
    "a priority of the connection": (frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL),
    "a priority of another size": (frame(PRIORITY, 0, 1, bytes(4)), SIZE),
    "a reset of the connection": (frame(RST_STREAM, 0, 0, u32(8)), PROTOCOL),
    "a reset of an idle stream": (frame(RST_STREAM, 0, 1, u32(8)), PROTOCOL),
    "a reset of an even stream": (request(3) + frame(RST_STREAM, 0, 2, u32(8)), PROTOCOL),
    "a reset of another size": (OPEN + frame(RST_STREAM, 0, 1, bytes(5)), SIZE),
    "settings of a stream": (frame(SETTINGS, 0, 1), PROTOCOL),
    "settings cut short": (frame(SETTINGS, payload=bytes(5)), SIZE),
    "an acknowledgement with settings": (frame(SETTINGS, ACK, payload=setting(4, 1)), SIZE),
    "a window beyond its bound": (frame(SETTINGS, payload=setting(4, 2**31)), FLOW),
    "a window that passes its bound by settings": (
        OPEN + frame(WINDOW_UPDATE, 0, 1, u32(2**31 - 1 - 65_535)) + frame(SETTINGS, payload=setting(4, 65_536)),
        FLOW,
    ),
    "frames smaller than the least": (frame(SETTINGS, payload=setting(5, FRAME_BYTES_MAX - 1)), PROTOCOL),
    "frames larger than can be told": (frame(SETTINGS, payload=setting(5, 2**24)), PROTOCOL),
    "pushing that is neither on nor off": (frame(SETTINGS, payload=setting(2, 2)), PROTOCOL),
    "a push": (OPEN + frame(PUSH_PROMISE, END_HEADERS, 1, u32(2) + block()), PROTOCOL),
    "a ping of a stream": (frame(PING, 0, 1, bytes(8)), PROTOCOL),
    "a short ping": (frame(PING, payload=bytes(7)), SIZE),
    "a long ping": (frame(PING, payload=bytes(9)), SIZE),
    "a goodbye of a stream": (frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL),
    "a goodbye cut short": (frame(GOAWAY, payload=bytes(7)), SIZE),
    "a connection widened by nothing": (frame(WINDOW_UPDATE, payload=u32(0)), PROTOCOL),
    "a connection widened beyond its bound": (frame(WINDOW_UPDATE, payload=u32(2**31 - 1)), FLOW),
    "a wider window of another size": (frame(WINDOW_UPDATE, payload=bytes(3)), SIZE),
    "a wider window of an idle stream": (frame(WINDOW_UPDATE, 0, 1, u32(1)), PROTOCOL),
}


def feed(connection, wire, chunk):
    for start in range(0, len(wire), chunk):
        connection.receive(wire[start : start + chunk])


@pytest.mark.parametrize(("frames", "code"), BROKEN.values(), ids=BROKEN)
def test_broken_frames_end_the_connection(frames, code):
    for chunk in (len(frames), 1000, 1):
        connection = greeted()
        with pytest.raises(ConnectionFailedError) as failed:
            feed(connection, frames, chunk)
        assert failed.value.code is code
        last = read_frames(connection.take_output())[-1]
        assert (last.kind, last.number) == (GOAWAY, code)


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\nhost: here\r\n\r\n",
        b"PRI * HTTP/1.1\r\n",
        b"X",
        PREFACE[:-1] + b"\r" + frame(SETTINGS),
        PREFACE + frame(PING, payload=bytes(8)),
    ],
)
def test_greetings_that_are_none(greeting):
    for chunk in (len(greeting), 1):
        connection = Http2Connection(streams_max=1)
        with pytest.raises(ConnectionFailedError) as failed:
            feed(connection, greeting, chunk)
        assert failed.value.code is PROTOCOL


def test_a_greeting_in_pieces():
    for cut in range(len(GREETING)):
        connection = Http2Connection(streams_max=1)
        assert connection.receive(GREETING[:cut]) == []
        assert len(connection.receive(GREETING[cut:] + request(1))) == 2


def test_what_is_not_known_is_ignored():
    connection = greeted()
    unknown = frame(0xEE, 0xFF, 7, b"anything") + frame(SETTINGS, payload=setting(0xABC, 5))
    # Flags without a meaning, and the bit of stream numbers that is reserved.
    odd = frame(HEADERS, END_HEADERS | END_STREAM | 0xC0, 1 | 2**31, block())
    goodbye = frame(GOAWAY, payload=u32(0) + u32(77) + b"because")
    priorities = frame(PRIORITY, 0, 9, bytes(5)) + frame(PRIORITY, 0, 1, bytes(5))
    events = connection.receive(unknown + odd + goodbye + priorities + frame(PING, ACK, 0, bytes(8)) + request(3))
    assert [event.stream_id for event in events] == [1, 1, 3, 3]
    assert [(sent.kind, sent.flags) for sent in read_frames(connection.take_output())] == [(SETTINGS, ACK)]


def test_pads_and_priorities_are_no_part_of_what_they_surround():
    connection = greeted()
    padded = frame(HEADERS, END_HEADERS | PADDED | WITH_PRIORITY, 1, b"\x03" + bytes(5) + block() + b"\0\0\0")
    data = frame(DATA, PADDED, 1, b"\x02data\0\0") + frame(DATA, PADDED, 1, b"\x02\0\0") + frame(DATA, PADDED, 1, b"\0")
    events = connection.receive(padded + data + frame(DATA, PADDED | END_STREAM, 1, b"\x01!\0"))
    assert events == [Opened(1, dict(REQUEST)), Data(1, b"data"), Data(1, b"!"), Ended(1)]


def test_a_stream_widened_wrongly_is_reset_and_no_other():
    connection = greeted()
    connection.receive(OPEN + request(3, end=False))
    assert connection.receive(frame(WINDOW_UPDATE, 0, 1, u32(0))) == [Reset(1, PROTOCOL)]
    assert [event.stream_id for event in connection.receive(frame(WINDOW_UPDATE, 0, 3, u32(2**31 - 1)))] == [3]
    assert [(sent.kind, sent.stream_id, sent.number) for sent in read_frames(connection.take_output())] == [
        (RST_STREAM, 1, PROTOCOL),
        (RST_STREAM, 3, FLOW),
    ]
    assert len(connection.receive(request(5))) == 2


def test_frames_that_cross_our_end_of_a_stream_are_ignored():
    connection = greeted()
    connection.receive(OPEN + request(3))
    connection.reset(1, ErrorCode.CANCEL)
    connection.reset(1, ErrorCode.CANCEL)
    connection.send_headers(3, b"\x88", end=True)
    sent = read_frames(connection.take_output())
    assert [(each.kind, each.stream_id) for each in sent] == [(RST_STREAM, 1), (HEADERS, 3)]
    late = frame(DATA, 0, 1, b"x") + frame(WINDOW_UPDATE, 0, 3, u32(1)) + frame(WINDOW_UPDATE, 0, 1, u32(0))
    trailers = frame(HEADERS, END_HEADERS | END_STREAM, 1, block())
    assert connection.receive(late + trailers + frame(PRIORITY, 0, 3, bytes(5))) == []
    assert connection.receive(frame(RST_STREAM, 0, 3, u32(8))) == [Reset(3, 8)]
    assert connection.take_output() == b""


def test_calls_beyond_the_limit_are_refused_one_by_one():
    connection = greeted(streams_max=2)
    events = connection.receive(request(1) + request(3) + request(5, end=False) + frame(DATA, END_STREAM, 5, b"x"))
    assert [event.stream_id for event in events] == [1, 1, 3, 3]
    (refused,) = read_frames(connection.take_output())
    assert (refused.kind, refused.stream_id, refused.number) == (RST_STREAM, 5, ErrorCode.REFUSED_STREAM)
    connection.send_headers(1, b"\x88", end=True)
    assert [event.stream_id for event in connection.receive(request(7))] == [7, 7]


def test_calls_behind_a_goodbye_are_refused_and_open_ones_go_on():
    connection = greeted()
    connection.receive(OPEN)
    connection.go_away()
    assert connection.receive(request(3) + frame(DATA, END_STREAM, 1, b"x")) == [Data(1, b"x"), Ended(1)]
    goodbye, refused = read_frames(connection.take_output())
    assert (goodbye.kind, goodbye.payload) == (GOAWAY, u32(1) + u32(0))
    assert (refused.kind, refused.stream_id, refused.number) == (RST_STREAM, 3, ErrorCode.REFUSED_STREAM)
    assert not connection.idle
    connection.send_headers(1, b"\x88", end=True)
    assert connection.idle
    connection.take_output()
    with pytest.raises(ConnectionFailedError):
        connection.receive(frame(PING))
    # A later goodbye never names a later call.
    assert read_frames(connection.take_output())[-1].payload == u32(1) + u32(SIZE)


def test_windows_are_widened_in_time_for_whatever_is_sent():
    connection = greeted()
    connection.receive(OPEN)
    data = 16 * frame(DATA, 0, 1, bytes(FRAME_BYTES_MAX))
    left = {0: CONNECTION_WINDOW, 1: STREAM_WINDOW}
    for _ in range(CONNECTION_WINDOW // (16 * FRAME_BYTES_MAX) * 2):
        assert len(connection.receive(data)) == 16
        for widened in read_frames(connection.take_output()):
            assert widened.kind == WINDOW_UPDATE
            left[widened.stream_id] += widened.number
        left = {stream_id: room - 16 * FRAME_BYTES_MAX for stream_id, room in left.items()}
        assert min(left.values()) >= 0
    assert max(left.values()) < 2**31


def test_data_beyond_a_window_ends_the_connection():
    for of_stream in (True, False):
        connection = greeted()
        connection.receive(OPEN)
        # Windows are widened long before, so that only a peer that counts wrongly gets here: by hand, then.
        if of_stream:
            connection._streams[1].receive_left = 9
        else:
            connection._receive_left = 9
        with pytest.raises(ConnectionFailedError) as failed:
            connection.receive(frame(DATA, 0, 1, bytes(10)))
        assert failed.value.code is FLOW


def test_equal_blocks_are_decoded_anew_while_the_peer_uses_a_table():
    connection = greeted()
    remembered = b"\x40\x03x-a\x01b"

    def headers(stream_id, encoded):
        opened, _ = connection.receive(frame(HEADERS, END_HEADERS | END_STREAM, stream_id, encoded))
        return opened.headers

    # Without a table nothing is remembered by it, whatever the block asks for: known bytes need no decoding.
    assert headers(1, b"\x20" + remembered) == {"x-a": "b"}
    assert headers(3, remembered) == headers(5, remembered) == {"x-a": "b"}
    # With one, the very same bytes are remembered, and the last of them is what index 62 means.
    assert headers(7, b"\x3f\xe1\x1f") == {}
    assert headers(9, b"\x40\x03x-c\x01d") == {"x-c": "d"}
    assert headers(11, remembered) == {"x-a": "b"}
    assert headers(13, b"\xbe") == {"x-a": "b"}
    assert headers(15, b"\xbf") == {"x-c": "d"}
    assert headers(17, b"\x40\x03x-e\x01f") == {"x-e": "f"}
    assert headers(19, b"\xbe") == {"x-e": "f"}
    assert headers(21, b"\x20" + remembered) == {"x-a": "b"}
    with pytest.raises(ConnectionFailedError):
        headers(23, b"\xbe")


def test_the_table_moves_on_with_blocks_of_streams_that_are_refused():
    connection = greeted(streams_max=1)
    connection.receive(OPEN)
    encoder = Encoder()
    # The open one's block gave up the table.
    connection.receive(frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x3f\xe1\x1f"))
    for stream_id in (3, 5):
        refused = frame(
            HEADERS, END_HEADERS | END_STREAM, stream_id, encoder.encode([*REQUEST, ("x-a", str(stream_id))])
        )
        assert connection.receive(refused) == []
    connection.reset(1, ErrorCode.CANCEL)
    known = encoder.encode([*REQUEST, ("x-a", "5")])
    opened, _ = connection.receive(frame(HEADERS, END_HEADERS | END_STREAM, 7, known))
    assert opened.headers == dict(REQUEST) | {"x-a": "5"}


def test_values_that_are_not_utf_8_fail_nobody():
    connection = greeted()
    opened, _ = connection.receive(frame(HEADERS, END_HEADERS | END_STREAM, 1, block(("tracestate", b"\xff\xe9"))))
    assert opened.headers["tracestate"] == "\xff\xe9"


def test_what_is_remembered_of_headers_is_bounded():
    connection = greeted()
    for stream_id in range(1, 1000, 2):
        encoded = block(("x-number", str(stream_id)))
        opened, _ = connection.receive(frame(HEADERS, END_HEADERS | END_STREAM, stream_id, encoded))
        assert opened.headers["x-number"] == str(stream_id)
        connection.reset(stream_id, ErrorCode.CANCEL)
    assert len(connection._decoded) <= 64


# Frames that are nearly right go deeper than random bytes.
numbers = st.sampled_from([0, 1, 2, 3, 5, 7, 2**31 - 1, 2**31 + 1])
payloads = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", bytes(4), bytes(5), bytes(8), u32(1), u32(2**31 - 1), block(), b"\x02" + block() + b"\0\0"]),
    st.builds(setting, st.integers(0, 7), st.sampled_from([0, 1, 2, 16_384, 65_535, 2**24, 2**31 - 1, 2**32 - 1])),
)
nearly_frames = st.builds(frame, st.integers(0, 11), st.integers(0, 255), numbers, payloads)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(nearly_frames, st.just(OPEN), st.just(request(3)), st.binary(max_size=30)), max_size=30),
    st.data(),
)
def test_whatever_arrives_only_the_connection_fails(pieces, data):
    connection = Http2Connection(streams_max=2)
    wire = data.draw(st.sampled_from([GREETING, PREFACE, b""])) + b"".join(pieces)
    chunk = data.draw(st.sampled_from([1, 7, 100, len(wire) + 1]))
    failed = None
    for start in range(0, len(wire), chunk):
        try:
            events = connection.receive(wire[start : start + chunk])
        except ConnectionFailedError as error:
            failed = error
            break
        for event in events:
            if isinstance(event, Opened) and connection.is_open(event.stream_id):
                connection.send_headers(event.stream_id, b"\x88")
                connection.send_data(event.stream_id, bytes(100_000))
                connection.send_headers(event.stream_id, b"\x88", end=True)
        assert len(connection._input) <= FRAME_BYTES_MAX + 9 + len(PREFACE)
        assert len(connection._streams) <= 2
        assert len(connection._block) <= HEADER_BLOCK_BYTES_MAX
    sent = read_frames(connection.take_output())
    if failed is not None:
        assert (sent[-1].kind, sent[-1].number) == (GOAWAY, failed.code)
