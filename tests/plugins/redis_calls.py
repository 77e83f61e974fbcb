"""Calls to reserve and end, spelled shortly for tests."""

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.reconciling import CounterBook
from budgetguard.core.budget import Reserve, Reserved, Settlement
from budgetguard.core.events import entry_order
from budgetguard.core.handoff import Handoff
from budgetguard.core.operation import End, OperationFacts
from budgetguard.core.pricing import DEFAULT_TIER, RateCard
from budgetguard.core.snapshot import BudgetSpec, KeySnapshot, SubjectKind, TenantSnapshot, WindowKind

KEY_ID = "k" * 16
NOW_MS = 1_750_000_000_000
RATES = RateCard("test", {DEFAULT_TIER: {}})


def a_budget(budget_id: str = "b1", limit_nanos: int = 1000, **changes) -> BudgetSpec:
    fields = {"subject_kind": SubjectKind.TENANT, "window": WindowKind.LIFETIME, **changes}
    return BudgetSpec(budget_id=budget_id, limit_nanos=limit_nanos, **fields)


def a_tenant(*budgets: BudgetSpec, tenant_id: str = "acme", version: int = 1, **changes) -> TenantSnapshot:
    return TenantSnapshot(tenant_id=tenant_id, version=version, budgets=budgets, **changes)


def a_key(tenant_id: str = "acme", key_id: str = KEY_ID, version: int = 1, **changes) -> KeySnapshot:
    return KeySnapshot(tenant_id=tenant_id, key_id=key_id, version=version, secret_sha256="00", **changes)


def the_facts(operation_id: str = "op-1", *, tenant_id: str = "acme", key_id: str = KEY_ID, held_at_ms: int = NOW_MS):
    return OperationFacts(
        operation_id=operation_id,
        tenant_id=tenant_id,
        key_id=key_id,
        held_at_ms=held_at_ms,
        api="openai.chat",
        provider_id="openai",
        model="gpt-4o-mini",
        price_version="test",
        stream=False,
    )


def a_reserve(
    tenant: TenantSnapshot,
    *,
    operation_id: str = "op-1",
    key: KeySnapshot | None = None,
    now_ms: int = NOW_MS,
    input_nanos: int = 100,
    output_femtos: int = 0,
    output_tokens: int = 0,
    output_tokens_min: int | None = None,
    eighth: bool = False,
) -> Reserve:
    key = key or a_key(tenant.tenant_id)
    return Reserve(
        facts=the_facts(operation_id, tenant_id=tenant.tenant_id, key_id=key.key_id, held_at_ms=now_ms),
        tenant=tenant,
        key=key,
        now_ms=now_ms,
        input_nanos=input_nanos,
        output_femtos=output_femtos,
        output_tokens=output_tokens,
        output_tokens_min=output_tokens if output_tokens_min is None else output_tokens_min,
        eighth=eighth,
    )


def a_handoff(facts: OperationFacts, *, counters: tuple[str, ...] = (), hold_nanos: int = 0) -> Handoff:
    return Handoff(
        facts=facts,
        counters=counters,
        hold_nanos=hold_nanos,
        input_tokens_bound=0,
        output_tokens_bound=0,
        rate_card=RATES,
        service_tier=DEFAULT_TIER,
    )


def the_handoff(request: Reserve, reserved: Reserved) -> Handoff:
    return a_handoff(request.facts, counters=reserved.counters, hold_nanos=reserved.hold_nanos)


def a_settlement(handoff: Handoff, amount_nanos: int, end: End = End.CONFIRMED, **changes) -> Settlement:
    fields = {"usage": None, "ended_at_ms": handoff.facts.held_at_ms + 500, "status": 200, **changes}
    return Settlement(handoff=handoff, end=end, amount_nanos=amount_nanos, **fields)


async def newest_event(redis: RedisClient, shard: int) -> tuple[int, int]:
    """Read how far a shard's stream has come, as (ms, sequence)."""
    if not await redis.command("EXISTS", keys.usage(shard)):
        return 0, 0
    stream = await redis.command("XINFO", "STREAM", keys.usage(shard))
    return entry_order(stream[stream.index("last-generated-id") + 1])


async def live_holds(counters: Counters, tenant_id: str) -> tuple[int, int]:
    """Count a tenant's calls under way, and sum what they hold."""
    holds = await CounterBook(counters._redis).live_holds(tenant_id)
    return len(holds), sum(hold.hold_nanos for hold in holds)
