"""Calls of which an event became no row, on real counters and a real ledger: no end of it gives budget away."""

import pytest

from budgetguard.adapters.postgres.audit_trail import AuditTrail
from budgetguard.adapters.postgres.dead_events import DeadEventRepository
from budgetguard.adapters.postgres.ledger_reader import LedgerReader
from budgetguard.adapters.redis import keys
from budgetguard.core.dead_events import DeadEventFilter
from budgetguard.core.operation import End
from budgetguard.v1 import dead_event_pb2
from control_plane.corrections import Corrections
from control_plane.services.dead_events import DeadEventService
from tests.plugins.redis_calls import a_settlement
from tests.services.jobs.conftest import now_ms


async def drain_all(plane) -> None:
    while await plane.drain().run_once():
        pass


async def ended(plane, end: str) -> None:
    """End the only dead event by the service, as an administrator does."""
    dead_events = DeadEventRepository(plane.database)
    (dead,) = (await dead_events.list(DeadEventFilter())).items
    service = DeadEventService(events=dead_events, counting=plane.reconciler)
    if end == "retry":
        await service.RetryDeadEvent(dead_event_pb2.RetryDeadEventRequest(dead_event_id=dead.dead_event_id), None)
        return
    request = dead_event_pb2.DiscardDeadEventRequest(dead_event_id=dead.dead_event_id, reason="never billed")
    await service.DiscardDeadEvent(request, None)


@pytest.fixture
async def handoff(plane, owner):
    """A call beside another one of 7: it expired at 100, which the ledger refuses."""
    await plane.make_tenant()
    await plane.call("op-other", 7)
    await owner.execute("ALTER TABLE usage_ledger ADD CONSTRAINT refusing CHECK (end_state <> 'EXPIRED') NOT VALID")
    handoff = await plane.hold("op-1", nanos=100)
    await plane.counters.settle(a_settlement(handoff, 100, End.EXPIRED), now_ms=now_ms())
    await drain_all(plane)
    assert (await plane.counted(), await plane.in_ledger()) == ({"acme-month": (107, 0)}, 7)
    return handoff


async def confirm(plane, handoff) -> None:
    await plane.counters.settle(a_settlement(handoff, 40), now_ms=now_ms())
    await drain_all(plane)


@pytest.mark.parametrize("end", ["retry", "discard"])
async def test_a_call_that_was_confirmed_meanwhile_costs_what_was_confirmed(plane, owner, handoff, end):
    await confirm(plane, handoff)
    assert (await plane.counted(), await plane.in_ledger()) == ({"acme-month": (47, 0)}, 7 - 60)
    if end == "retry":
        await owner.execute("ALTER TABLE usage_ledger DROP CONSTRAINT refusing")
    await ended(plane, end)
    assert (await plane.counted(), await plane.in_ledger()) == ({"acme-month": (47, 0)}, 47)
    assert (await plane.reconciler.compare("acme")).drifted == 0
    assert await owner.fetchval("SELECT count(*) FROM admin_audit WHERE kind = 'counter'") == 0
    # As it does after Redis lost everything.
    await plane.redis.command("FLUSHALL")
    await plane.rebuild.run_once()
    assert await plane.counted() == {"acme-month": (47, 0)}


async def test_a_call_that_is_confirmed_after_the_discard_costs_what_was_confirmed(plane, handoff):
    await ended(plane, "discard")
    assert (await plane.counted(), await plane.in_ledger()) == ({"acme-month": (7, 0)}, 7)
    await confirm(plane, handoff)  # Redis tells the difference to what it had counted
    assert await plane.in_ledger() == 47
    await plane.reconciler.compare("acme")
    assert await plane.counted() == {"acme-month": (47, 0)}


async def test_a_call_that_its_discarded_event_did_not_tell_is_set_right_by_a_correction(plane, owner):
    await plane.make_tenant()
    shard, handoff = keys.shard_of("acme"), await plane.hold("op-1", nanos=100)
    await plane.counters.settle(a_settlement(handoff, 100, End.EXPIRED), now_ms=now_ms())
    ((entry, _),) = await plane.redis.command("XRANGE", keys.usage(shard), "-", "+")
    await plane.redis.command("XDEL", keys.usage(shard), entry)
    await plane.redis.command("XADD", keys.usage(shard), "*", "facts", '{"tenant_id":"acme"}')
    await confirm(plane, handoff)
    await ended(plane, "discard")
    assert await plane.in_ledger() == -60
    # As a quarter of an hour after its end: until then Redis tells the difference to what it has counted.
    await plane.redis.command("DEL", keys.operation("acme", "op-1"))

    class Drained:
        async def ledger_has_all(self, _tenant_id):
            await drain_all(plane)
            return True

        async def follow(self, tenant_id):
            return await plane.reconciler.follow(tenant_id)

    corrections = Corrections(
        ledger=LedgerReader(plane.database),
        counting=Drained(),
        counters=plane.counters,
        audit=AuditTrail(plane.database),
        now_ms=now_ms,
    )
    await corrections.correct_one("op-1", amount_nanos=40, reason="as confirmed", actor="a")
    assert (await plane.counted(), await plane.in_ledger()) == ({"acme-month": (40, 0)}, 40)


@pytest.mark.parametrize(
    ("confirmed", "end", "rebuilt", "right"),
    [(False, "retry", 7, 107), (False, "discard", 7, 7), (True, "retry", 7 - 60, 47), (True, "discard", 7 - 60, 47)],
)
async def test_a_rebuild_lacks_what_stands_until_it_is_ended(plane, owner, handoff, confirmed, end, rebuilt, right):
    if confirmed:
        await confirm(plane, handoff)
    await plane.redis.command("FLUSHALL")
    await plane.rebuild.run_once()
    assert await plane.counted() == {"acme-month": (rebuilt, 0)}
    if end == "retry":
        await owner.execute("ALTER TABLE usage_ledger DROP CONSTRAINT refusing")
    await ended(plane, end)
    assert (await plane.counted(), await plane.in_ledger()) == ({"acme-month": (right, 0)}, right)
