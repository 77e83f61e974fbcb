import asyncio
import os
import sys
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from budgetguard.adapters.postgres.migrate import APP_ROLE, downgrade, migrate

TABLES = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')"


async def test_migrating_again_changes_nothing(migrated_database, owner):
    before = await owner.fetchval(TABLES)
    await migrate(migrated_database.owner_url)
    assert await owner.fetchval(TABLES) == before


def newest_revision():
    return max(path.name[:4] for path in (Path(__file__).parents[3] / "migrations/versions").glob("0*.py"))


async def test_several_programs_may_migrate_at_once(empty_database):
    code = (
        "import asyncio, sys; from budgetguard.adapters.postgres.migrate import migrate; "
        "asyncio.run(migrate(sys.argv[1]))"
    )
    programs = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, empty_database.owner_url, stderr=asyncio.subprocess.PIPE, env=dict(os.environ)
        )
        for _ in range(3)
    ]
    for program in programs:
        _, stderr = await program.communicate()
        assert program.returncode == 0, stderr.decode()
    connection = await asyncpg.connect(empty_database.owner_url)
    try:
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == newest_revision()
    finally:
        await connection.close()


async def test_down_to_nothing_and_up_again(empty_database):
    await migrate(empty_database.owner_url)
    await downgrade(empty_database.owner_url, "base")
    connection = await asyncpg.connect(empty_database.owner_url)
    try:
        left = await connection.fetch("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")
        assert {row["relname"] for row in left} == {"alembic_version", "alembic_version_pkc"}
        functions = await connection.fetchval(
            "SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        )
        assert functions == 0
    finally:
        await connection.close()
    await migrate(empty_database.owner_url)


async def test_a_downgrade_never_loses_a_ledger(migrated_database, owner, ledger_row):
    await ledger_row()
    with pytest.raises(DBAPIError, match="downgrade refused: the usage ledger holds rows"):
        await downgrade(migrated_database.owner_url, "base")
    assert await owner.fetchval("SELECT count(*) FROM usage_ledger") == 1


@pytest.mark.parametrize("priced_model", ["", "gpt-4o-mini", "gpt-4o"])
async def test_a_downgrade_never_loses_what_a_call_was_priced_as(migrated_database, owner, priced_model):
    await owner.execute(
        """
        INSERT INTO usage_ledger (held_at, operation_id, rank, sequence, end_state, tenant_id, key_id, api, provider_id,
            model, priced_model, stream, price_version, rate_tier, delta_nanos, amount_nanos, hold_nanos, status,
            detail, ended_at, shard, event_id)
        VALUES (now(), 'op', 3, 1, 'CONFIRMED', 'acme', 'k', 'a', 'p', 'gpt-4o-mini', $1, false, 'v', 'default',
            1, 1, 1, 200, '', now(), 1, '1-0')
        """,
        priced_model,
    )
    if priced_model == "gpt-4o":
        with pytest.raises(DBAPIError, match="downgrade refused: ledger rows name"):
            await downgrade(migrated_database.owner_url, "0005")
    else:
        await downgrade(migrated_database.owner_url, "0005")
        await migrate(migrated_database.owner_url)
        assert await owner.fetchval("SELECT priced_model FROM usage_ledger") == ""


@pytest.mark.parametrize(
    "budget",
    ["true, 1, 'TENANT', 'DAY'", "false, 2, 'TENANT', 'DAY'", "false, 1, 'TAG', 'DAY'", "false, 1, 'TENANT', 'YEAR'"],
)
async def test_a_downgrade_never_makes_a_budget_another_one(migrated_database, owner, budget):
    await owner.execute(
        f"""
        INSERT INTO tenants (tenant_id, name, status, version, requests_per_minute, output_tokens_max, clamp)
        VALUES ('acme', 'x', 'ACTIVE', 1, 0, 1, true);
        INSERT INTO budgets (budget_id, tenant_id, subject, zone, mode, limit_nanos, spec_version, version, each,
            anchor_day, subject_kind, window_kind)
        VALUES ('b1', 'acme', '', 'UTC', 'ENFORCE', 1, 1, 1, {budget})
        """
    )
    with pytest.raises(DBAPIError, match="downgrade refused: budgets have"):
        await downgrade(migrated_database.owner_url, "0002")
    assert await owner.fetchval("SELECT count(*) FROM budgets") == 1


async def test_budgets_that_were_there_before_stay_enforced_as_they_were(migrated_database, owner):
    await downgrade(migrated_database.owner_url, "0002")
    await owner.execute(
        """
        INSERT INTO tenants (tenant_id, name, status, version, requests_per_minute, output_tokens_max, clamp)
        VALUES ('acme', 'x', 'ACTIVE', 1, 0, 1, true);
        INSERT INTO budgets (budget_id, tenant_id, subject_kind, subject, window_kind, zone, mode, limit_nanos,
            spec_version, version)
        VALUES ('b1', 'acme', 'TENANT', '', 'DAY', 'UTC', 'ENFORCE', 5, 3, 4)
        """
    )
    await migrate(migrated_database.owner_url)
    row = await owner.fetchrow("SELECT * FROM budgets")
    assert (row["seeding"], row["each"], row["previous_spec"], row["rollover_cap_nanos"]) == (False, False, None, None)
    assert (row["anchor_day"], row["anchor_month"], row["threshold_bps"]) == (1, 1, [5_000, 8_000, 10_000])


async def test_the_programs_role_owns_nothing_and_makes_nothing(owner, app):
    owned = await owner.fetchval(
        f"SELECT count(*) FROM pg_class JOIN pg_roles ON pg_roles.oid = relowner WHERE rolname = '{APP_ROLE}'"
    )
    assert owned == 0
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await app.execute("CREATE TABLE mine (number integer)")


async def test_the_programs_role_can_be_given_a_password(migrated_database, owner):
    await migrate(migrated_database.owner_url, app_password="correct-horse-battery")
    assert await owner.fetchval("SELECT rolpassword LIKE 'SCRAM-SHA-256%' FROM pg_authid WHERE rolname = $1", APP_ROLE)
    with pytest.raises(ValueError, match="without quotes"):
        await migrate(migrated_database.owner_url, app_password="x'; DROP TABLE tenants; --")
