"""The server as gRPC's own clients meet it."""

import asyncio
import subprocess
import sys
import textwrap

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from budgetguard.adapters.grpc_wire.call import MESSAGE_BYTES_MAX, RpcError, StatusCode
from budgetguard.cli.local.parts import free_port

MEBIBYTE = 2**20


def unary(channel, name):
    return channel.unary_unary(f"/test.Test/{name}")


def bidirectional(channel, name):
    return channel.stream_stream(f"/test.Test/{name}")


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value.code(), failed.value.details()


@pytest.mark.parametrize("size", [0, 1, 4 * MEBIBYTE, 10 * MEBIBYTE, MESSAGE_BYTES_MAX])
async def test_messages_of_every_size_pass_both_ways(channel, size):
    message = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert await unary(channel, "Echo")(message) == message
    stream = bidirectional(channel, "EchoAll")()
    for _ in range(2):
        await stream.write(message)
        assert await stream.read() == message
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() is grpc.StatusCode.OK


async def test_a_message_beyond_the_bound_is_refused(channel):
    code, details = await failure(unary(channel, "Size")(bytes(MESSAGE_BYTES_MAX + 1)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MESSAGE_BYTES_MAX) in details
    stream = bidirectional(channel, "EchoAll")()
    await stream.write(b"first")
    assert await stream.read() == b"first"
    await stream.write(bytes(MESSAGE_BYTES_MAX + 1))
    assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await unary(channel, "Echo")(b"and on") == b"and on"


async def test_two_hundred_calls_at_once(channel):
    async def stream(number):
        call = bidirectional(channel, "EchoAll")()
        for part in range(5):
            await call.write(b"%d/%d" % (number, part))
        answers = [await call.read() for _ in range(5)]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        return answers

    messages = [b"%d" % number for number in range(200)]
    answers = asyncio.gather(*(unary(channel, "Echo")(message) for message in messages))
    streams = asyncio.gather(*(stream(number) for number in range(200)))
    assert await answers == messages
    assert await streams == [[b"%d/%d" % (number, part) for part in range(5)] for number in range(200)]


async def test_a_synchronous_client_over_tcp(make_server):
    server = make_server(f"127.0.0.1:{free_port()}")
    await server.start()

    def talk():
        with grpc.insecure_channel(server.address) as channel:
            big = bytes(MEBIBYTE)
            assert unary(channel, "Echo")(b"hello") == b"hello"
            assert unary(channel, "Echo")(big) == big
            answers = list(bidirectional(channel, "EchoAll")(iter([b"a", b"", big])))
            with pytest.raises(grpc.RpcError) as failed:
                unary(channel, "Raise")(b"")
            return answers == [b"a", b"", big], failed.value.code()

    assert await asyncio.to_thread(talk) == (True, grpc.StatusCode.NOT_FOUND)
    await server.stop()


async def test_a_method_that_is_not_there(channel):
    code, details = await failure(unary(channel, "Nothing")(b""))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "/test.Test/Nothing" in details
    stream = bidirectional(channel, "Nothing")()
    assert await stream.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_fault_keeps_its_text_to_itself(channel, caplog):
    assert await failure(unary(channel, "Raise")(b"the secret")) == (grpc.StatusCode.INTERNAL, "internal error")
    assert "the secret" in caplog.text
    assert await unary(channel, "Echo")(b"and on") == b"and on"


@pytest.mark.parametrize(
    "text",
    [
        "plain, with ~ and \"quotes\" and 'others' \\ {}",
        "100 % of 5 %41",
        "two\nlines\tand\x7f",
        "grüße, 漢字, 🙂",
        "",
    ],
)
async def test_the_text_of_a_status_arrives_as_it_is(channel, service, text):
    service.error = RpcError(StatusCode.INVALID_ARGUMENT, text)
    assert await failure(unary(channel, "Raise")(b"")) == (grpc.StatusCode.INVALID_ARGUMENT, text)


async def test_the_text_of_a_status_is_bounded_and_always_sendable(channel, service):
    service.error = RpcError(StatusCode.INVALID_ARGUMENT, "🙂" * 10_000)
    assert await failure(unary(channel, "Raise")(b"")) == (grpc.StatusCode.INVALID_ARGUMENT, "🙂" * 500)
    service.error = RpcError(StatusCode.INVALID_ARGUMENT, "half a \ud83d")
    assert await failure(unary(channel, "Raise")(b"")) == (grpc.StatusCode.INVALID_ARGUMENT, "half a ?")


async def test_a_client_that_gives_up_cancels_its_call(channel, service):
    call = unary(channel, "Wait")(b"")
    await service.entered.wait()
    call.cancel()
    await ended(service, "cancelled")
    assert service.unheard == 0


async def test_a_client_whose_deadline_passes_cancels_its_call(channel, service):
    code, _ = await failure(unary(channel, "Wait")(b"", timeout=0.05))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await ended(service, "cancelled")
    assert service.unheard == 0


async def test_a_client_that_drops_its_stream_cancels_it(channel, service):
    call = bidirectional(channel, "WaitAll")()
    assert await call.read() == b"here"
    call.cancel()
    await ended(service, "closed")
    assert "done" not in service.ends


async def test_giving_up_before_and_behind_a_call_changes_nothing(channel, service):
    early = unary(channel, "Wait")(b"")
    early.cancel()
    with pytest.raises(asyncio.CancelledError):
        await early
    late = unary(channel, "Echo")(b"done")
    assert await late == b"done"
    assert not late.cancel()
    assert await unary(channel, "Echo")(b"and on") == b"and on"
    assert service.unheard == 0


async def test_a_client_that_says_nothing(channel):
    stream = channel.stream_unary("/test.Test/Echo")()
    await stream.done_writing()
    code, _ = await failure(stream)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    silent = bidirectional(channel, "EchoAll")()
    await silent.done_writing()
    assert await silent.read() is grpc.aio.EOF
    assert await silent.code() is grpc.StatusCode.OK


async def test_a_unary_call_with_two_messages_is_refused(channel, service):
    stream = channel.stream_unary("/test.Test/Wait")()
    await stream.write(b"one")
    await stream.write(b"two")
    code, _ = await failure(stream)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert not service.entered.is_set()


async def test_clients_that_are_killed_end_their_calls(server, service):
    program = textwrap.dedent(
        f"""
        import grpc, time
        channel = grpc.insecure_channel({server.address!r})
        waiting = [channel.unary_unary("/test.Test/Wait").future(b"") for _ in range(3)]
        stream = channel.stream_stream("/test.Test/WaitAll")(iter(input, None))
        print(next(stream).decode(), flush=True)
        time.sleep(60)
        """
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert await process.stdout.readline() == b"here\n"
    async with asyncio.timeout(20):
        while sum(len(connection._calls) for connection in server._connections) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    process.kill()
    await process.wait()
    await ended(service, "cancelled", times=3)
    await ended(service, "closed")
    assert not server._connections
    assert service.unheard == 0


async def test_health(server, channel):
    health = HealthStub(channel)
    assert (await health.Check(HealthCheckRequest())).status == HealthCheckResponse.NOT_SERVING
    await server.set_serving(serving=True)
    assert (await health.Check(HealthCheckRequest())).status == HealthCheckResponse.SERVING
    code, _ = await failure(health.Check(HealthCheckRequest(service="some.Other")))
    assert code is grpc.StatusCode.NOT_FOUND
    code, _ = await failure(channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff\xff"))
    assert code is grpc.StatusCode.INTERNAL


async def ended(service, how, *, times=1):
    async with asyncio.timeout(20):
        while service.ends.count(how) < times:  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.005)
    assert service.ends.count(how) == times
