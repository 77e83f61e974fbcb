import pytest

from budgetguard.core.dead_events import (
    DeadEventState,
    RecordedDeadEvent,
    operation_told,
    split_dead_event_id,
    tenant_told,
)

DEAD = RecordedDeadEvent(
    shard=17,
    event_id="1750000000000-2",
    tenant_id="",
    error="malformed",
    fields={},
    recorded_at_ms=1,
    state=DeadEventState.STANDING,
    reason="",
    resolved_at_ms=None,
)


def test_an_id_names_shard_and_entry():
    assert DEAD.dead_event_id == "17-1750000000000-2"
    assert split_dead_event_id(DEAD.dead_event_id) == (17, "1750000000000-2")


@pytest.mark.parametrize(
    "text", ["", "17", "17-5", "17-5-", "17-5-0-0", "x-5-0", "1234-5-0", "17-5-0\n", "17-\u0665-0"]
)
def test_what_is_no_id_is_refused(text):
    with pytest.raises(ValueError):
        split_dead_event_id(text)


def test_an_entry_tells_whose_it_is_though_the_rest_cannot_be_read():
    assert tenant_told({"facts": '{"tenant_id":"acme","unheard-of":5}', "delta": "lots"}) == "acme"


@pytest.mark.parametrize(
    "facts",
    [
        "",
        "{",
        "[]",
        '"acme"',
        "{}",
        '{"tenant_id":null}',
        '{"tenant_id":""}',
        '{"tenant_id":5}',
        '{"tenant_id":"ac\\u0000me"}',
        '{"tenant_id":"Acme"}',
        '{"tenant_id":"acme\\n"}',
    ],
)
def test_an_entry_without_the_name_of_a_tenant_tells_nobody(facts):
    assert tenant_told({"facts": facts}) == ""


def test_an_entry_without_facts_tells_nobody():
    assert tenant_told({"nonsense": "x"}) == ""


@pytest.mark.parametrize(
    ("facts", "operation_id"),
    [
        ('{"operation_id":"op-1","unheard-of":5}', "op-1"),
        ('{"operation_id":"op\\u0000"}', ""),
        ('{"operation_id":5}', ""),
        ('{"tenant_id":"acme"}', ""),
        ("{", ""),
    ],
)
def test_an_entry_tells_which_operation_it_is_of(facts, operation_id):
    assert operation_told({"facts": facts}) == operation_id
