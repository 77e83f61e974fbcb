"""Measures what BudgetGuard adds to a call: the full path against an Envoy without filters, same upstream, same run.

    python bench/run.py [--seconds 4] [--rounds 3]

Each round alternates the two edges for every load, so that a noisy machine disturbs both; the table shows medians.
CPU is what /proc says the processes used, divided by the calls of that load. No figure here passes or fails anything.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from string import Template

import psutil

from budgetguard.cli.local.binaries import envoy_binary
from budgetguard.cli.local.parts import free_port
from budgetguard.cli.local.stack import Stack, StackSettings

CHECKOUT = Path(__file__).resolve().parents[1]
LOAD_TOOL = CHECKOUT / ".tools" / "bin" / "bombardier"
CONNECTIONS = (1, 16, 64)
PATH = "/v1/chat/completions"
QUESTION = {"model": "gpt-4o-mini", "max_tokens": 64, "messages": [{"role": "user", "content": "Say hello."}]}
BODIES = {"json": QUESTION, "sse": {**QUESTION, "stream": True}}
EDGES = ("plain", "full")
PARTS = ("envoy", "ext_authz", "ext_proc", "redis", "control_plane", "postgres")
PYTHON_PARTS = ("ext_authz", "ext_proc")


@dataclass(frozen=True, slots=True)
class Measured:
    """One load on one edge. Latencies in microseconds; CPU in microseconds a call, by part."""

    requests_per_second: float
    p50_us: float
    p99_us: float
    failed: int
    cpu_us: dict[str, float]


def cpu_seconds(pids: list[int]) -> float:
    used = 0.0
    for pid in pids:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            times = process.cpu_times()
            used += times.user + times.system
    return used


def load(url: str, body: dict[str, object], headers: dict[str, str], *, connections: int, seconds: int) -> dict:
    """Run one closed-loop load and return the tool's figures."""
    command = [
        *(str(LOAD_TOOL), "-m", "POST", "-c", str(connections), "-d", f"{seconds}s", "-t", "30s"),
        *("-b", json.dumps(body), "-H", "content-type: application/json", "-l", "-p", "r", "-o", "json", "--http1"),
    ]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    output = subprocess.run([*command, url], capture_output=True, text=True, check=True, timeout=seconds + 60)
    figures: dict = json.loads(output.stdout)["result"]
    return figures


def measure(
    url: str,
    body: dict[str, object],
    headers: dict[str, str],
    *,
    connections: int,
    seconds: int,
    pids: dict[str, list[int]],
) -> Measured:
    before = {part: cpu_seconds(group) for part, group in pids.items()}
    figures = load(url, body, headers, connections=connections, seconds=seconds)
    answered = figures["req2xx"]
    calls = max(1, answered + figures["req4xx"] + figures["req5xx"])
    cpu_us = {part: (cpu_seconds(group) - before[part]) / calls * 1e6 for part, group in pids.items()}
    latency = figures["latency"]["percentiles"]
    return Measured(
        requests_per_second=figures["rps"]["mean"],
        p50_us=latency["50"],
        p99_us=latency["99"],
        failed=figures["req1xx"] + figures["req3xx"] + figures["req4xx"] + figures["req5xx"] + figures["others"],
        cpu_us=cpu_us,
    )


def median_of(rounds: list[Measured], part: str | None = None, *, name: str = "") -> float:
    return statistics.median(one.cpu_us[part] if part else getattr(one, name) for one in rounds)


def report(results: dict[tuple[str, str, int], list[Measured]], rss: dict[str, float]) -> None:
    print(f"\n{'load':<10}{'edge':<7}{'RPS':>8}{'p50 ms':>9}{'p99 ms':>9}{'non-2xx':>9}  CPU us a call")
    for (kind, edge, connections), rounds in sorted(
        results.items(), key=lambda item: (item[0][0], item[0][2], item[0][1])
    ):
        cpu = "  ".join(f"{part} {median_of(rounds, part):.0f}" for part in rounds[0].cpu_us)
        print(
            f"{kind + ' c=' + str(connections):<10}{edge:<7}"
            f"{median_of(rounds, name='requests_per_second'):>8.0f}"
            f"{median_of(rounds, name='p50_us') / 1000:>9.2f}{median_of(rounds, name='p99_us') / 1000:>9.2f}"
            f"{sum(one.failed for one in rounds):>9}  {cpu}"
        )
    print()
    for kind in BODIES:
        for connections in CONNECTIONS:
            plain, full = results[kind, "plain", connections], results[kind, "full", connections]
            added = median_of(full, name="p50_us") - median_of(plain, name="p50_us")
            ratio = median_of(full, name="p50_us") / median_of(plain, name="p50_us")
            python = sum(median_of(full, part) for part in PYTHON_PARTS)
            print(
                f"{kind} c={connections}: adds {added / 1000:.2f} ms at p50 (x{ratio:.2f}); "
                f"Python {python:.0f} us a call"
            )
    print("RSS MiB: " + ", ".join(f"{part} {size:.0f}" for part, size in rss.items()))


def start_plain(folder: Path, upstream_port: int) -> tuple[subprocess.Popen[bytes], int]:
    port = free_port()
    text = Template((Path(__file__).with_name("plain.yaml")).read_text()).substitute(
        PORT=port, UPSTREAM_PORT=upstream_port, ADMIN_SOCKET=folder / "plain.sock"
    )
    configuration = folder / "plain.yaml"
    configuration.write_text(text)
    command = [str(envoy_binary()), "-c", str(configuration), "--concurrency", "2", "--base-id", str(os.getpid())]
    return subprocess.Popen([*command, "--log-level", "error"]), port


def run(seconds: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bg-bench-", dir="/tmp") as name:
        settings = StackSettings.from_environment(
            {"PATH": os.defpath, "BUDGETGUARD_HOME": f"{name}/home", "PORT": "0", "HOME": os.environ.get("HOME", "/")}
        )
        stack = Stack(settings, say=lambda line: print(f"  {line}", file=sys.stderr))
        stack.start()
        plain: subprocess.Popen[bytes] | None = None
        try:
            assert stack.fake_provider_url is not None
            plain, plain_port = start_plain(Path(name), int(stack.fake_provider_url.rpartition(":")[2]))
            headers = {"X-API-Key": tenant_key(stack)}
            measure_all(stack, plain.pid, plain_port, headers, seconds=seconds, rounds=rounds)
        finally:
            if plain is not None:
                plain.terminate()
                plain.wait(10)
            stack.stop()


def tenant_key(stack: Stack) -> str:
    """Make a tenant with a monthly and a daily budget and a rate limit that never binds, as a real one would have."""
    tenant_id = stack.admin.ask("POST", "/admin/tenant", {"name": "Bench"})["tenantId"]
    budgets = [{"period": "monthly", "amountUsd": "1000000"}, {"period": "daily", "amountUsd": "100000"}]
    stack.admin.ask("POST", f"/admin/tenant/{tenant_id}/budgets", {"budgets": budgets})
    stack.admin.ask("PUT", f"/admin/tenant/{tenant_id}/ratelimit", {"rateLimitPerMin": 10_000_000})
    return str(stack.admin.ask("POST", f"/admin/tenant/{tenant_id}/apikeys", {})["key"])


def measure_all(
    stack: Stack, plain_pid: int, plain_port: int, headers: dict[str, str], *, seconds: int, rounds: int
) -> None:
    pids = {part: [pid] for part in PARTS if (pid := stack.supervisor.pid(part)) is not None}
    urls = {"plain": f"http://127.0.0.1:{plain_port}{PATH}", "full": f"http://127.0.0.1:{stack.port}{PATH}"}
    edges = {"plain": {"envoy": [plain_pid]}, "full": pids}
    for edge in EDGES:  # warm: connections, caches, the price data
        load(urls[edge], QUESTION, headers, connections=4, seconds=1)
    results: dict[tuple[str, str, int], list[Measured]] = {}
    for _ in range(rounds):
        for kind, body in BODIES.items():
            for connections in CONNECTIONS:
                for edge in EDGES:
                    measured = measure(
                        urls[edge], body, headers, connections=connections, seconds=seconds, pids=edges[edge]
                    )
                    results.setdefault((kind, edge, connections), []).append(measured)
    rss = {part: psutil.Process(group[0]).memory_info().rss / 2**20 for part, group in pids.items()}
    report(results, rss)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=4, help="how long each load lasts")
    parser.add_argument("--rounds", type=int, default=3, help="how often each load is repeated")
    arguments = parser.parse_args()
    run(arguments.seconds, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
