"""Does one thing for many, each apart: one that fails keeps nobody else waiting, and is tried again later."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from control_plane.jobs.runner import back_off_s

logger = logging.getLogger(__name__)

# So many that fail one after the other are not at fault themselves: what they all need is down.
FAILURES_MAX = 3

Key = TypeVar("Key", int, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """How often one has failed in a row, and when (by the clock) it is tried again."""

    times: int
    again_at: float


class Turns(Generic[Key]):
    """Whose turn it is. ``what`` names a key in the log; ``clock`` counts seconds."""

    def __init__(self, *, job: str, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._job = job
        self._what = what
        self._clock = clock
        self._failed: dict[Key, _Failure] = {}
        self._in_a_row = 0

    def due(self, keys: Iterable[Key]) -> list[Key]:
        """Say whose turn it is now, in order; what failed last time comes last, and not before its time."""
        now = self._clock()
        due = [key for key in keys if key not in self._failed or self._failed[key].again_at <= now]
        return sorted(due, key=lambda key: (key in self._failed, key))

    def begin(self) -> None:
        """Begin another pass: what failed in the one before is no reason to give this one up."""
        self._in_a_row = 0

    @contextmanager
    def apart(self, key: Key, *, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Do one's work in this: its failure is logged and ends no more than that, until ``FAILURES_MAX`` in a row.

        Raises:
            Exception: that last failure, or one of ``but``, which is no key's own; the pass is to be given up.
        """
        try:
            yield
        except but:
            raise
        except Exception as error:
            self._note(key, error)
            self._in_a_row += 1
            if self._in_a_row >= FAILURES_MAX:
                raise
        else:
            self._failed.pop(key, None)
            self._in_a_row = 0

    def _note(self, key: Key, error: Exception) -> None:
        times = self._failed[key].times + 1 if key in self._failed else 1
        pause_s = back_off_s(times, jitter=1.0)
        self._failed[key] = _Failure(times=times, again_at=self._clock() + pause_s)
        # The stack once, when it begins.
        logger.log(
            logging.ERROR if times == 1 else logging.WARNING,
            "job=%s %s=%s failures=%d retry_s=%.1f error=%r",
            *(self._job, self._what, key, times, pause_s, error),
            exc_info=times == 1,
        )
