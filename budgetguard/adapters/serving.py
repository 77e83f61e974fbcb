"""What every program's server does alike: where it listens, how it is told to stop, how it ends."""

import asyncio
import signal
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

# Envoy and the programs share a user (or a group, in containers); nobody else has business on the socket.
SOCKET_MODE = 0o660


class ListenError(OSError):
    """The address cannot be listened on; the message is one sentence that says why."""


class Server(Protocol):
    """What can be served."""

    async def start(self) -> None:
        """Listen and serve; raises ``ListenError``."""

    async def stop(self) -> None:
        """Drain and end."""


def stop_on_signals() -> asyncio.Event:
    """Return an event that the first SIGTERM or SIGINT sets; a second one ends the process the hard way."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        stopping.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopping


async def serve(server: Server, *, stopping: asyncio.Event, close: Callable[[], Awaitable[None]]) -> None:
    """Serve until ``stopping`` is set, drain, and ``close`` what the services used (also when starting fails)."""
    try:
        await server.start()
        try:
            await stopping.wait()
        finally:
            await server.stop()
    finally:
        await close()


def unix_path(address: str) -> Path | None:
    """Return the path of a Unix socket's address; ``None`` for ``host:port``."""
    return Path(address.removeprefix("unix:")) if address.startswith("unix:") else None


def split_host_port(address: str) -> tuple[str, int]:
    """Split ``host:port``; an IPv6 host stands in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def remove_stale_socket(path: Path) -> None:
    """Remove a socket that a killed process left, and never one that a living process listens on.

    Raises:
        ListenError: the path cannot be listened on.
    """
    if not path.parent.is_dir():
        raise ListenError(f"cannot listen on unix:{path}: its folder does not exist")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"cannot listen on unix:{path}: the file exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise ListenError(f"cannot listen on unix:{path}: another process listens there")
