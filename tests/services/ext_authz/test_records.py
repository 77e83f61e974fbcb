from dataclasses import replace

from budgetguard.core.snapshot import TagSpec, TenantSnapshot
from ext_authz import records as module
from ext_authz.records import Records, weight_of

TENANT = TenantSnapshot(tenant_id="acme", version=1)


class Stored:
    """Every tenant that is asked for, each with as many tags as told."""

    def __init__(self) -> None:
        self.tags: dict[str, int] = {}
        self.loaded: list[str] = []

    async def load_tenant(self, tenant_id):
        self.loaded.append(tenant_id)
        tags = tuple(TagSpec(tag_id=f"t{n}") for n in range(self.tags.get(tenant_id, 0)))
        return replace(TENANT, tenant_id=tenant_id, tags=tags)

    async def load_key(self, tenant_id, key_id):
        raise NotImplementedError


async def test_the_least_recently_used_records_leave_when_they_grow_too_heavy(monkeypatch):
    monkeypatch.setattr(module, "TENANTS_WEIGHT_MAX", 4)
    stored = Stored()
    records = Records(stored)
    for tenant_id in ("a", "b", "c", "d", "a"):
        await records.tenant(tenant_id, fresh=False)
    assert stored.loaded == ["a", "b", "c", "d"]
    stored.tags["a"] = 6  # 3 units
    await records.tenant("a", fresh=True)
    stored.loaded.clear()
    for tenant_id in ("a", "d", "c"):
        await records.tenant(tenant_id, fresh=False)
    # b and c had to go for it; then c came for a.
    assert stored.loaded == ["c"]
    await records.tenant("d", fresh=False)
    assert stored.loaded == ["c"]
    await records.tenant("a", fresh=False)
    assert stored.loaded == ["c", "a"]


def test_a_full_tree_is_far_below_the_bound():
    full = replace(TENANT, tags=tuple(TagSpec(tag_id=f"t{n}") for n in range(10_000)))
    assert weight_of(TENANT) == 1
    assert weight_of(full) * 25 < module.TENANTS_WEIGHT_MAX
