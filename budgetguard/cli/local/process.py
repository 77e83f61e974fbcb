"""A part of the stack as a child process: how it starts, says that it is ready, is found again, and ends."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_WRAPPER = Path(__file__).with_name("child.py")

# A log is cut when it grows over this: the old half is kept beside it, so a part uses at most twice as much.
LOG_BYTES_MAX = 20 * 2**20
_LOG_TAIL_BYTES = 8192
_KILL_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """How to run one part.

    ``is_ready`` gets its pid. ``user`` is (uid, gid) to run as, ``None`` ourselves. ``environment`` is all it gets.
    ``stop_signal`` asks it to end in good order, within ``stop_seconds``.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    is_ready: Callable[[int], bool]
    where: str
    user: tuple[int, int] | None = None
    cwd: str | None = None
    stop_signal: int = signal.SIGTERM
    start_seconds: float = 30.0
    stop_seconds: float = 25.0


@dataclass(slots=True)
class Child:
    """One run of a part. ``log_path`` gets what it prints."""

    part: Part
    log_path: Path
    process: subprocess.Popen[bytes] = field(init=False)
    _log_start: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        part = self.part
        uid, gid = part.user or ("-", "-")
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(  # noqa: S603 - our own parts
                [
                    *(sys.executable, "-I", "-S", str(_WRAPPER)),
                    *(str(os.getpid()), str(part.stop_signal), str(uid), str(gid)),
                    *part.argv,
                ],
                env=dict(part.environment),
                cwd=part.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C at the terminal is for the supervisor, which then stops the parts in order.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def ended(self) -> str | None:
        """How it ended, as words; ``None`` while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    @property
    def last_words(self) -> str:
        """The last line that this run printed."""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start if self._log_start <= size else 0, size - _LOG_TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def stop(self, seconds: float | None = None) -> bool:
        """Ask it to end, then insist; say whether it ended by itself."""
        self.send(self.part.stop_signal)
        self.send(signal.SIGCONT)
        try:
            self.process.wait(self.part.stop_seconds if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self.process.wait(_KILL_SECONDS)
            return False
        return True


def cut_log(path: Path) -> None:
    """Move a log that grew too long aside. Parts append, so cutting the file under them is safe."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES_MAX:
            shutil.copyfile(path, path.with_name(path.name + ".1"))
            os.truncate(path, 0)


def identity(pid: int) -> float | None:
    """Tell processes apart that had the same pid: when this one started; ``None`` when there is none."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def end_leftover(pid: int, started: float, *, seconds: float) -> bool:
    """End a part of an earlier, killed run, if the pid is still that process; say whether there was one."""
    if identity(pid) != started:
        return False
    process = psutil.Process(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        try:
            process.wait(seconds)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(_KILL_SECONDS)
    return True
