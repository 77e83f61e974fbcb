import asyncio

import pytest

from budgetguard.adapters.postgres.api_keys import ApiKeyRepository
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.core.errors import (
    AlreadyExistsError,
    EtagMismatchError,
    InvalidError,
    NotFoundError,
    RequestIdReusedError,
)
from budgetguard.core.snapshot import KeySnapshot, KeyStatus

SECRET = "ab" * 32


@pytest.fixture
async def api_keys(database):
    tenants = TenantRepository(database)
    for tenant_id in ("acme", "other"):
        await tenants.create(actor="admin", tenant_id=tenant_id, name=tenant_id)
    return ApiKeyRepository(database)


async def create(api_keys, key_id="a" * 16, **changes):
    given = {"actor": "admin", "tenant_id": "acme", "key_id": key_id, "name": "ci", "secret_sha256": SECRET}
    return await api_keys.create(**{**given, **changes})


async def test_the_hash_is_in_the_snapshot_and_nowhere_else(api_keys, owner):
    created = await create(api_keys, requests_per_minute=7, expires_at_ms=1_900_000_000_123)
    assert await api_keys.get("a" * 16) == created
    assert SECRET not in repr(created)
    assert await api_keys.snapshot("a" * 16) == KeySnapshot(
        tenant_id="acme",
        key_id="a" * 16,
        version=1,
        secret_sha256=SECRET,
        requests_per_minute=7,
        expires_at_ms=1_900_000_000_123,
    )
    told = await owner.fetch("SELECT after::text FROM admin_audit UNION ALL SELECT answer::text FROM request_ids")
    assert not any(SECRET in (row[0] or "") for row in told)


async def test_ids_are_unique_over_all_tenants(api_keys):
    await create(api_keys)
    with pytest.raises(AlreadyExistsError):
        await create(api_keys, tenant_id="other")
    with pytest.raises(NotFoundError):
        await create(api_keys, "b" * 16, tenant_id="nobody")
    with pytest.raises(NotFoundError):
        await api_keys.snapshot("b" * 16)


async def test_the_same_request_again_names_the_first_key(api_keys):
    first = await create(api_keys, request_id="r1")
    again = await create(api_keys, "b" * 16, request_id="r1", secret_sha256="cd" * 32)
    assert again == first
    with pytest.raises(RequestIdReusedError):
        await create(api_keys, "b" * 16, request_id="r1", name="other")
    assert (await api_keys.list("acme")).items == (first,)


async def test_revoking_is_final_and_does_not_move_the_tenants_version(api_keys, database):
    await create(api_keys)
    revoked = await api_keys.revoke("a" * 16, actor="admin", expected_version=1)
    assert (revoked.status, revoked.version) == (KeyStatus.REVOKED, 2)
    assert await api_keys.revoke("a" * 16, actor="admin") == revoked
    assert (await TenantRepository(database).get("acme")).version == 1
    with pytest.raises(EtagMismatchError):
        await api_keys.revoke("a" * 16, actor="admin", expected_version=1)
    with pytest.raises(NotFoundError):
        await api_keys.revoke("z" * 16, actor="admin")


async def test_concurrent_revocations_count_once(api_keys):
    await create(api_keys)
    revoked = await asyncio.gather(*(api_keys.revoke("a" * 16, actor="admin") for _ in range(5)))
    assert {key.version for key in revoked} == {2}


async def test_limits_and_expiry_can_be_set_and_taken_away(api_keys):
    await create(api_keys)
    changed = await api_keys.update("a" * 16, {"requests_per_minute": 3, "expires_at_ms": 5}, actor="admin")
    assert (changed.version, changed.requests_per_minute, changed.expires_at_ms, changed.name) == (2, 3, 5, "ci")
    assert await api_keys.update("a" * 16, {"requests_per_minute": 3}, actor="admin") == changed
    cleared = await api_keys.update(
        "a" * 16, {"requests_per_minute": None, "expires_at_ms": None}, actor="admin", expected_version=2
    )
    assert (cleared.version, cleared.requests_per_minute, cleared.expires_at_ms) == (3, None, None)
    with pytest.raises(EtagMismatchError):
        await api_keys.update("a" * 16, {"name": "x"}, actor="admin", expected_version=2)
    for change in ({"name": ""}, {"requests_per_minute": -1}, {"expires_at_ms": 10**18}):
        with pytest.raises(InvalidError):
            await api_keys.update("a" * 16, change, actor="admin")


async def test_listing_pages_one_tenants_keys(api_keys):
    for letter in "edcba":
        await create(api_keys, letter * 16)
    await create(api_keys, "f" * 16, tenant_id="other")
    page = await api_keys.list("acme", page_size=3)
    rest = await api_keys.list("acme", page_size=3, page_token=page.next_page_token)
    assert "".join(key.key_id[0] for key in (*page.items, *rest.items)) == "abcde"
    with pytest.raises(InvalidError):
        await api_keys.list("other", page_token=page.next_page_token)
    assert {key.key_id for key in await api_keys.snapshots("acme")} == {letter * 16 for letter in "abcde"}
    assert [key.key_id[0] for key in await api_keys.snapshots_after("d" * 16, limit=5)] == ["e", "f"]
    assert await api_keys.snapshots_after("", limit=5, changed_within_s=0) == ()
