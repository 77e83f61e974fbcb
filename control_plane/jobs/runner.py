"""Runs jobs again and again: an error is logged and tried again later, it never ends the program."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter

logger = logging.getLogger(__name__)

BACK_OFF_FIRST_S = 0.5
BACK_OFF_MAX_S = 30.0
# How long a stop waits for runs that are under way, so that they end with their commit and acknowledgement.
STOP_GRACE_S = 10.0


class Job(Protocol):
    """Something to do every ``interval_s``. Each run must stand on its own: it may be cancelled and done again."""

    name: str
    interval_s: float

    async def run_once(self) -> bool:
        """Do it once; ``True``: there is more to do at once."""
        ...


class JobMetrics:
    """What the runs of jobs look like from outside."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.runs = Counter(
            "budgetguard_job_runs", "Runs of a background job by outcome.", ["job", "outcome"], registry=registry
        )


class JobRunner:
    """Runs each job in a task of its own until ``stop``."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        metrics: JobMetrics,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._jobs = jobs
        self._metrics = metrics
        self._jitter = jitter
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._failures = dict.fromkeys((job.name for job in jobs), 0)

    def start(self) -> None:
        """Start every job."""
        self._tasks = [asyncio.create_task(self._repeat(job), name=f"job {job.name}") for job in self._jobs]

    async def stop(self, *, grace_s: float = STOP_GRACE_S) -> None:
        """Begin no new run, wait for those under way, then cancel what is left (its transaction is rolled back)."""
        self._stopping.set()
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=grace_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def failing(self) -> dict[str, int]:
        """Return the jobs whose last run failed, with how many failed in a row."""
        return {name: failures for name, failures in self._failures.items() if failures}

    async def _repeat(self, job: Job) -> None:
        while not self._stopping.is_set():
            pause_s = await self._run(job)
            with suppress(TimeoutError):
                # Also yields when there is no pause.
                await asyncio.wait_for(self._stopping.wait(), timeout=pause_s)

    async def _run(self, job: Job) -> float:
        """Run a job once and return how long to pause."""
        started = time.monotonic()
        try:
            more = await job.run_once()
        except Exception as error:
            failures = self._failures[job.name] = self._failures[job.name] + 1
            self._metrics.runs.labels(job=job.name, outcome="error").inc()
            pause_s = back_off_s(failures, jitter=self._jitter())
            # The stack once, when it begins: an outage of minutes is one story, not hundreds.
            logger.log(
                logging.ERROR if failures == 1 else logging.WARNING,
                "job=%s failures=%d retry_s=%.1f error=%r",
                job.name,
                failures,
                pause_s,
                error,
                exc_info=failures == 1,
            )
            return pause_s
        if self._failures[job.name]:
            logger.info("job=%s recovered after failures=%d", job.name, self._failures[job.name])
        self._failures[job.name] = 0
        self._metrics.runs.labels(job=job.name, outcome="ok").inc()
        logger.debug("job=%s took_ms=%.0f more=%s", job.name, (time.monotonic() - started) * 1000, more)
        return 0.0 if more else job.interval_s


def back_off_s(failures: int, *, jitter: float) -> float:
    """Pause longer after each failure in a row, spread by ``jitter`` (0 to 1) over the upper half."""
    longest = min(BACK_OFF_FIRST_S * 2.0 ** min(failures - 1, 16), BACK_OFF_MAX_S)
    return longest * (0.5 + jitter / 2)
