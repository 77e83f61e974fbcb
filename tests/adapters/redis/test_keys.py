import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.adapters.redis import keys
from budgetguard.core.counter import counter_name
from budgetguard.core.snapshot import SubjectKind
from budgetguard.core.window import Window
from tests.plugins.redis_calls import a_budget

IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def test_a_shard_is_stable():
    # These decide where money is kept: they must never change.
    assert [keys.shard_of(tenant_id) for tenant_id in ("acme", "globex", "initech")] == [0x82, 0x5B, 0x4C]


def test_tenants_spread_over_all_shards():
    spread = Counter(keys.shard_of(f"tenant-{number}") for number in range(20_000))
    assert len(spread) == keys.SHARDS
    assert max(spread.values()) < 150


def a_name(subject: str) -> str:
    """A template's counter: an id's characters reach a counter's name only there."""
    return counter_name(a_budget("b1", subject_kind=SubjectKind.SESSION, each=True), Window(0, None), subject)


@given(tenant_id=IDS, other=IDS, part=IDS)
def test_all_keys_of_a_tenant_are_in_its_slot_and_no_id_reaches_another_key(tenant_id, other, part):
    shard = keys.shard_of(tenant_id)
    own = [
        keys.epoch(shard),
        keys.generation(shard),
        keys.usage(shard),
        keys.leases(shard),
        keys.refusals(shard),
        keys.refusal_counts(shard),
        keys.refusal_numbers(tenant_id, 60_000),
        keys.tenant(tenant_id),
        keys.tenant_requests(tenant_id),
        keys.api_key(tenant_id, part),
        keys.counter(tenant_id, a_name(part)),
        keys.subjects(tenant_id, part),
        keys.operation(tenant_id, part),
        keys.key_requests(tenant_id, part),
    ]
    assert len(set(own)) == len(own)
    # Redis Cluster hashes what is between the first brace and the next closing one.
    assert {re.search(r"\{(.*?)\}", key)[1] for key in own} == {f"{shard:02x}"}
    assert all(key.count("{") == 1 for key in own)
    if other != tenant_id:
        assert keys.counter(tenant_id, a_name(part)) != keys.counter(other, a_name(part))
        assert keys.subjects(f"{tenant_id}:{other}", part) != keys.subjects(tenant_id, f"{other}:{part}")


@given(tenant_id=IDS, operation_id=IDS)
def test_a_lease_names_its_operation(tenant_id, operation_id):
    assert keys.split_lease_member(keys.lease_member(tenant_id, operation_id)) == (tenant_id, operation_id)


@given(parts=st.lists(IDS, min_size=1), key_id=IDS, other=IDS)
def test_a_count_of_refusals_names_what_it_counts(parts, key_id, other):
    assert keys.split_refusal_count(keys.refusal_count(*parts)) == parts
    # The script sets a source behind it, after a space.
    assert " " not in keys.refusal_group(key_id, other)
    assert keys.refusal_group(f"{key_id}:{other}", "x") != keys.refusal_group(key_id, f"{other}:x")


def test_the_catalog_belongs_to_no_shard():
    assert keys.catalog() == "bg:catalog"


@pytest.mark.parametrize("shard", [0, 255])
def test_a_shard_has_two_digits(shard):
    assert keys.epoch(shard) == f"bg:{{{shard:02x}}}:epoch"
