"""What is left when all rows are done: nothing that a comparison with the ledger would change, now or later."""

import asyncio
import http.client
import time
from collections.abc import Sequence

from bench.prove.books import difference_nanos
from bench.prove.cell import Result
from bench.prove.system import System

COMPARED_SECONDS = 120.0
# So long nothing more is compared when a look is through.
QUIET_SECONDS = 3.0
_COMPARED = "budgetguard_counters_compared_total"


async def look_again(system: System, results: Sequence[Result]) -> list[str]:
    """Start the control plane anew, so that it compares every tenant of this day, and say what is wrong then.

    Drift is counted by its audit rows, which outlive the processes that found it.
    """
    system.running.kill("control_plane")
    await _wait_until_compared(system)
    faults = []
    drifted = await system.books.drifts()
    if drifted:
        faults.append(f"comparisons with the ledger have changed counters {drifted} times: they had drifted")
    for result in results:
        if result.tenant is None:
            continue
        rows = await system.books.rows(result.tenant.tenant_id)
        counters = system.books.counters(result.tenant.tenant_id)
        for budget_id, nanos in difference_nanos(list(result.tenant.budgets), counters, rows).items():
            faults.append(f"{' / '.join(result.name)}: the ledger has {nanos} nanos more than budget {budget_id}")
    return faults


async def _wait_until_compared(system: System) -> None:
    until, compared, since = time.monotonic() + COMPARED_SECONDS, 0.0, time.monotonic()
    while compared == 0 or time.monotonic() - since < QUIET_SECONDS:
        if time.monotonic() > until:
            raise TimeoutError(f"counters were not compared within {COMPARED_SECONDS:.0f} s")
        await asyncio.sleep(0.2)
        now = await asyncio.to_thread(_compared, system)
        if now != compared:
            compared, since = now, time.monotonic()


def _compared(system: System) -> float:
    """How many counters this control plane has compared; 0 while it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", system.running.stack.port, timeout=5)
    try:
        connection.request("GET", "/metrics", headers={"x-admin-key": system.running.admin_key})
        text = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return 0.0
    finally:
        connection.close()
    return next((float(line.split()[1]) for line in text.splitlines() if line.startswith(_COMPARED)), 0.0)
