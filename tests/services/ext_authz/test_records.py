from dataclasses import replace

from budgetguard.core.snapshot import CallerRecords, KeySnapshot, TagSpec, TenantSnapshot
from ext_authz import records as module
from ext_authz.records import Records, weight_of

TENANT = TenantSnapshot(tenant_id="acme", version=1)
KEY = KeySnapshot(tenant_id="acme", key_id="k", version=1, secret_sha256="")


class Stored:
    """Every tenant that is asked for, each with one key and as many tags as told."""

    def __init__(self) -> None:
        self.tags: dict[str, int] = {}
        self.loaded: list[str] = []

    async def load_tenant(self, tenant_id):
        self.loaded.append(tenant_id)
        tags = tuple(TagSpec(tag_id=f"t{n}") for n in range(self.tags.get(tenant_id, 0)))
        return replace(TENANT, tenant_id=tenant_id, tags=tags)

    async def load_key(self, tenant_id, key_id):
        return replace(KEY, tenant_id=tenant_id) if key_id == KEY.key_id else None

    async def load_records(self, tenant_id, key_id):
        key = await self.load_key(tenant_id, key_id)
        return CallerRecords(tenant=await self.load_tenant(tenant_id) if key else None, key=key)


async def test_the_least_recently_used_records_leave_when_they_grow_too_heavy(monkeypatch):
    monkeypatch.setattr(module, "TENANTS_WEIGHT_MAX", 4)
    stored = Stored()
    records = Records(stored)
    for tenant_id in ("a", "b", "c", "d", "a"):
        await records.find(tenant_id=tenant_id, key_id="k")
    assert stored.loaded == ["a", "b", "c", "d"]
    stored.tags["a"] = 6  # 3 units
    await records.find_for_sure(tenant_id="a", key_id="k")
    stored.loaded.clear()
    for tenant_id in ("a", "d", "c"):
        await records.find(tenant_id=tenant_id, key_id="k")
    # b and c had to go for it; then c came for a.
    assert stored.loaded == ["c"]
    await records.find(tenant_id="d", key_id="k")
    assert stored.loaded == ["c"]
    await records.find(tenant_id="a", key_id="k")
    assert stored.loaded == ["c", "a"]


async def test_a_key_that_is_not_there_costs_its_tenant_s_record_nothing():
    stored = Stored()
    records = Records(stored)
    await records.find(tenant_id="a", key_id="k")
    nothing = CallerRecords(tenant=None, key=None)
    for find in (records.find, records.find_for_sure):
        assert await find(tenant_id="a", key_id="made-up") == nothing
    await records.find(tenant_id="a", key_id="k")
    assert stored.loaded == ["a"]


def test_a_full_tree_is_far_below_the_bound():
    full = replace(TENANT, tags=tuple(TagSpec(tag_id=f"t{n}") for n in range(10_000)))
    assert weight_of(TENANT) == 1
    assert weight_of(full) * 25 < module.TENANTS_WEIGHT_MAX
