import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path

import grpc
import pytest
import uvloop

from budgetguard.adapters.grpc_wire.call import RpcError, StatusCode
from budgetguard.adapters.grpc_wire.server import WireServer
from tests.adapters.grpc_wire.raw import RawClient


class Service:
    """What the tests call: each method does one thing, and notes what became of it."""

    def __init__(self):
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()
        self.ends = []
        self.unheard = 0
        self.error = RpcError(StatusCode.NOT_FOUND, "nothing here")

    def methods(self):
        unary = {"Echo": self.echo, "Size": self.size, "Wait": self.wait, "Raise": self.raise_error, "Big": self.big}
        unary |= {"Insist": self.insist, "TidyUp": self.tidy_up}
        both = {"EchoAll": self.echo_all, "WaitAll": self.wait_all, "Many": self.many}
        return (
            {f"/test.Test/{name}": method for name, method in unary.items()},
            {f"/test.Test/{name}": method for name, method in both.items()},
        )

    def note_unheard(self):
        self.unheard += 1

    async def echo(self, message, call):
        call.unheard = self.note_unheard
        return message

    async def size(self, message, _call):
        return str(len(message)).encode()

    async def big(self, message, call):
        call.unheard = self.note_unheard
        return bytes(int(message))

    async def wait(self, message, call):
        self.entered.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise
        self.ends.append("done")
        call.unheard = self.note_unheard
        return message

    async def insist(self, message, call):
        """Answer, also when nobody waits for it any more."""
        call.unheard = self.note_unheard
        self.entered.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self.gate.wait()
        return message

    async def tidy_up(self, message, _call):
        self.entered.set()
        try:
            await self.gate.wait()
        finally:
            await asyncio.sleep(0.02)
            self.ends.append("tidy")
        return message

    async def raise_error(self, message, _call):
        if message:
            raise ValueError(message.decode())
        raise self.error

    async def echo_all(self, call):
        try:
            while (message := await call.read()) is not None:
                call.write(message)
        finally:
            self.ends.append("closed")

    async def wait_all(self, call):
        try:
            call.write(b"here")
            self.entered.set()
            await self.gate.wait()
            self.ends.append("done")
        finally:
            self.ends.append("closed")

    async def many(self, call):
        """Answer with a mebibyte as often as asked, whether it is read or not."""
        try:
            for _ in range(int(await call.read())):
                call.write(bytes(2**20))
                await asyncio.sleep(0)
        finally:
            self.ends.append("closed")


def pytest_asyncio_loop_factories(config, item):
    # As in production; the services' own tests run on asyncio's loop.
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def folder():
    # A Unix socket's path has at most 107 bytes, which pytest's own folders may exceed.
    folder = Path(tempfile.mkdtemp(prefix="bg-wire-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
async def service():
    return Service()


@pytest.fixture
async def make_server(service):
    """Make servers, which are stopped in the end whatever became of the test: uvloop waits for those that listen."""
    servers = []

    def make(address, *, drain_seconds=10.0):
        unary, bidirectional = service.methods()
        servers.append(WireServer(address, unary=unary, bidirectional=bidirectional, drain_seconds=drain_seconds))
        return servers[-1]

    yield make
    service.gate.set()
    for server in servers:
        await server.stop()


@pytest.fixture
async def server(make_server, folder, service):
    before = asyncio.all_tasks()
    server = make_server(f"unix:{folder}/wire.sock")
    await server.start()
    yield server
    service.gate.set()
    await server.stop()
    assert not server._connections
    assert not server._given_up
    left = {task for task in asyncio.all_tasks() - before if "grpc_wire" in str(task.get_coro())}
    assert left == set()


@pytest.fixture
async def channel(server):
    options = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        yield channel


@pytest.fixture
async def connect(server):
    """Open connections of raw clients, which are closed in the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def connect(**settings):
            path = server.address.removeprefix("unix:")
            return await stack.enter_async_context(RawClient.connected(path, **settings))

        yield connect
