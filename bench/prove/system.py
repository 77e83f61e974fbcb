"""The product under proof, with everything that looks into it, and the tenants that are made for a proof."""

import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import redis

from bench.prove.books import Books, CheckedBudget
from bench.prove.cells import FIELDS, Subject, Window
from bench.prove.trace import Trace
from budgetguard.cli.local.admin import AdminClient, AdminError
from budgetguard.core.money import format_usd
from budgetguard.v1 import budget_pb2
from tests.plugins.stack import RunningStack, running_stack

EXT_AUTHZ_PROCESSES = 3
ENFORCED_SECONDS = 20.0
WRITTEN_SECONDS = 20.0
_NUMBERS = count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One tenant with one key, made for one proof."""

    tenant_id: str
    key_id: str
    key: str
    budgets: tuple[CheckedBudget, ...] = ()


class System:
    """A running stack. ``trace`` has followed its Redis from the first write on."""

    def __init__(self, running: RunningStack) -> None:
        self.running = running
        stack = running.stack
        environment = stack.supervisor.part("control_plane").environment
        self.redis_url = environment["REDIS_URL"]
        self.books = Books(redis_url=self.redis_url, database_url=environment["DATABASE_URL"])
        self.trace = Trace(stack.home.redis_data / "appendonly.aof")
        self.keep_whole_trace()

    @property
    def admin(self) -> AdminClient:
        return self.running.stack.admin

    @property
    def ext_authz(self) -> tuple[str, ...]:
        """The parts that decide calls."""
        return self.running.stack.settings.ext_authz_names

    def keep_whole_trace(self) -> None:
        """Tell Redis not to rewrite its append-only file: a rewrite forgets in which order things happened."""
        self.books.redis.config_set("auto-aof-rewrite-percentage", 0)

    def wait_until_written(self) -> None:
        """Wait until the file has all that Redis acknowledged: while a sync is slow, it keeps up to 2 s back."""
        until = time.monotonic() + WRITTEN_SECONDS
        while self.books.redis.info("persistence").get("aof_buffer_length", 0):
            if time.monotonic() > until:
                raise TimeoutError(f"Redis did not write its file within {WRITTEN_SECONDS:.0f} s")
            time.sleep(0.01)

    def tenant(self, *budgets: tuple[Subject, Window, int], model: str) -> Tenant:
        """Make a tenant with a key and budgets, each with its limit in nanos, and wait until all are enforced."""
        ask = self.admin.ask
        tenant_id = ask("POST", "/admin/tenant", {"name": f"Prove {time.time_ns():x} {next(_NUMBERS)}"})["tenantId"]
        ask("PUT", f"/admin/tenant/{tenant_id}/ratelimit", {"rateLimitPerMin": 0})
        key = ask("POST", f"/admin/tenant/{tenant_id}/apikeys", {})
        for tag_id, parent_id in dict.fromkeys(tag for subject, _, _ in budgets for tag in subject.tags):
            body = {"tagId": tag_id, **({"parentId": parent_id} if parent_id else {})}
            ask("POST", f"/v1/admin/tenants/{tenant_id}/tags", body)
        made = []
        for subject, window, limit_nanos in budgets:
            fields = {n: v.format(key_id=key["id"], model=model) for n, v in subject.budget.items()}
            body = {FIELDS[n].json_name: v for n, v in {**fields, **window.budget}.items()}
            answer = ask(
                "POST", f"/v1/admin/tenants/{tenant_id}/budgets", {**body, "amountUsd": format_usd(limit_nanos)}
            )
            self._wait_until_enforced(answer["id"])
            made.append(
                CheckedBudget(
                    budget_id=answer["id"],
                    limit_nanos=limit_nanos,
                    fields=fields,
                    column=subject.column,
                    rolling=window.budget["period"] == "rolling",
                )
            )
        return Tenant(tenant_id=tenant_id, key_id=key["id"], key=key["key"], budgets=tuple(made))

    def _wait_until_enforced(self, budget_id: str) -> None:
        """A new budget may first be given its past."""
        if "state" not in budget_pb2.Budget.DESCRIPTOR.fields_by_name:
            return
        until = time.monotonic() + ENFORCED_SECONDS
        while self.admin.ask("GET", f"/v1/admin/budgets/{budget_id}").get("state") == "SEEDING":
            if time.monotonic() > until:
                raise TimeoutError(f"budget {budget_id} was not enforced within {ENFORCED_SECONDS:.0f} s")
            time.sleep(0.05)

    def spooled(self) -> bool:
        """Whether ext_proc has settlements on disk that Redis did not take yet."""
        return any(self.running.stack.home.spool.glob("settlements-*.jsonl"))

    def admin_answers(self) -> bool:
        try:
            self.admin.ask("GET", "/admin/tenant")
        except AdminError:
            return False
        return True

    def redis_answers(self) -> bool:
        try:
            return bool(self.books.redis.ping())
        except (redis.RedisError, OSError):
            return False


@contextmanager
def running_system(*, ext_authz_processes: int = EXT_AUTHZ_PROCESSES, variables: Mapping[str, Any] | None = None):
    """Start a stack of its own with several ext_authz processes."""
    chosen = {"BUDGETGUARD_EXT_AUTHZ_PROCESSES": str(ext_authz_processes), **(variables or {})}
    with running_stack(chosen) as running:
        yield System(running)
