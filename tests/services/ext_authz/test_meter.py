import asyncio
import tempfile
from pathlib import Path

import grpc
import pytest

from budgetguard.adapters.grpc_wire.server import WireServer
from budgetguard.cli.local.parts import free_port
from ext_authz.meter import Meter


@pytest.fixture(params=["unix", "tcp"])
def address(request):
    with tempfile.TemporaryDirectory(prefix="bg-meter-", dir="/tmp") as folder:
        yield f"unix:{Path(folder)}/proc.sock" if request.param == "unix" else f"127.0.0.1:{free_port()}"


async def becomes(meter, there):
    async with asyncio.timeout(10):
        while meter.is_there is not there:  # noqa: ASYNC110 - no event: it is looked at with every call
            await asyncio.sleep(0.005)


async def test_it_follows_the_process_s_comings_and_goings(address):
    meter = Meter(address)
    watching = asyncio.create_task(meter.watch())
    assert not meter.is_there
    for _ in range(2):
        server = WireServer(address, drain_seconds=0.1)
        await server.start()
        await becomes(meter, there=True)
        await server.stop()
        await becomes(meter, there=False)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching


async def test_a_server_that_stops_tells_who_watches_before_it_refuses_a_call(address):
    """What was admitted until then is still taken."""

    async def echo(message, _call):
        return message

    meter = Meter(address)
    watching = asyncio.create_task(meter.watch())
    server = WireServer(address, unary={"/test.Test/Echo": echo})
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        ask = channel.unary_unary("/test.Test/Echo")
        assert await ask(b"before") == b"before"
        await becomes(meter, there=True)
        stopping = asyncio.create_task(server.stop())
        await becomes(meter, there=False)
        assert await ask(b"admitted before") == b"admitted before"
        await stopping
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_what_is_not_watched_is_taken_for_there():
    meter = Meter(None)
    await meter.watch()
    assert meter.is_there
