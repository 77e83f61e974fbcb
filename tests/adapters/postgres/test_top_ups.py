import time
from datetime import UTC, datetime

import asyncpg
import pytest

from budgetguard.adapters.postgres.budgets import BudgetRepository
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.adapters.postgres.top_ups import TopUpRepository
from budgetguard.core.entities import TOP_UPS_PER_BUDGET_MAX, BudgetDraft, TopUpDraft
from budgetguard.core.errors import AlreadyExistsError, InvalidError, NotFoundError, RequestIdReusedError
from budgetguard.core.snapshot import SubjectKind, TopUp, WindowKind

HOUR_MS = 3_600_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
async def tenants(database):
    tenants = TenantRepository(database)
    await tenants.create(actor="a", tenant_id="acme", name="acme")
    budgets = BudgetRepository(database)
    for budget_id, window in (("b1", WindowKind.MONTH), ("b2", WindowKind.DAY)):
        draft = BudgetDraft(budget_id=budget_id, subject_kind=SubjectKind.TENANT, window=window, limit_nanos=100)
        await budgets.create(draft, actor="a", tenant_id="acme")
        await budgets.mark_seeded(budget_id, 1)
    return tenants


@pytest.fixture
def top_ups(database, tenants):
    return TopUpRepository(database)


async def add(top_ups, top_up_id="t1", *, budget_id="b1", request_id="", **changes):
    draft = TopUpDraft(**{"top_up_id": top_up_id, "amount_nanos": 50, "reason": "a busy week", **changes})
    return await top_ups.add(draft, actor="admin", budget_id=budget_id, request_id=request_id)


async def in_snapshot(tenants) -> dict[str, tuple[TopUp, ...]]:
    return {spec.budget_id: spec.top_ups for spec in (await tenants.snapshot("acme")).budgets}


async def test_a_top_up_is_in_the_next_version_of_its_budget_only(top_ups, tenants, owner):
    before = (await tenants.get("acme")).version
    soon = now_ms() + HOUR_MS
    added = await add(top_ups, expires_at_ms=soon)
    assert abs(added.starts_at_ms - now_ms()) < 60_000
    assert await in_snapshot(tenants) == {
        "b1": (TopUp(amount_nanos=50, starts_at_ms=added.starts_at_ms, expires_at_ms=soon),),
        "b2": (),
    }
    assert (await tenants.get("acme")).version == before + 1
    assert (await top_ups.list("b1")).items == (added,)
    audit = await owner.fetchrow("SELECT * FROM admin_audit WHERE kind = 'top-up'")
    assert (audit["actor"], audit["action"], audit["tenant_id"]) == ("admin", "add", "acme")
    assert "a busy week" in audit["after"]


async def test_what_begins_later_is_known_and_what_expired_is_not(top_ups, tenants, owner):
    later = now_ms() + HOUR_MS
    await add(top_ups, starts_at_ms=later)
    assert [one.starts_at_ms for one in (await in_snapshot(tenants))["b1"]] == [later]
    await owner.execute(
        "UPDATE budget_top_ups SET starts_at = now() - interval '2 days', expires_at = now() - interval '1 day'"
    )
    assert (await in_snapshot(tenants))["b1"] == ()
    assert len((await top_ups.list("b1")).items) == 1


async def test_a_removed_top_up_is_out_of_the_next_version(top_ups, tenants):
    added = await add(top_ups)
    with pytest.raises(NotFoundError):
        await top_ups.remove("b2", "t1", actor="a")
    removed = await top_ups.remove("b1", "t1", actor="a")
    assert removed.removed_at_ms is not None
    assert added.removed_at_ms is None
    assert (await in_snapshot(tenants))["b1"] == ()
    version = (await tenants.get("acme")).version
    with pytest.raises(NotFoundError):
        await top_ups.remove("b1", "t1", actor="a")
    assert (await tenants.get("acme")).version == version
    assert (await top_ups.list("b1")).items == (removed,)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"amount_nanos": 0}, "amount_nanos"),
        ({"amount_nanos": 2**63}, "amount_nanos"),
        ({"reason": ""}, "reason"),
        ({"reason": "x" * 501}, "reason"),
        ({"reason": "a\nb"}, "reason"),
        ({"expires_at_ms": 1}, "expire_time"),
        ({"starts_at_ms": 4 * 10**12, "expires_at_ms": 4 * 10**12}, "expire_time"),
        ({"starts_at_ms": 10**18}, "start_time"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(top_ups, tenants, change, field):
    version = (await tenants.get("acme")).version
    with pytest.raises(InvalidError) as invalid:
        await add(top_ups, **change)
    assert invalid.value.violations[0].field == field
    assert (await tenants.get("acme")).version == version


async def test_the_same_request_again_adds_no_second_top_up(top_ups, tenants):
    first = await add(top_ups, request_id="r1")
    assert await add(top_ups, "made-anew", request_id="r1") == first
    with pytest.raises(RequestIdReusedError):
        await add(top_ups, "t2", request_id="r1", amount_nanos=51)
    with pytest.raises(AlreadyExistsError):
        await add(top_ups)
    with pytest.raises(NotFoundError):
        await add(top_ups, "t3", budget_id="nothing")
    assert len((await in_snapshot(tenants))["b1"]) == 1


async def test_a_budget_has_a_bounded_number_of_top_ups_that_may_apply(top_ups, owner):
    await owner.execute(
        f"""
        INSERT INTO budget_top_ups (top_up_id, budget_id, amount_nanos, reason, starts_at)
        SELECT 'x' || number, 'b1', 1, 'x', now() FROM generate_series(1, {TOP_UPS_PER_BUDGET_MAX}) AS number
        """
    )
    with pytest.raises(InvalidError, match="less than"):
        await add(top_ups)
    await top_ups.remove("b1", "x1", actor="a")
    await add(top_ups)


async def test_pages_go_from_the_newest_to_the_oldest(top_ups):
    for number in range(5):
        await add(top_ups, f"t{number}")
    found, token = [], ""
    while True:
        page = await top_ups.list("b1", page_size=2, page_token=token)
        found += [one.top_up_id for one in page.items]
        token = page.next_page_token
        if not token:
            break
    assert found == [f"t{number}" for number in reversed(range(5))]


async def test_events_are_append_only(owner, app, tenants):
    values = "('acme', 'b1', '', 5000, 1, 2, 'ENFORCE', $1)"
    insert = (
        "INSERT INTO budget_events (tenant_id, budget_id, subject, threshold_bps, spent_nanos, limit_nanos, mode, "
        f"window_starts_at) VALUES {values}"
    )
    await app.execute(insert, datetime(2026, 1, 1, tzinfo=UTC))
    with pytest.raises(asyncpg.UniqueViolationError):
        await app.execute(insert, datetime(2026, 1, 1, tzinfo=UTC))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await app.execute("UPDATE budget_events SET spent_nanos = 0")
    for change in ("UPDATE budget_events SET spent_nanos = 0", "DELETE FROM budget_events", "TRUNCATE budget_events"):
        with pytest.raises(asyncpg.RestrictViolationError):
            await owner.execute(change)
