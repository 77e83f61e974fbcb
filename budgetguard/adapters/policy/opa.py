"""A real OPA beside us: its data API over TCP or a Unix socket."""

import asyncio
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from budgetguard.core.policy import DECISION_PATH, PolicyDecision, PolicyFault, PolicyInput, PolicyLoadError
from budgetguard.core.policy import PolicyUnavailableError as Unavailable

DEADLINE_SECONDS = 0.05
# OPA answers in well under a millisecond: more connections would only queue in it.
CONNECTIONS_MAX = 32
# A decision is small; whatever is larger is none.
ANSWER_BYTES_MAX = 64 * 1024
_SOCKET_SCHEME = "unix"


class OpaPolicy:
    """Asks OPA at ``url``: ``http://host:port``, ``https://host:port`` or ``unix:/path.sock``."""

    def __init__(self, url: str, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        """Keep the address; the first decision connects.

        Raises:
            PolicyLoadError: the URL is none of the above.
        """
        self._deadline_seconds = deadline_seconds
        connector, base = _connector(url)
        self._decision_url = f"{base}/v1/data/{DECISION_PATH}"
        self._health_url = f"{base}/health"
        # The deadline is ours, over everything; aiohttp's own would count from other moments.
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def decide(self, question: PolicyInput) -> PolicyDecision:
        """Decide one call within the deadline."""
        body = orjson.dumps({"input": question.to_input()})
        status, answer = await self._in_time(self._post(body))
        if status != 200:
            raise Unavailable(PolicyFault.FAILED, f"OPA answered {status}: {answer[:500].decode(errors='replace')}")
        try:
            document = orjson.loads(answer)
        except orjson.JSONDecodeError as error:
            raise Unavailable(PolicyFault.WRONG_TYPED, "OPA's answer is not JSON") from error
        if not isinstance(document, dict):
            raise Unavailable(PolicyFault.WRONG_TYPED, "OPA's answer is not an object")
        if "result" not in document:
            raise Unavailable(PolicyFault.UNDEFINED, "no rule gives a decision for this call")
        return PolicyDecision.from_result(document["result"])

    async def health(self) -> None:
        """Ask OPA whether it is ready."""
        status, _ = await self._in_time(self._exchange("GET", self._health_url, None))
        if status != 200:
            raise Unavailable(PolicyFault.DOWN, f"OPA's health is {status}")

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _in_time(self, exchange: Coroutine[Any, Any, tuple[int, bytes]]) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(self._deadline_seconds):
                return await exchange
        except TimeoutError as error:
            raise Unavailable(PolicyFault.SLOW, f"no answer within {self._deadline_seconds} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(PolicyFault.DOWN, f"{type(error).__name__}: {error}") from error

    async def _post(self, body: bytes) -> tuple[int, bytes]:
        """Ask; once more when a kept connection turns out dead, as after OPA restarted. A decision changes nothing."""
        try:
            return await self._exchange("POST", self._decision_url, body)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            return await self._exchange("POST", self._decision_url, body)

    async def _exchange(self, method: str, url: str, body: bytes | None) -> tuple[int, bytes]:
        if self._session.closed:
            raise Unavailable(PolicyFault.DOWN, "closed")
        async with self._session.request(method, url, data=body, allow_redirects=False) as response:
            answer = bytearray()
            async for piece in response.content.iter_any():
                answer += piece
                if len(answer) > ANSWER_BYTES_MAX:
                    raise Unavailable(PolicyFault.WRONG_TYPED, f"an answer of more than {ANSWER_BYTES_MAX} bytes")
            return response.status, bytes(answer)


def _connector(url: str) -> tuple[aiohttp.BaseConnector, str]:
    expected = "OPA_URL: expected http://host:port, https://host:port or unix:/path.sock"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise PolicyLoadError(f"{expected}, got a malformed URL") from error
    if parts.scheme == _SOCKET_SCHEME and parts.path.startswith("/") and not parts.netloc:
        return aiohttp.UnixConnector(parts.path, limit=CONNECTIONS_MAX), "http://opa"
    if parts.scheme in {"http", "https"} and parts.hostname:
        return aiohttp.TCPConnector(limit=CONNECTIONS_MAX), url.rstrip("/")
    raise PolicyLoadError(f"{expected}, got {parts.scheme or 'no scheme'}")
