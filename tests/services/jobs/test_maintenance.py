from prometheus_client import CollectorRegistry

from budgetguard.adapters.postgres.journal import forget_request_ids
from budgetguard.adapters.postgres.maintenance import MaintenanceRepository
from budgetguard.adapters.postgres.refusals import RefusalRepository
from budgetguard.core.attempts import RefusalFilter, RefusedCall
from control_plane.jobs.expire_holds import ExpireHolds
from control_plane.jobs.maintain_ledger import MaintainLedger
from control_plane.jobs.watch_alarms import AlarmMetrics, WatchAlarms
from tests.plugins.attempts import an_attempt
from tests.plugins.usage_events import a_delivery, milliseconds
from tests.services.jobs.conftest import now_ms


async def test_partitions_are_made_ahead_and_rows_without_one_are_an_alarm(plane, database, owner, caplog):
    registry = CollectorRegistry()
    metrics = AlarmMetrics(registry)
    job = MaintainLedger(MaintenanceRepository(database), RefusalRepository(database), metrics=metrics)
    watch = WatchAlarms(plane.ledger, metrics=metrics)

    def alarm(kind: str) -> float | None:
        return registry.get_sample_value("budgetguard_ledger_alarms", {"kind": kind})

    await job.run_once()
    await watch.run_once()
    assert alarm("default_partition_rows") == 0
    assert "alarm=" not in caplog.text
    await plane.ledger.insert_events([a_delivery("op", held_at_ms=milliseconds("2001-01-01T00:00:00"))])
    newest = await owner.fetchval(
        "SELECT max(relname) FROM pg_class WHERE relname ~ '^usage_ledger_[0-9]{4}_[0-9]{2}$'"
    )
    await owner.execute(f"DROP TABLE {newest}")
    year, month = map(int, newest.removeprefix("usage_ledger_").split("_"))
    await plane.ledger.insert_events([a_delivery("op", held_at_ms=milliseconds(f"{year}-{month:02d}-15T00:00:00"))])
    await job.run_once()
    await watch.run_once()
    assert alarm("default_partition_rows") == 2
    assert alarm("blocked_partitions") == 1
    assert "alarm=default_partition_rows count=2" in caplog.text
    assert "alarm=blocked_partitions" in caplog.text
    await owner.execute("SELECT rehome_ledger_default()")
    await job.run_once()
    await watch.run_once()
    assert (alarm("default_partition_rows"), alarm("blocked_partitions")) == (0, 0)


async def test_an_alarm_is_logged_when_it_changes(plane, caplog):
    registry = CollectorRegistry()
    watch = WatchAlarms(plane.ledger, metrics=AlarmMetrics(registry))
    for number, logged in ((1, ["count=1"]), (1, ["count=1"]), (2, ["count=1", "count=2"])):
        await plane.ledger.insert_events([a_delivery("op", event_id=f"{number}-0", model="\x00")])
        assert not await watch.run_once()
        assert registry.get_sample_value("budgetguard_ledger_alarms", {"kind": "dead_events"}) == number
        alarms = [record.getMessage() for record in caplog.records if record.getMessage().startswith("alarm=")]
        assert alarms == [f"alarm=dead_events {count}" for count in logged]


async def test_old_refusals_are_dropped_in_parts(database, caplog):
    caplog.set_level("INFO")
    refusals = RefusalRepository(database)
    job = MaintainLedger(MaintenanceRepository(database), refusals, metrics=AlarmMetrics(CollectorRegistry()))
    old, young = an_attempt("old", refused_at_ms=now_ms() - 91 * 86_400_000), an_attempt("y", refused_at_ms=now_ms())
    await refusals.record([(7, a.operation_id, RefusedCall(attempt=a, number=1)) for a in (old, young)], [])
    assert await job.run_once(), "there may be more"
    assert "refusals_forgotten=1" in caplog.text
    assert not await job.run_once()
    assert [row.attempt for row in (await refusals.list(RefusalFilter())).items] == [young]


async def test_request_ids_are_forgotten_in_the_end(plane, database, owner):
    for number in range(3):
        await plane.tenants.create(actor="a", tenant_id=f"t{number}", name="t", request_id=f"r{number}")
    await owner.execute("UPDATE request_ids SET created_at = now() - interval '8 days' WHERE request_id <> 'r2'")
    assert await MaintenanceRepository(database).forget_request_ids() == 2
    assert await owner.fetchval("SELECT request_id FROM request_ids") == "r2"
    async with database.transaction() as connection:
        assert await forget_request_ids(connection) == 0


async def test_a_hold_nobody_ends_counts_whole_after_its_lease(plane):
    await plane.make_tenant()
    await plane.hold("op-1", nanos=100)
    await plane.hold("op-2", nanos=50)
    assert not await ExpireHolds(plane.counters, now_ms=now_ms).run_once()
    assert await plane.counted() == {"acme-month": (0, 150)}
    later_ms = now_ms() + 10 * 60_000
    await ExpireHolds(plane.counters, now_ms=lambda: later_ms).run_once()
    assert await plane.counted() == {"acme-month": (150, 0)}
