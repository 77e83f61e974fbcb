"""How each part of one machine's stack is run: its command, what it may know, and how it shows that it is ready."""

import os
import random
import socket
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from budgetguard.cli.edge import EdgeSettings, command
from budgetguard.cli.local.binaries import CHECKOUT, envoy_binary
from budgetguard.cli.local.envoy_admin import EnvoyAdmin
from budgetguard.cli.local.postgres import EmbeddedPostgres
from budgetguard.cli.local.process import Part
from budgetguard.cli.local.redis import EmbeddedRedis

HEALTH_SECONDS = 1.0
# The control plane's first start may rebuild counters from the ledger.
PROGRAM_START_SECONDS = 60.0
# Recovery after a crash replays the log.
DATABASE_START_SECONDS = 120.0
# Systems give the near ends of connections ports from 32,768 (Linux) or 49,152 (others) on: a port that was free there
# when it was looked for can be taken when a server comes to listen on it.
UNASSIGNED_PORTS = range(20_000, 32_000)
PROVIDER_KEY_VARIABLES = ("OPENAI_API_KEY", "OPENAI_KEY")
# What only some programs need; nobody else gets to see it.
_SECRETS = ("DATABASE_URL", "MIGRATE_DATABASE_URL", "REDIS_URL", "ADMIN_API_KEY", *PROVIDER_KEY_VARIABLES)


def postgres_part(server: EmbeddedPostgres) -> Part:
    """Run the machine's own PostgreSQL. ``server.prepare()`` comes first."""
    options = server.popen_options
    user = (int(options["user"]), int(options["group"])) if "user" in options else None
    return Part(
        name="postgres",
        argv=server.argv,
        environment=options["env"],
        cwd=options["cwd"],
        user=user,
        is_ready=server.is_ready,
        where=str(server.socket_dir),
        # "Fast shutdown": ends sessions and leaves everything committed on disk.
        stop_signal=2,
        start_seconds=DATABASE_START_SECONDS,
    )


def redis_part(server: EmbeddedRedis) -> Part:
    """Run the machine's own Redis."""
    return Part(
        name="redis",
        argv=server.argv,
        environment={"PATH": os.defpath, "LC_ALL": "C"},
        is_ready=lambda _pid: server.is_ready(),
        where=str(server.socket_path),
        start_seconds=DATABASE_START_SECONDS,
    )


def program_part(
    program: str,
    *,
    address: str,
    metrics_address: str | None,
    variables: Mapping[str, str],
    own: Mapping[str, str],
    name: str,
) -> Part:
    """Run one of our gRPC programs as the part ``name``.

    ``own`` is what it gets beside the user's variables, less everybody's secrets.
    """
    metrics = {} if metrics_address is None else {f"{program.upper()}_METRICS_ADDRESS": metrics_address}
    return Part(
        name=name,
        # -P: a file of the user's folder must not pass for a module of ours.
        argv=(sys.executable, "-P", "-m", program),
        environment={
            **_without_secrets(variables),
            "PYTHONUNBUFFERED": "1",
            "POLICY_DIR": str(_policy_dir(variables)),
            f"{program.upper()}_ADDRESS": address,
            **metrics,
            **own,
        },
        is_ready=lambda _pid: is_serving(address),
        where=address if metrics_address is None else f"{address}  http://{metrics_address}/metrics",
        start_seconds=PROGRAM_START_SECONDS,
    )


def _without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in _SECRETS}


def _policy_dir(variables: Mapping[str, str]) -> Path:
    return Path(variables.get("POLICY_DIR") or CHECKOUT / "policies").expanduser().absolute()


def is_serving(address: str) -> bool:
    """Ask a gRPC server for its health."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_SECONDS)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def fake_provider_part(port: int, *, variables: Mapping[str, str]) -> Part:
    """Run the built-in fake provider on the loopback interface."""
    return Part(
        name="fake_provider",
        argv=(sys.executable, "-P", "-m", "budgetguard.cli.fake_provider", "--port", str(port)),
        environment={**_without_secrets(variables), "PYTHONUNBUFFERED": "1"},
        is_ready=lambda _pid: is_listening("127.0.0.1", port),
        where=f"http://127.0.0.1:{port}",
    )


def envoy_part(settings: EdgeSettings, *, configuration: Path, url: str) -> Part:
    """Run the edge on a rendered configuration."""
    admin = EnvoyAdmin(settings.admin_socket)
    return Part(
        name="envoy",
        argv=command(envoy_binary(), configuration),
        environment={"PATH": os.defpath, "HOME": str(configuration.parent)},
        is_ready=lambda _pid: admin.is_live(),
        where=url,
    )


def is_listening(host: str, port: int) -> bool:
    """Say whether a TCP connection is taken."""
    try:
        socket.create_connection((host, port), timeout=HEALTH_SECONDS).close()
    except OSError:
        return False
    return True


def free_port(host: str = "127.0.0.1") -> int:
    """Find a port that nobody listens on, and that no outgoing connection is given before somebody does."""
    shuffled = random.sample(UNASSIGNED_PORTS, k=len(UNASSIGNED_PORTS))
    return next(port for port in shuffled if port_problem(host, port) is None)


def free_ports_from(first: int, *, count: int) -> list[int]:
    """Find ``count`` loopback ports that nobody listens on, the lowest from ``first`` on."""
    free = (port for port in range(first, 65_536) if port_problem("127.0.0.1", port) is None)
    return list(islice(free, count))


def port_problem(host: str, port: int) -> str | None:
    """Say why a port cannot be listened on, or ``None``. Envoy itself would share it with another Envoy in silence."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
