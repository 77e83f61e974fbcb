import asyncio
from itertools import pairwise

import orjson
import pytest

from budgetguard.adapters.postgres import tags as module
from budgetguard.adapters.postgres.api_keys import ApiKeyRepository
from budgetguard.adapters.postgres.tags import TagRepository
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.core.entities import TagStatus
from budgetguard.core.errors import (
    AlreadyExistsError,
    EtagMismatchError,
    InvalidError,
    NotFoundError,
    RequestIdReusedError,
)
from budgetguard.core.snapshot import TagSpec
from budgetguard.core.tags import TAG_DEPTH_MAX

INACTIVE = {"status": TagStatus.INACTIVE}
ACTIVE = {"status": TagStatus.ACTIVE}


@pytest.fixture
def tags(database):
    return TagRepository(database)


@pytest.fixture
async def tenants(database):
    tenants = TenantRepository(database)
    for tenant_id in ("acme", "other"):
        await tenants.create(actor="a", tenant_id=tenant_id, name=tenant_id)
    return tenants


@pytest.fixture
def add(tags, tenants):
    async def add(path: str, tenant_id="acme"):
        """Create the last tag of a path below the one before it."""
        *above, tag_id = path.split("/")
        parent_id = above[-1] if above else ""
        return await tags.create(
            actor="a", tenant_id=tenant_id, tag_id=tag_id, name=tag_id.title(), parent_id=parent_id
        )

    return add


async def paths(tags, tenant_id="acme"):
    return [tag.path for tag in (await tags.list(tenant_id)).items]


async def test_a_tree_is_told_with_its_paths_and_reaches_the_record(tags, tenants, add):
    for path in ("company", "company/eng", "eng/search", "company/eng-tools", "prod"):
        made = await add(path)
    assert (made.name, made.path, made.parent_id, made.status, made.version) == ("Prod", "prod", "", "ACTIVE", 1)
    assert (await tags.get("acme", "search")).path == "company/eng/search"
    # Each right before what is below it, although "-" sorts before "/".
    assert await paths(tags) == ["company", "company/eng", "company/eng/search", "company/eng-tools", "prod"]
    snapshot = await tenants.snapshot("acme")
    assert snapshot.version == 6
    assert set(snapshot.tags) == {
        TagSpec(tag_id="company"),
        TagSpec(tag_id="eng", parent_id="company"),
        TagSpec(tag_id="search", parent_id="eng"),
        TagSpec(tag_id="eng-tools", parent_id="company"),
        TagSpec(tag_id="prod"),
    }
    assert (await tenants.snapshot("other")).tags == ()


async def test_ids_belong_to_their_tenant(tags, add):
    await add("eng")
    assert (await add("eng", "other")).tenant_id == "other"
    with pytest.raises(AlreadyExistsError):
        await add("eng")
    for tenant_id, tag_id in (("acme", "nope"), ("nobody", "eng")):
        with pytest.raises(NotFoundError):
            await tags.get(tenant_id, tag_id)
        with pytest.raises(NotFoundError):
            await tags.update(tenant_id, tag_id, INACTIVE, actor="a")
        with pytest.raises(NotFoundError):
            await tags.move(tenant_id, tag_id, parent_id="", actor="a")
    with pytest.raises(NotFoundError):
        await add("nope/below")
    with pytest.raises(NotFoundError):
        await tags.list("nobody")


@pytest.mark.parametrize("tag_id", ["", "a/b", "a,b", "-a", "a b", "ä", "a" * 64, "a\n"])
async def test_an_id_that_a_header_could_not_carry_is_refused(tags, tenants, tag_id):
    with pytest.raises(InvalidError) as invalid:
        await tags.create(actor="a", tenant_id="acme", tag_id=tag_id, name="n")
    assert invalid.value.violations[0].field == "tag_id"


@pytest.mark.parametrize("tag_id", ["a", "A.b_c:d-e", "9", "a" * 63])
async def test_ids_are_permissive(tags, add, tag_id):
    await add(tag_id)
    assert (await tags.get("acme", tag_id)).tag_id == tag_id


async def test_a_create_sent_again_is_answered_the_same(tags, tenants):
    async def create(name="Eng"):
        return await tags.create(actor="a", tenant_id="acme", tag_id="eng", name=name, request_id="r1")

    first = await create()
    assert await create() == first
    assert (await tenants.get("acme")).version == 2
    with pytest.raises(RequestIdReusedError):
        await create("Other")


async def test_a_move_takes_along_what_is_below_and_no_namesake(tags, tenants, add, owner):
    for path in ("a", "a/b", "b/c", "a/b_", "b_/d", "a/bx", "z"):
        await add(path)
    before = (await tenants.get("acme")).version
    moved = await tags.move("acme", "b", parent_id="z", actor="admin")
    assert (moved.path, moved.parent_id, moved.version) == ("z/b", "z", 2)
    assert await paths(tags) == ["a", "a/b_", "a/b_/d", "a/bx", "z", "z/b", "z/b/c"]
    assert (await tags.get("acme", "c")).parent_id == "b"
    assert (await tenants.get("acme")).version == before + 1
    assert (await tags.move("acme", "b_", parent_id="", actor="admin")).path == "b_"
    assert "b_/d" in await paths(tags)
    row = await owner.fetchrow("SELECT before, after FROM admin_audit WHERE action = 'move' ORDER BY audit_id LIMIT 1")
    assert [orjson.loads(row[side])["path"] for side in ("before", "after")] == ["a/b", "z/b"]
    # Where it is already: nothing is written.
    version = (await tenants.get("acme")).version
    await tags.move("acme", "b", parent_id="z", actor="admin")
    assert (await tenants.get("acme")).version == version


async def test_a_cycle_is_refused(tags, add):
    for path in ("a", "a/b", "b/c"):
        await add(path)
    for parent_id in ("a", "b", "c"):
        with pytest.raises(InvalidError, match="not 'a' itself nor below it"):
            await tags.move("acme", "a", parent_id=parent_id, actor="x")
    assert await paths(tags) == ["a", "a/b", "a/b/c"]


async def test_moves_against_each_other_never_make_a_cycle(tags, add):
    for path in ("a", "b"):
        await add(path)
    outcomes = await asyncio.gather(
        tags.move("acme", "a", parent_id="b", actor="x"),
        tags.move("acme", "b", parent_id="a", actor="x"),
        return_exceptions=True,
    )
    assert sum(isinstance(outcome, InvalidError) for outcome in outcomes) == 1
    assert await paths(tags) in (["a", "a/b"], ["b", "b/a"])


async def test_the_depth_is_bounded_for_new_tags_and_for_moves(tags, add):
    names = [f"t{depth}" for depth in range(TAG_DEPTH_MAX)]
    await add(names[0])
    for parent, name in pairwise(names):
        await add(f"{parent}/{name}")
    with pytest.raises(InvalidError, match="16 levels"):
        await add(f"{names[-1]}/deeper")
    await add("root")
    with pytest.raises(InvalidError, match="got 17"):
        await tags.move("acme", names[0], parent_id="root", actor="x")
    assert (await tags.move("acme", names[1], parent_id="root", actor="x")).path == "root/t1"
    assert (await tags.get("acme", names[-1])).path.startswith("root/t1/t2/")


async def test_the_number_of_tags_is_bounded(tags, tenants, add, monkeypatch):
    monkeypatch.setattr(module, "TAGS_PER_TENANT_MAX", 2)
    await add("a")
    await add("b")
    await tags.update("acme", "a", INACTIVE, actor="x")
    version = (await tenants.get("acme")).version
    with pytest.raises(InvalidError, match="at most 2 tags"):
        await add("c")
    assert (await tenants.get("acme")).version == version
    await add("c", "other")


async def test_a_deactivated_tag_stays_and_can_come_back(tags, tenants, add):
    await add("a")
    inactive = await tags.update("acme", "a", INACTIVE, actor="x", expected_version=1)
    assert (inactive.status, inactive.version) == (TagStatus.INACTIVE, 2)
    assert (await tenants.snapshot("acme")).tags == (TagSpec(tag_id="a", active=False),)
    assert await tags.update("acme", "a", INACTIVE, actor="x") == inactive
    with pytest.raises(EtagMismatchError):
        await tags.update("acme", "a", {"name": "New"}, actor="x", expected_version=1)
    version = (await tenants.get("acme")).version
    # A name is nothing that calls know of.
    assert (await tags.update("acme", "a", {"name": "New"}, actor="x")).name == "New"
    assert (await tenants.get("acme")).version == version
    await tags.update("acme", "a", ACTIVE, actor="x")
    assert (await tenants.snapshot("acme")).tags == (TagSpec(tag_id="a"),)
    with pytest.raises(InvalidError):
        await tags.update("acme", "a", {"name": ""}, actor="x")


async def test_a_tenant_requires_open_tags_of_its_own_and_they_stay_open(tags, tenants, add):
    for path in ("a", "a/b", "closed"):
        await add(path)
    await add("theirs", "other")
    await tags.update("acme", "closed", INACTIVE, actor="x")
    for wanted, named in (
        (("theirs",), "'theirs'"),
        (("closed",), "'closed'"),
        (("b", "b"), "each once"),
        (tuple(f"t{n}" for n in range(17)), "at most 16"),
    ):
        with pytest.raises(InvalidError, match=named) as invalid:
            await tenants.update("acme", {"required_tags": wanted}, actor="x")
        assert invalid.value.violations[0].field == "required_tags"
    required = await tenants.update("acme", {"required_tags": ("b",)}, actor="x")
    assert required.required_tags == (await tenants.get("acme")).required_tags == ("b",)
    assert (await tenants.snapshot("acme")).required_tags == ("b",)
    for tag_id in ("a", "b"):
        with pytest.raises(InvalidError, match="'b' to stay open"):
            await tags.update("acme", tag_id, INACTIVE, actor="x")
    with pytest.raises(InvalidError, match="'b' to stay open") as invalid:
        await tags.move("acme", "a", parent_id="closed", actor="x")
    assert invalid.value.violations[0].field == "parent_id"
    assert (await tags.get("acme", "b")).path == "a/b"
    await tenants.update("acme", {"required_tags": ()}, actor="x")
    await tags.update("acme", "a", INACTIVE, actor="x")


async def test_a_key_has_fixed_tags_of_its_tenant(database, add):
    keys = ApiKeyRepository(database)
    await add("a")
    await add("theirs", "other")

    async def create(key_id, *wanted):
        return await keys.create(
            actor="x", tenant_id="acme", key_id=key_id, name="k", secret_sha256="0" * 64, tags=wanted
        )

    with pytest.raises(InvalidError, match="'theirs'") as invalid:
        await create("a" * 16, "theirs")
    assert invalid.value.violations[0].field == "tags"
    made = await create("a" * 16, "a")
    assert made.tags == (await keys.get("a" * 16)).tags == ("a",)
    assert (await keys.list("acme")).items == (made,)
    assert (await keys.snapshot("a" * 16)).tags == ("a",)
    with pytest.raises(InvalidError, match="'nope'"):
        await keys.update("a" * 16, {"tags": ("a", "nope")}, actor="x")
    assert (await keys.update("a" * 16, {"tags": ()}, actor="x")).tags == ()
    assert (await keys.snapshot("a" * 16)).tags == ()


async def test_limits_reach_the_records(database, tenants):
    keys = ApiKeyRepository(database)
    limits = {"tokens_per_minute": 1000, "concurrent_calls": 5}
    own = {"unbounded_share": 4, "stream_slice_tokens": 0, "overrun": True}
    changed = await tenants.update("acme", limits | own, actor="x")
    snapshot = await tenants.snapshot("acme")
    for field, value in (limits | own).items():
        assert getattr(changed, field) == getattr(snapshot, field) == value
    made = await tenants.create(actor="a", tenant_id="third", name="t", **limits, **own)
    assert (made.tokens_per_minute, made.overrun, made.unbounded_share) == (1000, True, 4)
    await keys.create(actor="x", tenant_id="acme", key_id="a" * 16, name="k", secret_sha256="0" * 64, **limits)
    key = await keys.snapshot("a" * 16)
    assert (key.tokens_per_minute, key.concurrent_calls) == (1000, 5)
    await keys.update("a" * 16, {"tokens_per_minute": None, "concurrent_calls": 0}, actor="x")
    key = await keys.snapshot("a" * 16)
    assert (key.tokens_per_minute, key.concurrent_calls) == (None, 0)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("tokens_per_minute", (-1, 2_000_000_001)),
        ("concurrent_calls", (-1, 100_001)),
        ("unbounded_share", (0, 1_001)),
        ("stream_slice_tokens", (-1, 15, 10_000_001)),
    ],
)
async def test_a_limit_out_of_its_bounds_is_refused_by_name(database, tenants, field, values):
    keys = ApiKeyRepository(database)
    await keys.create(actor="x", tenant_id="acme", key_id="a" * 16, name="k", secret_sha256="0" * 64)
    for value in values:
        with pytest.raises(InvalidError) as invalid:
            await tenants.update("acme", {field: value}, actor="x")
        assert invalid.value.violations[0].field == field
        if field in ("tokens_per_minute", "concurrent_calls"):
            with pytest.raises(InvalidError):
                await keys.update("a" * 16, {field: value}, actor="x")


async def test_an_answer_that_was_kept_before_there_were_tags_is_still_given(database, tenants, owner):
    keys = ApiKeyRepository(database)

    async def create():
        tenant = await tenants.create(actor="a", tenant_id="third", name="t", request_id="r1")
        key = await keys.create(
            actor="x", tenant_id="third", key_id="a" * 16, name="k", secret_sha256="0" * 64, request_id="r2"
        )
        return tenant, key

    first = await create()
    await owner.execute(
        "UPDATE request_ids SET answer = answer - '{tags,required_tags,tokens_per_minute,concurrent_calls,overrun,"
        "unbounded_share,stream_slice_tokens}'::text[]"
    )
    assert await create() == first
