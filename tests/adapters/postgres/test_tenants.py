import asyncio

import asyncpg
import pytest

from budgetguard.adapters.postgres.api_keys import ApiKeyRepository
from budgetguard.adapters.postgres.budgets import BudgetRepository
from budgetguard.adapters.postgres.pool import open_database
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.core.entities import BudgetDraft
from budgetguard.core.errors import (
    AlreadyExistsError,
    DependencyUnavailableError,
    EtagMismatchError,
    InvalidError,
    NotFoundError,
    RequestIdReusedError,
)
from budgetguard.core.snapshot import KeyStatus, Status, SubjectKind, WindowKind


@pytest.fixture
def tenants(database):
    return TenantRepository(database)


async def create(tenants, tenant_id="acme", **changes):
    return await tenants.create(**{"actor": "admin", "tenant_id": tenant_id, "name": "Acme", **changes})


async def test_what_is_created_can_be_read(tenants):
    created = await create(tenants, requests_per_minute=60, output_tokens_max=100, clamp=False)
    assert (created.status, created.version, created.deleted_at_ms) == (Status.ACTIVE, 1, None)
    assert (created.requests_per_minute, created.output_tokens_max, created.clamp) == (60, 100, False)
    assert await tenants.get("acme") == created
    snapshot = await tenants.snapshot("acme")
    assert (snapshot.version, snapshot.requests_per_minute, snapshot.output_tokens_max) == (1, 60, 100)
    with pytest.raises(AlreadyExistsError):
        await create(tenants)
    for read in (tenants.get, tenants.snapshot):
        with pytest.raises(NotFoundError):
            await read("nobody")


async def test_the_same_request_again_gets_the_same_answer_whatever_happened_since(tenants, owner):
    first = await create(tenants, request_id="r1")
    await tenants.update("acme", {"name": "New"}, actor="admin")
    assert await create(tenants, request_id="r1") == first
    assert await owner.fetchval("SELECT count(*) FROM admin_audit WHERE action = 'create'") == 1
    with pytest.raises(RequestIdReusedError):
        await create(tenants, tenant_id="other", request_id="r1")
    with pytest.raises(NotFoundError):
        await tenants.get("other")
    with pytest.raises(InvalidError):
        await create(tenants, tenant_id="x", request_id="r" * 129)


async def test_of_concurrent_creates_one_wins_and_the_same_request_is_answered_to_all(tenants):
    answers = await asyncio.gather(*(create(tenants, request_id="r1") for _ in range(8)))
    assert len({answer.created_at_ms for answer in answers}) == 1
    others = await asyncio.gather(*(create(tenants, "race") for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(other, AlreadyExistsError) for other in others) == 7


async def test_a_failed_create_does_not_use_up_its_request_id(tenants):
    await create(tenants)
    with pytest.raises(AlreadyExistsError):
        await create(tenants, request_id="r1", name="Second")
    created = await create(tenants, tenant_id="other", request_id="r1")
    assert created.tenant_id == "other"


async def test_a_change_raises_the_version_and_no_change_does_not(tenants):
    await create(tenants)
    changed = await tenants.update("acme", {"requests_per_minute": 5}, actor="admin", expected_version=1)
    assert (changed.version, changed.requests_per_minute, changed.name) == (2, 5, "Acme")
    assert await tenants.update("acme", {"requests_per_minute": 5}, actor="admin") == changed
    with pytest.raises(EtagMismatchError) as mismatch:
        await tenants.update("acme", {"name": "x"}, actor="admin", expected_version=1)
    assert mismatch.value.metadata["etag"] == "2"
    suspended = await tenants.update("acme", {"status": Status.SUSPENDED}, actor="admin")
    assert (await tenants.snapshot("acme")).status is Status.SUSPENDED
    assert suspended.version == 3


async def test_concurrent_changes_each_count(tenants):
    await create(tenants)
    await asyncio.gather(*(tenants.update("acme", {"requests_per_minute": n + 1}, actor="admin") for n in range(10)))
    assert (await tenants.get("acme")).version == 11


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "x" * 201},
        {"name": "a\x00b"},
        {"requests_per_minute": -1},
        {"requests_per_minute": 2**31},
        {"output_tokens_max": 0},
        {"status": Status.DELETED},
    ],
)
async def test_what_cannot_be_is_refused_by_name(tenants, change):
    await create(tenants)
    with pytest.raises(InvalidError) as invalid:
        await tenants.update("acme", change, actor="admin")
    assert invalid.value.violations[0].field == next(iter(change))
    assert (await tenants.get("acme")).version == 1


async def test_a_deleted_tenant_leaves_a_tombstone_and_no_usable_key(tenants, database):
    api_keys, budgets = ApiKeyRepository(database), BudgetRepository(database)
    await create(tenants)
    await api_keys.create(actor="a", tenant_id="acme", key_id="a" * 16, name="k", secret_sha256="0" * 64)
    draft = BudgetDraft(budget_id="b1", subject_kind=SubjectKind.TENANT, window=WindowKind.DAY, limit_nanos=1)
    await budgets.create(draft, actor="a", tenant_id="acme")
    with pytest.raises(EtagMismatchError):
        await tenants.delete("acme", actor="admin", expected_version=1)
    deleted = await tenants.delete("acme", actor="admin", expected_version=2)
    assert (deleted.status, deleted.version) == (Status.DELETED, 3)
    assert deleted.deleted_at_ms is not None
    snapshot = await tenants.snapshot("acme")
    assert (snapshot.status, snapshot.version) == (Status.DELETED, 3)
    key = await api_keys.snapshot("a" * 16)
    assert (key.status, key.version) == (KeyStatus.REVOKED, 2)
    assert (await tenants.list()).items == ()
    for attempt in (
        tenants.get("acme"),
        tenants.update("acme", {"name": "x"}, actor="admin"),
        tenants.delete("acme", actor="admin"),
        api_keys.create(actor="a", tenant_id="acme", key_id="b" * 16, name="k", secret_sha256="0" * 64),
        api_keys.list("acme"),
        budgets.list("acme"),
        budgets.get("b1"),
        budgets.update("b1", {"limit_nanos": 2}, actor="a"),
    ):
        with pytest.raises(NotFoundError):
            await attempt
    with pytest.raises(AlreadyExistsError):
        await create(tenants)


async def test_pages_neither_repeat_nor_miss(tenants):
    wanted = [f"t-{number:02d}" for number in range(7)]
    for tenant_id in reversed(wanted):
        await create(tenants, tenant_id)
    page = await tenants.list(page_size=3)
    seen = [tenant.tenant_id for tenant in page.items]
    await create(tenants, "a-new-one-before")
    while page.next_page_token:
        page = await tenants.list(page_size=3, page_token=page.next_page_token)
        seen += [tenant.tenant_id for tenant in page.items]
    assert seen == wanted
    exact = await tenants.list(page_size=8)
    assert (len(exact.items), exact.next_page_token) == (8, "")


async def test_the_audit_tells_who_changed_what(tenants, owner):
    await create(tenants)
    await tenants.update("acme", {"name": "New"}, actor="bob")
    await tenants.delete("acme", actor="eve")
    rows = await owner.fetch(
        "SELECT actor, action, before->>'name' AS before, after->>'name' AS after FROM admin_audit ORDER BY audit_id"
    )
    assert [tuple(row) for row in rows] == [
        ("admin", "create", None, "Acme"),
        ("bob", "update", "Acme", "New"),
        ("eve", "delete", "New", "New"),
    ]


async def test_nothing_is_written_when_the_audit_cannot_be(tenants, owner):
    await create(tenants)
    await owner.execute("REVOKE INSERT ON admin_audit FROM budgetguard_app")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await tenants.update("acme", {"name": "New"}, actor="bob")
    assert (await tenants.get("acme")).version == 1


async def test_a_server_that_does_not_answer_is_named(tmp_path):
    nowhere = await open_database(f"postgresql://budgetguard_app@/nothing?host={tmp_path}")
    try:
        with pytest.raises(DependencyUnavailableError, match="Postgres"):
            await TenantRepository(nowhere).get("acme")
        with pytest.raises(DependencyUnavailableError):
            await nowhere.ping()
    finally:
        await nowhere.close()


async def test_a_wrong_value_is_no_outage(database):
    await database.ping()
    with pytest.raises(asyncpg.DataError):
        async with database.transaction() as connection:
            await connection.fetchval("SELECT $1::int", "not a number")


async def test_only_one_is_exclusive(database):
    work, other = "work", "other work"
    async with database.exclusive(work) as a, database.exclusive(work) as b, database.exclusive(other) as c:
        assert (a, b, c) == (True, False, True)
    async with database.exclusive("work") as again:
        assert again
