"""Large request bodies, read in a process of their own.

Reading 10 MiB takes up to half a second, most of it inside the parser, which keeps the interpreter to itself: beside a
thread that does, every other caller would wait. One process reads one body after the other.
"""

import asyncio
import os
import socket
import sys
from asyncio.subprocess import Process
from contextlib import suppress

import orjson

from budgetguard.core.providers import ProviderApi
from budgetguard.core.providers.api import InvalidRequestError, RequestFacts
from ext_authz.body_process import ANSWER_HEAD, APIS, REQUEST_HEAD

# More would only wait until their calls are given up; each waits with its whole body.
WAITING_MAX = 8
# The slowest body takes a tenth of this.
READ_SECONDS_MAX = 5.0
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")


class LargeBodiesError(Exception):
    """The body cannot be read now: too many wait, or the process died."""


class LargeBodies:
    """The process and the queue for it. ``start`` it beforehand: starting takes longer than a call may wait."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._asking: set[asyncio.Task[RequestFacts]] = set()
        self._process: Process | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def parse(self, api: ProviderApi, body: bytes) -> RequestFacts:
        """Read what is metered of a body.

        Raises:
            InvalidRequestError: the body cannot be metered.
            LargeBodiesError: it cannot be read now.
        """
        if len(self._asking) >= WAITING_MAX:
            raise LargeBodiesError(f"{WAITING_MAX} large bodies wait")
        reading = asyncio.Event()
        task = asyncio.create_task(self._ask(api, body, reading))
        self._asking.add(task)
        task.add_done_callback(self._forget)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # What the process has begun it ends: its answer must not meet the next question.
            if not reading.is_set():
                task.cancel()
            raise

    async def start(self) -> None:
        """Start the process, in place of one that died."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "ext_authz.body_process", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours)

    async def close(self) -> None:
        """End the process."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        await self._end()

    async def _ask(self, api: ProviderApi, body: bytes, reading: asyncio.Event) -> RequestFacts:
        async with self._turn:
            reading.set()
            try:
                async with asyncio.timeout(READ_SECONDS_MAX):
                    if self._process is None:
                        await self.start()
                    self._writer.write(REQUEST_HEAD.pack(APIS.index(api), len(body)))
                    self._writer.write(body)
                    (size,) = ANSWER_HEAD.unpack(await self._reader.readexactly(ANSWER_HEAD.size))
                    answer = orjson.loads(await self._reader.readexactly(size))
            except (OSError, EOFError, TimeoutError) as error:
                await self._end()
                raise LargeBodiesError(f"the process that reads large bodies failed: {error!r}") from error
            except asyncio.CancelledError:
                await self._end()
                raise
        if "invalid" in answer:
            raise InvalidRequestError(answer["invalid"], param=answer["param"])
        return RequestFacts(**answer["facts"])

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._writer.close()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    def _forget(self, task: "asyncio.Task[RequestFacts]") -> None:
        self._asking.discard(task)
        if not task.cancelled():
            task.exception()  # somebody has to look at it, when its caller has given up
