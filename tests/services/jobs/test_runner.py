import asyncio

import pytest
from prometheus_client import CollectorRegistry

from control_plane.jobs.runner import BACK_OFF_FIRST_S, BACK_OFF_MAX_S, JobMetrics, JobRunner, back_off_s


class Job:
    name = "job"

    def __init__(self, answers, *, interval_s=0.0):
        self.interval_s = interval_s
        self.answers = list(answers)
        self.runs = 0
        self.done = asyncio.Event()

    async def run_once(self):
        self.runs += 1
        if not self.answers:
            self.done.set()
            return False
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def runner(*jobs, registry=None):
    return JobRunner(jobs, metrics=JobMetrics(registry or CollectorRegistry()), jitter=lambda: 0.0)


async def test_errors_are_told_counted_and_outlived(caplog):
    caplog.set_level("INFO")
    registry = CollectorRegistry()
    job = Job([ValueError("broken"), False])
    running = runner(job, registry=registry)
    running.start()
    await asyncio.wait_for(job.done.wait(), 10)
    await running.stop()
    assert running.failing() == {}
    assert "recovered after failures=1" in caplog.text
    assert "job=job failures=1" in caplog.text
    assert "broken" in caplog.text
    assert registry.get_sample_value("budgetguard_job_runs_total", {"job": "job", "outcome": "error"}) == 1


async def test_more_to_do_is_done_without_a_pause():
    job = Job([True] * 50, interval_s=3600)
    running = runner(job)
    running.start()
    await asyncio.wait_for(job.done.wait(), 10)
    assert job.runs == 51
    await running.stop()


async def test_one_broken_job_does_not_stop_another():
    broken, healthy = Job([RuntimeError()] * 1000), Job([True] * 10)
    broken.name = "broken"
    running = runner(broken, healthy)
    running.start()
    await asyncio.wait_for(healthy.done.wait(), 10)
    await running.stop()
    assert running.failing() == {"broken": broken.runs}


async def test_stopping_lets_a_run_finish_and_begins_no_other():
    class Slow(Job):
        def __init__(self):
            super().__init__([])
            self.entered, self.go_on, self.finished = asyncio.Event(), asyncio.Event(), 0

        async def run_once(self):
            self.entered.set()
            await self.go_on.wait()
            self.finished += 1
            return True

    job = Slow()
    running = runner(job)
    running.start()
    await job.entered.wait()
    stopping = asyncio.create_task(running.stop())
    await asyncio.sleep(0)
    assert not stopping.done()
    job.go_on.set()
    await stopping
    assert job.finished == 1


async def test_what_does_not_finish_is_cancelled():
    class Stuck(Job):
        cancelled = False

        async def run_once(self):
            self.done.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise

    job = Stuck([])
    running = runner(job)
    running.start()
    await job.done.wait()
    await running.stop(grace_s=0.01)
    assert job.cancelled


async def test_stopping_what_was_not_started_is_nothing():
    await runner(Job([])).stop()


def test_pauses_grow_to_a_bound_and_are_spread():
    assert back_off_s(1, jitter=1.0) == BACK_OFF_FIRST_S
    assert back_off_s(1, jitter=0.0) == BACK_OFF_FIRST_S / 2
    assert back_off_s(3, jitter=1.0) == pytest.approx(BACK_OFF_FIRST_S * 4)
    assert back_off_s(10_000, jitter=1.0) == BACK_OFF_MAX_S
