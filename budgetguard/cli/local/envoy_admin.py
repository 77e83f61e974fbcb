"""Envoy's admin interface on its Unix socket, and the drain that loses no call."""

import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 2.0
_POLL_SECONDS = 0.1
_ACTIVE = "http.edge.downstream_rq_active"


class EnvoyAdmin:
    """Asks one Envoy. Everything raises ``OSError`` when it does not answer."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path

    def is_live(self) -> bool:
        """Say whether its listeners are up."""
        try:
            return self._ask("GET", "/ready").strip() == "LIVE"
        except OSError:
            return False

    def active_requests(self) -> int:
        """Count the callers' requests under way."""
        answer = self._ask("GET", f"/stats?filter=^{_ACTIVE.replace('.', '[.]')}$")
        return int(answer.rpartition(":")[2] or 0)

    def reaches(self, cluster: str, url: str) -> bool:
        """Say whether a cluster is there with the host and port of ``url`` as its endpoint."""
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        clusters = json.loads(self._ask("GET", "/config_dump?resource=dynamic_active_clusters")).get("configs", ())
        return any(
            f'"{parts.hostname}"' in (text := json.dumps(entry)) and f'"port_value": {port}' in text
            for entry in clusters
            if entry.get("cluster", {}).get("name") == cluster
        )

    def drain(
        self, *, seconds: float, hurry: Callable[[], bool], waiting: Callable[[int], None] = lambda _count: None
    ) -> int:
        """Take no new connection, end idle ones, wait for the calls under way; return how many are left.

        ``waiting`` is told the number whenever it has changed.
        """
        self._ask("POST", "/healthcheck/fail")  # answers say "connection: close" from now on
        self._ask("POST", "/drain_listeners")
        until = time.monotonic() + seconds
        told = active = self.active_requests()
        if active:
            waiting(active)
        while active and time.monotonic() < until and not hurry():
            time.sleep(_POLL_SECONDS)
            active = self.active_requests()
            if active and active != told:
                told = active
                waiting(active)
        return active

    def _ask(self, method: str, path: str) -> str:
        connection = _UnixConnection(self._socket_path)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            text = response.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"Envoy's admin interface answered nonsense: {error!r}") from error
        finally:
            connection.close()
        if response.status != 200 and path != "/ready":
            raise OSError(f"Envoy's admin interface answered {response.status} to {path}")
        return text


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, socket_path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._socket_path = socket_path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._socket_path))
