"""The embedded policy engine: regopy in child processes, each decision with a deadline that holds.

A policy that loops cannot be interrupted in a thread, and a thread that shares the GIL with a busy loop answers late;
a process can be killed and shares nothing. ``docs/decisions/010`` has the numbers.
"""

import asyncio
import logging
import os
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Any, cast

import orjson

from budgetguard.adapters.policy.memory import DecisionMemory
from budgetguard.core.policy import PolicyDecision, PolicyFault, PolicyInput, PolicyLoadError, PolicyUnavailableError

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 0.05
# One answers some 10,000 decisions a second; the second takes over while a killed one is replaced.
PROCESSES = 2
# What one process can answer within the deadline, with room to spare; more would only time out.
WAITING_MAX = 256
# A cold start on a busy machine, compiling included.
START_SECONDS_MAX = 20.0
# A process that dies at once is not restarted in a tight loop.
RESTART_SECONDS_MAX = 5.0
# A loop that was blocked sees a timer before the answer that is already there: look again before killing.
SECOND_LOOK_SECONDS = 0.002
MODULE_BYTES_MAX = 1024 * 1024
# The engine's process gets no secrets: a policy can read its environment (opa.runtime()).
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")


def read_modules(policy_dir: Path) -> dict[str, str]:
    """Read the policies: every ``*.rego`` below the folder but ``*_test.rego``, by its path in the folder.

    Raises:
        PolicyLoadError: there is none, one cannot be read, or the folder holds data that only a real OPA would load.
    """
    if not policy_dir.is_dir():
        raise PolicyLoadError(f"no policy folder {policy_dir}")
    modules = {}
    for path in sorted(policy_dir.rglob("*")):
        name = str(path.relative_to(policy_dir))
        if path.suffix in {".json", ".yaml", ".yml"}:
            raise PolicyLoadError(
                f"{name}: the embedded engine loads no data files; put the data into a .rego file, or set OPA_URL"
            )
        if path.suffix != ".rego" or path.name.endswith("_test.rego"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyLoadError(f"{name}: {error}") from error
        if len(source) > MODULE_BYTES_MAX:
            raise PolicyLoadError(f"{name}: larger than {MODULE_BYTES_MAX} bytes")
        modules[name] = source
    if not modules:
        raise PolicyLoadError(f"no *.rego in {policy_dir}")
    return modules


class EmbeddedPolicy:
    """Policies evaluated on this machine, in child processes that are replaced when they hang or die."""

    def __init__(self, modules: dict[str, str], *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self._modules = modules
        self._deadline_seconds = deadline_seconds
        self._engines: set[_Engine] = set()
        self._keepers: list[asyncio.Task[None]] = []
        # Until the plan has told what the policies read, nothing is.
        self._memory = DecisionMemory(None)

    @classmethod
    async def open(
        cls, policy_dir: Path, *, processes: int = PROCESSES, deadline_seconds: float = DEADLINE_SECONDS
    ) -> "EmbeddedPolicy":
        """Read the policies once and start the engines; each later one gets the same policies.

        Raises:
            PolicyLoadError: the policies cannot be used.
        """
        policy = cls(read_modules(policy_dir), deadline_seconds=deadline_seconds)
        # The first alone, so that broken policies are told once.
        first = await _Engine.start(policy._modules, deadline_seconds)
        policy._keepers = [
            asyncio.create_task(policy._keep(first if number == 0 else None)) for number in range(processes)
        ]
        policy._engines.add(first)
        policy._memory = DecisionMemory(first.fields_read)
        return policy

    async def decide(self, question: PolicyInput) -> PolicyDecision:
        """Decide one call within the deadline.

        What is remembered is answered without an engine, so also while none is running: asked, it would say the same.
        """
        memory = self._memory
        key = memory.key(question)
        decision = memory.recall(key)
        if decision is None:
            decision = await self._ask(question)
            # Only decisions: a fault may pass.
            memory.remember(key, decision)
        return decision

    async def health(self) -> None:
        """Return when an engine is running."""
        if not self._engines:
            raise PolicyUnavailableError(PolicyFault.DOWN, "no engine process is running")

    async def close(self) -> None:
        """End the processes and forget."""
        self._memory = DecisionMemory(None)
        engines = self._engines.copy()
        self._engines.clear()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        # A keeper that was cancelled before its first step has stopped nothing.
        for engine in engines:
            await engine.stop()

    async def _ask(self, question: PolicyInput) -> PolicyDecision:
        engine = min(self._engines, key=_Engine.waiting, default=None)
        if engine is None:
            raise PolicyUnavailableError(PolicyFault.DOWN, "no engine process is running")
        answer = await engine.ask(question.to_input())
        if "fault" in answer:
            raise PolicyUnavailableError(PolicyFault(answer["fault"]), answer["detail"])
        return PolicyDecision.from_result(answer["result"])

    async def _keep(self, engine: "_Engine | None") -> None:
        """Keep one engine running."""
        pause_seconds = 0.0
        try:
            while True:
                if engine is None:
                    await asyncio.sleep(pause_seconds)
                    pause_seconds = min(RESTART_SECONDS_MAX, pause_seconds * 2 + 0.1)
                    engine = await self._restart()
                    continue
                self._engines.add(engine)
                answered = await engine.ended()
                self._engines.discard(engine)
                logger.warning("policy engine process ended", extra={"answered": answered})
                engine = None
                if answered:
                    pause_seconds = 0.0
        finally:
            if engine is not None:
                await engine.stop()

    async def _restart(self) -> "_Engine | None":
        try:
            return await _Engine.start(self._modules, self._deadline_seconds)
        except (PolicyLoadError, OSError) as error:
            logger.warning("policy engine process does not start", extra={"error": str(error)})
            return None


class _Engine(asyncio.Protocol):
    """One process. It answers in the order of asking, so that the first future that waits is the one it works on."""

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self._loop = asyncio.get_running_loop()
        self._closed = self._loop.create_future()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._received = b""
        self._answered = 0
        self._killed = False
        self.fields_read: frozenset[str] | None = None
        # When the process took up the question that it works on, and the one timer that watches it.
        self._working_since = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, modules: dict[str, str], deadline_seconds: float) -> "_Engine":
        """Start a process and have it compile the policies.

        Raises:
            PolicyLoadError: it refuses them, or dies on them.
        """
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "budgetguard.adapters.rego.process",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                # Its print() is for the log.
                stdout=2,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        engine = cls(deadline_seconds)
        engine._process = process
        try:
            await engine._loop.create_connection(lambda: engine, sock=ours)
            await engine._compile(modules)
        except BaseException:
            await engine.stop()
            raise
        return engine

    def waiting(self) -> int:
        """How many questions wait for this process."""
        return len(self._waiting)

    async def ask(self, document: dict[str, Any]) -> Any:
        """Send an ``input``; return the process' answer.

        Raises:
            PolicyUnavailableError: too many wait, no answer within the deadline, or the process died.
        """
        if len(self._waiting) >= WAITING_MAX:
            raise PolicyUnavailableError(PolicyFault.BUSY, f"{WAITING_MAX} decisions wait")
        answer = self._send(document)
        if len(self._waiting) == 1:
            self._working_since = self._loop.time()
            self._arm(self._deadline_seconds)
        late = self._loop.call_later(self._deadline_seconds, self._give_up, answer)
        try:
            return await answer
        finally:
            late.cancel()

    async def ended(self) -> int:
        """Wait until the process is gone; return how many questions it had answered."""
        await asyncio.shield(self._closed)
        await self.stop()
        return self._answered

    async def stop(self) -> None:
        """End the process, whatever it does."""
        self._kill()
        await self._process.wait()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio's callback)."""
        # uvloop's transports can be written to without being asyncio's WriteTransport.
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Hand out whole answers (asyncio's callback)."""
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            answer = self._waiting.popleft()
            self._answered += 1
            self._working_since = self._loop.time()
            if not answer.done():
                answer.set_result(orjson.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what waits (asyncio's callback)."""
        if self._watch is not None:
            self._watch.cancel()
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(PolicyUnavailableError(PolicyFault.DOWN, f"the engine process ended: {exc}"))
        self._waiting.clear()
        if not self._closed.done():
            self._closed.set_result(None)

    async def _compile(self, modules: dict[str, str]) -> None:
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                compiled = await self._send(modules)
                if "refusal" in compiled:
                    await self._closed
        except (TimeoutError, PolicyUnavailableError) as error:
            raise PolicyLoadError("the policy engine died or hung while it compiled the policies") from error
        if "refusal" in compiled:
            raise PolicyLoadError(compiled["refusal"])
        if compiled["fields_read"] is not None:
            self.fields_read = frozenset(compiled["fields_read"])
        self._answered = 0

    def _send(self, document: Any) -> "asyncio.Future[Any]":
        if self._closed.done() or self._transport is None:
            raise PolicyUnavailableError(PolicyFault.DOWN, "the engine process ended")
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._transport.write(orjson.dumps(document) + b"\n")
        self._waiting.append(answer)
        return answer

    def _give_up(self, answer: "asyncio.Future[Any]") -> None:
        if not answer.done():
            seconds = self._deadline_seconds
            answer.set_exception(PolicyUnavailableError(PolicyFault.SLOW, f"no decision within {seconds} s"))

    def _arm(self, seconds: float) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """Kill the process when it has worked on one question for longer than the deadline."""
        if not self._waiting:
            return
        left = self._working_since + self._deadline_seconds - self._loop.time()
        if left > 0:
            self._arm(left)
        else:
            self._watch = self._loop.call_later(SECOND_LOOK_SECONDS, self._kill_if_stuck, self._answered)

    def _kill_if_stuck(self, answered: int) -> None:
        if self._answered != answered:
            self._look()
        else:
            logger.warning("policy engine process killed: one decision took too long")
            self._kill()

    def _kill(self) -> None:
        # At most once, and never one that ended by itself: kill() would reap it before asyncio sees its end.
        if not self._killed and not self._closed.done():
            self._killed = True
            self._process.kill()
