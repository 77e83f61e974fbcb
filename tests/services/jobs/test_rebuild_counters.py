import asyncio

import pytest

from budgetguard.adapters.postgres.pool import open_database
from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.keys import SHARDS, shard_of
from budgetguard.core.budget import NotReady, Refusal
from budgetguard.core.operation import End
from budgetguard.core.snapshot import SubjectKind, WindowKind
from control_plane.jobs.expire_holds import ExpireHolds
from tests.plugins.redis_calls import a_settlement, live_holds
from tests.services.jobs.conftest import KEY_ID, Plane, now_ms

ACME = shard_of("acme")


async def drain_all(plane) -> None:
    job = plane.drain()
    while await job.run_once():
        pass


@pytest.fixture
async def spent(plane):
    """A tenant with three budgets, six drained calls and a live hold."""
    await plane.make_tenant()
    await plane.make_budget("day", window=WindowKind.DAY)
    await plane.make_budget("mine", subject_kind=SubjectKind.API_KEY, subject=KEY_ID, window=WindowKind.LIFETIME)
    await plane.publisher.publish("acme")
    plane.handoffs = [await plane.call(f"op-{number}", 10 + number) for number in range(6)]
    plane.held = await plane.hold("op-held", nanos=100)
    await drain_all(plane)
    return plane


async def test_a_new_installation_is_ready_after_one_run(database, redis):
    plane = Plane(database, redis)
    await plane.make_tenant()
    assert (await plane.hold("too-early")).kind is Refusal.NOT_READY
    await plane.rebuild.run_once()
    run_id = await plane.epoch.run_id()
    assert set((await plane.epoch.signed_off(range(SHARDS))).values()) == {run_id}
    assert (await plane.call("op-1", 60)).hold_nanos == 100


async def test_an_empty_redis_gets_back_exactly_what_was_spent(spent):
    before = await spent.counted()
    assert before["day"] == (sum(range(10, 16)), 100)
    await spent.redis.command("FLUSHALL")
    assert isinstance(await spent.counters.settle(a_settlement(spent.held, 50), now_ms=now_ms()), NotReady)
    await spent.rebuild.run_once()
    assert await spent.counted() == {budget: (amount, 0) for budget, (amount, _) in before.items()}
    assert await spent.counters.load_tenant("acme") == await spent.tenants.snapshot("acme")
    # The call that was under way still ends, and is charged; what had ended is not charged again.
    await spent.counters.settle(a_settlement(spent.held, 50), now_ms=now_ms())
    for number, handoff in enumerate(spent.handoffs):
        await spent.counters.settle(a_settlement(handoff, 10 + number), now_ms=now_ms())
    assert {amount for amount, _ in (await spent.counted()).values()} == {75 + 50}
    await drain_all(spent)
    assert await spent.in_ledger() == 75 + 50


@pytest.mark.parametrize("lost", ["all", "the last calls"])
async def test_what_was_rebuilt_agrees_with_the_ledger_from_then_on(spent, lost):
    """Of a stream that lost what the ledger has, the events would be numbered below it: then sums would lack rows."""
    if lost == "all":
        await spent.redis.command("FLUSHALL")
    else:  # as from an older file: the stream ends earlier, some counters are of that moment
        stream = keys.usage(ACME)
        await spent.redis.command("DEL", stream)
        await spent.redis.command("XADD", stream, "1-1", "facts", "{}")
        await spent.redis.command("XDEL", stream, "1-1")
        await spent.redis.command("XGROUP", "CREATE", stream, "ledger", "$")
        await spent.redis.command("DEL", keys.epoch(ACME))
    await spent.rebuild.run_once()
    before = await spent.counted()
    assert before["day"][0] == sum(range(10, 16))
    assert (await spent.reconciler.compare("acme")).drifted == 0
    assert await spent.counted() == before
    # So it stays, with new events, and for a process that looks at all of it again.
    await spent.call("op-after", 40)
    await drain_all(spent)
    comparison = await Plane(spent.database, spent.redis).reconciler.compare("acme")
    assert (comparison.complete, comparison.drifted) == (True, 0)
    assert (await spent.counted())["day"][0] == before["day"][0] + 40 == await spent.in_ledger()
    # And the next sign-off finds nothing to rebuild.
    await spent.redis.command("DEL", keys.epoch(ACME))
    assert await spent.rebuild._has_all(ACME, await spent.ledger.positions())


async def test_a_rebuild_that_is_killed_is_begun_again(spent, monkeypatch):
    """Until every counter is written, the shard must look as lost as it is."""
    before = await spent.counted()
    await spent.redis.command("FLUSHALL")

    async def killed(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(spent.rebuild, "_rebuild_tenant", killed)
    with pytest.raises(RuntimeError):
        await spent.rebuild.run_once()
    monkeypatch.undo()
    await spent.rebuild.run_once()
    assert await spent.counted() == {budget: (amount, 0) for budget, (amount, _) in before.items()}


async def test_a_stream_that_is_behind_the_ledger_is_not_compared(spent):
    """Whatever made it so: nothing may be taken from a counter by a sum that lacks rows."""
    before = await spent.counted()
    await spent.redis.command("DEL", keys.usage(ACME))
    comparison = await spent.reconciler.compare("acme")
    assert (comparison.complete, comparison.drifted) == (False, 0)
    assert await spent.counted() == before


async def test_a_restarted_redis_with_its_data_is_signed_off_as_it_is(database, own_redis_server):
    await own_redis_server.wait_until_ready()
    client = RedisClient(own_redis_server.url, timeout_seconds=10)
    plane = Plane(database, client)
    await plane.rebuild.run_once()
    await plane.make_tenant()
    await plane.call("op-drained", 60)
    await drain_all(plane)
    held = await plane.hold("op-held", nanos=100)
    await plane.call("op-undrained", 7)
    await own_redis_server.wait_until_written()
    own_redis_server.kill()
    own_redis_server.start()
    await own_redis_server.wait_until_ready()
    assert isinstance(await plane.counters.settle(a_settlement(held, 50), now_ms=now_ms()), NotReady)
    await plane.rebuild.run_once()
    assert await plane.counted() == {"acme-month": (67, 100)}
    await plane.counters.settle(a_settlement(held, 50), now_ms=now_ms())
    await drain_all(plane)
    assert await plane.in_ledger() == 117
    assert await plane.counted() == {"acme-month": (117, 0)}
    await client.close()


async def test_a_redis_rolled_back_in_time_is_brought_to_the_ledgers_state(spent):
    """As from an old backup: an older stream, counters that know less, and a hold that has ended since."""
    saved = [key for key in await spent.redis.command("KEYS", "*") if not key.endswith(":usage")]
    for key in saved:
        await spent.redis.command("COPY", key, f"saved:{key}")
    await spent.counters.settle(a_settlement(spent.held, 70), now_ms=now_ms())
    await spent.call("op-later", 5)
    await drain_all(spent)
    ledger = await spent.in_ledger()
    for key in await spent.redis.command("KEYS", "bg:*"):
        await spent.redis.command("DEL", key)
    for key in saved:
        if not key.endswith(":epoch"):
            await spent.redis.command("RENAME", f"saved:{key}", key)
    assert (await spent.counted())["day"] == (75, 100)
    await spent.rebuild.run_once()
    assert ledger == 75 + 70 + 5
    assert set((await spent.counted()).values()) == {(ledger, 0)}
    assert await live_holds(spent.counters, "acme") == (0, 0)


async def test_undrained_events_of_a_stream_that_fell_behind_are_not_lost(spent, owner):
    await spent.call("op-undrained", 9)
    other_worker = await spent.events.read([ACME], consumer="stuck", count=10)
    assert len(other_worker) == 1
    await spent.call("op-undrained-2", 4)
    await owner.execute("UPDATE drain_positions SET stream_ms = stream_ms + 1000000")
    await spent.epoch.begin_rebuild(ACME)
    await spent.rebuild.run_once()
    assert await spent.in_ledger() == 75 + 13
    assert {amount for amount, _ in (await spent.counted()).values()} == {75 + 13}
    assert (await spent.events.backlog([ACME]))[ACME] == 0
    assert (await spent.counted())["day"][1] == 100, "the live hold stays"


async def test_a_late_word_on_a_rebuilt_expiry_posts_the_difference(spent):
    late_ms = now_ms() + 10 * 60_000
    await ExpireHolds(spent.counters, now_ms=lambda: late_ms).run_once()
    await drain_all(spent)
    assert await spent.in_ledger() == 75 + 100
    await spent.redis.command("FLUSHALL")
    await spent.rebuild.run_once()
    assert {amount for amount, _ in (await spent.counted()).values()} == {175}
    settled = await spent.counters.settle(a_settlement(spent.held, 40, End.CONFIRMED), now_ms=now_ms())
    assert settled.amount_nanos == 40
    assert {amount for amount, _ in (await spent.counted()).values()} == {115}
    await drain_all(spent)
    assert await spent.in_ledger() == 115


async def test_a_deleted_tenant_needs_no_counters(spent):
    await spent.tenants.delete("acme", actor="a")
    await spent.redis.command("FLUSHALL")
    await spent.rebuild.run_once()
    assert (await spent.counters.load_tenant("acme")).status.value == "DELETED"
    assert await spent.redis.command("KEYS", "*counter*") == []


async def test_two_control_planes_rebuild_without_each_others_harm(spent, migrated_database):
    second_database = await open_database(migrated_database.app_url)
    second = Plane(second_database, spent.redis)
    await spent.redis.command("FLUSHALL")
    await asyncio.gather(spent.rebuild.run_once(), second.rebuild.run_once())
    await second.rebuild.run_once()
    assert {amount for amount, _ in (await spent.counted()).values()} == {75}
    assert (await spent.hold("op-after")).hold_nanos == 100
    await second_database.close()


async def test_while_another_rebuilds_it_waits(spent):
    await spent.redis.command("FLUSHALL")
    async with spent.database.exclusive("rebuild_counters"):
        await spent.rebuild.run_once()
        assert set((await spent.epoch.signed_off(range(SHARDS))).values()) == {None}
    await spent.rebuild.run_once()
    assert None not in (await spent.epoch.signed_off(range(SHARDS))).values()


async def test_a_sign_off_for_a_process_that_is_gone_opens_nothing(spent):
    await spent.redis.command("FLUSHALL")
    await spent.epoch.sign_off(ACME, "0" * 40)
    await spent.publisher.sweep()
    assert (await spent.hold("op-x")).kind is Refusal.NOT_READY


async def test_an_unsafe_redis_is_an_alarm(plane, caplog):
    await plane.redis.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        await plane.redis.command("DEL", keys.epoch(1))
        await plane.rebuild.run_once()
        assert "alarm=redis_settings" in caplog.text
    finally:
        await plane.redis.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
