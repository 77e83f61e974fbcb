"""The same load while something is killed, stopped or emptied in the middle of it."""

import asyncio
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from bench.prove.cell import (
    LATE_ENDS_SECONDS,
    Result,
    calls_of,
    check_the_books,
    let_leases_run_out,
    limit_worth,
    settled,
    spend_the_rest,
    used_of,
)
from bench.prove.cells import ROUTES, Route, Subject, Window, able
from bench.prove.load import CONCURRENCY, Call, Callers, Outcome
from bench.prove.system import System, Tenant

# Which part of the calls has been made when it happens.
STRIKE_AFTER = 0.4
PAUSE_SECONDS = 1.0
RECOVERY_SECONDS = 60.0
# A Redis that has lost data is told the settlements of the last seconds again, so long after it is back at the latest:
# until then it may have room that has been spent.
TOLD_AGAIN_SECONDS = 2.5
# Callers that are refused for now try again, this much later.
AGAIN_SECONDS = 0.1
# Limits of the budgets beside the tight one.
ROOMY = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that goes wrong. ``strike`` makes it happen and may take a while."""

    name: str
    strike: Callable[[System], None]


def _kill(part: str) -> Fault:
    return Fault(name=f"kill -9 {part}", strike=lambda system: system.running.kill(part))


def _restart_redis(system: System) -> None:
    system.wait_until_written()
    system.running.kill("redis")


def _pause_redis(system: System) -> None:
    system.running.send("redis", signal.SIGSTOP)
    time.sleep(PAUSE_SECONDS)
    system.running.send("redis", signal.SIGCONT)


def _flush_redis(system: System) -> None:
    system.books.redis.flushall()


def faults_of(system: System) -> tuple[Fault, ...]:
    """List what can go wrong with this system."""
    return (
        *(_kill(part) for part in (*system.ext_authz, "ext_proc", "envoy", "control_plane", "postgres")),
        Fault(name="kill -9 redis", strike=_restart_redis),
        Fault(name="redis stopped for 1 s", strike=_pause_redis),
        Fault(name="redis FLUSHALL", strike=_flush_redis),
    )


async def prove_fault(
    system: System,
    fault: Fault,
    *,
    subjects: tuple[Subject, ...],
    windows: tuple[Window, ...],
    routes: tuple[Route, ...] = ROUTES,
    calls: int,
    hold_nanos: Mapping[str, int],
    random: Random,
) -> Result:
    """Run the load over every route with the fault in its middle, and say how the books look afterwards.

    The tenant has a budget for every subject, with windows in turn. The first one is tight, the others are roomy: they
    never refuse, and each of them must agree with the ledger all the same. ``hold_nanos``: by route, what a call holds.
    """
    started = time.monotonic()
    result = Result(name=(fault.name,), calls=calls, expired_allowed=True)
    able_subjects, able_windows = able(subjects), able(windows)
    tight_nanos = limit_worth(calls, sum(hold_nanos[route.name] for route in routes) // len(routes))
    budgets = [
        (subject, able_windows[number % len(able_windows)], tight_nanos * (ROOMY if number else 1))
        for number, subject in enumerate(able_subjects)
        if "{model}" not in subject.budget.values()  # which differs by route
    ]
    tenant = system.tenant(*budgets, model="")
    headers = {name: value for subject in able_subjects for name, value in subject.callers[0].items()}
    system.trace.watch({budget.budget_id: budget.limit_nanos for budget in tenant.budgets})
    outcomes, broken = await _load_with(system, fault, tenant, headers, routes, calls, random)
    await _recover(system, tenant, headers, routes[0], random, outcomes)
    await asyncio.sleep(TOLD_AGAIN_SECONDS)
    # Ends that are on their way (spools, replays, releases) come first; what then still is held, nobody will end.
    if not await settled(system, tenant, seconds=LATE_ENDS_SECONDS):
        await let_leases_run_out(system)
        if not await settled(system, tenant):
            result.faults.append("settlements are left in the spool, or holds without a lease")
    async with Callers(system.running.base_url) as callers:
        closing, last = await spend_the_rest(callers, tenant, headers, routes, random, result)
    outcomes += closing
    result.used = used_of(last, tenant, result)
    await check_the_books(system, tenant, outcomes, result)
    if not broken:
        result.faults.append("it struck when every call had been made")
    result.seconds = time.monotonic() - started
    return result.judge()


async def _load_with(
    system: System,
    fault: Fault,
    tenant: Tenant,
    headers: dict[str, str],
    routes: tuple[Route, ...],
    calls: int,
    random: Random,
) -> tuple[list[Outcome], bool]:
    """Make the calls with the fault in the middle; say whether calls were left when it struck.

    A caller that is refused (for now, or by a budget of which much is only held) waits a moment, as callers do: without
    that a part's absence would take in all the calls that are left within milliseconds.
    """
    waiting = iter([calls_of(tenant, headers, routes[n % len(routes)], random, slow=True) for n in range(calls)])
    outcomes: list[Outcome] = []
    enough = asyncio.Event()

    async def caller(callers: Callers, one: Call) -> None:
        outcome = await callers.one(one)
        outcomes.append(outcome)
        if len(outcomes) >= calls * STRIKE_AFTER:
            enough.set()
        if outcome.status != 200:
            await asyncio.sleep(AGAIN_SECONDS)

    async with Callers(system.running.base_url) as callers:

        async def work() -> None:
            for one in waiting:
                await caller(callers, one)

        async def strike() -> bool:
            await enough.wait()
            left = len(outcomes) < calls
            await asyncio.to_thread(fault.strike, system)
            return left

        struck, *_ = await asyncio.gather(strike(), *(work() for _ in range(CONCURRENCY)))
    return outcomes, struck


async def _recover(
    system: System, tenant: Tenant, headers: dict[str, str], route: Route, random: Random, outcomes: list[Outcome]
) -> None:
    """Wait until calls are decided by the budget again, and administrators are heard.

    Raises:
        TimeoutError: that did not come about.
    """
    until = time.monotonic() + RECOVERY_SECONDS
    while True:
        if await asyncio.to_thread(system.redis_answers) and await asyncio.to_thread(system.admin_answers):
            # A Redis that was started again has forgotten what it was told.
            await asyncio.to_thread(system.keep_whole_trace)
            async with Callers(system.running.base_url) as callers:
                outcome = await callers.one(calls_of(tenant, headers, route, random))
            outcomes.append(outcome)
            if outcome.status in (200, 402):
                return
        if time.monotonic() > until:
            raise TimeoutError(f"calls did not go on within {RECOVERY_SECONDS:.0f} s")
        await asyncio.sleep(0.1)
