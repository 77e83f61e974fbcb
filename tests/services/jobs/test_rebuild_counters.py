import asyncio

import pytest

from budgetguard.adapters.postgres.pool import open_database
from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.keys import SHARDS, shard_of
from budgetguard.core.budget import NotReady, Refusal
from budgetguard.core.operation import End
from budgetguard.core.shard import SignOff
from budgetguard.core.snapshot import SubjectKind, WindowKind
from control_plane.jobs.expire_holds import ExpireHolds
from tests.plugins.redis_calls import a_settlement, live_holds
from tests.plugins.redis_server import close_shards
from tests.plugins.usage_events import a_delivery
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
    opening = await close_shards(spent.redis, [ACME])
    position = (await spent.ledger.positions())[ACME]
    assert await spent.epoch.sign_off(opening, ACME, position=position) is SignOff.OPENED


async def test_a_rebuild_that_is_killed_is_begun_again(spent, monkeypatch):
    """Until every counter is written, the shard must look as lost as it is."""
    before = await spent.counted()
    await spent.redis.command("FLUSHALL")

    async def killed(*_):
        raise asyncio.CancelledError

    monkeypatch.setattr(spent.rebuild, "_rebuild_tenant", killed)
    with pytest.raises(asyncio.CancelledError):
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
    saved = await spent.save()
    await spent.counters.settle(a_settlement(spent.held, 70), now_ms=now_ms())
    await spent.call("op-later", 5)
    await drain_all(spent)
    ledger = await spent.in_ledger()
    await spent.put_back(saved)
    assert (await spent.counted())["day"] == (75, 100)
    await spent.rebuild.run_once()
    assert ledger == 75 + 70 + 5
    assert set((await spent.counted()).values()) == {(ledger, 0)}
    assert await live_holds(spent.counters, "acme") == (0, 0)


HOUR_MS = 3_600_000


async def test_a_hold_that_an_old_backup_revives_is_dropped_however_long_ago_it_ended(spent):
    saved = await spent.save()
    await spent.counters.settle(a_settlement(spent.held, 70), now_ms=now_ms())
    await drain_all(spent)
    await spent.put_back(saved)
    assert (await spent.counted())["mine"] == (75, 100)
    later_ms = now_ms() + 30 * HOUR_MS
    await spent.rebuilding(now_ms=lambda: later_ms).run_once()
    assert (await spent.counted())["mine"] == (75 + 70, 0)
    assert await live_holds(spent.counters, "acme") == (0, 0)
    # Nothing is left that could expire, and what is sent again is known.
    await ExpireHolds(spent.counters, now_ms=lambda: later_ms).run_once()
    await spent.counters.settle(a_settlement(spent.held, 70), now_ms=now_ms())
    await drain_all(spent)
    assert (await spent.counted())["mine"] == (75 + 70, 0)
    assert await spent.in_ledger() == 75 + 70


async def test_a_live_hold_stays_whatever_another_operation_of_its_name_has_cost(spent):
    long_ago_ms = now_ms() - 30 * HOUR_MS
    namesake = a_delivery("op-held", shard=ACME, tenant_id="acme", key_id=KEY_ID, held_at_ms=long_ago_ms, delta_nanos=3)
    await spent.ledger.insert_events([(ACME, f"{now_ms() + 10**6}-0", namesake[2])])
    await close_shards(spent.redis, [ACME])
    await spent.rebuild.run_once()
    assert (await spent.counted())["mine"] == (75 + 3, 100)
    assert await live_holds(spent.counters, "acme") == (1, 100)
    await spent.counters.settle(a_settlement(spent.held, 50), now_ms=now_ms())
    assert (await spent.counted())["mine"] == (75 + 3 + 50, 0)


async def test_an_end_that_was_recorded_lately_is_remembered_however_long_ago_it_was(spent):
    """It waited in a spool while Redis was away, came in, and was lost with Redis' last writes."""
    held_at_ms = spent.held.facts.held_at_ms
    await ExpireHolds(spent.counters, now_ms=lambda: held_at_ms + 120_000).run_once()
    await drain_all(spent)
    saved = await spent.save()
    ended_at_ms = now_ms() - 17 * 60_000
    await spent.counters.settle(a_settlement(spent.held, 40, ended_at_ms=ended_at_ms), now_ms=now_ms())
    await drain_all(spent)
    assert await spent.in_ledger() == 75 + 40
    await spent.put_back(saved)
    await spent.rebuild.run_once()
    assert set((await spent.counted()).values()) == {(75 + 40, 0)}
    # A lower word that comes after all changes nothing.
    await spent.counters.settle(a_settlement(spent.held, 99, End.ESTIMATED), now_ms=now_ms())
    await drain_all(spent)
    assert set((await spent.counted()).values()) == {(75 + 40, 0)}
    assert await spent.in_ledger() == 75 + 40


async def open_shards(plane) -> set[int]:
    run_id = await plane.epoch.run_id()
    return {shard for shard, signed in (await plane.epoch.signed_off(range(SHARDS))).items() if signed == run_id}


async def test_a_tenant_whose_sums_take_too_long_keeps_no_other_closed(spent, slow_tenants):
    await spent.make_tenant("slow", key_id="s" * 16)
    await spent.call("op-slow", 40, tenant_id="slow", key_id="s" * 16)
    await spent.make_tenant("other", key_id="o" * 16)
    await spent.call("op-other", 30, tenant_id="other", key_id="o" * 16)
    await drain_all(spent)
    slow, clock = shard_of("slow"), [0.0]
    assert slow < max(ACME, shard_of("other")), "so that others come after it"
    await spent.redis.command("FLUSHALL")
    await slow_tenants("slow")
    rebuild = spent.rebuilding(sum_seconds=3.0, clock=lambda: clock[0])
    await rebuild.run_once()
    assert await open_shards(spent) == set(range(SHARDS)) - {slow}
    assert {amount for amount, _ in (await spent.counted()).values()} == {75}
    assert await spent.counted("other") == {"other-month": (30, 0)}
    # Not on counters that are not true.
    assert (await spent.hold("op-1", tenant_id="slow", key_id="s" * 16)).kind is Refusal.NOT_READY
    # It is not tried in vain all the time, but in time.
    await slow_tenants()
    await rebuild.run_once()
    assert slow not in await open_shards(spent)
    clock[0] = 1.0
    await rebuild.run_once()
    assert await open_shards(spent) == set(range(SHARDS))
    assert await spent.counted("slow") == {"slow-month": (40, 0)}


async def test_what_is_right_is_open_before_anything_is_rebuilt(spent, slow_tenants):
    """Also when what must be rebuilt is so much that the run gives up."""
    names = [f"slow-{number}" for number in range(4)]
    for number, name in enumerate(names):
        await spent.make_tenant(name, key_id=f"{number:016}")
        await spent.call(f"op-{name}", tenant_id=name, key_id=f"{number:016}")
    await drain_all(spent)
    behind = {shard_of(name) for name in names}
    assert len(behind) == 4
    for shard in range(SHARDS):
        await spent.redis.command("DEL", keys.epoch(shard), *([keys.usage(shard)] if shard in behind else []))
    await slow_tenants(*names)
    rebuild = spent.rebuilding(sum_seconds=0.3)
    with pytest.raises(RuntimeError, match="tenant slow-"):
        await rebuild.run_once()
    assert await open_shards(spent) == set(range(SHARDS)) - behind
    # The last one had no chance: now it is the first.
    await slow_tenants(*sorted(names, key=shard_of)[:3])
    await rebuild.run_once()
    assert await open_shards(spent) == set(range(SHARDS)) - set(sorted(behind)[:3])


async def test_usage_that_comes_from_the_redis_of_before_meanwhile_keeps_its_shard_closed(spent, monkeypatch):
    """A worker may have taken events from Redis before it lost them, and write them while the shards are looked at."""
    await spent.redis.command("DEL", keys.epoch(ACME))
    sweep = spent.publisher.sweep

    async def meanwhile():
        late = a_delivery("op-late", tenant_id="acme", key_id=KEY_ID, held_at_ms=now_ms(), delta_nanos=9)
        await spent.ledger.insert_events([(ACME, f"{now_ms() + 10**6}-0", late[2])])
        return await sweep()

    monkeypatch.setattr(spent.publisher, "sweep", meanwhile)
    await spent.rebuild.run_once()
    assert set((await spent.counted()).values()) == {(75 + 9, 100)}
    assert ACME in await open_shards(spent)


async def test_a_rebuild_s_sums_may_take_two_minutes(spent, rows_seen_if):
    before = await spent.counted()
    await spent.redis.command("FLUSHALL")
    await rows_seen_if("current_setting('statement_timeout') = '2min'")
    await spent.rebuild.run_once()
    assert await spent.counted() == {budget: (amount, 0) for budget, (amount, _) in before.items()}
    # Ends were found too: what is sent again is known.
    await spent.counters.settle(a_settlement(spent.handoffs[0], 10), now_ms=now_ms())
    assert await spent.counted() == {budget: (amount, 0) for budget, (amount, _) in before.items()}


async def test_undrained_events_of_a_stream_that_fell_behind_are_not_lost(spent, owner):
    await spent.call("op-undrained", 9)
    other_worker = await spent.events.read([ACME], consumer="stuck", count=10)
    assert len(other_worker) == 1
    await spent.call("op-undrained-2", 4)
    await owner.execute("UPDATE drain_positions SET stream_ms = stream_ms + 1000000")
    await close_shards(spent.redis, [ACME])
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
    opening = await spent.epoch.begin_opening([ACME], "0" * 40)
    assert await spent.epoch.sign_off(opening, ACME, rebuilt=True) is SignOff.LOST
    assert (await spent.hold("op-x")).kind is Refusal.NOT_READY


@pytest.mark.parametrize(
    "moment", ["publish_tenant", "write_counter", "remember_ended", "the last position", "sign_off", "mark_incarnation"]
)
async def test_what_redis_loses_once_more_in_a_run_opens_nothing(spent, monkeypatch, caplog, moment):
    """FLUSHALL leaves the process as it is: only what it took with it tells."""
    before = await spent.counted()
    await spent.redis.command("FLUSHALL")
    # Of a shard's position there is a look before its rebuild and one after; the others are signed off as they are.
    owner, name, look = {
        "publish_tenant": (spent.publisher._counters, "publish_tenant", 1),
        "the last position": (spent.rebuild._sums, "position", 2),
        "sign_off": (spent.epoch, "sign_off", SHARDS + 1),
    }.get(moment, (spent.epoch, moment, 1))
    original, looks = getattr(owner, name), 0

    async def lost_meanwhile(*arguments, **more):
        nonlocal looks
        looks += 1
        if looks == look:
            await spent.redis.command("FLUSHALL")
        return await original(*arguments, **more)

    monkeypatch.setattr(owner, name, lost_meanwhile)
    await spent.rebuild.run_once()
    monkeypatch.undo()
    assert looks >= look
    assert "beginning again" in caplog.text
    assert ACME not in await open_shards(spent)
    assert await spent.counters.load_records("acme", KEY_ID) == NotReady()
    # It does not wait: nothing of its own has failed.
    await spent.rebuild.run_once()
    assert await open_shards(spent) == set(range(SHARDS))
    assert await spent.counted() == {budget: (amount, 0) for budget, (amount, _) in before.items()}
    assert await spent.counters.load_tenant("acme") == await spent.tenants.snapshot("acme")


async def test_a_shard_that_looked_whole_is_not_opened_on_the_nothing_that_is_left(spent, monkeypatch):
    await spent.redis.command("DEL", keys.epoch(ACME))
    positions = spent.ledger.positions

    async def lost_meanwhile():
        found = await positions()
        await spent.redis.command("FLUSHALL")
        return found

    monkeypatch.setattr(spent.ledger, "positions", lost_meanwhile)
    await spent.rebuild.run_once()
    monkeypatch.undo()
    assert await open_shards(spent) == set()
    await spent.rebuild.run_once()
    assert {amount for amount, _ in (await spent.counted()).values()} == {75}


async def test_an_unsafe_redis_is_an_alarm(plane, caplog):
    await plane.redis.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        await plane.redis.command("DEL", keys.epoch(1))
        await plane.rebuild.run_once()
        assert "alarm=redis_settings" in caplog.text
    finally:
        await plane.redis.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
