"""Keeps the parts of the stack running: starts them, restarts what dies, stops them in order.

Everything happens in the thread that calls ``tend``, ``start`` or ``stop``; a lock lets tests call from another one.
The thread that starts parts must outlive them: the kernel ties a child to the thread, not the process, that made it.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from budgetguard.cli.local.process import Child, Part, cut_log, end_leftover, identity

POLL_SECONDS = 0.05
BACKOFF_SECONDS_MIN = 0.2
BACKOFF_SECONDS_MAX = 30.0
# A part that ran this long had a good start: its next restart is quick again.
SETTLED_SECONDS = 60.0
PROBE_SECONDS = 5.0
# So many failed probes in a row are worth a line; one may be a moment's load.
SILENT_PROBES = 3
LEFTOVER_SECONDS = 20.0


class StartError(Exception):
    """The stack cannot start. The message is one sentence for the person at the terminal."""


class StoppedError(Exception):
    """Somebody asked to stop while the stack was starting."""


@dataclass(slots=True)
class _Kept:
    """A part under supervision. ``child`` is ``None`` while it waits for its restart."""

    part: Part
    child: Child | None = None
    started_at: float = 0.0
    ready_seconds: float = 0.0
    backoff_seconds: float = BACKOFF_SECONDS_MIN
    restart_at: float | None = None
    restarts: int = 0
    was_ready: bool = False
    silent_probes: int = 0


class Supervisor:
    """``logs`` is a folder, ``record`` a file that remembers pids for a later start, ``say`` tells the user a line."""

    def __init__(self, *, logs: Path, record: Path, say: Callable[[str], None]) -> None:
        self._logs = logs
        self._record = record
        self._say = say
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.RLock()
        self._probe_at = 0.0
        logs.mkdir(parents=True, exist_ok=True)

    def end_leftovers(self) -> None:
        """End what an earlier, killed run left. Call it only while holding the lock on the data folder."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return
        for name, (pid, started) in record.items():
            if end_leftover(pid, started, seconds=LEFTOVER_SECONDS):
                self._say(f"ended {name} (pid {pid}), which an earlier run had left")
        self._record.unlink(missing_ok=True)

    def start(self, *parts: Part) -> None:
        """Start parts, not waiting for them."""
        with self._lock:
            for part in parts:
                cut_log(self.log_path(part.name))
                kept = self._kept.setdefault(part.name, _Kept(part))
                kept.part = part
                self._spawn(kept)

    def wait_ready(
        self, *names: str, stopping: Callable[[], bool] = lambda: False, on_ready: Callable[[str, float], None]
    ) -> None:
        """Wait until parts are ready; ``on_ready`` is told each and its seconds.

        Raises:
            StartError: one ended, or was not ready in time.
            StoppedError: ``stopping`` said so.
        """
        waiting = list(names)
        while waiting:
            if stopping():
                raise StoppedError
            for name in tuple(waiting):
                kept = self._kept[name]
                if self._became_ready(kept):
                    waiting.remove(name)
                    on_ready(name, kept.ready_seconds)
            time.sleep(POLL_SECONDS)

    def _became_ready(self, kept: _Kept) -> bool:
        child = kept.child
        if child is None or (ended := child.ended):
            why = child.last_words if child else ""
            how = f" ({ended})" if child else ""
            raise StartError(f"{kept.part.name} did not start{how}: {why or 'it said nothing'}")
        if kept.part.is_ready(child.pid):
            kept.was_ready = True
            kept.ready_seconds = time.monotonic() - kept.started_at
            return True
        if time.monotonic() - kept.started_at > kept.part.start_seconds:
            raise StartError(
                f"{kept.part.name} was not ready within {kept.part.start_seconds:.0f} s: "
                f"{child.last_words or 'it said nothing'} (all it said: {child.log_path})"
            )
        return False

    def tend(self) -> None:
        """Notice what died or does not answer, and restart what is due. Call it several times a second."""
        with self._lock:
            now = time.monotonic()
            for kept in self._kept.values():
                self._tend(kept, now)
            if now >= self._probe_at:
                self._probe_at = now + PROBE_SECONDS
                for log in self._logs.glob("*.log"):
                    cut_log(log)
                for kept in self._kept.values():
                    self._probe(kept)

    def _tend(self, kept: _Kept, now: float) -> None:
        name = kept.part.name
        if kept.child is not None and (ended := kept.child.ended) is not None:
            if now - kept.started_at > SETTLED_SECONDS:
                kept.backoff_seconds = BACKOFF_SECONDS_MIN
            why = f": {kept.child.last_words}" if not ended.startswith("killed") and kept.child.last_words else ""
            self._say(f"{name} ended ({ended}){why}; starting it again in {kept.backoff_seconds:g} s")
            kept.child = None
            kept.restart_at = now + kept.backoff_seconds
            kept.backoff_seconds = min(kept.backoff_seconds * 2, BACKOFF_SECONDS_MAX)
        elif kept.child is None and kept.restart_at is not None and now >= kept.restart_at:
            kept.restarts += 1
            self._spawn(kept)
        elif kept.child is not None and not kept.was_ready and kept.part.is_ready(kept.child.pid):
            kept.was_ready = True
            self._say(f"{name} is back (pid {kept.child.pid})")

    def _probe(self, kept: _Kept) -> None:
        if kept.child is None or not kept.was_ready:
            return
        if kept.part.is_ready(kept.child.pid):
            if kept.silent_probes >= SILENT_PROBES:
                self._say(f"{kept.part.name} answers again")
            kept.silent_probes = 0
            return
        kept.silent_probes += 1
        if kept.silent_probes == SILENT_PROBES:
            self._say(f"{kept.part.name} does not answer (its log: {self.log_path(kept.part.name)})")

    def _spawn(self, kept: _Kept) -> None:
        kept.child = Child(kept.part, self.log_path(kept.part.name))
        kept.started_at = time.monotonic()
        kept.restart_at = None
        kept.was_ready = False
        kept.silent_probes = 0
        self._remember()

    def stop(self, name: str, seconds: float | None = None) -> None:
        """Stop a part for good, giving it ``seconds`` (its own patience when ``None``)."""
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                return
            kept.restart_at = None
            child, kept.child = kept.child, None
        # Outside the lock: a part may take a while to end in good order, and the others are tended meanwhile.
        if child is not None and not child.stop(seconds):
            self._say(f"{name} did not stop in time and was killed")
        self._remember()

    def names(self) -> list[str]:
        """List the parts that are supervised."""
        return list(self._kept)

    def part(self, name: str) -> Part:
        """Return how a part is run."""
        return self._kept[name].part

    def pid(self, name: str) -> int | None:
        """Return a part's process id, or ``None`` while it does not run."""
        child = self._kept[name].child
        return None if child is None or child.ended else child.pid

    def is_ready(self, name: str) -> bool:
        """Ask a part now."""
        pid = self.pid(name)
        return pid is not None and self._kept[name].part.is_ready(pid)

    def restarts(self, name: str) -> int:
        """Count how often a part was started again after it had died."""
        return self._kept[name].restarts

    def log_path(self, name: str) -> Path:
        """Where a part's output goes."""
        return self._logs / f"{name}.log"

    def send(self, name: str, number: int) -> None:
        """Send a part a signal."""
        child = self._kept[name].child
        if child is not None:
            child.send(number)

    def _remember(self) -> None:
        record = {
            name: (kept.child.pid, identity(kept.child.pid))
            for name, kept in self._kept.items()
            if kept.child is not None and kept.child.ended is None
        }
        unfinished = self._record.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(record), encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            unfinished.replace(self._record)
