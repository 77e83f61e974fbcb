"""Whose spend a call is, decided against a real Redis: records that are old, changes between two calls."""

from dataclasses import replace

from budgetguard.core.snapshot import TagSpec
from ext_authz.call import Admitted
from tests.services.ext_authz.test_check import RECORD, TENANT, reason

TREE = (
    TagSpec(tag_id="company"),
    TagSpec(tag_id="eng", parent_id="company"),
    TagSpec(tag_id="search", parent_id="eng"),
    TagSpec(tag_id="ranking", parent_id="search"),
    TagSpec(tag_id="nightly", parent_id="ranking"),
    TagSpec(tag_id="sales", parent_id="company"),
)
TAGGED = replace(TENANT, version=2, tags=TREE)


async def admitted(bench, **headers):
    answer = await bench.check(**headers)
    assert isinstance(answer, Admitted), answer
    return answer.handoff.facts


async def test_a_leaf_is_held_under_all_its_ancestors_and_the_policy_sees_them(bench):
    await bench.counters.publish_tenant(TAGGED)
    facts = await admitted(bench, x_tags="nightly", x_session_id="s1", x_user_id="jo")
    assert facts.tags == ("company", "eng", "nightly", "ranking", "search") == bench.policy.question.tags
    assert (facts.session_id, facts.end_user, facts.session_name) == ("s1", "jo", "")
    assert bench.policy.question.session_id == "s1"


async def test_what_a_call_says_of_its_session_goes_into_its_facts(bench):
    facts = await admitted(bench, x_session_id="s1", x_session_name="Nightly run", x_session_path="/plan/2")
    assert (facts.session_name, facts.session_path) == ("Nightly run", "/plan/2")


async def test_a_tag_that_an_old_record_does_not_know_works_at_once(bench):
    await admitted(bench)
    await bench.counters.publish_tenant(TAGGED)
    assert (await admitted(bench, x_tags="sales")).tags == ("company", "sales")


async def test_a_move_counts_from_the_very_next_call(bench):
    await bench.counters.publish_tenant(TAGGED)
    assert (await admitted(bench, x_tags="search")).tags == ("company", "eng", "search")
    moved = tuple(replace(tag, parent_id="sales") if tag.tag_id == "search" else tag for tag in TREE)
    await bench.counters.publish_tenant(replace(TAGGED, version=3, tags=moved))
    assert (await admitted(bench, x_tags="search")).tags == ("company", "sales", "search")


async def test_a_deactivated_tag_is_refused_on_the_very_next_call_and_nothing_is_held(bench):
    await bench.counters.publish_tenant(TAGGED)
    await admitted(bench, x_tags="ranking")
    held = await bench.held()
    closed = tuple(replace(tag, active=tag.tag_id != "search") for tag in TREE)
    await bench.counters.publish_tenant(replace(TAGGED, version=3, tags=closed))
    assert reason(await bench.check(x_tags="ranking")) == "TAG_INACTIVE"
    assert await bench.held() == held
    await admitted(bench, x_tags="eng")
    await bench.counters.publish_tenant(replace(TAGGED, version=4))
    await admitted(bench, x_tags="ranking")


async def test_a_fixed_tag_is_on_every_call_of_its_key(bench):
    await bench.counters.publish_tenant(TAGGED)
    await bench.counters.publish_key(replace(RECORD, version=2, tags=("sales",)))
    assert (await admitted(bench)).tags == ("company", "sales")
    assert (await admitted(bench, x_tags="eng")).tags == ("company", "eng", "sales")


async def test_a_required_tag_that_is_missing_is_named_before_the_policy_is_asked(bench):
    await bench.counters.publish_tenant(replace(TAGGED, required_tags=("eng",)))
    answer = await bench.check(x_tags="sales")
    assert (reason(answer), answer.deny.telling.http_status) == ("TAG_REQUIRED", 400)
    assert "missing: eng." in answer.deny.message
    assert bench.policy.question is None
    assert "eng" in (await admitted(bench, x_tags="nightly")).tags
    # Required only since the record that this process has.
    await bench.counters.publish_tenant(replace(TAGGED, version=3, required_tags=("sales",)))
    assert reason(await bench.check(x_tags="nightly")) == "TAG_REQUIRED"


async def test_a_session_is_closed_and_opened_from_one_call_to_the_next(bench):
    await admitted(bench, x_session_id="s1")
    await bench.counters.publish_tenant(replace(TENANT, version=2, closed_sessions=("s1",)))
    answer = await bench.check(x_session_id="s1")
    assert (reason(answer), answer.deny.telling.http_status) == ("SESSION_INACTIVE", 403)
    await admitted(bench, x_session_id="s2")
    await bench.counters.publish_tenant(replace(TENANT, version=3))
    await admitted(bench, x_session_id="s1")


async def test_only_who_knows_the_key_learns_of_tags(bench):
    await bench.counters.publish_tenant(replace(TAGGED, required_tags=("eng",)))
    assert reason(await bench.check(x_api_key="bg_acme_0123456789abcdef_" + "x" * 43, x_tags="nope")) == (
        "API_KEY_UNKNOWN"
    )
    await bench.counters.publish_key(replace(RECORD, version=2))
    assert reason(await bench.check(x_tags="nope")) == "TAG_UNKNOWN"
