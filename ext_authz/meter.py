"""Whether ext_proc is there: a call is not admitted when nobody could meter it.

Envoy refuses such a call by itself, but after its money is held, and then nobody is left to free the hold: it would
expire at its full price. So a connection to ext_proc is kept open; a process that ends, however it ends, closes it.
"""

import asyncio
import logging
from contextlib import suppress

from budgetguard.adapters.serving import split_host_port, unix_path

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 1.0
RETRY_SECONDS = 0.05


class _Watched(asyncio.Protocol):
    def __init__(self) -> None:
        self.lost = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.lost.set()


class Meter:
    """Watches ext_proc at ``address`` (``unix:/path.sock`` or ``host:port``); ``None``: taken for there, unwatched."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._watched: _Watched | None = None

    @property
    def is_there(self) -> bool:
        """Whether the process runs and takes calls."""
        return self._address is None or (self._watched is not None and not self._watched.lost.is_set())

    async def watch(self) -> None:
        """Keep the connection open until cancelled."""
        if self._address is None:
            return
        while True:
            transport = await self._connect(self._address)
            if transport is not None and self._watched is not None:
                logger.info("ext_proc is there")
                try:
                    await self._watched.lost.wait()
                finally:
                    transport.close()
                logger.warning("ext_proc is away: calls are refused before their money is held")
            await asyncio.sleep(RETRY_SECONDS)

    async def _connect(self, address: str) -> asyncio.BaseTransport | None:
        loop, path = asyncio.get_running_loop(), unix_path(address)
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_SECONDS):
                if path is not None:
                    transport, self._watched = await loop.create_unix_connection(_Watched, str(path))
                else:
                    transport, self._watched = await loop.create_connection(_Watched, *split_host_port(address))
                return transport
        return None
