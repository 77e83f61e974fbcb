"""The ledger beside the counters: both are added up here anew, from their rows and fields."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import asyncpg
import redis

from budgetguard.adapters.redis import keys
from budgetguard.core.window import Window

_ROWS = """
    SELECT operation_id, end_state, delta_nanos, amount_nanos, hold_nanos, key_id, model, provider_id, tags,
           session_id, end_user, (extract(epoch FROM held_at) * 1000)::bigint AS held_at_ms
    FROM usage_ledger WHERE tenant_id = $1
"""
# The ledger's column that a budget's field names; a tag's row names the tag among others.
_COLUMNS = {
    "api_key_id": "key_id",
    "tag_id": "tags",
    "session_id": "session_id",
    "end_user": "end_user",
    "model": "model",
    "provider_id": "provider_id",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedBudget:
    """A budget as it was made: ``fields`` are those of its subject; ``column`` tells a template's subjects apart."""

    budget_id: str
    limit_nanos: int
    fields: Mapping[str, str]
    column: str = ""
    rolling: bool = False

    def counts(self, row: Mapping[str, Any], window: Window) -> bool:
        """Whether a ledger row is this budget's spend in a window."""
        inside = window.starts_at_ms <= row["held_at_ms"] < (window.resets_at_ms or 2**63)
        return (inside or self.rolling) and all(
            value in json.loads(row["tags"]) if name == "tag_id" else row[_COLUMNS[name]] == value
            for name, value in self.fields.items()
            if name in _COLUMNS
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """One counter, as Redis has it."""

    name: str
    spent_nanos: int
    held_nanos: int

    @property
    def budget_id(self) -> str:
        return self.name.partition(":")[0]

    @property
    def window(self) -> Window:
        """As ``core/counter.py`` spells it; what rolls has no bounds in its name."""
        _, _, starts_at, resets_at, *_ = self.name.split(":")
        if starts_at.startswith("~"):
            return Window(0, None)
        return Window(int(starts_at or 0), int(resets_at) if resets_at else None)


class Books:
    """Reads one tenant's counters, holds and ledger rows."""

    def __init__(self, *, redis_url: str, database_url: str) -> None:
        self.redis: redis.Redis = redis.Redis.from_url(redis_url, decode_responses=True, socket_timeout=10)
        self._database_url = database_url

    def counters(self, tenant_id: str) -> list[Counted]:
        """Read every counter that the tenant has."""
        # A tenant's counters are few and the database is ours alone.
        pattern = keys.counter(tenant_id, "b:1:0:").rpartition(":")[0].replace("{", "[{]") + ":*"
        names = sorted(self.redis.scan_iter(pattern, count=10_000))
        found = []
        for key in names:
            spent, held = self.redis.hmget(key, "spent", "held")
            name = unquote(key.rpartition(":")[2])
            found.append(Counted(name=name, spent_nanos=int(spent or 0), held_nanos=int(held or 0)))
        return found

    def live_holds(self, tenant_id: str) -> int:
        """Count the tenant's holds that have not ended."""
        members = self.redis.zrange(keys.leases(keys.shard_of(tenant_id)), 0, -1)
        return sum(keys.split_lease_member(member)[0] == tenant_id for member in members)

    async def drifts(self) -> int:
        """Count how often a comparison with the ledger has changed a counter."""
        connection = await asyncpg.connect(self._database_url)
        try:
            return int(await connection.fetchval("SELECT count(*) FROM admin_audit WHERE kind = 'counter'"))
        finally:
            await connection.close()

    async def rows(self, tenant_id: str) -> list[Mapping[str, Any]]:
        """Read every ledger row of the tenant."""
        connection = await asyncpg.connect(self._database_url)
        try:
            return [dict(row) for row in await connection.fetch(_ROWS, tenant_id)]
        finally:
            await connection.close()


def difference_nanos(
    budgets: list[CheckedBudget], counters: list[Counted], rows: list[Mapping[str, Any]]
) -> dict[str, int]:
    """Compare each counter with the rows that it should be the sum of: ledger minus counter by budget id, if any."""
    differences: dict[str, int] = {}
    for budget in budgets:
        own = [counter for counter in counters if counter.budget_id == budget.budget_id]
        ever = Window(0, None)
        windows = {ever} if budget.rolling or not own else {counter.window for counter in own}
        for window in windows:
            spent = sorted(c.spent_nanos for c in own if c.window == window or window == ever)
            by_subject: dict[str, int] = {}
            for row in rows:
                if budget.counts(row, window):
                    subject = row[budget.column] if budget.column else ""
                    by_subject[subject] = by_subject.get(subject, 0) + row["delta_nanos"]
            # A template's counters are compared with its subjects' sums, both in ascending order.
            booked = sorted(by_subject.values())
            longer = max(len(spent), len(booked))
            of_ledger = [0] * (longer - len(booked)) + booked
            of_redis = [0] * (longer - len(spent)) + spent
            for ledger_nanos, counter_nanos in zip(of_ledger, of_redis, strict=True):
                if ledger_nanos != counter_nanos:
                    differences[budget.budget_id] = ledger_nanos - counter_nanos
    return differences
