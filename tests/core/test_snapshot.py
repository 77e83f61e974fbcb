import pytest

from budgetguard.core.reasons import TELLING, Deny, Reason
from budgetguard.core.snapshot import BudgetSpec, KeySnapshot, Mode, SubjectKind, TagSpec, TenantSnapshot, WindowKind

BUDGET = BudgetSpec(
    budget_id="b1",
    subject_kind=SubjectKind.API_KEY,
    subject="k",
    window=WindowKind.FIXED,
    limit_nanos=5,
    mode=Mode.OBSERVE,
    starts_at_ms=1,
    ends_at_ms=2,
)


def test_a_tenant_record_survives_its_journey():
    tenant = TenantSnapshot(tenant_id="acme", version=3, budgets=(BUDGET,), requests_per_minute=60)
    read = TenantSnapshot.from_json(tenant.to_json())
    assert read == tenant
    assert read.budgets[0].mode is Mode.OBSERVE


def test_tags_and_closed_sessions_survive_it_too():
    tags = (TagSpec(tag_id="eng"), TagSpec(tag_id="search", parent_id="eng", active=False))
    tenant = TenantSnapshot(
        tenant_id="acme", version=3, tags=tags, required_tags=("eng",), closed_sessions=("s1", "ü"), overrun=True
    )
    assert TenantSnapshot.from_json(tenant.to_json()) == tenant
    key = KeySnapshot(tenant_id="acme", key_id="k", version=1, secret_sha256="00", tags=("eng",), concurrent_calls=0)
    assert KeySnapshot.from_json(key.to_json()) == key


def test_a_record_of_a_program_that_knew_no_tags_is_read():
    assert TenantSnapshot.from_json('{"tenant_id":"acme","version":1,"status":"ACTIVE","budgets":[]}').tags == ()


def test_a_key_record_survives_its_journey():
    key = KeySnapshot(tenant_id="acme", key_id="k", version=1, secret_sha256="00", expires_at_ms=9)
    assert KeySnapshot.from_json(key.to_json()) == key


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"status":"ODD","budgets":[]}', '{"budgets":[{}],"status":"ACTIVE"}']
)
def test_malformed_records_are_refused(text):
    with pytest.raises(ValueError, match="malformed tenant record"):
        TenantSnapshot.from_json(text)
    with pytest.raises(ValueError, match="malformed API key record"):
        KeySnapshot.from_json(text)


def test_every_reason_is_told():
    assert set(TELLING) == set(Reason)
    for reason in Reason:
        assert Deny(reason).message == TELLING[reason].message
        assert 400 <= Deny(reason).telling.http_status < 600
    assert Deny(Reason.POLICY_DENIED, "not today").message == "not today"
