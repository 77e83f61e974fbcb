"""Proves that a hard budget is hard: `make prove`, or `python -m bench.prove --help` for a part of it.

Every row runs a thousand calls, two hundred at a time, through Envoy and several ext_authz processes, with budgets that
are too small for them. Exit code 1 when an expectation was not met; the row says which.
"""

import argparse
import logging
import sys
import time
from random import Random

import uvloop

from bench.prove import faults, report
from bench.prove.afterwards import look_again
from bench.prove.cell import Result, hold_of, prove_cell
from bench.prove.cells import ROUTES, SUBJECTS, WINDOWS, cells, chosen, missing
from bench.prove.load import Callers
from bench.prove.system import EXT_AUTHZ_PROCESSES, System, running_system


def say(line: str) -> None:
    print(line, flush=True)


async def prove(system: System, arguments: argparse.Namespace) -> list[Result]:
    random = Random(arguments.seed)
    subjects, windows, routes = (
        chosen(rows, names)
        for rows, names in (
            (SUBJECTS, arguments.subject),
            (WINDOWS, arguments.window),
            (ROUTES, arguments.route),
        )
    )
    for row in (*subjects, *windows):
        if lacking := missing(row):
            say(f"left out: {row.name} ({lacking} does not exist in this build)")
    results: list[Result] = []
    async with Callers(system.running.base_url) as callers:
        holds = {route.name: await hold_of(system, callers, route, random) for route in routes}
    if not arguments.only_faults:
        say("")
        report.head(say, "subject", "window", "route")
        for subject, window, route in cells(subjects, windows, routes):
            result = await prove_cell(
                *(system, subject, window, route), calls=arguments.calls, hold_nanos=holds[route.name], random=random
            )
            report.line(say, result)
            results.append(result)
    if not arguments.only_cells:
        say("")
        report.head(say, "fault")
        for fault in chosen(faults.faults_of(system), arguments.fault):
            result = await faults.prove_fault(
                *(system, fault),
                subjects=subjects,
                windows=windows,
                routes=routes,
                calls=arguments.calls,
                hold_nanos=holds,
                random=random,
            )
            report.line(say, result)
            results.append(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="calls a row")
    parser.add_argument("--processes", type=int, default=EXT_AUTHZ_PROCESSES, help="how many ext_authz share them")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="of what the calls cost")
    for name in ("subject", "window", "route", "fault"):
        parser.add_argument(f"--{name}", action="append", help="only this one; may be given again")
    parser.add_argument("--only-cells", action="store_true")
    parser.add_argument("--only-faults", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # a job that expires holds says so, which here is what it was asked for
    started = time.monotonic()
    with running_system(ext_authz_processes=arguments.processes) as system:
        say(f"{arguments.processes} ext_authz processes, seed {arguments.seed}")
        results = uvloop.run(prove(system, arguments))
        afterwards = uvloop.run(look_again(system, results)) if results else []
    failed = [result for result in results if result.faults]
    calls = sum(sum(result.statuses.values()) for result in results)
    say(f"\n{len(results)} rows, {calls} calls, {time.monotonic() - started:.0f} s: {len(failed)} rows failed")
    for result in failed:
        for said in result.faults:
            say(f"  {' / '.join(result.name)}: {said}")
    for said in afterwards or ("nothing: no comparison with the ledger has changed a counter",):
        say(f"  afterwards: {said}")
    return 1 if failed or afterwards or not results else 0


if __name__ == "__main__":
    sys.exit(main())
