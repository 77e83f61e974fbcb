import time
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry

from budgetguard.adapters.postgres.api_keys import ApiKeyRepository
from budgetguard.adapters.postgres.audit_trail import AuditTrail
from budgetguard.adapters.postgres.budgets import BudgetRepository
from budgetguard.adapters.postgres.catalog import CatalogRepository
from budgetguard.adapters.postgres.ledger import LedgerRepository
from budgetguard.adapters.postgres.ledger_sums import LedgerSums
from budgetguard.adapters.postgres.pool import Database
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.epoch import Epoch
from budgetguard.adapters.redis.events import UsageEvents
from budgetguard.adapters.redis.published import Published
from budgetguard.adapters.redis.reconciling import CounterBook
from budgetguard.core.budget import Reserved
from budgetguard.core.counter import counter_name
from budgetguard.core.entities import BudgetDraft
from budgetguard.core.snapshot import SubjectKind, WindowKind
from budgetguard.core.window import bounds
from control_plane.jobs.drain_usage import DrainMetrics, DrainUsage, LedgerWriter
from control_plane.jobs.publish_snapshots import SnapshotPublisher
from control_plane.jobs.rebuild_counters import RebuildCounters
from control_plane.reconciler import ReconcileMetrics, Reconciler
from tests.plugins.redis_calls import a_reserve, a_settlement, the_handoff

KEY_ID = "k" * 16


def now_ms() -> int:
    return int(time.time() * 1000)


@dataclass
class Plane:
    """The control plane's parts on one Redis and one Postgres, with what tests do to them."""

    database: Database
    redis: RedisClient

    def __post_init__(self) -> None:
        self.tenants = TenantRepository(self.database)
        self.api_keys = ApiKeyRepository(self.database)
        self.budgets = BudgetRepository(self.database)
        self.catalog = CatalogRepository(self.database)
        self.ledger = LedgerRepository(self.database)
        self.counters = Counters(self.redis)
        self.events = UsageEvents(self.redis)
        self.epoch = Epoch(self.redis)
        self.metrics = DrainMetrics(CollectorRegistry())
        self.sums = LedgerSums(self.database)
        self.reconciler = Reconciler(
            database=self.database,
            sums=self.sums,
            audit=AuditTrail(self.database),
            counters=self.counters,
            book=CounterBook(self.redis),
            events=self.events,
            metrics=ReconcileMetrics(CollectorRegistry()),
            now_ms=now_ms,
            drain_seconds=0.2,
        )
        self.waiting = set()
        self.publisher = SnapshotPublisher(
            tenants=self.tenants,
            api_keys=self.api_keys,
            budgets=self.budgets,
            counters=self.counters,
            published=Published(self.redis),
            reconciler=self.reconciler,
            waiting=self.waiting,
        )
        self.writer = LedgerWriter(self.events, self.ledger, metrics=self.metrics)
        self.rebuild = self.rebuilding()

    def rebuilding(self, **changes) -> RebuildCounters:
        return RebuildCounters(
            database=self.database,
            tenants=self.tenants,
            ledger=self.ledger,
            sums=self.sums,
            epoch=self.epoch,
            book=CounterBook(self.redis),
            publisher=self.publisher,
            writer=self.writer,
            **{"now_ms": now_ms, **changes},
        )

    def drain(self, consumer: str = "one", **changes) -> DrainUsage:
        return DrainUsage(self.writer, consumer=consumer, **changes)

    async def make_tenant(self, tenant_id: str = "acme", *, key_id: str = KEY_ID, limit_nanos: int = 10**9) -> None:
        """A published tenant with a key and a monthly budget."""
        await self.tenants.create(actor="a", tenant_id=tenant_id, name=tenant_id)
        await self.api_keys.create(actor="a", tenant_id=tenant_id, key_id=key_id, name="k", secret_sha256="0" * 64)
        await self.make_budget(f"{tenant_id}-month", tenant_id=tenant_id, limit_nanos=limit_nanos)
        await self.publisher.publish_key(key_id)
        await self.publisher.publish(tenant_id)

    async def make_budget(self, budget_id: str, *, tenant_id: str = "acme", **changes) -> None:
        fields = {"subject_kind": SubjectKind.TENANT, "window": WindowKind.MONTH, "limit_nanos": 10**9, **changes}
        await self.budgets.create(BudgetDraft(budget_id=budget_id, **fields), actor="a", tenant_id=tenant_id)

    async def hold(self, operation_id: str, *, tenant_id: str = "acme", key_id: str = KEY_ID, nanos: int = 100):
        """Hold money for a call, by the records in Redis; returns its handoff, or the refusal."""
        tenant = await self.counters.load_tenant(tenant_id)
        key = await self.counters.load_key(tenant_id, key_id)
        request = a_reserve(tenant, operation_id=operation_id, key=key, now_ms=now_ms(), input_nanos=nanos)
        answer = await self.counters.reserve(request)
        return the_handoff(request, answer) if isinstance(answer, Reserved) else answer

    async def call(self, operation_id: str, amount_nanos: int = 60, **of_whom):
        """A whole call; returns its handoff."""
        handoff = await self.hold(operation_id, **of_whom)
        await self.counters.settle(a_settlement(handoff, amount_nanos), now_ms=now_ms())
        return handoff

    async def counted(self, tenant_id: str = "acme") -> dict[str, tuple[int, int]]:
        """(spent, held) of each budget in its current window."""
        snapshot = await self.tenants.snapshot(tenant_id)
        names = [counter_name(spec, bounds(spec, now_ms())) for spec in snapshot.budgets]
        read = await self.counters.read_counters(tenant_id, names)
        return {spec.budget_id: one for spec, one in zip(snapshot.budgets, read, strict=True)}

    async def put_back(self, saved: list[str]) -> None:
        """Give Redis what it had when it was saved, as from an older file."""
        for key in await self.redis.command("KEYS", "bg:*"):
            await self.redis.command("DEL", key)
        for key in saved:
            await self.redis.command("RENAME", f"saved:{key}", key)

    async def save(self) -> list[str]:
        """Keep what Redis has now, but for what closes its shards when it is put back: sign-offs and streams."""
        found = await self.redis.command("KEYS", "bg:*")
        saved = [key for key in found if not key.endswith((":usage", ":epoch"))]
        for key in saved:
            await self.redis.command("COPY", key, f"saved:{key}")
        return saved

    async def in_ledger(self, tenant_id: str = "acme") -> int:
        return await self.ledger.spent(
            tenant_id=tenant_id, subject_kind=SubjectKind.TENANT, subject="", from_ms=0, until_ms=None
        )


@pytest.fixture
def plane(database, ready_redis):
    return Plane(database, ready_redis)


@pytest.fixture
def rows_seen_if(owner):
    """Let the programs see the ledger's rows by a condition, which is looked at for each row that a query wants."""

    async def restrict(condition: str | None) -> None:
        await owner.execute("DROP POLICY IF EXISTS seen ON usage_ledger")
        await owner.execute("DROP POLICY IF EXISTS added ON usage_ledger")
        if condition is None:
            await owner.execute("ALTER TABLE usage_ledger DISABLE ROW LEVEL SECURITY")
            return
        await owner.execute(f"CREATE POLICY seen ON usage_ledger FOR SELECT USING ({condition})")
        await owner.execute("CREATE POLICY added ON usage_ledger FOR INSERT WITH CHECK (true)")
        await owner.execute("ALTER TABLE usage_ledger ENABLE ROW LEVEL SECURITY")

    return restrict


@pytest.fixture
def slow_tenants(rows_seen_if):
    """Let every query that wants a row of these tenants take longer than any may."""

    async def slow(*tenant_ids: str) -> None:
        names = ", ".join(f"'{tenant_id}'" for tenant_id in tenant_ids)
        condition = f"CASE WHEN tenant_id IN ({names}) THEN pg_sleep(300) IS NOT NULL ELSE true END"
        await rows_seen_if(condition if tenant_ids else None)

    return slow
