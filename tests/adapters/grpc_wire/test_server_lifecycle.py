"""Where the server listens, what it replaces and what it never does, and how it ends."""

import asyncio
import socket
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from budgetguard.adapters.grpc_wire import server as wire_server
from budgetguard.adapters.grpc_wire.call import StatusCode
from budgetguard.adapters.grpc_wire.server import _Connection
from budgetguard.adapters.serving import SOCKET_MODE, ListenError
from tests.adapters.grpc_wire.frames import GOAWAY, read_frames, request
from tests.adapters.grpc_wire.raw import RawClient


async def answers(address):
    async with grpc.aio.insecure_channel(address) as channel:
        return await channel.unary_unary("/test.Test/Echo")(b"hello") == b"hello"


def path_of(server):
    return Path(server.address.removeprefix("unix:"))


# --- listening


async def test_the_socket_is_the_group_s_too(server):
    mode = path_of(server).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == SOCKET_MODE


async def test_a_killed_process_s_socket_is_replaced(make_server, folder):
    path = folder / "wire.sock"
    program = f"""
import socket, time
listener = socket.socket(socket.AF_UNIX)
listener.bind({str(path)!r})
listener.listen()
print(flush=True)
time.sleep(60)
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    await process.stdout.readline()
    server = make_server(f"unix:{path}")
    with pytest.raises(ListenError, match="another process listens there"):
        await server.start()
    process.kill()
    await process.wait()
    assert path.exists()
    await server.start()
    assert await answers(server.address)
    await server.stop()


async def test_a_living_server_s_socket_is_left_alone(server, make_server):
    with pytest.raises(ListenError, match="another process listens there"):
        await make_server(server.address).start()
    assert await answers(server.address)


async def test_paths_that_cannot_be_listened_on(make_server, folder):
    with pytest.raises(ListenError, match="folder does not exist"):
        await make_server(f"unix:{folder}/none/wire.sock").start()
    (folder / "file").write_text("precious")
    with pytest.raises(ListenError, match="is no socket"):
        await make_server(f"unix:{folder}/file").start()
    assert (folder / "file").read_text() == "precious"
    with pytest.raises(ListenError, match="is no socket"):
        await make_server(f"unix:{folder}").start()
    with pytest.raises(ListenError):
        await make_server(f"unix:{folder}/{'long' * 30}").start()


async def test_a_port_that_is_in_use(make_server):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenError, match="in use"):
        await make_server(f"127.0.0.1:{taken.getsockname()[1]}").start()


async def test_a_host_that_is_not_ours(make_server):
    with pytest.raises(ListenError):
        await make_server("192.0.2.1:9").start()


# --- ending


async def test_stopping_lets_calls_end_and_takes_no_new_ones(make_server, folder, service):
    server = make_server(f"unix:{folder}/wire.sock")
    await server.start()
    async with RawClient.connected(path_of(server)) as client, RawClient.connected(path_of(server)) as idle:
        stream_id = await client.ask("Wait", b"x")
        await service.entered.wait()
        stopping = asyncio.create_task(server.stop())
        await client.until(lambda: client.went_away)
        assert client.went_away == (stream_id, 0)
        assert not path_of(server).exists()
        with pytest.raises(OSError):
            await asyncio.open_unix_connection(path_of(server))
        # A connection without calls is closed at once.
        await idle.until(lambda: idle.went_away)
        assert await idle.reader.read() == b""
        client.writer.write(request(stream_id + 2))
        assert not stopping.done()
        service.gate.set()
        answer = await client.end_of(stream_id)
        assert (answer.messages, answer.status) == ([b"x"], StatusCode.OK)
        assert await client.reader.read() == b""
        await stopping
    assert service.ends == ["done"]
    assert service.unheard == 0


async def test_calls_that_outlast_the_drain_are_cancelled(make_server, folder, service):
    server = make_server(f"unix:{folder}/wire.sock", drain_seconds=0.01)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        waiting = channel.unary_unary("/test.Test/Wait")(b"")
        stream = channel.stream_stream("/test.Test/WaitAll")()
        assert await stream.read() == b"here"
        await service.entered.wait()
        await server.stop()
        assert sorted(service.ends) == ["cancelled", "closed"]
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await waiting
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE
    assert not server._connections


async def test_stopping_waits_for_cancelled_calls_to_tidy_up(make_server, folder, service):
    server = make_server(f"unix:{folder}/wire.sock", drain_seconds=0.01)
    await server.start()
    async with RawClient.connected(path_of(server)) as client:
        await client.ask("TidyUp", b"")
        await service.entered.wait()
        await server.stop()
        assert service.ends == ["tidy"]


async def test_a_connection_that_was_accepted_in_the_last_turn_is_closed(make_server, folder):
    server = make_server(f"unix:{folder}/wire.sock")
    await server.start()
    await server.stop()
    ours, theirs = socket.socketpair()
    await asyncio.get_running_loop().connect_accepted_socket(lambda: _Connection(server), ours)
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    frames = read_frames(await reader.read())
    assert frames[-1].kind == GOAWAY
    assert not server._connections
    writer.close()


async def test_stopping_waits_for_answers_that_wait_for_their_peer(make_server, folder):
    server = make_server(f"unix:{folder}/wire.sock")
    await server.start()
    async with RawClient.connected(path_of(server), window=10) as client:
        stream_id = await client.ask("Big", b"1000")
        await client.until(lambda: len(client.answers[stream_id].body) == 10)
        stopping = asyncio.create_task(server.stop())
        await client.until(lambda: client.went_away)
        client.h2.increment_flow_control_window(5000, stream_id)
        answer = await client.end_of(stream_id)
        assert (answer.messages, answer.status) == ([bytes(1000)], StatusCode.OK)
        await stopping


async def test_stopping_does_not_wait_for_peers_that_read_nothing(make_server, folder, monkeypatch):
    monkeypatch.setattr(wire_server, "CLOSE_SECONDS", 0.01)
    server = make_server(f"unix:{folder}/wire.sock", drain_seconds=0.01)
    await server.start()
    async with RawClient.connected(path_of(server)) as client, RawClient.connected(path_of(server), window=0) as other:
        await client.ask("Big", b"5000000")
        await other.ask("Big", b"5000000")
        await other.settled()
        await server.stop()
    assert not server._connections


async def test_a_server_that_stops_leaves_its_successor_s_socket(make_server, folder, service):
    old, new = (make_server(f"unix:{folder}/wire.sock") for _ in range(2))
    await old.start()
    async with RawClient.connected(path_of(old)) as client:
        stream_id = await client.ask("Wait", b"x")
        await service.entered.wait()
        stopping = asyncio.create_task(old.stop())
        await client.until(lambda: client.went_away)
        await new.start()
        service.gate.set()
        assert (await client.end_of(stream_id)).messages == [b"x"]
        await stopping
        await old.stop()
    assert await answers(new.address)
    await new.stop()


async def test_stopping_what_never_started(make_server, folder):
    (folder / "wire.sock").write_text("somebody's")
    await make_server(f"unix:{folder}/wire.sock").stop()
    assert (folder / "wire.sock").exists()
