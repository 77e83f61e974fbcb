import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.providers import InvalidRequestError
from budgetguard.core.providers.json_text import DEPTH_MAX, members, parse_object, set_member, without_null

TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=5)
LAYOUTS = st.sampled_from(
    [
        {"separators": (",", ":"), "ensure_ascii": True},
        {"separators": (" ,\n", "\t: "), "ensure_ascii": False},
        {"indent": 3, "ensure_ascii": False},
    ]
)


def spell(value, layout) -> bytes:
    return json.dumps(value, **layout).encode()


@given(OBJECTS, LAYOUTS)
def test_members_are_found_where_they_stand(value, layout):
    text = b" \n" + spell(value, layout)
    found = members(text)
    assert {m.key: json.loads(text[m.value_start : m.value_end]) for m in found} == value


@given(OBJECTS, LAYOUTS, st.sampled_from(["max_tokens", "n"]), st.integers(0, 99), st.booleans())
def test_setting_a_member_changes_that_member_and_no_other_byte(value, layout, key, number, present):
    value = {name: member for name, member in value.items() if name != key}
    if present:
        value = {**value, key: {"old": [1, "}", "longer than any other text here"]}}
    text = spell(value, layout)
    changed = set_member(text, key, str(number).encode())
    assert json.loads(changed) == {**value, key: number}
    if present:
        before, _, after = text.partition(json.dumps(value[key], **layout).encode())
        if layout.get("indent") is None:
            assert changed == before + str(number).encode() + after
    else:
        added = f'"{key}":{number}'.encode() + (b"," if value else b"")
        assert changed == text[:1] + added + text[1:]


def test_a_member_of_an_inner_object_can_be_set():
    text = b'{"a":{"b":1},"stream_options": {"x":{"include_usage":false}} }'
    start = next(m.value_start for m in members(text) if m.key == "stream_options")
    changed = set_member(text, "include_usage", b"true", start=start)
    assert changed == b'{"a":{"b":1},"stream_options": {"include_usage":true,"x":{"include_usage":false}} }'


@given(OBJECTS, LAYOUTS, st.integers(0, 5))
def test_a_null_member_is_removed_with_its_comma(value, layout, place):
    value.pop("usage", None)
    items = list(value.items())
    items.insert(min(place, len(items)), ("usage", None))
    changed = without_null(spell(dict(items), layout), "usage")
    assert json.loads(changed) == value
    if layout.get("indent") is None:
        assert changed == spell(value, layout)


@pytest.mark.parametrize("text", [b'{"usage":1}', b'{"a":{"usage":null}}', b'{"a":"\\"usage\\":null"}', b"{}"])
def test_what_is_not_a_null_member_stays(text):
    assert without_null(text, "usage") == text


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "a JSON object"),
        (b"null", "a JSON object"),
        (b'"x"', "a JSON object"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "-Infinity"),
        (b'{"a":' + b"9" * 5000 + b"}", "ordinary size"),
        (b'{"model":"a","model":"b"}', "'model' twice"),
        (b'{"model":"a","\\u006dodel":"b"}', "'model' twice"),
        (b'{"a":[{"content":"long","content":"x"}]}', "'content' twice"),
        (b'{"a":' * (DEPTH_MAX + 1) + b"1" + b"}" * (DEPTH_MAX + 1), "64 levels"),
        (b"[" * 500_000, "64 levels"),
        (b'{"a":1} x', "not JSON"),
        (b'{"a":"\n"}', "not JSON"),
    ],
)
def test_what_cannot_be_read_one_way_is_refused(body, told):
    with pytest.raises(InvalidRequestError, match=told):
        parse_object(body)


@pytest.mark.parametrize("rest", [b'"b":2', b'"b":', b'"b', b'"b":[1', b""])
def test_text_that_breaks_off_has_the_members_that_are_whole(rest):
    assert [member.key for member in members(b'{"a":1,' + rest)] == ["a"]


def test_a_key_met_twice_is_named_so_that_an_answer_can_be_encoded():
    with pytest.raises(InvalidRequestError) as raised:
        parse_object(b'{"\\ud800":1,"\\ud800":2}')
    assert raised.value.param == "?"


def test_a_key_met_twice_among_very_many_is_found_in_one_pass():
    # Looking each key up in the list of all would be two billion comparisons here: the test would time out.
    keys = b",".join(b'"k%d":1' % number for number in range(65_000))
    with pytest.raises(InvalidRequestError, match="'k64999' twice"):
        parse_object(b"{" + keys + b',"k64999":1}')


def test_the_deepest_text_that_is_taken():
    assert parse_object(b'{"a":' * DEPTH_MAX + b"1" + b"}" * DEPTH_MAX)


def test_brackets_in_strings_and_side_by_side_are_not_depth():
    assert parse_object(b'{"a":"' + b"[" * 200 + b'"}') == {"a": "[" * 200}
    assert parse_object(b'{"a":[' + b"[],{}," * 100 + b"0]}")["a"][0] == []
