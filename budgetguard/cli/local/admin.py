"""A small client of the control plane's REST API, as an administrator uses it."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 15.0


class AdminError(Exception):
    """The control plane refused or did not answer. ``status`` is its HTTP status, 0 when there was none."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class AdminClient:
    """``base_url`` is the edge, ``http://127.0.0.1:3000``; ``admin_key`` goes with every request."""

    def __init__(self, *, base_url: str, admin_key: str) -> None:
        parts = urlsplit(base_url)
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or 80
        self._admin_key = admin_key

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request and return the answer's JSON.

        Raises:
            AdminError: it was refused (with the control plane's own sentence) or could not be sent.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_SECONDS)
        headers = {"x-admin-key": self._admin_key, "content-type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise AdminError(0, f"{method} {path}: no answer: {error}") from error
        finally:
            connection.close()
        try:
            answer = json.loads(text) if text else None
        except ValueError:
            answer = None
        if response.status >= 300:
            raise AdminError(response.status, f"{method} {path}: {response.status}: {_sentence(answer) or text[:200]}")
        return answer


def _sentence(answer: Any) -> str:
    """Find the message: google.rpc.Status has it on top, the edge's own error object one level down."""
    if not isinstance(answer, dict):
        return ""
    error = answer.get("error")
    return str(answer.get("message") or (error.get("message") if isinstance(error, dict) else "") or "")
