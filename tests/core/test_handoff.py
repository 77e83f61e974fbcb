import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.handoff import Handoff
from budgetguard.core.operation import OperationFacts
from budgetguard.core.pricing import RateCard
from budgetguard.core.slices import StreamSlices

CARD = RateCard(version="v", rates={"default": {"input_tokens": ((-1, 5),)}})
COUNTERS = st.lists(st.from_regex(r"[a-z0-9:-]{1,20}", fullmatch=True), max_size=4).map(tuple)

WHOSE = ("tags", "session_id", "end_user", "session_name", "session_path", "priced_model")
# What the handoffs of an older release do not have.
LATER = ("priced_model", "search_nanos")


def handoff(**changes) -> Handoff:
    facts = OperationFacts(
        operation_id="op",
        tenant_id="acme",
        key_id="k",
        held_at_ms=1,
        api="openai.chat",
        provider_id="openai",
        model="m",
        price_version="v",
        stream=changes.pop("stream", False),
        **{name: changes.pop(name) for name in WHOSE if name in changes},
    )
    return Handoff(
        **{
            "facts": facts,
            "counters": (),
            "hold_nanos": 7,
            "input_tokens_bound": 1,
            "output_tokens_bound": 2,
            "rate_card": CARD,
            "service_tier": "default",
        }
        | changes
    )


SLICES = st.builds(
    StreamSlices,
    slice_tokens=st.integers(1, 10**6),
    choices=st.integers(1, 128),
    output_femtos=st.integers(0, 10**19),
    output_tokens_largest=st.integers(1, 10**6),
    overrun=st.booleans(),
)


@given(COUNTERS, st.none() | st.integers(0, 10**6), st.booleans(), st.booleans(), st.none() | SLICES)
def test_a_handoff_survives_its_journey(counters, clamped, inject, stream, slices):
    sent = handoff(counters=counters, clamped_output_tokens=clamped, inject_usage=inject, stream=stream, slices=slices)
    values = sent.to_metadata()
    assert all(isinstance(value, str) for value in values.values())
    assert Handoff.from_metadata(values) == sent
    assert sent.rewrites_request == (inject or clamped is not None)


@given(st.tuples(st.lists(st.text(max_size=9), max_size=3).map(tuple), *[st.text(max_size=9)] * 5))
def test_whose_spend_a_call_is_survives_it_too(told):
    sent = handoff(**dict(zip(WHOSE, told, strict=True)), search_nanos=5)
    assert Handoff.from_metadata(sent.to_metadata()) == sent


def inner(**changes) -> dict[str, str]:
    values = handoff().to_metadata()
    return values | {"call": json.dumps(json.loads(values["call"]) | changes)}


@pytest.mark.parametrize("name", sorted(handoff().to_metadata()))
def test_a_missing_field_is_named(name):
    values = handoff().to_metadata()
    del values[name]
    with pytest.raises(ValueError, match=name):
        Handoff.from_metadata(values)


@pytest.mark.parametrize("name", sorted(json.loads(handoff().to_metadata()["call"])))
def test_a_missing_or_mistyped_field_of_the_call_is_named(name):
    values = inner()
    call = json.loads(values["call"])
    del call[name]
    if name not in LATER:
        with pytest.raises(ValueError, match=name):
            Handoff.from_metadata(values | {"call": json.dumps(call)})
    with pytest.raises(ValueError, match=name):
        Handoff.from_metadata(inner(**{name: {}}))


def test_a_call_that_an_older_release_admitted_is_decoded():
    values = handoff(priced_model="").to_metadata()
    call = {name: value for name, value in json.loads(values["call"]).items() if name not in LATER}
    assert Handoff.from_metadata(values | {"call": json.dumps(call)}) == handoff()


@pytest.mark.parametrize("call", ["", "no JSON", "[]", "7", json.dumps({"rate_card": "x"})])
def test_a_malformed_call_is_refused(call):
    with pytest.raises(ValueError, match=r".+"):
        Handoff.from_metadata(handoff().to_metadata() | {"call": call})


def test_slices_are_read_as_strictly():
    good = {"slice_tokens": 1, "choices": 1, "output_femtos": 1, "output_tokens_largest": 1, "overrun": False}
    assert Handoff.from_metadata(inner(slices=good)).slices == StreamSlices(**good)
    for name in good:
        with pytest.raises(ValueError, match=name):
            Handoff.from_metadata(inner(slices=good | {name: "1"}))
        with pytest.raises(ValueError, match=name):
            Handoff.from_metadata(inner(slices={other: value for other, value in good.items() if other != name}))


@pytest.mark.parametrize("name", sorted(handoff().to_metadata()))
def test_what_is_no_text_is_refused(name):
    with pytest.raises(ValueError, match=name):
        Handoff.from_metadata(handoff().to_metadata() | {name: 5})


@pytest.mark.parametrize(
    "changes",
    [
        {"hold_nanos": True},
        {"held_at_ms": 1.5},
        {"rate_card": "{}"},
        {"stream": 1},
        {"tags": "ab"},
        {"tags": ["a", 1]},
        {"counters": [None]},
    ],
)
def test_a_malformed_field_is_refused(changes):
    with pytest.raises(ValueError, match=r".+"):
        Handoff.from_metadata(inner(**changes))
