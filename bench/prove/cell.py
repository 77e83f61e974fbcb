"""One cell: a thousand calls at a budget's last cent, then the rest of the money call by call, then the books."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from bench.prove.books import difference_nanos
from bench.prove.cells import Route, Subject, Window
from bench.prove.load import CONCURRENCY, Call, Callers, Outcome
from bench.prove.system import System, Tenant
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.core.money import parse_usd
from budgetguard.core.operation import LEASE_MS
from control_plane.jobs.expire_holds import ExpireHolds

# A limit has room for this part of the calls' holds; they cost about half of their holds.
LIMIT_PART = 6
# How long usage may take to the ledger, and holds to be ended, before they count as lost.
BOOKED_SECONDS = 20.0
# How long ends that come late (a spool, a replay, a release) are waited for before leases are made to run out.
LATE_ENDS_SECONDS = 8.0
WAVES_MAX = 200
# How often, and after what pause, a caller tries again what was refused for now.
AGAIN_MAX = 25
AGAIN_SECONDS = 0.2


@dataclass(slots=True, kw_only=True)
class Result:
    """A row of the table. Amounts in nanos."""

    name: tuple[str, ...]
    calls: int
    statuses: Counter[int] = field(default_factory=Counter)
    over_nanos: int = 0
    over_allowed_nanos: int = 0
    false_refusals: int = 0
    used: float = 0.0
    leaked: int = 0
    difference_nanos: int = 0
    unmetered: int = 0
    unmetered_allowed: int = 0
    expired: int = 0
    expired_allowed: bool = False
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    tenant: Tenant | None = None

    def judge(self) -> "Result":
        """Say of each expectation that was not met what it was."""
        expectations = (
            (self.statuses[200] > 0, "no call was admitted"),
            (self.statuses[402] > 0, "no call was refused, so the limit was never met"),
            (self.over_nanos <= self.over_allowed_nanos, f"overspent by {self.over_nanos} nanos"),
            (not self.false_refusals, f"{self.false_refusals} calls refused although their hold would have fitted"),
            (not self.leaked, f"{self.leaked} holds without an end"),
            (not self.difference_nanos, f"the ledger has {self.difference_nanos} nanos more than the counters"),
            (self.unmetered <= self.unmetered_allowed, f"{self.unmetered} answered calls are in no ledger row"),
            (self.expired_allowed or not self.expired, f"{self.expired} calls whose end nobody saw"),
        )
        self.faults += [said for met, said in expectations if not met]
        return self


def calls_of(tenant: Tenant, headers: Mapping[str, str], route: Route, random: Random, *, slow: bool = False) -> Call:
    return Call(route.path, {"X-API-Key": tenant.key, **headers}, route.body(random, slow=slow))


def limit_worth(calls: int, hold_nanos: int) -> int:
    """Make a limit of which calls want three times as much, with a few nanos that no sum of holds makes up."""
    return calls * hold_nanos // LIMIT_PART + 7


async def hold_of(system: System, callers: Callers, route: Route, random: Random) -> int:
    """Ask what a call of this route is held for; all of them are held for the same."""
    tenant = system.tenant(model=route.model)
    outcome = await callers.one(calls_of(tenant, {}, route, random))
    if outcome.status != 200:
        raise RuntimeError(f"{route.name}: a call without a budget got {outcome.status}: {outcome.error}")
    return outcome.hold_nanos


async def prove_cell(
    system: System, subject: Subject, window: Window, route: Route, *, calls: int, hold_nanos: int, random: Random
) -> Result:
    """Run one cell and say how it went."""
    started = time.monotonic()
    result = Result(name=(subject.name, window.name, route.name), calls=calls)
    # Every subject of a template has the whole limit for itself.
    limit_nanos = limit_worth(calls // len(subject.callers), hold_nanos)
    tenant = system.tenant((subject, window, limit_nanos), model=route.model)
    system.trace.watch({budget.budget_id: budget.limit_nanos for budget in tenant.budgets})
    async with Callers(system.running.base_url) as callers:
        asked = [
            calls_of(tenant, subject.callers[number % len(subject.callers)], route, random) for number in range(calls)
        ]
        outcomes = await callers.all(asked)
        await settled(system, tenant)
        used = []
        for headers in subject.callers:
            closing, last = await spend_the_rest(callers, tenant, headers, (route,), random, result)
            outcomes += closing
            used.append(used_of(last, tenant, result))
    result.used = min(used)
    await check_the_books(system, tenant, outcomes, result)
    result.seconds = time.monotonic() - started
    return result.judge()


def used_of(last: Outcome, tenant: Tenant, result: Result) -> float:
    """Read out of the last refusal how much of the limit is spent; what is left must be less than one hold."""
    if not last.refused_by_budget:
        told = str(last.error.get("message", ""))[:100]
        result.faults.append(f"money is left, yet the calls came to no refusal but {last.status} {told}")
        return 0.0
    if last.error["budget_id"] not in {budget.budget_id for budget in tenant.budgets}:
        result.faults.append(f"refused by budget {last.error['budget_id']}, which is another one")
    if parse_usd(last.error["held_usd"]):
        result.faults.append(f"${last.error['held_usd']} is held although no call is under way")
    return 100 * parse_usd(last.error["spent_usd"]) / parse_usd(last.error["limit_usd"])


async def spend_the_rest(
    callers: Callers,
    tenant: Tenant,
    headers: Mapping[str, str],
    routes: tuple[Route, ...],
    random: Random,
    result: Result,
) -> tuple[list[Outcome], Outcome]:
    """Call until a call is refused while nothing is under way.

    One call tells what is left after it; then as many at once as that has room for. Each of those must be admitted,
    which is known without a look inside: a refusal among them is a false one, whatever its numbers say.
    """
    outcomes: list[Outcome] = []
    last = Outcome()
    for number in range(WAVES_MAX):
        route = routes[number % len(routes)]
        for _ in range(AGAIN_MAX):
            last = await callers.one(calls_of(tenant, headers, route, random))
            outcomes.append(last)
            if last.status != 503:
                break
            # A process that was killed is found out by a call now and then, until it is back.
            await asyncio.sleep(AGAIN_SECONDS)
        if last.status != 200:
            break
        fitting = min(last.remaining_nanos // last.hold_nanos, CONCURRENCY)
        wave = await callers.all(calls_of(tenant, headers, route, random) for _ in range(fitting))
        result.false_refusals += sum(one.refused_by_budget and not one.refused_falsely for one in wave)
        outcomes += wave
    return outcomes, last


async def settled(system: System, tenant: Tenant, *, seconds: float = BOOKED_SECONDS) -> bool:
    """Wait until nothing of the tenant is held and no end waits in the spool; say whether that came about."""
    until = time.monotonic() + seconds
    while system.books.live_holds(tenant.tenant_id) or system.spooled():
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.02)
    return True


async def let_leases_run_out(system: System) -> None:
    """Do what the control plane's job does 90 s later, by a clock that is that much ahead.

    Only when no call is under way: such a hold's lease would have been renewed meanwhile.
    """
    redis = RedisClient(system.redis_url, timeout_seconds=10)
    ahead = ExpireHolds(Counters(redis), now_ms=lambda: time.time_ns() // 1_000_000 + LEASE_MS)
    while await ahead.run_once():
        pass
    await redis.close()


async def check_the_books(system: System, tenant: Tenant, outcomes: list[Outcome], result: Result) -> None:
    """Wait for the ledger and compare: what was refused, held, spent and booked."""
    result.tenant, budgets = tenant, list(tenant.budgets)
    answered = {one.operation_id for one in outcomes if one.status == 200}
    until = time.monotonic() + BOOKED_SECONDS
    system.wait_until_written()
    system.trace.follow()
    while True:
        rows = await system.books.rows(tenant.tenant_id)
        counters = system.books.counters(tenant.tenant_id)
        differences = difference_nanos(budgets, counters, rows)
        unmetered = answered - {row["operation_id"] for row in rows}
        lost = system.trace.lost.operations
        if (not differences and unmetered <= lost) or time.monotonic() > until:
            break
        await asyncio.sleep(0.05)
    system.wait_until_written()
    system.trace.follow()
    result.statuses.update(one.status for one in outcomes)
    result.false_refusals += sum(one.refused_falsely for one in outcomes)
    result.over_nanos = max(system.trace.over_nanos.values(), default=0)
    result.over_allowed_nanos = system.trace.lost.nanos
    result.leaked = system.books.live_holds(tenant.tenant_id)
    held_nanos = sum(counter.held_nanos for counter in counters)
    if held_nanos and not result.leaked:
        result.faults.append(f"{held_nanos} nanos are held by no call")
    result.difference_nanos = max(differences.values(), key=abs, default=0)
    result.unmetered = len(unmetered)
    result.unmetered_allowed = len(unmetered & lost)
    result.expired = sum(row["end_state"] == "EXPIRED" for row in rows)
    if any(row["amount_nanos"] > row["hold_nanos"] for row in rows):
        result.faults.append("a call was billed more than its hold, which is not what this proves")
    if not system.trace.over_nanos:
        result.faults.append("no counter of the budgets was ever written")
