"""The whole stack as `budgetguard up` runs it, on free ports and in a folder of its own."""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from budgetguard.cli.local.stack import Stack, StackSettings

READY_SECONDS = 60
# Each run of the tests has its own, below the ports of outgoing connections: those of killed parts would take theirs.
METRICS_PORT = str(10_000 + os.getpid() % 20_000)


class RunningStack:
    """A stack that is tended by a thread. Parts are named as in `budgetguard up`'s table."""

    def __init__(self, home: Path, variables: Mapping[str, str] | None = None) -> None:
        self.said: list[str] = []
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        environment |= {"BUDGETGUARD_HOME": str(home), "PORT": "0", "METRICS_PORT": METRICS_PORT}
        environment |= variables or {}
        self.stack = Stack(StackSettings.from_environment(environment), say=self.said.append)
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._started = threading.Event()
        self._error: BaseException | None = None
        # Starts and restarts happen in this thread: a part ends with the thread that started it.
        self._thread = threading.Thread(target=self._run, name="stack")

    def _run(self) -> None:
        try:
            self.stack.start(stopping=self._stopping.is_set)
        except BaseException as error:  # noqa: BLE001 - told to whoever waits for the start
            self._error = error
            self._started.set()
            return
        self._started.set()
        while not self._stopping.wait(0.05):
            self.stack.tend()
        self.stack.stop(hurry=self._hurry.is_set)

    def start(self) -> None:
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def stop(self, *, hurry: bool = False) -> None:
        if hurry:
            self._hurry.set()
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.stack.port}"

    @property
    def admin_key(self) -> str:
        return self.stack.admin_key

    @property
    def fake_provider_url(self) -> str:
        assert self.stack.fake_provider_url is not None
        return self.stack.fake_provider_url

    def send(self, part: str, number: int) -> None:
        """Send a part a signal (SIGSTOP, SIGCONT ...)."""
        self.stack.supervisor.send(part, number)

    def kill(self, part: str) -> None:
        """Kill a part; the supervisor starts it again."""
        pid = self.stack.supervisor.pid(part)
        assert pid is not None, f"{part} does not run"
        os.kill(pid, signal.SIGKILL)

    def wait_ready(self, part: str) -> None:
        """Wait until a part answers."""
        deadline = time.monotonic() + READY_SECONDS
        while not self.stack.supervisor.is_ready(part):
            assert time.monotonic() < deadline, f"{part} is not ready; said: {self.said[-5:]}"
            time.sleep(0.05)


@contextmanager
def running_stack(variables: Mapping[str, str] | None = None):
    # A Unix socket's path has at most 107 bytes; and PostgreSQL's user, when we are root, must be able to get there.
    folder = Path(tempfile.mkdtemp(prefix="bg-stack-", dir="/tmp"))
    folder.chmod(0o755)
    running = RunningStack(folder / "home", variables)
    try:
        running.start()
        yield running
    finally:
        running.stop(hurry=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def stack():
    """One stack for all end-to-end tests; each makes tenants of its own."""
    with running_stack() as running:
        yield running
