"""Counters against the ledger: new ones get their past under traffic, drift is corrected, and load is no drift."""

import asyncio
import random
from dataclasses import replace

import orjson
import pytest

from budgetguard.adapters.postgres.audit_trail import AuditTrail
from budgetguard.adapters.postgres.dead_events import DeadEventRepository
from budgetguard.adapters.postgres.ledger_activity import LedgerActivity
from budgetguard.adapters.postgres.ledger_reader import LedgerReader
from budgetguard.adapters.postgres.refusals import RefusalRepository
from budgetguard.adapters.postgres.tags import TagRepository
from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import CountersUnavailableError
from budgetguard.core.attempt_counts import Tally
from budgetguard.core.budget import Refusal, Reserved
from budgetguard.core.counter import counter_name
from budgetguard.core.dead_events import DeadEventFilter
from budgetguard.core.entities import Provider
from budgetguard.core.errors import DependencyUnavailableError
from budgetguard.core.operation import End
from budgetguard.core.reasons import Reason
from budgetguard.core.snapshot import SubjectKind, WindowKind
from budgetguard.core.window import bounds
from budgetguard.v1 import dead_event_pb2
from control_plane.corrections import Corrections
from control_plane.jobs.reconcile_counters import SWEEP_COUNT, ReconcileCounters
from control_plane.services.dead_events import DeadEventService
from tests.plugins.redis_calls import a_reserve, a_settlement, the_handoff
from tests.plugins.redis_server import close_shards, sign_off
from tests.plugins.usage_events import a_delivery
from tests.services.jobs.conftest import KEY_ID, now_ms


async def drain_all(plane):
    while await plane.drain().run_once():
        pass


def the_job(plane, **changes) -> ReconcileCounters:
    return ReconcileCounters(
        budgets=plane.budgets,
        tenants=plane.tenants,
        activity=LedgerActivity(plane.database),
        refusals=RefusalRepository(plane.database),
        reconciler=plane.reconciler,
        publisher=plane.publisher,
        waiting=plane.waiting,
        **{"compare_every_s": 0, "clock": lambda: 0.0, **changes},
    )


async def audited(owner) -> list[tuple[dict[str, object], dict[str, object]]]:
    rows = await owner.fetch("SELECT before, after FROM admin_audit WHERE kind = 'counter' ORDER BY audit_id")
    return [(orjson.loads(row["before"]), orjson.loads(row["after"])) for row in rows]


async def test_a_budget_made_while_calls_are_under_way_ends_with_the_exact_sum(plane):
    await plane.make_tenant()
    early, late = await plane.hold("op-early", nanos=100), await plane.hold("op-late", nanos=200)
    await plane.call("op-ended", 60)
    await drain_all(plane)
    await plane.make_budget("day", window=WindowKind.DAY, limit_nanos=400)
    await plane.publisher.publish("acme")
    # What has ended is spent; what is under way is held, though its hold does not know this budget.
    assert await plane.counted() == {"acme-month": (60, 300), "day": (60, 300)}
    refused = await plane.hold("op-too-much", nanos=50)
    assert (refused.kind, refused.budget_id, refused.held) == (Refusal.BUDGET, "day", 300)
    await plane.counters.settle(a_settlement(early, 70), now_ms=now_ms())
    await plane.call("op-new", 20, nanos=40)
    await drain_all(plane)
    job = the_job(plane)
    await job.run_once()
    assert await plane.counted() == {"acme-month": (150, 200), "day": (150, 200)}
    await plane.counters.settle(a_settlement(late, 110), now_ms=now_ms())
    await drain_all(plane)
    await job.run_once()
    assert await plane.counted() == {"acme-month": (260, 0), "day": (260, 0)}
    assert await plane.in_ledger() == 260


async def test_until_the_ledger_has_what_redis_has_the_older_budget_is_enforced(plane):
    await plane.make_tenant(limit_nanos=150)
    await plane.call("op-1", 100)
    await plane.budgets.update("acme-month", {"window": WindowKind.DAY, "limit_nanos": 120}, actor="a")
    await plane.publisher.publish("acme")
    (seeding, enforced) = (await plane.counters.load_tenant("acme")).budgets
    assert (seeding.seeding, seeding.window, enforced.window) == (True, WindowKind.DAY, WindowKind.MONTH)
    refused = await plane.hold("op-2", nanos=60)
    assert (refused.kind, refused.limit, refused.spent) == (Refusal.BUDGET, 150, 100)
    assert isinstance(await plane.hold("op-3", nanos=10), object)
    await drain_all(plane)
    await the_job(plane).run_once()
    (spec,) = (await plane.counters.load_tenant("acme")).budgets
    assert (spec.seeding, spec.window, spec.limit_nanos) == (False, WindowKind.DAY, 120)
    refused = await plane.hold("op-4", nanos=60)
    assert (refused.kind, refused.limit, refused.spent, refused.held) == (Refusal.BUDGET, 120, 100, 10)


async def test_what_older_calls_hold_in_a_budget_that_an_rpc_gave_its_past_is_free_when_they_have_ended(plane):
    await plane.make_tenant()
    clock = [1000.0]
    job = the_job(plane, compare_every_s=60.0, clock=lambda: clock[0])
    await job.run_once()
    early, late = await plane.hold("op-early"), await plane.hold("op-late")
    await plane.make_budget("day", window=WindowKind.DAY, limit_nanos=10**6)
    await plane.publisher.publish("acme")
    assert (await plane.counted())["day"] == (0, 200)
    # Not only once a minute, as where calls end without such a budget.
    for handoff, left in ((early, 100), (late, 0)):
        await plane.counters.settle(a_settlement(handoff, 7), now_ms=now_ms())
        await drain_all(plane)
        clock[0] += 0.5
        await job.run_once()
        assert (await plane.counted())["day"][1] == left
    assert (await plane.counted())["day"] == (14, 0)


async def test_a_comparison_that_takes_long_is_not_made_all_the_time(plane, monkeypatch):
    await plane.make_tenant()
    await plane.hold("op-1")
    clock, compared, compare = [1000.0], [], plane.reconciler.compare

    async def slow(tenant_id, **how):
        compared.append(tenant_id)
        clock[0] += 3.0
        return await compare(tenant_id, **how)

    job = the_job(plane, compare_every_s=10**6, sweep_every_s=10**6, clock=lambda: clock[0])
    await job.run_once()
    await plane.make_budget("day", window=WindowKind.DAY)
    await plane.publisher.publish("acme")
    monkeypatch.setattr(plane.reconciler, "compare", slow)
    await job.run_once()
    clock[0] += 29.0
    await job.run_once()
    assert len(compared) == 1
    clock[0] += 1.5
    await job.run_once()
    assert len(compared) == 2


@pytest.mark.parametrize(
    ("changes", "subjects"),
    [
        ({"window": WindowKind.ROLLING, "rolling_ms": 3_600_000}, [""]),
        ({"window": WindowKind.LIFETIME, "subject_kind": SubjectKind.TAG, "subject": "eng"}, [""]),
        ({"window": WindowKind.DAY, "subject_kind": SubjectKind.SESSION, "each": True}, ["s1", "s2"]),
        ({"window": WindowKind.ROLLING, "rolling_ms": 60_000_000, "subject_kind": SubjectKind.TAG, "each": True},
         ["eng", "web"]),
    ],
)  # fmt: skip
async def test_every_kind_of_counter_gets_its_past_and_keeps_it(plane, changes, subjects):
    await plane.make_tenant()

    async def call(operation_id, amount_nanos, *, settle=True, **whose):
        tenant = await plane.counters.load_tenant("acme")
        request = a_reserve(tenant, operation_id=operation_id, now_ms=now_ms(), input_nanos=100)
        request = replace(request, facts=replace(request.facts, **whose))
        answer = await plane.counters.reserve(request)
        assert isinstance(answer, Reserved)
        handoff = the_handoff(request, answer)
        if settle:
            await plane.counters.settle(a_settlement(handoff, amount_nanos), now_ms=now_ms())
        return handoff

    whose = {"tags": ("eng", "web"), "session_id": "s1"}
    await call("op-1", 40, **whose)
    older = await call("op-2", 50, settle=False, tags=("eng", "web"), session_id="s2")
    await call("op-3", 7)  # nobody's
    await drain_all(plane)
    await TagRepository(plane.database).create(actor="a", tenant_id="acme", tag_id="eng", name="eng")
    await plane.make_budget("new", **changes)
    await plane.publisher.publish("acme")
    spec = next(spec for spec in (await plane.counters.load_tenant("acme")).budgets if spec.budget_id == "new")
    assert not spec.seeding
    of_tag = changes["subject_kind"] is SubjectKind.TAG if "subject_kind" in changes else False
    by_subject = {"": (40, 100)} if not changes.get("each") and of_tag else {"": (47, 100)}
    if changes.get("each"):
        by_subject = {"s1": (40, 0), "s2": (0, 100)} if not of_tag else {"eng": (40, 100), "web": (40, 100)}
    assert await spent_and_held(plane, spec, subjects) == by_subject
    await call("op-4", 5, **whose)
    await plane.counters.settle(a_settlement(older, 60), now_ms=now_ms())
    await drain_all(plane)
    await the_job(plane).run_once()
    after = await spent_and_held(plane, spec, subjects)
    assert {held for _, held in after.values()} == {0}
    total = {"s1": 45, "s2": 60} if changes.get("each") and not of_tag else dict.fromkeys(subjects, 105)
    if not changes.get("each") and not of_tag:
        total = {"": 112}
    assert {subject: spent for subject, (spent, _) in after.items()} == total


SPELLINGS = ["gpt-4o-mini", "GPT-4o-mini", "gpt-4o-mini-2024-07-18"]


async def test_a_model_has_one_counter_whatever_it_is_called_also_when_it_is_rebuilt(plane):
    await plane.make_tenant()
    tenant = await plane.counters.load_tenant("acme")
    holds = []

    async def call(number, model, *, settle=True):
        nonlocal tenant
        request = a_reserve(tenant, operation_id=f"op-{number}", now_ms=now_ms(), input_nanos=100)
        facts = replace(request.facts, model=model, priced_model="gpt-4o-mini")
        request = replace(request, facts=facts)
        answer = await plane.counters.reserve(request)
        assert isinstance(answer, Reserved)
        if settle:
            await plane.counters.settle(a_settlement(the_handoff(request, answer), 2**number), now_ms=now_ms())
        else:
            holds.append((number, the_handoff(request, answer)))

    # Before there are budgets of models.
    for number, model in enumerate(SPELLINGS):
        await call(number, model)
        await call(number + 3, model, settle=False)
    await drain_all(plane)
    provider = Provider(provider_id="openai", kind="openai", base_url="https://api.openai.com", api_key_env="")
    await plane.catalog.put_provider(provider, actor="a")
    subjects = {"family": "gpt-4o-mini", "snapshot": SPELLINGS[2]}
    for budget_id, subject in subjects.items():
        await plane.make_budget(budget_id, subject_kind=SubjectKind.MODEL, subject=subject)
    await plane.make_budget("each", subject_kind=SubjectKind.MODEL, each=True)
    await plane.publisher.publish("acme")
    tenant = await plane.counters.load_tenant("acme")
    specs = {spec.budget_id: spec for spec in tenant.budgets}

    async def counted():
        names = {
            "family": counter_name(specs["family"], bounds(specs["family"], now_ms()), ""),
            "snapshot": counter_name(specs["snapshot"], bounds(specs["snapshot"], now_ms()), ""),
            "each": counter_name(specs["each"], bounds(specs["each"], now_ms()), "gpt-4o-mini"),
        }
        return dict(zip(names, await plane.counters.read_counters("acme", list(names.values())), strict=True))

    assert await counted() == {"family": (0b111, 300), "snapshot": (0b100, 100), "each": (0b111, 300)}
    for number, handoff in holds:
        await plane.counters.settle(a_settlement(handoff, 2**number), now_ms=now_ms())
    for number, model in enumerate(SPELLINGS, 6):
        await call(number, model)
    await drain_all(plane)
    await the_job(plane).run_once()
    ends = {"family": (0b111111111, 0), "snapshot": (0b100100100, 0), "each": (0b111111111, 0)}
    assert await counted() == ends
    await plane.redis.command("FLUSHALL")
    await plane.rebuild.run_once()
    assert await counted() == ends
    names = await plane.redis.command("KEYS", "*:counter:*")
    assert len(names) == 4, "the tenant's and these"
    await call(9, SPELLINGS[1])
    await drain_all(plane)
    assert (await plane.reconciler.compare("acme")).drifted == 0
    assert await counted() == ends | {"family": (0b1111111111, 0), "each": (0b1111111111, 0)}


async def spent_and_held(plane, spec, subjects):
    names = [counter_name(spec, bounds(spec, now_ms()), subject) for subject in subjects]
    return dict(zip(subjects, await plane.counters.read_counters("acme", names), strict=True))


async def test_subjects_that_have_not_spent_for_long_get_no_counters(plane):
    await plane.make_tenant()
    await plane.make_budget("new", window=WindowKind.LIFETIME, subject_kind=SubjectKind.SESSION, each=True)
    long_ago = now_ms() - 91 * 86_400_000
    await plane.call("op-1")
    await drain_all(plane)
    shard = keys.shard_of("acme")
    await plane.ledger.insert_events(
        [
            a_delivery("op-old", shard=shard, tenant_id="acme", session_id="old", held_at_ms=long_ago),
            a_delivery("op-now", shard=shard, tenant_id="acme", session_id="now", held_at_ms=now_ms()),
        ]
    )
    await plane.publisher.publish("acme")
    names = await plane.redis.command("KEYS", "*:counter:*")
    assert [name for name in names if name.endswith("now")]
    assert not [name for name in names if name.endswith("old")]


async def test_drift_is_corrected_counted_and_written_down(plane, owner):
    await plane.make_tenant()
    await plane.call("op-1", 60)
    await drain_all(plane)
    (name,) = await plane.redis.command("KEYS", "*:counter:*")
    await plane.redis.command("HINCRBY", name, "spent", 1000)
    assert (await plane.reconciler.compare("acme")).drifted == 1
    assert await plane.counted() == {"acme-month": (60, 0)}
    ((before, after),) = await audited(owner)
    assert (before["spent_nanos"], after["spent_nanos"]) == (1060, 60)
    assert (await plane.reconciler.compare("acme")).drifted == 0


async def test_a_tenant_whose_calls_are_refused_is_looked_at_within_a_minute(plane):
    """It makes no rows any more, so its wrong counter would refuse it for ever."""
    await plane.make_tenant()
    await plane.hold("op-1")
    clock = [0.0]
    job = the_job(plane, clock=lambda: clock[0], compare_every_s=60, sweep_every_s=10**9)
    await job.run_once()
    (name,) = await plane.redis.command("KEYS", "*:counter:*")
    await plane.redis.command("HINCRBY", name, "spent", 10**9)
    assert (await plane.hold("op-2")).kind is Refusal.BUDGET
    clock[0] = 61.0
    await job.run_once()
    assert await plane.counted() == {"acme-month": (10**9, 100)}
    minute_ms = now_ms() // 60_000 * 60_000
    tally = Tally(tenant_id="acme", key_id=KEY_ID, reason=Reason.BUDGET_EXCEEDED, minute_ms=minute_ms, source="one")
    await RefusalRepository(plane.database).record([], [(keys.shard_of("acme"), "name", (tally, 1))])
    clock[0] = 122.0
    await job.run_once()
    assert await plane.counted() == {"acme-month": (0, 100)}


async def test_tenants_that_nobody_calls_are_looked_at_in_turn(plane):
    tenants = [f"tenant-{number}" for number in range(12)]
    for number, tenant_id in enumerate(tenants):
        await plane.make_tenant(tenant_id, key_id=f"{number:016}")
        await plane.hold(f"op-{number}", tenant_id=tenant_id, key_id=f"{number:016}")
    clock = [0.0]
    job = the_job(plane, clock=lambda: clock[0], compare_every_s=10**9, sweep_every_s=600)
    for _ in range(3):
        await job.run_once()
    for name in await plane.redis.command("KEYS", "*:counter:*"):
        await plane.redis.command("HSET", name, "spent", 1000)

    async def right() -> int:
        return sum([(await plane.counted(tenant))[f"{tenant}-month"] == (0, 100) for tenant in tenants])

    clock[0] = 599.0
    await job.run_once()
    assert await right() == 0
    clock[0] = 600.0
    await job.run_once()
    assert await right() == SWEEP_COUNT
    for _ in range(2):
        await job.run_once()
    assert await right() == 12
    # The next turn begins when its time has come.
    for name in await plane.redis.command("KEYS", "*:counter:*"):
        await plane.redis.command("HSET", name, "spent", 1000)
    clock[0] = 1199.0
    await job.run_once()
    assert await right() == 0


async def drift(plane) -> None:
    for name in await plane.redis.command("KEYS", "*:counter:*"):
        await plane.redis.command("HINCRBY", name, "spent", 1000)


async def with_tenants(plane, *names) -> None:
    for number, name in enumerate(names):
        await plane.make_tenant(name, key_id=f"{number:016}")
        await plane.call(f"op-{name}", 60, tenant_id=name, key_id=f"{number:016}")
    await drain_all(plane)


async def spent_by(plane, *names) -> list[int]:
    return [spent for name in names for spent, _ in (await plane.counted(name)).values()]


@pytest.fixture
def quick(plane):
    """Comparisons that give up soon."""
    plane.reconciler._sum_seconds = 2.0
    return plane


async def test_a_tenant_that_cannot_be_compared_keeps_no_other_waiting(quick, slow_tenants):
    names = ("a-slow", "b", "c")
    await with_tenants(quick, *names)
    clock = [0.0]
    job = the_job(quick, clock=lambda: clock[0], compare_every_s=10**9, sweep_every_s=60)
    await job.run_once()
    await drift(quick)
    await slow_tenants("a-slow")
    clock[0] = 100.0
    await job.run_once()
    assert await spent_by(quick, *names) == [1060, 60, 60]
    # It is not tried in vain all the time, but in time.
    await slow_tenants()
    await job.run_once()
    assert await spent_by(quick, "a-slow") == [1060]
    clock[0] = 101.0
    await job.run_once()
    assert await spent_by(quick, *names) == [60, 60, 60]


async def test_a_budget_that_cannot_get_its_past_keeps_no_other_waiting(quick, slow_tenants):
    names = ("a-slow", "b")
    await with_tenants(quick, *names)
    job = the_job(quick, compare_every_s=10**9)
    await job.run_once()
    await slow_tenants("a-slow")
    for name in names:
        await quick.make_budget(f"{name}-day", tenant_id=name, window=WindowKind.DAY)
        await quick.publisher.publish(name, wait=False)
    await drift(quick)
    await job.run_once()
    assert [await seeding(quick, name) for name in names] == [[f"{names[0]}-day"], []]
    assert await spent_by(quick, "b") == [60, 60]


async def seeding(plane, tenant_id) -> list[str]:
    return [spec.budget_id for spec in (await plane.counters.load_tenant(tenant_id)).budgets if spec.seeding]


async def test_when_one_after_the_other_fails_the_look_is_given_up_and_others_come_first_in_the_next(
    quick, slow_tenants
):
    slow = ("a-1", "a-2", "a-3")
    await with_tenants(quick, *slow, "b")
    quick.reconciler._sum_seconds = 0.3
    clock = [0.0]
    job = the_job(quick, clock=lambda: clock[0], compare_every_s=10**9, sweep_every_s=60)
    await job.run_once()
    await drift(quick)
    await slow_tenants(*slow)
    clock[0] = 100.0
    with pytest.raises(DependencyUnavailableError):
        await job.run_once()
    assert await spent_by(quick, "b") == [1060]
    clock[0] = 101.0
    quick.reconciler._sum_seconds = 2.0
    await slow_tenants("a-1", "a-2")
    await job.run_once()
    assert await spent_by(quick, *slow, "b") == [1060, 1060, 60, 60]


async def test_a_comparison_s_sums_may_take_half_a_minute(plane, rows_seen_if):
    await plane.make_tenant()
    await plane.make_budget("each", subject_kind=SubjectKind.API_KEY, each=True)
    await plane.call("op-1", 60)
    await drain_all(plane)
    await rows_seen_if("current_setting('statement_timeout') = '30s'")
    await plane.publisher.publish("acme")
    (name,) = await plane.redis.command("KEYS", "*:counter:*each*")
    assert await plane.redis.command("HGET", name, "spent") == "60"


async def test_what_may_be_usage_that_no_row_has_is_not_taken_from_a_counter(plane, owner):
    await plane.make_tenant()
    await plane.call("op-1", 60)
    await plane.redis.command("XADD", keys.usage(keys.shard_of("acme")), "*", "facts", "nonsense")
    await drain_all(plane)
    (name,) = await plane.redis.command("KEYS", "*:counter:*")
    await plane.redis.command("HINCRBY", name, "spent", 1000)
    assert (await plane.reconciler.compare("acme")).drifted == 0
    await plane.redis.command("HINCRBY", name, "spent", -1030)
    assert (await plane.reconciler.compare("acme")).drifted == 1
    assert await plane.counted() == {"acme-month": (60, 0)}


def a_neighbour() -> str:
    """Another tenant of the same shard."""
    names = (f"tenant-{number}" for number in range(10_000))
    return next(name for name in names if keys.shard_of(name) == keys.shard_of("acme"))


async def lose_usage(plane, **fields):
    """Bring an event into acme's stream that nobody can read."""
    given = [part for pair in fields.items() for part in pair]
    await plane.redis.command("XADD", keys.usage(keys.shard_of("acme")), "*", *given)


async def test_a_dead_event_keeps_back_the_counters_of_its_tenant_and_of_no_other(plane):
    neighbour = a_neighbour()
    await plane.make_tenant()
    await plane.make_tenant(neighbour, key_id="n" * 16)
    await plane.call("op-1", 60)
    await plane.call("op-2", 60, tenant_id=neighbour, key_id="n" * 16)
    await lose_usage(plane, facts='{"tenant_id":"acme","unheard-of":1}')
    await drain_all(plane)
    for name in await plane.redis.command("KEYS", "*:counter:*"):
        await plane.redis.command("HINCRBY", name, "spent", 1000)
    for tenant_id in ("acme", neighbour):
        await plane.reconciler.compare(tenant_id)
    assert await plane.counted() == {"acme-month": (1060, 0)}
    assert await plane.counted(neighbour) == {f"{neighbour}-month": (60, 0)}


async def test_a_dead_event_that_does_not_tell_its_tenant_keeps_back_the_shard_until_it_is_discarded(plane):
    neighbour = a_neighbour()
    await plane.make_tenant()
    await plane.make_tenant(neighbour, key_id="n" * 16)
    await plane.call("op-1", 60)
    await plane.call("op-2", 60, tenant_id=neighbour, key_id="n" * 16)
    await lose_usage(plane, facts='{"tenant_id":"nobody"}')
    await drain_all(plane)
    for name in await plane.redis.command("KEYS", "*:counter:*"):
        await plane.redis.command("HINCRBY", name, "spent", 1000)
    for tenant_id in ("acme", neighbour):
        await plane.reconciler.compare(tenant_id)
        assert await plane.counted(tenant_id) == {f"{tenant_id}-month": (1060, 0)}
    dead_events = DeadEventRepository(plane.database)
    (dead,) = (await dead_events.list(DeadEventFilter())).items
    await dead_events.discard(dead.dead_event_id, reason="no usage", actor="a")
    for tenant_id in ("acme", neighbour):
        await plane.reconciler.compare(tenant_id)
        assert await plane.counted(tenant_id) == {f"{tenant_id}-month": (60, 0)}


@pytest.mark.parametrize("end", ["retry", "discard"])
async def test_an_end_of_a_dead_event_brings_the_counters_to_the_ledger_without_an_alarm(plane, owner, end):
    await plane.make_tenant()
    await plane.call("op-1", 60)
    await drain_all(plane)
    await owner.execute("ALTER TABLE usage_ledger ADD CONSTRAINT refusing CHECK (operation_id <> 'op-2') NOT VALID")
    await plane.call("op-2", 40)
    await drain_all(plane)
    await plane.reconciler.compare("acme")
    assert (await plane.counted(), await plane.in_ledger()) == ({"acme-month": (100, 0)}, 60)
    await owner.execute("ALTER TABLE usage_ledger DROP CONSTRAINT refusing")
    dead_events = DeadEventRepository(plane.database)
    (dead,) = (await dead_events.list(DeadEventFilter(tenant_id="acme"))).items
    service = DeadEventService(events=dead_events, counting=plane.reconciler)
    for _ in range(2):
        if end == "retry":
            request = dead_event_pb2.RetryDeadEventRequest(dead_event_id=dead.dead_event_id)
            await service.RetryDeadEvent(request, None)
        else:
            request = dead_event_pb2.DiscardDeadEventRequest(dead_event_id=dead.dead_event_id, reason="free of charge")
            await service.DiscardDeadEvent(request, None)
    expected = 100 if end == "retry" else 60
    assert (await plane.counted(), await plane.in_ledger()) == ({"acme-month": (expected, 0)}, expected)
    assert (await plane.reconciler.compare("acme")).drifted == 0
    assert await audited(owner) == []


async def test_an_end_that_was_cut_off_before_the_counters_followed_is_sent_again(plane, owner):
    await plane.make_tenant()
    await owner.execute("ALTER TABLE usage_ledger ADD CONSTRAINT refusing CHECK (operation_id <> 'op-1') NOT VALID")
    await plane.call("op-1", 40)
    await drain_all(plane)

    class Away:
        async def follow(self, tenant_id):
            raise CountersUnavailableError("away")

    dead_events = DeadEventRepository(plane.database)
    (dead,) = (await dead_events.list(DeadEventFilter())).items
    request = dead_event_pb2.DiscardDeadEventRequest(dead_event_id=dead.dead_event_id, reason="free of charge")
    with pytest.raises(CountersUnavailableError):
        await DeadEventService(events=dead_events, counting=Away()).DiscardDeadEvent(request, None)
    assert await plane.counted() == {"acme-month": (40, 0)}
    await DeadEventService(events=dead_events, counting=plane.reconciler).DiscardDeadEvent(request, None)
    assert await plane.counted() == {"acme-month": (0, 0)}


async def test_usage_that_is_retried_while_counters_are_compared_is_not_taken_from_them(plane, owner, monkeypatch):
    await plane.make_tenant()
    await owner.execute("ALTER TABLE usage_ledger ADD CONSTRAINT refusing CHECK (operation_id <> 'op-1') NOT VALID")
    await plane.call("op-1", 40)
    await drain_all(plane)
    await owner.execute("ALTER TABLE usage_ledger DROP CONSTRAINT refusing")
    dead_events = DeadEventRepository(plane.database)
    (dead,) = (await dead_events.list(DeadEventFilter())).items
    spent = plane.sums.spent

    async def retried_after(*arguments, **named):
        summed = await spent(*arguments, **named)
        await dead_events.retry(dead.dead_event_id, actor="a")
        return summed

    monkeypatch.setattr(plane.sums, "spent", retried_after)
    await plane.reconciler.compare("acme")
    assert await plane.counted() == {"acme-month": (40, 0)}


async def test_a_late_correction_of_what_redis_forgot_reaches_the_counters(plane):
    await plane.make_tenant()
    handoff = await plane.call("op-1", 60)
    await plane.redis.command("DEL", keys.operation("acme", "op-1"))
    await drain_all(plane)
    corrected = a_settlement(handoff, 10, End.CORRECTED, replaces=1)
    await plane.counters.settle(corrected, now_ms=now_ms())
    await drain_all(plane)
    assert await plane.in_ledger() == 10
    await plane.reconciler.compare("acme")
    assert await plane.counted() == {"acme-month": (10, 0)}


async def test_a_budget_made_after_the_call_hears_of_its_correction_without_an_alarm(plane, owner):
    await plane.make_tenant()
    await plane.call("op-1", 700)
    await plane.make_budget("younger", window=WindowKind.DAY)
    await drain_all(plane)
    await plane.publisher.publish("acme")
    assert (await plane.counted())["younger"] == (700, 0)
    corrections = Corrections(
        ledger=LedgerReader(plane.database),
        counting=plane.reconciler,
        counters=plane.counters,
        audit=AuditTrail(plane.database),
        now_ms=now_ms,
    )
    draining = asyncio.create_task(drain_for_ever(plane))
    try:
        await corrections.correct_one("op-1", amount_nanos=50, reason="provider's invoice", actor="a")
    finally:
        draining.cancel()
    assert await plane.counted() == {"acme-month": (50, 0), "younger": (50, 0)}
    assert (await plane.reconciler.compare("acme")).drifted == 0
    assert await audited(owner) == []


async def drain_for_ever(plane):
    while True:
        await drain_all(plane)
        await asyncio.sleep(0.01)


async def test_counters_that_wait_for_their_rebuild_are_left_alone(plane):
    await plane.make_tenant()
    await plane.call("op-1", 60)
    await drain_all(plane)
    await close_shards(plane.redis, [keys.shard_of("acme")])
    assert not (await plane.reconciler.compare("acme")).complete
    assert (await plane.reconciler.compare("nobody")).complete is False


async def test_what_was_read_before_a_rebuild_is_not_written_after_it(plane, monkeypatch):
    await plane.make_tenant()
    await plane.call("op-1", 60)
    await drain_all(plane)
    (name,) = await plane.redis.command("KEYS", "*:counter:*")
    await plane.redis.command("HINCRBY", name, "spent", 1000)
    drained, shard = plane.events.drained, keys.shard_of("acme")

    async def meanwhile(*arguments):
        await plane.redis.command("HSET", name, "spent", 60)
        await sign_off(plane.redis, [shard])
        return await drained(*arguments)

    monkeypatch.setattr(plane.events, "drained", meanwhile)
    assert not (await plane.reconciler.compare("acme")).complete
    assert await plane.counted() == {"acme-month": (60, 0)}


async def test_under_load_nothing_drifts_and_every_change_of_a_budget_ends_exact(plane):
    """Calls of every kind run while budgets are made, changed and compared; whatever the moment, the sums are exact."""
    await plane.make_tenant(limit_nanos=10**12)
    chance, calls = random.Random(7), 0
    stopping = asyncio.Event()

    async def caller(number):
        nonlocal calls
        while not stopping.is_set():
            calls += 1
            operation_id = f"op-{number}-{calls}"
            handoff = await plane.hold(operation_id)
            if not hasattr(handoff, "facts"):
                continue  # its record was changed meanwhile
            await asyncio.sleep(chance.random() / 50)
            end = chance.choice([End.CONFIRMED, End.CONFIRMED, End.ESTIMATED, End.RELEASED])
            amount_nanos = 0 if end is End.RELEASED else chance.randrange(150)
            await plane.counters.settle(a_settlement(handoff, amount_nanos, end), now_ms=now_ms())
            if end is End.ESTIMATED:
                await plane.counters.settle(a_settlement(handoff, 33), now_ms=now_ms())

    async def repeat(job, pause):
        while not stopping.is_set():
            await job.run_once()
            await asyncio.sleep(pause)

    job = the_job(plane)
    running = [asyncio.create_task(caller(number)) for number in range(8)]
    running += [asyncio.create_task(repeat(plane.drain(), 0.02)), asyncio.create_task(repeat(job, 0.05))]
    for number, window in enumerate((WindowKind.DAY, WindowKind.LIFETIME, WindowKind.ROLLING, WindowKind.YEAR)):
        rolling = {"rolling_ms": 86_400_000} if window is WindowKind.ROLLING else {}
        await plane.make_budget(f"b{number}", window=window, limit_nanos=10**12, **rolling)
        await plane.publisher.publish("acme")
        await asyncio.sleep(0.3)
        await plane.budgets.update("acme-month", {"zone": chance.choice(["UTC", "Asia/Kathmandu"])}, actor="a")
        await plane.publisher.publish("acme")
        await asyncio.sleep(0.3)
    stopping.set()
    await asyncio.gather(*running)
    await drain_all(plane)
    await job.run_once()
    await job.run_once()
    ledger = await plane.in_ledger()
    assert calls > 200
    assert ledger > 0
    assert {spec.seeding for spec in (await plane.counters.load_tenant("acme")).budgets} == {False}
    assert set((await plane.counted()).values()) == {(ledger, 0)}
    assert plane.reconciler._metrics.drifted._value.get() == 0
    assert isinstance(await plane.hold("op-last", key_id=KEY_ID), object)
