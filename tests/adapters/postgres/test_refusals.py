from dataclasses import replace

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from budgetguard.adapters.postgres.migrate import downgrade, migrate
from budgetguard.adapters.postgres.refusals import DeadRefusal, RefusalRepository
from budgetguard.core.attempts import RecordedAttempt, RefusalCount, RefusalFilter, RefusalGroup, RefusedCall
from budgetguard.core.errors import InvalidError
from budgetguard.core.reasons import Reason
from tests.plugins.attempts import MINUTE_MS, a_tally, an_attempt

DAY_MS = 86_400_000


@pytest.fixture
def refusals(database):
    return RefusalRepository(database)


def a_row(number=1, **changes):
    return (7, f"{number}-0", RefusedCall(attempt=an_attempt(f"op-{number}", **changes), number=number))


def a_count(count=1, **changes):
    return (7, "name", (a_tally(**changes), count))


async def listed(refusals, **wanted):
    return [row.attempt for row in (await refusals.list(RefusalFilter(**wanted))).items]


async def counted(refusals, by=RefusalGroup.REASON, **wanted):
    return {one.group: one.count for one in await refusals.counts(RefusalFilter(**wanted), by=by)}


async def test_what_is_recorded_is_read_as_it_was(refusals):
    facts = {"budget_id": "b1", "limit_usd": "0.02", "resets_at": None, "retryable": True, "needed_tokens": 2**62}
    attempt = an_attempt(facts=facts, message='Say "é".', tags=("a", "b"), end_user="jo@example.org")
    assert await refusals.record([(7, "1-0", RefusedCall(attempt=attempt, number=1))], []) == 0
    (row,) = (await refusals.list(RefusalFilter())).items
    assert isinstance(row, RecordedAttempt)
    assert row.attempt == attempt
    assert row.recorded_at_ms > MINUTE_MS


async def test_recorded_again_nothing_changes(refusals):
    rows, counts = [a_row(number) for number in (1, 2)], [a_count(5)]
    for _ in range(2):
        await refusals.record(rows, counts)
    assert len(await listed(refusals)) == 2
    assert await counted(refusals) == {"BUDGET_EXCEEDED": 5}


async def test_a_count_only_rises_and_sources_add_up(refusals):
    for number in (5, 3, 8, 8, 1):
        await refusals.record([], [a_count(number)])
    await refusals.record([], [a_count(4, source="q.1"), a_count(2, minute_ms=MINUTE_MS + 60_000)])
    assert await counted(refusals) == {"BUDGET_EXCEEDED": 14}
    assert await refusals.total(RefusalFilter()) == 14


async def test_a_minute_has_ten_rows_whoever_writes_them(refusals, app):
    await refusals.record([a_row(number) for number in range(1, 11)], [])
    await refusals.record([a_row(3, end_user="another")], [])
    assert len(await listed(refusals)) == 10
    assert {attempt.end_user for attempt in await listed(refusals)} == {"jo"}
    with pytest.raises(asyncpg.CheckViolationError):
        await app.execute(
            "INSERT INTO refused_calls (tenant_id, key_id, reason, minute, number, refused_at, operation_id, api, "
            "provider_id, model, status, message, facts, tags, session_id, end_user) SELECT tenant_id, key_id, reason, "
            "minute, 11, refused_at, operation_id, api, provider_id, model, status, message, facts, tags, session_id, "
            "end_user FROM refused_calls LIMIT 1"
        )


async def test_what_postgres_refuses_is_put_aside_and_blocks_nobody(refusals, owner):
    rows = [a_row(1), a_row(2, model="x\x00y"), a_row(3, refused_at_ms=10**18), a_row(4)]
    counts = [a_count(5), a_count(0, source="zero"), a_count(2**70, source="large")]
    dead = [DeadRefusal(shard=7, entry="9-0\x00", fields={"a": "\x00"}, error="malformed")]
    for _ in range(2):
        assert await refusals.record(rows, counts, dead=dead) == 5
    assert sorted(attempt.operation_id for attempt in await listed(refusals)) == ["op-1", "op-4"]
    assert await counted(refusals) == {"BUDGET_EXCEEDED": 5}
    found = {row["entry"]: row["error"] for row in await owner.fetch("SELECT entry, error FROM dead_refusals")}
    assert found == {"2-0": "refused", "3-0": "refused", "name": "refused", "9-0\ufffd": "malformed"}
    assert await owner.fetchval("SELECT count(*) FROM dead_events") == 0, "no counter waits for a refusal"


FILTERS = [
    ({}, "abcd"),
    ({"tenant_id": "acme"}, "abc"),
    ({"tenant_id": "acme", "key_id": "other"}, "b"),
    ({"reason": Reason.POLICY_DENIED}, "c"),
    ({"model": "gpt-4o"}, "c"),
    ({"tenant_id": "acme", "session_id": "s2"}, "b"),
    ({"from_ms": MINUTE_MS + 60_000}, "cd"),
    ({"until_ms": MINUTE_MS + 60_000}, "ab"),
    ({"from_ms": MINUTE_MS + 60_000, "until_ms": MINUTE_MS + 60_000}, ""),
    ({"tenant_id": "nobody"}, ""),
]


@pytest.fixture
async def four(refusals):
    later = {"refused_at_ms": MINUTE_MS + 60_000}
    attempts = [
        an_attempt("a", refused_at_ms=MINUTE_MS),
        an_attempt("b", refused_at_ms=MINUTE_MS + 1, key_id="other", session_id="s2"),
        an_attempt("c", reason=Reason.POLICY_DENIED, model="gpt-4o", **later),
        an_attempt("d", tenant_id="globex", **later),
    ]
    await refusals.record(
        [(7, a.operation_id, RefusedCall(attempt=a, number=1)) for a in attempts],
        [
            (
                7,
                a.operation_id,
                (a_tally(tenant_id=a.tenant_id, key_id=a.key_id, reason=a.reason, minute_ms=a.minute_ms), n),
            )
            for n, a in enumerate(attempts, 1)
        ],
    )


@pytest.mark.parametrize(("wanted", "expected"), FILTERS)
async def test_each_filter_restricts(refusals, four, wanted, expected):
    found = await listed(refusals, **wanted)
    assert {attempt.operation_id for attempt in found} == set(expected)
    assert [a.refused_at_ms for a in found] == sorted((a.refused_at_ms for a in found), reverse=True)
    if not wanted.keys() & {"model", "session_id"}:
        assert await refusals.total(RefusalFilter(**wanted)) == sum("abcd".index(one) + 1 for one in expected)


async def test_counts_by_group(refusals, four):
    assert await counted(refusals) == {"BUDGET_EXCEEDED": 7, "POLICY_DENIED": 3}
    assert await counted(refusals, RefusalGroup.API_KEY, tenant_id="acme") == {"k" * 16: 4, "other": 2}
    assert await counted(refusals, RefusalGroup.DAY) == {"2025-06-15": 10}
    assert await refusals.counts(RefusalFilter(), by=RefusalGroup.MINUTE) == (
        RefusalCount(group="2025-06-15T15:07Z", count=3),
        RefusalCount(group="2025-06-15T15:08Z", count=7),
    )


async def test_pages_follow_each_other(refusals):
    await refusals.record([a_row(number, refused_at_ms=MINUTE_MS) for number in range(1, 6)], [])
    found, token = [], ""
    for _ in range(3):
        page = await refusals.list(RefusalFilter(tenant_id="acme"), page_size=2, page_token=token)
        found += [row.attempt.operation_id for row in page.items]
        token = page.next_page_token
    assert (sorted(found), token) == ([f"op-{number}" for number in range(1, 6)], "")
    other = await refusals.list(RefusalFilter(tenant_id="acme"), page_size=2)
    with pytest.raises(InvalidError):
        await refusals.list(RefusalFilter(), page_size=2, page_token=other.next_page_token)


async def test_a_time_that_is_none_is_refused_by_name(refusals):
    with pytest.raises(InvalidError) as raised:
        await refusals.list(RefusalFilter(from_ms=10**18))
    assert [violation.field for violation in raised.value.violations] == ["from"]
    with pytest.raises(InvalidError):
        await refusals.total(RefusalFilter(until_ms=10**18))


CHANGES = [
    "UPDATE refused_calls SET message = ''",
    "DELETE FROM refused_calls",
    "TRUNCATE refused_calls",
    "UPDATE refused_tallies SET count = count - 1",
    "UPDATE refused_tallies SET tenant_id = 'x'",
    "DELETE FROM refused_tallies",
    "TRUNCATE refused_tallies",
]


@pytest.mark.parametrize("change", CHANGES)
async def test_not_even_the_owner_changes_what_was_refused_lately(refusals, owner, change):
    lately = await owner.fetchval("SELECT epoch_ms(now()) - 89 * 86400000::bigint")
    await refusals.record([a_row(refused_at_ms=lately)], [a_count(5, minute_ms=lately - lately % 60_000)])
    for replica in (False, True):
        if replica:
            await owner.execute("SET session_replication_role = replica")
        with pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
            await owner.execute(change)


async def test_the_programs_role_adds_counts_up_and_deletes_nothing(app):
    for change in ("DELETE FROM refused_calls", "DELETE FROM refused_tallies", "UPDATE refused_calls SET model = ''"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.execute(change)


async def test_what_is_old_is_forgotten_and_nothing_else(refusals, owner):
    now_ms = await owner.fetchval("SELECT epoch_ms(now())")
    ages = (1, 89, 91, 399, 401)
    for days in ages:
        at_ms = now_ms - days * DAY_MS
        await refusals.record(
            [a_row(refused_at_ms=at_ms, message=str(days))], [a_count(days, minute_ms=at_ms - at_ms % 60_000)]
        )
    assert await refusals.forget() == 3 + 1
    assert [attempt.message for attempt in await listed(refusals)] == ["1", "89"]
    assert await refusals.total(RefusalFilter()) == 1 + 89 + 91 + 399
    assert await refusals.forget() == 0


async def test_a_downgrade_never_loses_what_was_refused(migrated_database, refusals):
    await refusals.record([], [a_count(1)])
    with pytest.raises(DBAPIError, match="downgrade refused: refused calls"):
        await downgrade(migrated_database.owner_url, "0004")


async def test_down_and_up_again(migrated_database, owner):
    await downgrade(migrated_database.owner_url, "0004")
    assert await owner.fetchval("SELECT to_regclass('refused_calls') IS NULL")
    await migrate(migrated_database.owner_url)
    assert await owner.fetchval("SELECT to_regclass('refused_calls') IS NOT NULL")


async def test_every_partition_of_the_ledger_finds_by_tag_and_end_user(owner):
    await owner.execute("SELECT make_ledger_partition(date '2001-01-15')")
    for column in ("tags", "end_user"):
        missing = await owner.fetch(
            """
            SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'usage_ledger'::regclass AND NOT EXISTS (
                SELECT FROM pg_index JOIN pg_attribute ON attrelid = indexrelid
                WHERE indrelid = inhrelid AND attname = $1)
            """,
            column,
        )
        assert missing == []


async def test_a_shown_row_keeps_its_id_when_others_come(refusals):
    await refusals.record([a_row(1)], [])
    before = (await refusals.list(RefusalFilter())).items
    await refusals.record([a_row(1), a_row(2)], [])
    after = (await refusals.list(RefusalFilter())).items
    assert [replace(row, recorded_at_ms=0) for row in after[-1:]] == [replace(row, recorded_at_ms=0) for row in before]
