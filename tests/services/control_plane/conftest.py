"""A control plane as it runs: its own process, real Postgres and Redis, and the real edge in front of it."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import asyncpg
import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from budgetguard.cli import edge
from budgetguard.cli.local.binaries import envoy_binary
from budgetguard.cli.local.envoy_admin import EnvoyAdmin
from budgetguard.cli.local.parts import free_port
from tests.plugins.postgres_server import TEMPLATE, TestDatabase
from tests.plugins.redis_server import running_redis_server

ADMIN_KEY = "test-admin-key"
METADATA = (("x-admin-key", ADMIN_KEY),)
START_SECONDS = 30
_numbers = count(1)


class RunningControlPlane:
    """The program on a Unix socket."""

    def __init__(self, folder: Path, *, database_url: str, redis_url: str) -> None:
        self.folder = folder
        self.socket = folder / "control.sock"
        self.address = f"unix:{self.socket}"
        self.clusters_path = folder / "clusters" / "clusters.json"
        self.environment = {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "ADMIN_API_KEY": ADMIN_KEY,
            "CONTROL_PLANE_ADDRESS": self.address,
            "EDGE_CLUSTERS_PATH": str(self.clusters_path),
        }
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        log = (self.folder / "control_plane.log").open("ab")
        self.process = subprocess.Popen([sys.executable, "-m", "control_plane"], env=self.environment, stderr=log)
        log.close()

    def log(self) -> str:
        return (self.folder / "control_plane.log").read_text()

    def serving(self) -> bool:
        with grpc.insecure_channel(self.address) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
            return answer.status == health_pb2.HealthCheckResponse.SERVING

    def wait_until_serving(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.serving():
            assert self.process.poll() is None, self.log()[-3000:]
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.05)

    def stop(self) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


def short_folder(prefix: str) -> Path:
    # A Unix socket's path has at most 107 bytes, which pytest's own folders may exceed.
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    folder.chmod(0o755)
    (folder / "clusters").mkdir()
    return folder


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def program(postgres_server):
    """The control plane that these tests share; each makes tenants of its own."""
    name = f"control_plane_{os.getpid()}"
    asyncio.run(_execute(postgres_server.url(database="postgres"), f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
    folder = short_folder("bg-cp-")
    with running_redis_server() as redis_server:
        urls = TestDatabase(postgres_server, name)
        running = RunningControlPlane(folder, database_url=urls.app_url, redis_url=redis_server.url)
        running.start()
        try:
            running.wait_until_serving()
            yield running
            assert running.stop() == 0, running.log()[-3000:]
        finally:
            running.process.kill()
            running.process.wait()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def channel(program):
    async with grpc.aio.insecure_channel(program.address) as open_channel:
        yield open_channel


@pytest.fixture(scope="session")
def edge_url(program):
    """The real edge, in front of the control plane only."""
    folder = short_folder("bg-cpe-")
    settings = edge.EdgeSettings(
        listen_address="127.0.0.1",
        port=free_port(),
        admin_socket=folder / "admin.sock",
        ext_authz_sockets=(folder / "authz.sock",),
        ext_proc_socket=folder / "proc.sock",
        control_plane_socket=program.socket,
        clusters_path=folder / "clusters" / "clusters.json",
        access_log_path=folder / "access.log",
    )
    edge.ensure_clusters_file(settings.clusters_path)
    configuration = folder / "edge.yaml"
    configuration.write_text(edge.render(settings, edge.TEMPLATE.read_text()))
    log = (folder / "envoy.log").open("wb")
    process = subprocess.Popen(
        [*edge.command(envoy_binary(), configuration), "--concurrency", "1"], stdout=log, stderr=log
    )
    log.close()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not EnvoyAdmin(settings.admin_socket).is_live():
            said = (folder / "envoy.log").read_text()[-2000:]
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.02)
        yield f"http://127.0.0.1:{settings.port}"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def rest(edge_url):
    with httpx.Client(base_url=edge_url, headers={"X-Admin-Key": ADMIN_KEY}, timeout=20) as client:
        yield client


@pytest.fixture
def tenant_id(rest) -> str:
    answer = rest.post("/admin/tenant", json={"name": f"Tenant {os.getpid()} {next(_numbers)}"})
    assert answer.status_code == 200, answer.text
    return answer.json()["tenantId"]
