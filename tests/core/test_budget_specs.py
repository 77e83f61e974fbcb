from dataclasses import replace

from budgetguard.core.entities import Budget
from budgetguard.core.snapshot import Mode, SubjectKind, TenantSnapshot, TopUp, WindowKind

BUDGET = Budget(
    budget_id="b1",
    tenant_id="acme",
    subject_kind=SubjectKind.TENANT,
    subject="",
    window=WindowKind.DAY,
    zone="UTC",
    mode=Mode.ENFORCE,
    limit_nanos=10,
    spec_version=1,
    version=1,
    starts_at_ms=None,
    ends_at_ms=None,
    created_at_ms=0,
    updated_at_ms=0,
)


def test_a_budget_with_its_past_is_one_specification():
    assert BUDGET.specs() == (BUDGET.spec(),)
    assert not BUDGET.spec().seeding


def test_a_new_budget_is_counted_only_and_nothing_stands_in_for_it():
    (spec,) = replace(BUDGET, seeding=True).specs()
    assert spec.seeding


def test_a_changed_budget_goes_on_as_it_was_until_it_has_its_past():
    changed = replace(
        BUDGET, window=WindowKind.MONTH, limit_nanos=300, spec_version=2, seeding=True, previous_spec=BUDGET.spec()
    )
    new, old = changed.specs()
    assert (new.seeding, new.spec_version, new.window, new.limit_nanos) == (True, 2, WindowKind.MONTH, 300)
    assert old == BUDGET.spec()
    top_up = TopUp(amount_nanos=5, starts_at_ms=0)
    _, old = replace(changed, mode=Mode.OBSERVE, top_ups=(top_up,)).specs()
    assert (old.mode, old.top_ups, old.window, old.limit_nanos) == (Mode.OBSERVE, (top_up,), WindowKind.DAY, 10)
    tenant = TenantSnapshot(tenant_id="acme", version=1, budgets=changed.specs())
    assert TenantSnapshot.from_json(tenant.to_json()) == tenant
