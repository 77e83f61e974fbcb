import asyncpg
import pytest

from tests.plugins.usage_events import milliseconds

LONG_AGO = milliseconds("2001-02-03T04:05:06")
CHANGES = [
    "UPDATE usage_ledger SET delta_nanos = 0",
    "UPDATE usage_ledger SET held_at = held_at + interval '2 months'",
    "DELETE FROM usage_ledger",
    "TRUNCATE usage_ledger",
]


UPSERT = (
    "INSERT INTO usage_ledger SELECT * FROM usage_ledger "
    "ON CONFLICT (held_at, operation_id, rank, sequence) DO UPDATE SET detail = 'x'"
)


async def partitions(connection) -> list[str]:
    rows = await connection.fetch(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = 'usage_ledger'::regclass"
    )
    return [row["name"] for row in rows]


@pytest.mark.parametrize(
    "change",
    [
        *CHANGES,
        UPSERT,
    ],
)
async def test_the_programs_role_may_not_change_a_row(app, ledger_row, change):
    await ledger_row()
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await app.execute(change)


@pytest.mark.parametrize("change", CHANGES)
async def test_not_even_the_owner_changes_a_row(owner, ledger_row, change):
    await ledger_row()
    with pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
        await owner.execute(change)
    assert await owner.fetchval("SELECT sum(delta_nanos) FROM usage_ledger") == 100


async def test_no_partition_can_be_changed_directly(owner, ledger_row):
    await owner.execute("SELECT make_ledger_partition(date '2001-01-15')")
    names = await partitions(owner)
    assert {"usage_ledger_2001_01", "usage_ledger_default"} < set(names)
    await ledger_row("in-default", held_at_ms=LONG_AGO)
    await ledger_row("in-made-later", held_at_ms=milliseconds("2001-01-31T23:59:59"))
    await ledger_row("now")
    filled = [name for name in names if await owner.fetchval(f"SELECT count(*) FROM {name}")]
    assert len(filled) == 3
    for name in names:
        with pytest.raises(asyncpg.RestrictViolationError):
            await owner.execute(f"TRUNCATE {name}")
    for name in filled:
        for change in (f"UPDATE {name} SET detail = 'x'", f"DELETE FROM {name}"):
            with pytest.raises(asyncpg.RestrictViolationError):
                await owner.execute(change)


async def test_claiming_to_be_a_replica_does_not_help(owner, ledger_row):
    await owner.execute("SELECT make_ledger_partition(date '2001-02-15')")
    await ledger_row(held_at_ms=LONG_AGO)
    await owner.execute("SET session_replication_role = replica")
    for change in (*CHANGES, "TRUNCATE usage_ledger_2001_02", "DELETE FROM usage_ledger_2001_02"):
        with pytest.raises(asyncpg.RestrictViolationError):
            await owner.execute(change)


async def test_the_audit_is_append_only_too(owner, app):
    await app.execute("INSERT INTO admin_audit (actor, action, kind, resource_id) VALUES ('a', 'b', 'c', 'd')")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await app.execute("DELETE FROM admin_audit")
    for change in ("UPDATE admin_audit SET actor = 'x'", "DELETE FROM admin_audit", "TRUNCATE admin_audit"):
        with pytest.raises(asyncpg.RestrictViolationError):
            await owner.execute(change)


async def test_rows_without_a_partition_are_kept_alarmed_and_rehomed(owner, ledger, ledger_row):
    await ledger_row("lost-1", held_at_ms=LONG_AGO)
    await ledger_row("lost-2", held_at_ms=milliseconds("2001-03-01T00:00:00"))
    assert (await ledger.alarms())["default_partition_rows"] == 2
    assert await owner.fetchval("SELECT make_ledger_partition(date '2001-02-01')") == "blocked"
    before = await owner.fetch("SELECT * FROM usage_ledger ORDER BY operation_id")
    assert await owner.fetchval("SELECT rehome_ledger_default()") == 2
    assert await owner.fetch("SELECT * FROM usage_ledger ORDER BY operation_id") == before
    assert (await ledger.alarms())["default_partition_rows"] == 0
    assert await owner.fetchval("SELECT count(*) FROM usage_ledger_2001_02") == 1
    assert await owner.fetchval("SELECT count(*) FROM usage_ledger_2001_03") == 1
    # The new DEFAULT partition is as guarded as the old one.
    await ledger_row("lost-3", held_at_ms=milliseconds("1999-01-01T00:00:00"))
    for change in ("TRUNCATE usage_ledger_default", "DELETE FROM usage_ledger_default"):
        with pytest.raises(asyncpg.RestrictViolationError):
            await owner.execute(change)


async def test_the_programs_role_makes_partitions_ahead_but_no_other_ones(app, owner):
    rows = await app.fetch("SELECT * FROM make_ledger_partitions(6)")
    assert [row["outcome"] for row in rows][-1] == "made"
    assert len(rows) == 8
    assert {row["outcome"] for row in await app.fetch("SELECT * FROM make_ledger_partitions(6)")} == {"exists"}
    for forbidden in ("SELECT make_ledger_partition(now()::date)", "SELECT rehome_ledger_default()"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.execute(forbidden)
    with pytest.raises(asyncpg.RaiseError, match="expected 0 to 24"):
        await app.execute("SELECT make_ledger_partitions(25)")
    for number in (None, -1):
        with pytest.raises(asyncpg.RaiseError):
            await app.execute("SELECT make_ledger_partitions($1)", number)
    newest = f"usage_ledger_{rows[-1]['month']:%Y_%m}"
    with pytest.raises(asyncpg.RestrictViolationError):
        await owner.execute(f"TRUNCATE {newest}")


async def test_months_begin_in_utc_whatever_the_session_says(owner, ledger_row):
    await owner.execute("SET timezone = 'Pacific/Kiritimati'")
    await owner.execute("SELECT make_ledger_partition(date '2001-01-01')")
    await ledger_row("last-of-january", held_at_ms=milliseconds("2001-01-31T23:59:59.999"))
    await ledger_row("first-of-february", held_at_ms=milliseconds("2001-02-01T00:00:00"))
    assert await owner.fetchval("SELECT operation_id FROM usage_ledger_2001_01") == "last-of-january"
    assert await owner.fetchval("SELECT operation_id FROM usage_ledger_default") == "first-of-february"
