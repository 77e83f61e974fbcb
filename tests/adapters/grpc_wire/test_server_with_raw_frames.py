"""What Envoy may do and gRPC's own clients never show: messages cut anywhere, resets behind answers, closed windows."""

import asyncio

import h2.settings
import pytest

from budgetguard.adapters.grpc_wire import server as wire_server
from budgetguard.adapters.grpc_wire.call import WAITING_BYTES_MAX, StatusCode
from budgetguard.adapters.grpc_wire.server import ANSWERED_KEPT, STREAMS_MAX
from tests.adapters.grpc_wire.frames import PING, RST_STREAM, frame, u32
from tests.adapters.grpc_wire.raw import framed

CANCEL = 8
MEBIBYTE = 2**20


async def test_messages_that_share_a_frame(connect):
    client = await connect()
    stream_id = client.open("EchoAll")
    messages = [b"one", b"", b"two" * 100, b"3"]
    client.send(stream_id, b"".join(map(framed, messages)), end=True)
    answer = await client.end_of(stream_id)
    assert (answer.messages, answer.status) == (messages, StatusCode.OK)
    assert (answer.headers[":status"], answer.headers["content-type"]) == ("200", "application/grpc")


@pytest.mark.parametrize("frame_bytes", [1, 4, 5, 6, 7, 100])
async def test_messages_over_many_frames(connect, frame_bytes):
    client = await connect()
    stream_id = client.open("EchoAll")
    messages = [b"first message", b"", b"the second"]
    client.send(stream_id, b"".join(map(framed, messages)), end=True, frame_bytes=frame_bytes)
    assert (await client.end_of(stream_id)).messages == messages


async def test_messages_byte_by_byte_on_the_wire(connect):
    client = await connect()
    stream_id = client.open("EchoAll")
    client.send(stream_id, framed(b"slow") + framed(b"ly"), end=True)
    wire = client.h2.data_to_send()
    for byte in wire:
        client.writer.write(bytes((byte,)))
        await asyncio.sleep(0)
    assert (await client.end_of(stream_id)).messages == [b"slow", b"ly"]


@pytest.mark.parametrize("method", ["Echo", "EchoAll"])
@pytest.mark.parametrize("body", [b"\0", b"\0\0\0\0", framed(b"whole")[:-1], framed(b"") + b"\0\0"])
async def test_a_request_that_ends_in_the_middle_of_a_message(connect, method, body):
    client = await connect()
    stream_id = client.open(method)
    client.send(stream_id, body, end=True)
    answer = await client.end_of(stream_id)
    assert answer.status == StatusCode.INVALID_ARGUMENT
    assert await client.call("Echo", b"and on")


@pytest.mark.parametrize("method", ["Echo", "EchoAll"])
async def test_compressed_messages_are_not_taken(connect, method):
    client = await connect()
    stream_id = client.open(method)
    client.send(stream_id, framed(b"packed", compressed=1))
    await client.flush()
    answer = await client.end_of(stream_id)
    assert answer.status == StatusCode.UNIMPLEMENTED
    assert "compressed" in answer.message
    assert (await client.call("Echo", b"and on")).messages == [b"and on"]


@pytest.mark.parametrize("headers", [{":method": "GET"}, {"content-type": "application/json"}])
async def test_what_is_not_grpc_is_reset(connect, headers):
    client = await connect()
    stream_id = client.open("Echo", **headers)
    assert (await client.end_of(stream_id)).reset == 1
    assert (await client.call("Echo", b"and on")).messages == [b"and on"]


async def test_a_broken_frame_ends_its_connection_and_its_calls_and_no_others(connect, service, caplog):
    broken, well = await connect(), await connect()
    stream_id = await broken.ask("Wait", b"")
    await service.entered.wait()
    broken.writer.write(frame(RST_STREAM, 0, stream_id, b""))
    await broken.until(lambda: broken.went_away)
    assert broken.went_away == (stream_id, 6)
    assert await broken.reader.read() == b""
    assert service.ends == ["cancelled"]
    assert "cut off" in caplog.text
    assert (await well.call("Echo", b"and on")).messages == [b"and on"]


# --- answers that nobody waited for


async def test_a_reset_behind_the_answer_is_told_once(connect, service):
    client = await connect()
    answer = await client.call("Echo", b"too late")
    assert (answer.messages, answer.status, service.unheard) == ([b"too late"], StatusCode.OK, 0)
    # h2 refuses to reset what it has read to its end; Envoy had not read it yet when it gave up.
    (stream_id,) = client.answers
    for _ in range(2):
        client.writer.write(frame(RST_STREAM, 0, stream_id, u32(CANCEL)))
        await client.settled()
    assert service.unheard == 1


async def test_a_reset_while_the_answer_waits_for_room_is_told_once(connect, service):
    client = await connect(window=1000)
    stream_id = await client.ask("Big", b"5000")
    await client.until(lambda: len(client.answers[stream_id].body) == 1000)
    assert service.unheard == 0
    client.h2.reset_stream(stream_id, CANCEL)
    await client.settled()
    assert service.unheard == 1


async def test_an_answer_that_was_waited_for_is_heard(connect, service):
    client = await connect()
    for number in range(20):
        await client.call("Echo", b"%d" % number)
    await client.settled()
    client.writer.close()
    other = await connect()
    await other.call("Echo", b"x")
    assert service.unheard == 0


async def test_a_call_that_is_given_up_before_its_answer_is_cancelled_instead(connect, service):
    client = await connect()
    stream_id = await client.ask("Wait", b"")
    await service.entered.wait()
    client.h2.reset_stream(stream_id, CANCEL)
    client.writer.write(client.h2.data_to_send() + frame(RST_STREAM, 0, stream_id, u32(CANCEL)))
    await client.settled()
    assert (service.ends, service.unheard) == (["cancelled"], 0)


async def test_a_call_that_is_given_up_in_the_very_turn_of_its_answer(connect, service):
    """Either it is cancelled, or its answer turns out to be unheard: never both, never neither."""
    client = await connect()
    for _ in range(20):
        service.entered.clear()
        service.gate.clear()
        stream_id = await client.ask("Wait", b"")
        await service.entered.wait()
        client.writer.write(frame(RST_STREAM, 0, stream_id, u32(CANCEL)))
        service.gate.set()
        await client.settled()
    assert service.ends.count("done") == service.unheard
    assert service.ends.count("done") + service.ends.count("cancelled") == 20


async def test_a_method_that_answers_although_it_was_cancelled(connect, service):
    client = await connect()
    stream_id = await client.ask("Insist", b"x")
    await service.entered.wait()
    client.h2.reset_stream(stream_id, CANCEL)
    await client.settled()
    assert service.unheard == 1
    client.writer.write(frame(RST_STREAM, 0, stream_id, u32(CANCEL)))
    await client.settled()
    assert service.unheard == 1


async def test_a_call_that_is_opened_and_given_up_in_one_breath(connect, service):
    client = await connect()
    for _ in range(100):
        stream_id = client.open("Wait")
        client.h2.send_data(stream_id, framed(b""), end_stream=True)
        client.h2.reset_stream(stream_id, CANCEL)
    unknown = client.open("Nothing")
    client.h2.reset_stream(unknown, CANCEL)
    await client.settled()
    assert not service.entered.is_set()
    assert (await client.call("Echo", b"and on")).messages == [b"and on"]
    assert service.unheard == 0


async def test_answers_that_may_turn_out_unheard_are_kept_within_a_bound(connect, service, server):
    client = await connect()
    for _ in range(ANSWERED_KEPT // 64 + 1):
        asked = [await client.ask("Echo", b"") for _ in range(64)]
        for stream_id in asked:
            await client.end_of(stream_id)
    (connection,) = server._connections
    assert len(connection._answered) == ANSWERED_KEPT
    for stream_id in client.answers:
        client.writer.write(frame(RST_STREAM, 0, stream_id, u32(CANCEL)))
    await client.settled()
    assert service.unheard == ANSWERED_KEPT


# --- bounds


async def test_a_large_answer_through_tiny_windows(connect):
    client = await connect(window=7, connection_window=65_535)
    stream_id = await client.ask("Big", b"20000")
    answer, size = client.answers[stream_id], 20_005
    while True:
        await client.until(lambda: client.h2.remote_flow_control_window(stream_id) == 0)
        assert not answer.ended
        if len(answer.body) == size - 1:
            break
        client.h2.increment_flow_control_window(min(size - 1 - len(answer.body), 7 + len(answer.body) // 3), stream_id)
    client.h2.increment_flow_control_window(1, stream_id)
    assert (await client.end_of(stream_id)).messages == [bytes(20_000)]


async def test_many_answers_that_wait_for_one_connection_s_window(connect):
    client = await connect(connection_window=65_535)
    asked = [await client.ask("Big", b"50000") for _ in range(50)]
    await client.until(lambda: sum(len(answer.body) for answer in client.answers.values()) == 65_535)
    await client.settled()
    assert sum(len(answer.body) for answer in client.answers.values()) == 65_535
    client.h2.increment_flow_control_window(2**24)
    for stream_id in asked:
        assert (await client.end_of(stream_id)).messages == [bytes(50_000)]


async def test_a_stream_whose_answers_are_never_read_is_given_up(connect, service, server):
    client = await connect(window=0)
    stream_id = await client.ask("Many", b"1000")
    answer = await client.end_of(stream_id)
    assert answer.reset == 11
    assert service.ends == ["closed"]
    assert (await client.call("Nothing", b"")).status == StatusCode.UNIMPLEMENTED
    (connection,) = server._connections
    assert connection._http2.idle


async def test_a_stream_whose_messages_are_never_taken_is_given_up(connect, service):
    client = await connect()
    stream_id = client.open("WaitAll")
    message = framed(bytes(MEBIBYTE))
    sent = 0
    while client.answers[stream_id].headers.get("grpc-status") is None:
        client.h2.acknowledge_received_data(0, stream_id)
        client.send(stream_id, message)
        sent += len(message)
        assert sent < 2 * WAITING_BYTES_MAX
        await client.settled()
    assert client.answers[stream_id].status == StatusCode.RESOURCE_EXHAUSTED
    assert service.ends == ["closed"]


async def test_many_small_messages_may_wait_for_a_method_that_is_busy(connect, service):
    client = await connect()
    stream_id = client.open("EchoAll")
    client.send(stream_id, framed(b"event") * 5000, end=True)
    assert (await client.end_of(stream_id)).messages == [b"event"] * 5000


async def test_a_peer_that_does_not_read_its_socket_is_not_read_either(connect, server, monkeypatch):
    monkeypatch.setattr(wire_server, "UNREAD_BYTES_MAX", 2**17)
    client = await connect()
    (connection,) = server._connections
    pings = frame(PING, 0, 0, bytes(8)) * 1000
    while connection._transport.is_reading():
        client.writer.write(pings)
        await asyncio.sleep(0)
    assert connection._transport.get_write_buffer_size() < 2**17 + 2 * len(pings)
    # It reads again, and everything goes on.
    assert (await client.call("Echo", b"and on")).messages == [b"and on"]


async def test_more_calls_than_allowed_are_refused(connect, service):
    client = await connect()
    client.h2.remote_settings.update({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS_MAX + 10})
    client.h2.remote_settings.acknowledge()
    asked = [client.open("WaitAll") for _ in range(STREAMS_MAX + 10)]
    await client.settled()
    refused = [stream_id for stream_id in asked if client.answers[stream_id].reset is not None]
    assert refused == asked[STREAMS_MAX:]
    assert {client.answers[stream_id].reset for stream_id in refused} == {7}
