from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.events import UsageEvent, entry_order, join_counters, split_counters
from budgetguard.core.operation import End
from budgetguard.core.usage import Usage
from tests.plugins.redis_calls import the_facts

EVENT = UsageEvent(
    facts=the_facts(),
    end=End.CONFIRMED,
    sequence=2,
    delta_nanos=-5,
    amount_nanos=2**53 - 1,
    hold_nanos=7,
    usage=Usage(input_tokens=3, output_tokens=0),
    ended_at_ms=9,
    status=200,
    detail='up"stream\nsaid',
    rate_tier="flex",
    counters=("b1:1:0:", "b2:1:5:6"),
    forgotten=True,
)


@pytest.mark.parametrize("event", [EVENT, replace(EVENT, usage=None, counters=(), forgotten=False)])
def test_an_event_survives_its_encoding(event):
    assert UsageEvent.from_fields(event.to_fields()) == event


def test_an_event_of_before_priced_models_were_told_is_read():
    event = replace(EVENT, facts=replace(EVENT.facts, priced_model="gpt-4o-mini"))
    fields = event.to_fields()
    facts = orjson.loads(fields["facts"])
    assert facts.pop("priced_model") == "gpt-4o-mini"
    assert UsageEvent.from_fields(fields) == event
    assert UsageEvent.from_fields(fields | {"facts": orjson.dumps(facts).decode()}).facts.priced_model == ""


def test_an_event_is_known_by_its_operation_and_sequence_and_ranked_by_its_end():
    assert (EVENT.event_id, EVENT.rank) == ("op-1:2", 3)


@pytest.mark.parametrize("field", sorted(EVENT.to_fields()))
def test_an_event_without_one_of_its_fields_is_malformed(field):
    fields = EVENT.to_fields()
    del fields[field]
    with pytest.raises(ValueError, match="malformed usage event"):
        UsageEvent.from_fields(fields)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("facts", "{}"),
        ("facts", "x"),
        ("end", "DONE"),
        ("usage", '{"x":1}'),
        ("usage", "[]"),
        ("usage", '{"input_tokens":1.5}'),
        ("delta", "1.5"),
    ],
)
def test_an_event_with_a_wrong_field_is_malformed(field, text):
    with pytest.raises(ValueError, match="malformed usage event"):
        UsageEvent.from_fields({**EVENT.to_fields(), field: text})


@given(st.lists(st.text(st.characters(exclude_characters="\n"), min_size=1)).map(tuple))
def test_counter_names_survive_being_joined(names):
    assert split_counters(join_counters(names)) == names


def test_entry_ids_compare_as_the_stream_orders():
    assert entry_order("5-10") > entry_order("5-9")
    with pytest.raises(ValueError, match="invalid"):
        entry_order("5")
