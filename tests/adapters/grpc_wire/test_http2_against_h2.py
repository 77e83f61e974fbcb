"""The server's half against hyper's h2 as the client's: whatever both do, every byte arrives once and in order."""

import random
from collections import Counter
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.settings
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetguard.adapters.grpc_wire.events import Data, Ended, Opened, Reset
from budgetguard.adapters.grpc_wire.http2 import Http2Connection
from tests.adapters.grpc_wire.frames import REQUEST

BYTES = random.Random(1).randbytes(2**20)
STREAMS_MAX = 12
ANSWER_BLOCK = b"\x88"
# A literal that is not remembered: "a: b".
TRAILERS_BLOCK = b"\x00\x01a\x01b"
WINDOW_MAX = 2**31 - 1


@dataclass
class Stream:
    stream_id: int
    headers: dict
    # As the client has done it and seen it.
    sent: bytes = b""
    sent_end: bool = False
    reset: bool = False
    closed: bool = False
    received: bytes = b""
    # As the server has done it and seen it.
    opened: bool = False
    arrived: bytes = b""
    arrived_end: bool = False
    answered: bytes = b""
    answer_begun: bool = False
    answer_ended: bool = False
    answered_early: bool = False

    def bytes_after(self, done, size):
        start = self.stream_id * 1000 + len(done)
        return BYTES[start : start + size]


@dataclass
class Pair:
    """A client and a server, and the bytes that are on their way between them."""

    client: h2.connection.H2Connection = field(
        default_factory=lambda: h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    )
    server: Http2Connection = field(default_factory=lambda: Http2Connection(streams_max=100))
    streams: list[Stream] = field(default_factory=list)
    to_server: bytes = b""
    to_client: bytes = b""
    everything_sent: bytes = b""
    server_events: list = field(default_factory=list)
    resets: Counter = field(default_factory=Counter)
    pings: int = 0
    pongs: int = 0
    # h2 takes any acknowledgement for that of every change on its way, so there is one at a time.
    settings_on_their_way: int = 1

    def __post_init__(self):
        self.client.initiate_connection()

    # --- what may happen, each with numbers to choose by

    def open(self, which, size):
        if len(self.streams) == STREAMS_MAX:
            return
        stream_id = self.client.get_next_available_stream_id()
        more = {"x-number": str(which % 5), "x-long": "v" * (size % 40_000)}
        stream = Stream(stream_id, dict(REQUEST) | more, sent_end=size % 7 == 0)
        # h2 forgets a priority's size where it splits a block that is longer than a frame.
        weight = {"priority_weight": 1 + which % 256} if which % 3 == 0 and size % 40_000 < 10_000 else {}
        self.client.send_headers(stream_id, list(stream.headers.items()), end_stream=stream.sent_end, **weight)
        self.streams.append(stream)

    def send(self, which, size, *, end=None):
        stream = self.pick(which, lambda stream: not (stream.sent_end or stream.closed))
        if stream is None:
            return
        padding = size % 5 * 50 if size % 2 else None
        room = min(self.client.local_flow_control_window(stream.stream_id), self.client.max_outbound_frame_size)
        data = stream.bytes_after(stream.sent, min(size, room - 1 - (padding or 0)))
        stream.sent_end = which % 4 == 0 if end is None else end
        self.client.send_data(stream.stream_id, data, end_stream=stream.sent_end, pad_length=padding)
        stream.sent += data

    def send_trailers(self, which, _size):
        stream = self.pick(which, lambda stream: not (stream.sent_end or stream.closed))
        if stream is not None:
            self.client.send_headers(stream.stream_id, [("x-end", "yes")], end_stream=True)
            stream.sent_end = True

    def reset(self, which, _size):
        stream = self.pick(which, lambda stream: not stream.closed)
        if stream is not None and which % 2:
            self.client.reset_stream(stream.stream_id, 8)
            stream.reset = stream.closed = True

    def change_settings(self, which, size):
        new = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: size % 50_000 if which % 2 else size % 50}
        if which % 3 == 0:
            new[h2.settings.SettingCodes.MAX_FRAME_SIZE] = 16_384 + size
        if not self.settings_on_their_way:
            self.client.update_settings(new)
            self.settings_on_their_way += 1

    def widen_stream(self, which, size):
        stream = self.pick(which, lambda stream: not stream.closed)
        if stream is not None:
            self.client.increment_flow_control_window(1 + size, stream.stream_id)

    def widen_connection(self, _which, size):
        self.client.increment_flow_control_window(1 + size)

    def ping(self, which, _size):
        self.client.ping(which.to_bytes(8, "big"))
        self.pings += 1

    def prioritise(self, which, _size):
        self.client.prioritize(1 + 2 * (which % 20), weight=1 + which % 256)

    def answer(self, which, size):
        stream = self.pick(which, lambda stream: stream.opened and not stream.answer_ended)
        if stream is None or not self.server.is_open(stream.stream_id):
            return
        if not stream.answer_begun:
            self.server.send_headers(stream.stream_id, ANSWER_BLOCK)
            stream.answer_begun = True
        data = stream.bytes_after(stream.answered, size)
        self.server.send_data(stream.stream_id, data)
        stream.answered += data

    def end_answer(self, which, _size):
        stream = self.pick(which, lambda stream: stream.answer_begun and not stream.answer_ended)
        if stream is None or not self.server.is_open(stream.stream_id):
            return
        self.server.send_headers(stream.stream_id, TRAILERS_BLOCK, end=True)
        stream.answer_ended = True
        stream.answered_early = not stream.arrived_end

    def reach_server(self, which, size):
        self.collect()
        size = size if which % 2 else size % 20
        self._feed_server(self.to_server[:size])
        self.to_server = self.to_server[size:]

    def reach_client(self, which, size):
        self.collect()
        size = size if which % 2 else size % 20
        self._feed_client(self.to_client[:size])
        self.to_client = self.to_client[size:]

    # --- the way there

    def pick(self, which, fits):
        fitting = [stream for stream in self.streams if fits(stream)]
        return fitting[which % len(fitting)] if fitting else None

    def collect(self):
        sent = self.client.data_to_send()
        self.to_server += sent
        self.everything_sent += sent
        self.to_client += self.server.take_output()

    def deliver_all(self):
        self.collect()
        while self.to_server or self.to_client:
            self.reach_server(1, len(self.to_server))
            self.reach_client(1, len(self.to_client))
            self.collect()

    def _feed_server(self, data):
        by_id = {stream.stream_id: stream for stream in self.streams}
        for event in self.server.receive(data):
            self.server_events.append(event)
            stream = by_id[event.stream_id]
            match event:
                case Opened(headers=headers):
                    assert not stream.opened
                    assert headers == stream.headers
                    stream.opened = True
                case Data(data=piece):
                    assert piece
                    assert not stream.arrived_end
                    stream.arrived += piece
                case Ended():
                    assert not stream.arrived_end
                    stream.arrived_end = True
                case Reset(error_code=code):
                    # h2 resets again with STREAM_CLOSED what still arrives behind a reset of its own.
                    assert code in (8, 5)
                    self.resets[stream.stream_id] += code == 8

    def _feed_client(self, data):
        by_id = {stream.stream_id: stream for stream in self.streams}
        for event in self.client.receive_data(data):
            match event:
                case h2.events.DataReceived(stream_id=stream_id, data=piece):
                    by_id[stream_id].received += piece
                case h2.events.StreamEnded(stream_id=stream_id):
                    # Behind it comes a reset, where the request was not at its end.
                    by_id[stream_id].closed = by_id[stream_id].sent_end
                case h2.events.StreamReset(stream_id=stream_id, error_code=code):
                    assert code == 0
                    by_id[stream_id].closed = True
                case h2.events.PingAckReceived():
                    self.pongs += 1
                case h2.events.SettingsAcknowledged():
                    self.settings_on_their_way -= 1
                case h2.events.ConnectionTerminated():
                    raise AssertionError("the server went away")

    def finish(self):
        """Open every window, end every request and answer, and let everything arrive."""
        self.deliver_all()
        self.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 2**28})
        self.client.increment_flow_control_window(2**28)
        self.deliver_all()
        for _ in self.streams:
            self.send_trailers(0, 0)
        self.deliver_all()
        for stream in self.streams:
            if self.server.is_open(stream.stream_id):
                if not stream.answer_begun:
                    self.answer(self._index_to_answer(stream), 70_000)
                self.server.send_headers(stream.stream_id, TRAILERS_BLOCK, end=True)
        self.deliver_all()

    def _index_to_answer(self, stream):
        return [each for each in self.streams if each.opened and not each.answer_ended].index(stream)


ACTIONS = (
    *(Pair.open, Pair.send, Pair.send, Pair.send_trailers, Pair.reset),
    *(Pair.change_settings, Pair.widen_stream, Pair.widen_connection, Pair.ping, Pair.prioritise),
    *(Pair.answer, Pair.answer, Pair.end_answer),
    *(Pair.reach_server, Pair.reach_server, Pair.reach_client, Pair.reach_client),
)
steps = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2**16), st.integers(0, 2**16)), min_size=5, max_size=60
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(steps)
def test_every_byte_arrives_once_and_in_order_whatever_both_sides_do(steps):
    pair = Pair()
    for act, which, size in steps:
        act(pair, which, size)
    pair.finish()
    for stream in pair.streams:
        assert stream.opened
        assert pair.resets[stream.stream_id] == stream.reset
        if stream.reset or stream.answered_early:
            assert stream.sent.startswith(stream.arrived)
        else:
            assert (stream.arrived, stream.arrived_end) == (stream.sent, True)
        if stream.reset:
            assert stream.answered.startswith(stream.received)
        else:
            assert (stream.received, stream.closed) == (stream.answered, True)
    assert pair.server.idle
    assert pair.pongs == pair.pings
    if len(pair.everything_sent) < 20_000 and not any(stream.answered_early for stream in pair.streams):
        again = Http2Connection(streams_max=100)
        assert [event for byte in pair.everything_sent for event in again.receive(bytes((byte,)))] == pair.server_events


def test_windows_lowered_below_what_is_on_its_way_are_owed_first():
    pair = Pair()
    pair.open(1, 0)
    pair.deliver_all()
    (stream,) = pair.streams
    pair.answer(0, 60_000)
    pair.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 10})
    pair.deliver_all()
    assert len(stream.received) == 60_000
    pair.answer(0, 1000)
    pair.client.increment_flow_control_window(59_990 - 1, 1)
    pair.deliver_all()
    assert len(stream.received) == 60_000
    pair.client.increment_flow_control_window(100, 1)
    pair.deliver_all()
    assert len(stream.received) == 60_099
    pair.finish()
    assert (stream.received, stream.closed) == (stream.answered, True)


def test_many_short_answers_keep_within_a_window():
    pair = Pair()
    pair.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    pair.client.increment_flow_control_window(2**20)
    pair.open(1, 0)
    pair.deliver_all()
    for _ in range(150):
        pair.answer(0, 10)
    pair.deliver_all()
    (stream,) = pair.streams
    assert len(stream.received) == 1000
    pair.finish()
    assert stream.received == stream.answered


def test_many_streams_keep_within_their_connection_s_window():
    pair = Pair()
    for _ in range(10):
        pair.open(1, 0)
    pair.deliver_all()
    for size in (9000, 1000, 20):
        for number in range(10):
            pair.answer(number, size)
    pair.deliver_all()
    assert sum(len(stream.received) for stream in pair.streams) == 65_535
    pair.finish()
    assert [stream.received for stream in pair.streams] == [stream.answered for stream in pair.streams]


def test_wider_windows_are_acknowledged_before_they_are_used():
    pair = Pair()
    pair.client.increment_flow_control_window(2**20)
    pair.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 5})
    pair.open(1, 0)
    pair.deliver_all()
    pair.answer(0, 50_000)
    pair.deliver_all()
    (stream,) = pair.streams
    assert len(stream.received) == 5
    # h2 counts by its old settings until it reads that they are acknowledged.
    pair.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 60_000})
    pair.deliver_all()
    assert stream.received == stream.answered


def test_a_client_that_uses_its_table_and_then_gives_it_up():
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    server = Http2Connection(streams_max=100)
    client.initiate_connection()

    def ask(stream_id, *more):
        client.send_headers(stream_id, [*REQUEST, *more], end_stream=True)
        opened, ended = server.receive(client.data_to_send())
        assert (opened, ended) == (Opened(stream_id, dict([*REQUEST, *more])), Ended(stream_id))
        server.send_headers(stream_id, ANSWER_BLOCK, end=True)

    # Not knowing our settings, h2 indexes: equal bytes may mean other headers, and must not be remembered.
    ask(1, ("x-a", "first"))
    ask(3, ("x-b", "second"), ("x-a", "first"))
    ask(5, ("x-a", "first"))
    ask(7, ("x-b", "second"))
    client.receive_data(server.take_output())
    assert client.encoder.header_table_size == 0
    for stream_id in range(9, 29, 4):
        ask(stream_id, ("x-a", "first"))
        ask(stream_id + 2, ("x-b", str(stream_id)))
    # Against what was asked of it, it takes a table again.
    client.encoder.header_table_size = 4096
    ask(31, ("x-a", "first"))
    ask(33, ("x-a", "first"), ("x-c", "third"))
    ask(35, ("x-c", "third"))
    client.encoder.header_table_size = 0
    for stream_id in range(37, 300, 2):
        ask(stream_id, ("x-a", "first"), ("x-number", str(stream_id % 200)))
        client.receive_data(server.take_output())
