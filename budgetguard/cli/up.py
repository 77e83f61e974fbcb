"""`budgetguard up`: the whole product on one machine, until Ctrl-C."""

import contextlib
import signal
import sys
import time
from collections.abc import Mapping

from budgetguard.adapters.settings import SettingsError
from budgetguard.cli.local.admin import AdminError
from budgetguard.cli.local.binaries import BinaryMissingError
from budgetguard.cli.local.demo import Demo, ensure_demo
from budgetguard.cli.local.home import HomeError
from budgetguard.cli.local.postgres import PostgresError
from budgetguard.cli.local.stack import Stack, StackSettings
from budgetguard.cli.local.supervisor import StartError, StoppedError

HELP = """Start PostgreSQL, Redis, the control plane, ext_authz, ext_proc and Envoy, and keep them running until Ctrl-C.
Environment: PORT (3000), LISTEN_ADDRESS (127.0.0.1), BUDGETGUARD_HOME (./.budgetguard), DATABASE_URL,
MIGRATE_DATABASE_URL and REDIS_URL (servers of yours), ADMIN_API_KEY, OPENAI_API_KEY (without it calls go to a built-in
fake provider), BUDGETGUARD_EXT_AUTHZ_PROCESSES (1: how many processes share the decisions), METRICS_PORT (9464: metrics
of ext_proc and of each ext_authz are at the first free ports from there on), OPA_URL, POLICY_DIR, POLICY_FAILURE."""

TEND_SECONDS = 0.1


class _Signals:
    """Counts Ctrl-C and SIGTERM: the first stops, the second hurries."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        self.count += 1

    def stopping(self) -> bool:
        return self.count > 0

    def hurry(self) -> bool:
        return self.count > 1


def main(variables: Mapping[str, str]) -> int:
    """Run the stack; what the user can put right is one sentence and exit code 1."""
    signals = _Signals()
    try:
        stack = Stack(StackSettings.from_environment(variables), say=_say)
        stack.start(stopping=signals.stopping)
    except StoppedError:
        _say("stopped while starting")
        return 0
    except (StartError, HomeError, PostgresError, BinaryMissingError, SettingsError) as error:
        sys.stderr.write(f"budgetguard: {error}\n")
        return 1
    try:
        _present(stack)
        while not signals.stopping():
            stack.tend()
            time.sleep(TEND_SECONDS)
    except AdminError as error:
        sys.stderr.write(f"budgetguard: the stack runs, but its demo tenant could not be set up: {error}\n")
        stack.stop(hurry=lambda: True)
        return 1
    except BaseException:
        stack.stop(hurry=lambda: True)
        raise
    _say("stopping")
    stack.stop(hurry=signals.hurry)
    _say("stopped")
    return 0


def _say(line: str) -> None:
    # A closed terminal must not keep the stack from draining.
    with contextlib.suppress(OSError):
        print(line, flush=True)


def _present(stack: Stack) -> None:
    """Show what runs where, and how to call it."""
    demo = ensure_demo(stack.admin, stack.home)
    supervisor = stack.supervisor
    rows = [(name, str(supervisor.pid(name)), supervisor.part(name).where) for name in supervisor.names()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = ["", *(f"  {name:<{widths[0]}}  {pid:>{widths[1]}}  {where}" for name, pid, where in rows), ""]
    lines.append(f"  BudgetGuard  {stack.base_url}")
    lines.append(f"  data, logs   {stack.home.path}")
    lines.append(f"  provider     {_provider(stack)}")
    lines.append(f"  admin key    {_admin_key(stack)}")
    lines += _demo(stack, demo)
    _say("\n".join(lines))


def _provider(stack: Stack) -> str:
    if stack.fake_provider_url is None:
        return "OpenAI, with your key"
    return "the built-in fake (set OPENAI_API_KEY for the real one)"


def _admin_key(stack: Stack) -> str:
    if stack.settings.admin_key:
        return "yours (ADMIN_API_KEY)"
    if stack.admin_key_is_new:
        return f"{stack.admin_key} (shown this once; kept in {stack.home.path / 'admin-key'})"
    return f"in {stack.home.path / 'admin-key'}"


def _demo(stack: Stack, demo: Demo | None) -> list[str]:
    if demo is None:
        return ["", "The demo tenant was deleted: make your own with POST /admin/tenant.", "Ctrl-C stops everything."]
    return [
        f"  demo tenant  {demo.tenant_id}, key {demo.api_key}",
        "",
        "Try it:",
        "",
        demo.curl(stack.base_url),
        "",
        "Ctrl-C stops everything.",
    ]
