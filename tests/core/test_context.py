from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core import context as module
from budgetguard.core.context import CallContext, Contexts
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.snapshot import KeySnapshot, TagSpec, TenantSnapshot
from budgetguard.core.tags import TagTree, depth_of, is_at_or_below, moved_path, path_of

TREE = (
    TagSpec(tag_id="company"),
    TagSpec(tag_id="eng", parent_id="company"),
    TagSpec(tag_id="search", parent_id="eng"),
    TagSpec(tag_id="ranking", parent_id="search"),
    TagSpec(tag_id="nightly", parent_id="ranking"),
    TagSpec(tag_id="sales", parent_id="company"),
    TagSpec(tag_id="closed", parent_id="company", active=False),
    TagSpec(tag_id="within", parent_id="closed"),
    TagSpec(tag_id="prod"),
)
TENANT = TenantSnapshot(tenant_id="acme", version=1, tags=TREE, closed_sessions=("over",))
KEY = KeySnapshot(tenant_id="acme", key_id="k", version=1, secret_sha256="0")


def read(tenant=TENANT, key=KEY, not_utf8=(), repeated=(), **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Contexts().read(names, tenant=tenant, key=key, not_utf8=not_utf8, repeated=repeated)


def refused(answer) -> tuple[Reason, str]:
    assert isinstance(answer, Deny), answer
    return answer.reason, answer.message


def test_a_call_that_tells_nothing_has_an_empty_context():
    assert read() == CallContext() == read(x_tags=" , ", x_session_id=" ", x_user_id="")


def test_a_leaf_brings_all_its_ancestors():
    assert read(x_tags="nightly").tags == ("company", "eng", "nightly", "ranking", "search")


def test_tags_are_told_once_and_sorted_whatever_was_sent():
    assert read(x_tags="sales, eng,prod ,eng,, company").tags == ("company", "eng", "prod", "sales")


def test_who_and_where_is_kept_as_it_was_sent():
    told = read(x_session_id="s/1", x_session_name=" Nächtlicher Lauf ", x_session_path="/plan/3", x_user_id="jo@x.org")
    assert told == CallContext(
        session_id="s/1", session_name="Nächtlicher Lauf", session_path="/plan/3", end_user="jo@x.org"
    )


def test_tags_fixed_on_a_key_cannot_be_dropped_or_replaced():
    key = replace(KEY, tags=("sales",))
    assert read(key=key).tags == ("company", "sales")
    assert read(key=key, x_tags="prod").tags == ("company", "prod", "sales")


@pytest.mark.parametrize("tags", ["nope", "eng,nope", "EVE"])
def test_an_unknown_tag_is_named(tags):
    answer = read(x_tags=tags)
    reason, message = refused(answer)
    unknown = tags.rpartition(",")[2]
    assert reason is Reason.TAG_UNKNOWN
    assert repr(unknown) in message
    assert (answer.facts, answer.param) == ({"tag": unknown}, "X-Tags")


def test_an_inactive_tag_is_refused_and_so_is_what_is_below_it():
    reason, message = refused(read(x_tags="eng, closed"))
    assert (reason, message) == (Reason.TAG_INACTIVE, "X-Tags: tag 'closed' is inactive.")
    reason, message = refused(read(x_tags="within"))
    assert (reason, message) == (
        Reason.TAG_INACTIVE,
        "X-Tags: tag 'within' is below 'closed', which is inactive.",
    )
    answer = read(key=replace(KEY, tags=("closed",)))
    assert refused(answer) == (Reason.TAG_INACTIVE, "This API key: tag 'closed' is inactive.")
    assert answer.param is None


def test_required_tags_may_be_met_by_a_tag_below_them_or_by_the_key():
    tenant = replace(TENANT, required_tags=("eng", "prod"))
    for tags in ("eng,prod", "nightly, prod"):
        assert set(read(tenant=tenant, x_tags=tags).tags) >= {"eng", "prod"}
    assert "prod" in read(tenant=tenant, key=replace(KEY, tags=("prod",)), x_tags="search").tags
    answer = read(tenant=tenant, x_tags="search")
    reason, message = refused(answer)
    assert reason is Reason.TAG_REQUIRED
    assert message == "X-Tags: expected each of eng, prod, or a tag below it; missing: prod."
    assert answer.facts == {"missing_tags": "prod"}
    assert refused(read(tenant=tenant))[1].endswith("missing: eng, prod.")
    # The tag above a required one is not below it.
    assert refused(read(tenant=tenant, x_tags="company,prod"))[0] is Reason.TAG_REQUIRED


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"x_tags": "a/b"}, "X-Tags"),
        ({"x_tags": "ü"}, "X-Tags"),
        ({"x_tags": "-a"}, "X-Tags"),
        ({"x_tags": "a" * 64}, "X-Tags"),
        ({"x_tags": ",".join(f"t{n}" for n in range(17))}, "X-Tags"),
        ({"x_tags": "eng," * 1025}, "X-Tags"),
        ({"x_session_id": "s" * 201}, "X-Session-Id"),
        ({"x_session_id": "a\tb"}, "X-Session-Id"),
        ({"x_session_id": "a\x85b"}, "X-Session-Id"),
        ({"x_session_id": "s", "x_session_name": "n" * 201}, "X-Session-Name"),
        ({"x_session_id": "s", "x_session_path": "\x00"}, "X-Session-Path"),
        ({"x_session_name": "alone"}, "X-Session-Name"),
        ({"x_session_path": "alone"}, "X-Session-Path"),
        ({"x_user_id": "u" * 201}, "X-User-Id"),
    ],
)
def test_what_is_malformed_is_refused_by_name(headers, named):
    answer = read(**headers)
    reason, message = refused(answer)
    assert reason is Reason.REQUEST_INVALID
    assert message.startswith(f"{named}: expected ")
    assert answer.param == named
    assert len(message) < 300


@pytest.mark.parametrize("name", ["X-Tags", "X-Session-Id", "X-Session-Name", "X-Session-Path", "X-User-Id"])
def test_what_is_no_text_names_nobody(name):
    answer = read(x_session_id="s", not_utf8=["authorization", name.lower()])
    assert refused(answer) == (Reason.REQUEST_INVALID, f"{name}: expected UTF-8, got bytes that are none.")
    assert answer.param == name


def test_only_tags_may_be_told_in_several_headers():
    assert read(x_tags="eng,prod", repeated=["x-tags", "cookie"]).tags == ("company", "eng", "prod")
    answer = read(x_session_id="a,b", repeated=["x-session-id"])
    assert refused(answer) == (Reason.REQUEST_INVALID, "X-Session-Id: expected it once, got it several times.")
    assert answer.param == "X-Session-Id"


def test_a_text_of_the_largest_size_passes():
    assert read(x_session_id="s" * 200).session_id == "s" * 200
    tags = tuple(TagSpec(tag_id=f"t{n}") for n in range(16))
    assert len(read(tenant=replace(TENANT, tags=tags), x_tags=",".join(tag.tag_id for tag in tags)).tags) == 16


def test_tags_with_all_above_them_are_bounded():
    """Five branches of 13 tags each are 65."""
    tags = [
        TagSpec(tag_id=f"b{branch}-{depth}", parent_id=f"b{branch}-{depth - 1}" if depth else "")
        for branch in range(5)
        for depth in range(13)
    ]
    tenant = replace(TENANT, tags=tuple(tags))
    assert len(read(tenant=tenant, x_tags="b0-12,b1-12,b2-12,b3-12,b4-11").tags) == 64
    reason, message = refused(read(tenant=tenant, x_tags="b0-12,b1-12,b2-12,b3-12,b4-12"))
    assert reason is Reason.REQUEST_INVALID
    assert message.endswith("got 65.")


def test_a_deactivated_session_is_refused_by_name():
    answer = read(x_session_id="over")
    assert refused(answer) == (Reason.SESSION_INACTIVE, "Session 'over' was deactivated.")
    assert answer.facts == {"session_id": "over"}
    assert read(x_session_id="overture").session_id == "overture"
    assert read(tenant=replace(TENANT, closed_sessions=()), x_session_id="over").session_id == "over"


def test_another_record_of_a_tenant_is_indexed_anew():
    contexts = Contexts()
    for _ in range(2):
        assert contexts.read({"x-tags": "search"}, tenant=TENANT, key=KEY).tags == ("company", "eng", "search")
    moved = replace(TENANT, tags=(*TREE[:2], TagSpec(tag_id="search", parent_id="company")))
    assert contexts.read({"x-tags": "search"}, tenant=moved, key=KEY).tags == ("company", "search")


def test_indexes_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "INDEXED_MAX", 25)
    contexts = Contexts()
    for name in ("a", "b", "c", "c", "a"):
        tenant = replace(TENANT, tenant_id=name)
        assert contexts.read({"x-tags": "prod"}, tenant=tenant, key=KEY).tags == ("prod",)
        assert contexts._size == sum(index.size for index in contexts._indexes.values()) <= 25
    assert list(contexts._indexes) == ["c", "a"]


@given(st.lists(st.sampled_from([tag.tag_id for tag in TREE if tag.tag_id not in ("closed", "within")]), max_size=6))
def test_a_context_is_closed_under_parents(sent):
    parents = {tag.tag_id: tag.parent_id for tag in TREE}
    tags = read(x_tags=",".join(sent)).tags
    assert list(tags) == sorted(set(tags))
    assert set(sent) <= set(tags)
    assert all(parents[tag] in tags for tag in tags if parents[tag])
    assert all(any(tag in TagTree(TREE).line(one) for one in sent) for tag in tags)


def test_paths():
    assert path_of("eng", parent_path="") == "eng"
    assert path_of("search", parent_path="company/eng") == "company/eng/search"
    assert (depth_of("a"), depth_of("a/b/c")) == (1, 3)
    assert is_at_or_below("a/b", "a")
    assert is_at_or_below("a", "a")
    assert not is_at_or_below("ab", "a")
    assert not is_at_or_below("a", "a/b")
    assert moved_path("a/b/c", old_root="a/b", new_root="x/b") == "x/b/c"
    assert moved_path("a/b", old_root="a/b", new_root="b") == "b"
