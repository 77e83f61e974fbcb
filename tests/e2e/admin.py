"""What the end-to-end tests do as an administrator, over REST as a person would."""

import time
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count
from typing import Any

import httpx

_NUMBERS = count(1)
# How long the ledger may lag behind the counters before a test calls it lost.
DRAIN_SECONDS = 20.0
# How long counters may take to be rebuilt.
REBUILD_SECONDS = 40.0


@dataclass
class TenantUnderTest:
    """One tenant with one key."""

    http: httpx.Client
    base_url: str
    tenant_id: str
    key_id: str
    key: str
    budgets: list[dict[str, Any]] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {"X-API-Key": self.key}

    def set_budgets(self, *budgets: dict[str, Any]) -> list[dict[str, Any]]:
        answer = self.http.post(f"/admin/tenant/{self.tenant_id}/budgets", json={"budgets": list(budgets)})
        assert answer.status_code == 200, answer.text
        self.budgets = answer.json()["budgets"]
        return self.budgets

    def budget(self) -> tuple[Decimal, Decimal]:
        """Return spent and held of the tenant's one budget, in dollars, once the counters are to be trusted."""
        deadline = time.monotonic() + REBUILD_SECONDS
        while True:
            answer = self.http.get(f"/admin/tenant/{self.tenant_id}/budgets")
            assert answer.status_code == 200, answer.text
            (budget,) = answer.json()["budgets"]
            window = budget.get("window")
            if window is not None:
                break
            assert time.monotonic() < deadline, f"no figures after {REBUILD_SECONDS} s: {budget}"
            time.sleep(0.1)
        return Decimal(window["spentUsd"]), Decimal(window["heldUsd"])

    def rows(self, *, at_least: int, seconds: float = DRAIN_SECONDS) -> list[dict[str, Any]]:
        """Return every ledger row of the tenant, newest first, once there are ``at_least`` so many."""
        deadline = time.monotonic() + seconds
        while True:
            rows: list[dict[str, Any]] = []
            token = ""
            while True:
                answer = self.http.get(
                    f"/admin/tenant/{self.tenant_id}/usage/ledger", params={"page_size": 500, "page_token": token}
                )
                assert answer.status_code == 200, answer.text
                rows += answer.json().get("rows", [])
                token = answer.json().get("nextPageToken", "")
                if not token:
                    break
            if len(rows) >= at_least or time.monotonic() > deadline:
                assert len(rows) >= at_least, f"{len(rows)} of {at_least} rows after {seconds} s"
                return rows
            time.sleep(0.1)

    def settled(self, *, seconds: float = DRAIN_SECONDS) -> Decimal:
        """Wait until nothing is held, and return what is spent."""
        deadline = time.monotonic() + seconds
        while True:
            spent, held = self.budget()
            if held == 0:
                return spent
            assert time.monotonic() < deadline, f"${held} still held after {seconds} s"
            time.sleep(0.1)

    def ledger_sum(self, *, at_least: int) -> Decimal:
        return sum((Decimal(row["deltaUsd"]) for row in self.rows(at_least=at_least)), Decimal(0))


def new_tenant(base_url: str, admin_key: str, *budgets: dict[str, Any], rate: int = 0) -> TenantUnderTest:
    """Make a tenant with a key and budgets."""
    http = httpx.Client(base_url=base_url, headers={"X-Admin-Key": admin_key}, timeout=20)
    name = f"Tenant {time.time_ns():x} {next(_NUMBERS)}"
    made = http.post("/admin/tenant", json={"name": name})
    assert made.status_code == 200, made.text
    tenant_id = made.json()["tenantId"]
    limited = http.put(f"/admin/tenant/{tenant_id}/ratelimit", json={"rateLimitPerMin": rate})
    assert limited.status_code == 200, limited.text
    key = http.post(f"/admin/tenant/{tenant_id}/apikeys", json={})
    assert key.status_code == 200, key.text
    tenant = TenantUnderTest(http, base_url, tenant_id, key.json()["id"], key.json()["key"])
    if budgets:
        tenant.set_budgets(*budgets)
    return tenant


def monthly(amount_usd: str | float) -> dict[str, Any]:
    return {"period": "monthly", "amountUsd": amount_usd}
