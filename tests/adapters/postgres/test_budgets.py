import asyncio
from dataclasses import replace
from decimal import Decimal

import pytest

from budgetguard.adapters.postgres.api_keys import ApiKeyRepository
from budgetguard.adapters.postgres.budgets import BudgetRepository
from budgetguard.adapters.postgres.catalog import CatalogRepository
from budgetguard.adapters.postgres.tags import TagRepository
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.core.entities import BUDGETS_PER_TENANT_MAX, BudgetDraft, Provider, TagStatus
from budgetguard.core.errors import (
    AlreadyExistsError,
    EtagMismatchError,
    InvalidError,
    NotFoundError,
    RequestIdReusedError,
)
from budgetguard.core.money import COUNTER_NANOS_MAX
from budgetguard.core.pricing import PriceOverride, caseless
from budgetguard.core.snapshot import Mode, SubjectKind, WindowKind


@pytest.fixture
async def tenants(database):
    tenants = TenantRepository(database)
    for tenant_id in ("acme", "other"):
        await tenants.create(actor="admin", tenant_id=tenant_id, name=tenant_id)
    return tenants


@pytest.fixture
def budgets(database, tenants):
    return BudgetRepository(database)


def draft(budget_id="b1", **changes):
    given = {"subject_kind": SubjectKind.TENANT, "window": WindowKind.MONTH, "limit_nanos": 100}
    return BudgetDraft(**{"budget_id": budget_id, **given, **changes})


async def create(budgets, budget_id="b1", *, tenant_id="acme", request_id="", **changes):
    return await budgets.create(draft(budget_id, **changes), actor="admin", tenant_id=tenant_id, request_id=request_id)


async def version(tenants) -> int:
    return (await tenants.get("acme")).version


async def test_a_new_budget_is_in_the_tenants_next_version(budgets, tenants):
    created = await create(budgets, limit_nanos=COUNTER_NANOS_MAX)
    assert (created.spec_version, created.version, created.limit_nanos) == (1, 1, COUNTER_NANOS_MAX)
    assert await budgets.get("b1") == created
    snapshot = await tenants.snapshot("acme")
    assert (snapshot.version, snapshot.budgets) == (2, (created.spec(),))
    with pytest.raises(AlreadyExistsError):
        await create(budgets, tenant_id="other")
    assert (await tenants.snapshot("other")).version == 1


async def test_another_limit_keeps_the_counter_another_window_starts_a_new_one(budgets, tenants):
    await create(budgets)
    raised = await budgets.update("b1", {"limit_nanos": 200, "mode": Mode.OBSERVE}, actor="a", expected_version=1)
    assert (raised.limit_nanos, raised.mode, raised.spec_version, raised.version) == (200, Mode.OBSERVE, 1, 2)
    moved = await budgets.update("b1", {"window": WindowKind.DAY, "zone": "Europe/Berlin"}, actor="a")
    assert (moved.window, moved.zone, moved.spec_version, moved.version) == (WindowKind.DAY, "Europe/Berlin", 2, 3)
    assert await version(tenants) == 4
    assert await budgets.update("b1", {"zone": "Europe/Berlin"}, actor="a") == moved
    assert await version(tenants) == 4
    with pytest.raises(EtagMismatchError):
        await budgets.update("b1", {"limit_nanos": 1}, actor="a", expected_version=1)


async def test_dates_belong_to_fixed_windows(budgets):
    fixed = await create(budgets, window=WindowKind.FIXED, starts_at_ms=1_000, ends_at_ms=2_001)
    assert (fixed.starts_at_ms, fixed.ends_at_ms) == (1_000, 2_001)
    later = await budgets.update("b1", {"ends_at_ms": 3_000}, actor="a")
    assert (later.ends_at_ms, later.spec_version) == (3_000, 2)
    lifetime = await budgets.update("b1", {"window": WindowKind.LIFETIME}, actor="a")
    assert (lifetime.starts_at_ms, lifetime.ends_at_ms) == (None, None)
    with pytest.raises(InvalidError):
        await budgets.update("b1", {"ends_at_ms": 3_000}, actor="a")
    with pytest.raises(InvalidError):
        await budgets.update("b1", {"window": WindowKind.FIXED}, actor="a")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"limit_nanos": -1}, "limit_nanos"),
        ({"limit_nanos": COUNTER_NANOS_MAX + 1}, "limit_nanos"),
        ({"zone": "Mars/Olympus"}, "zone"),
        ({"zone": "../../etc/passwd"}, "zone"),
        ({"zone": ""}, "zone"),
        ({"subject": "x"}, "subject"),
        ({"subject_kind": SubjectKind.API_KEY}, "subject"),
        ({"starts_at_ms": 1}, "starts_at_ms"),
        ({"subject_kind": SubjectKind.TAG, "each": True, "subject": "x"}, "each"),
        ({"each": True}, "each"),
        ({"subject_kind": SubjectKind.SESSION, "subject": "x" * 201}, "session_id"),
        ({"subject_kind": SubjectKind.SESSION, "subject": "a\nb"}, "session_id"),
        ({"subject_kind": SubjectKind.SESSION, "subject": " s"}, "session_id"),
        ({"subject_kind": SubjectKind.END_USER, "subject": " "}, "end_user"),
        ({"subject_kind": SubjectKind.MODEL, "subject": "m" * 257}, "model"),
        ({"subject_kind": SubjectKind.TAG, "subject": "a\nb"}, "tag_id"),
        ({"subject_kind": SubjectKind.SESSION, "each": True, "subjects_max": 0}, "subjects_max"),
        ({"subject_kind": SubjectKind.SESSION, "each": True, "subjects_max": 1_000_001}, "subjects_max"),
        ({"subjects_max": 5}, "subjects_max"),
        ({"window": WindowKind.ROLLING}, "rolling_ms"),
        ({"window": WindowKind.ROLLING, "rolling_ms": 59_999}, "rolling_ms"),
        ({"window": WindowKind.ROLLING, "rolling_ms": 366 * 86_400_000 + 1}, "rolling_ms"),
        ({"rolling_ms": 60_000}, "rolling_ms"),
        ({"anchor_day": 32}, "anchor_day"),
        ({"anchor_day": 0}, "anchor_day"),
        ({"window": WindowKind.WEEK, "anchor_day": 8}, "anchor_day"),
        ({"window": WindowKind.DAY, "anchor_day": 2}, "anchor_day"),
        ({"anchor_month": 2}, "anchor_month"),
        ({"window": WindowKind.YEAR, "anchor_month": 13}, "anchor_month"),
        ({"rollover_cap_nanos": -1}, "rollover_cap_nanos"),
        ({"rollover_cap_nanos": COUNTER_NANOS_MAX + 1}, "rollover_cap_nanos"),
        ({"window": WindowKind.LIFETIME, "rollover_cap_nanos": 1}, "rollover_cap_nanos"),
        ({"subject_kind": SubjectKind.TAG, "each": True, "rollover_cap_nanos": 1}, "rollover_cap_nanos"),
        ({"threshold_bps": (0,)}, "threshold_bps"),
        ({"threshold_bps": (100_001,)}, "threshold_bps"),
        ({"threshold_bps": (5, 5)}, "threshold_bps"),
        ({"threshold_bps": tuple(range(1, 22))}, "threshold_bps"),
        ({"window": WindowKind.FIXED, "starts_at_ms": 2, "ends_at_ms": 2}, "ends_at_ms"),
        ({"window": WindowKind.FIXED, "starts_at_ms": 2, "ends_at_ms": 10**18}, "ends_at_ms"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(budgets, tenants, change, field):
    with pytest.raises(InvalidError) as invalid:
        await create(budgets, **change)
    assert invalid.value.violations[0].field == field
    assert await version(tenants) == 1


async def test_a_keys_budget_needs_a_key_of_this_tenant(budgets, database):
    api_keys = ApiKeyRepository(database)
    for tenant_id, letter in (("acme", "a"), ("other", "b")):
        await api_keys.create(actor="x", tenant_id=tenant_id, key_id=letter * 16, name="k", secret_sha256="0" * 64)
    created = await create(budgets, subject_kind=SubjectKind.API_KEY, subject="a" * 16)
    assert created.subject == "a" * 16
    for subject in ("b" * 16, "c" * 16):
        with pytest.raises(NotFoundError):
            await create(budgets, "b2", subject_kind=SubjectKind.API_KEY, subject=subject)


async def test_a_deleted_budget_is_out_of_the_next_version(budgets, tenants):
    await create(budgets)
    await create(budgets, "b2")
    with pytest.raises(EtagMismatchError):
        await budgets.delete("b1", actor="a", expected_version=9)
    deleted = await budgets.delete("b1", actor="a", expected_version=1)
    assert deleted.deleted_at_ms is not None
    snapshot = await tenants.snapshot("acme")
    assert ([spec.budget_id for spec in snapshot.budgets], snapshot.version) == (["b2"], 4)
    for attempt in (budgets.get("b1"), budgets.delete("b1", actor="a"), budgets.update("b1", {}, actor="a")):
        with pytest.raises(NotFoundError):
            await attempt
    with pytest.raises(AlreadyExistsError):
        await create(budgets)


async def test_the_same_request_again_makes_no_second_budget(budgets, tenants):
    first = await create(budgets, request_id="r1")
    assert await create(budgets, "made-anew", request_id="r1") == first
    assert await version(tenants) == 2
    with pytest.raises(RequestIdReusedError):
        await create(budgets, "b2", request_id="r1", limit_nanos=5)


async def test_setting_many_changes_what_is_there_and_is_repeatable(budgets, tenants):
    day = draft("d1", window=WindowKind.DAY)
    month = draft("m1")
    first = await budgets.set_many([day, month], actor="a", tenant_id="acme")
    assert [budget.budget_id for budget in first] == ["d1", "m1"]
    assert await version(tenants) == 2
    again = await budgets.set_many([draft("m2"), draft("d2", window=WindowKind.DAY)], actor="a", tenant_id="acme")
    assert again == (first[1], first[0])
    assert await version(tenants) == 2
    (cheaper,) = await budgets.set_many([draft("m3", limit_nanos=7)], actor="a", tenant_id="acme")
    assert (cheaper.budget_id, cheaper.limit_nanos, cheaper.spec_version) == ("m1", 7, 1)
    assert len((await budgets.list("acme")).items) == 2
    await budgets.set_many([draft("m4", limit_nanos=7)], actor="a", tenant_id="acme", remove_others=True)
    assert [budget.budget_id for budget in (await budgets.list("acme")).items] == ["m1"]
    assert await version(tenants) == 4
    await budgets.set_many([], actor="a", tenant_id="acme", remove_others=True)
    assert (await tenants.snapshot("acme")).budgets == ()


async def test_setting_many_is_all_or_nothing(budgets, tenants):
    await create(budgets, "taken", tenant_id="other")
    with pytest.raises(AlreadyExistsError):
        await budgets.set_many([draft("b1"), draft("taken", window=WindowKind.DAY)], actor="a", tenant_id="acme")
    with pytest.raises(InvalidError):
        await budgets.set_many([draft("b1"), draft("b2", limit_nanos=5)], actor="a", tenant_id="acme")
    assert (await budgets.list("acme")).items == ()
    assert await version(tenants) == 1


async def test_concurrent_changes_of_budgets_each_raise_the_version(budgets, tenants):
    await asyncio.gather(*(create(budgets, f"b{number}") for number in range(8)))
    snapshot = await tenants.snapshot("acme")
    assert (snapshot.version, len(snapshot.budgets)) == (9, 8)


async def test_a_snapshot_never_mixes_versions(budgets, tenants):
    async def read():
        for _ in range(30):
            snapshot = await tenants.snapshot("acme")
            assert snapshot.version == 1 + len(snapshot.budgets)

    async def write():
        for number in range(15):
            await create(budgets, f"b{number}")

    await asyncio.gather(read(), write(), read())


async def test_a_tenant_has_a_bounded_number_of_budgets(budgets, owner):
    await owner.execute(
        f"""
        INSERT INTO budgets (budget_id, tenant_id, subject_kind, subject, window_kind, zone, mode, limit_nanos,
            spec_version, version)
        SELECT 'x' || number, 'acme', 'TENANT', '', 'DAY', 'UTC', 'ENFORCE', 1, 1, 1
        FROM generate_series(1, {BUDGETS_PER_TENANT_MAX}) AS number
        """
    )
    with pytest.raises(InvalidError, match="at most"):
        await create(budgets, "one-more")
    page = await budgets.list("acme", page_size=5000)
    assert (len(page.items), page.next_page_token) == (1000, "")


EVERY_FIELD = {
    "subject_kind": SubjectKind.END_USER,
    "each": True,
    "subjects_max": 7,
    "window": WindowKind.YEAR,
    "zone": "Pacific/Apia",
    "anchor_day": 31,
    "anchor_month": 4,
    "threshold_bps": (1, 100_000),
    "mode": Mode.OBSERVE,
}


async def test_every_field_is_kept_and_reaches_the_snapshot(budgets, tenants):
    template = await create(budgets, **EVERY_FIELD)
    rolling = await create(budgets, "b2", window=WindowKind.ROLLING, rolling_ms=90_000)
    carrying = await create(budgets, "b3", window=WindowKind.WEEK, anchor_day=7, rollover_cap_nanos=5)
    for budget in (template, rolling, carrying):
        assert await budgets.get(budget.budget_id) == budget
    for field, value in EVERY_FIELD.items():
        assert getattr(template, field) == value
    assert (rolling.rolling_ms, carrying.rollover_cap_nanos, carrying.anchor_day) == (90_000, 5, 7)
    specs = (await tenants.snapshot("acme")).budgets
    assert specs == (template.spec(), rolling.spec(), carrying.spec())
    assert (specs[0].each, specs[0].subjects_max, specs[0].anchor_month, specs[1].rolling_ms) == (True, 7, 4, 90_000)
    assert await create(budgets, "b4", request_id="r", **EVERY_FIELD) == await create(
        budgets, "b5", request_id="r", **EVERY_FIELD
    )


async def test_a_new_budget_is_seeding_until_it_is_marked(budgets, tenants):
    created = await create(budgets)
    assert (created.seeding, created.previous_spec) == (True, None)
    assert [spec.seeding for spec in (await tenants.snapshot("acme")).budgets] == [True]
    assert not await budgets.mark_seeded("b1", 2)
    assert await version(tenants) == 2
    assert await budgets.mark_seeded("b1", 1)
    assert [spec.seeding for spec in (await tenants.snapshot("acme")).budgets] == [False]
    assert await version(tenants) == 3
    assert (await budgets.get("b1")).version == created.version
    for budget_id in ("b1", "nothing"):
        assert not await budgets.mark_seeded(budget_id, 1)
    assert await version(tenants) == 3


async def test_until_the_new_window_has_its_past_the_oldest_enforced_one_goes_on(budgets, tenants):
    created = await create(budgets, window=WindowKind.DAY)
    await budgets.mark_seeded("b1", 1)
    enforced = (await budgets.get("b1")).spec()
    first = await budgets.update("b1", {"window": WindowKind.MONTH, "limit_nanos": 900}, actor="a")
    assert (first.seeding, first.previous_spec, first.spec_version) == (True, enforced, 2)
    second = await budgets.update("b1", {"zone": "Asia/Tokyo"}, actor="a")
    assert (second.seeding, second.previous_spec, second.spec_version) == (True, enforced, 3)
    snapshot = await tenants.snapshot("acme")
    assert snapshot.budgets == (second.spec(), enforced)
    assert [(spec.seeding, spec.limit_nanos) for spec in snapshot.budgets] == [
        (True, 900),
        (False, created.limit_nanos),
    ]
    assert not await budgets.mark_seeded("b1", 2)
    assert await budgets.mark_seeded("b1", 3)
    assert (await tenants.snapshot("acme")).budgets == ((await budgets.get("b1")).spec(),)


async def test_a_budget_changed_before_it_ever_counted_has_nothing_to_go_on_with(budgets):
    await create(budgets)
    changed = await budgets.update("b1", {"window": WindowKind.DAY}, actor="a")
    assert (changed.seeding, changed.previous_spec, changed.spec_version) == (True, None, 2)


@pytest.mark.parametrize(
    ("change", "raises"),
    [
        ({"zone": "Asia/Tokyo"}, True),
        ({"anchor_day": 2}, True),
        ({"anchor_month": 2}, True),
        ({"window": WindowKind.QUARTER}, True),
        ({"limit_nanos": 1}, False),
        ({"mode": Mode.OBSERVE}, False),
        ({"rollover_cap_nanos": 5}, False),
        ({"threshold_bps": (1,)}, False),
    ],
)
async def test_only_what_changes_the_counting_starts_another_counter(budgets, change, raises):
    await create(budgets, window=WindowKind.YEAR)
    await budgets.mark_seeded("b1", 1)
    changed = await budgets.update("b1", change, actor="a")
    assert (changed.spec_version, changed.seeding) == ((2, True) if raises else (1, False))
    for field, value in change.items():
        assert getattr(changed, field) == value


async def test_another_kind_of_window_drops_what_belonged_to_the_old_one(budgets):
    await create(budgets, window=WindowKind.YEAR, anchor_day=15, anchor_month=4, rollover_cap_nanos=5)
    quarter = await budgets.update("b1", {"window": WindowKind.QUARTER, "anchor_month": 2}, actor="a")
    assert (quarter.anchor_day, quarter.anchor_month, quarter.rollover_cap_nanos) == (1, 2, 5)
    rolling = await budgets.update("b1", {"window": WindowKind.ROLLING, "rolling_ms": 60_000}, actor="a")
    assert (rolling.anchor_month, rolling.rollover_cap_nanos, rolling.rolling_ms) == (1, None, 60_000)
    day = await budgets.update("b1", {"window": WindowKind.DAY}, actor="a")
    assert day.rolling_ms is None
    with pytest.raises(InvalidError) as invalid:
        await budgets.update("b1", {"window": WindowKind.ROLLING}, actor="a")
    assert invalid.value.violations[0].field == "rolling_ms"


@pytest.fixture
async def provider(database):
    row = Provider(provider_id="openai", kind="openai", base_url="https://a.example", api_key_env="A")
    return await CatalogRepository(database).put_provider(row, actor="a")


async def test_a_budget_is_for_what_calls_can_be_of(budgets, database, provider):
    tags, catalog = TagRepository(database), CatalogRepository(database)
    await tags.create(actor="a", tenant_id="other", tag_id="theirs", name="t")
    closed = await tags.create(actor="a", tenant_id="acme", tag_id="closed", name="t")
    await tags.update("acme", closed.tag_id, {"status": TagStatus.INACTIVE}, actor="a")
    usd = {"input_tokens": Decimal(1), "output_tokens": Decimal(1)}
    for model, starts_at_ms, ends_at_ms in (("ours", 0, None), ("planned", 2**42, None), ("past", 0, 1_000)):
        price = PriceOverride(model, "openai", model, usd, starts_at_ms=starts_at_ms, ends_at_ms=ends_at_ms)
        await catalog.put_price(price, actor="a")
    subjects = {
        (SubjectKind.TAG, "tag_id"): {"closed": True, "theirs": False, "typo": False, "é☃🙂": False, " ": False},
        (SubjectKind.PROVIDER, "provider_id"): {"openai": True, "x": False},
        (SubjectKind.MODEL, "model"): {
            "gpt-4o-mini": True,
            "ours": True,
            "planned": True,
            "past": False,
            "claude-3-5-haiku-latest": False,  # its prices are shipped, but nobody provides it
            "gpt-4o-mimi": False,
        },
        (SubjectKind.SESSION, "session_id"): {"nobody's yet, ☃": True},
        (SubjectKind.END_USER, "end_user"): {"a@example.org": True},
    }
    for (kind, field), known in subjects.items():
        for number, (subject, exists) in enumerate(known.items()):
            budget_id = f"{kind.value.lower()}-{number}"
            if exists:
                await create(budgets, budget_id, subject_kind=kind, subject=subject)
                continue
            with pytest.raises(InvalidError) as invalid:
                await create(budgets, budget_id, subject_kind=kind, subject=subject)
            assert [v.field for v in invalid.value.violations] == [field], subject
            drafts = [draft("x"), draft("y", subject_kind=kind, subject=subject)]
            with pytest.raises(InvalidError) as invalid:
                await budgets.set_many(drafts, actor="a", tenant_id="acme")
            assert [v.field for v in invalid.value.violations] == [f"budgets[1].{field}"]


# The Kelvin sign, and letters that Unicode has in two cases: to calls these are other names.
@pytest.mark.parametrize(
    ("priced", "same", "others"),
    [
        ("Our-K", ["our-k", "OUR-K"], ["our-\u212a"]),
        ("our-\u212a", ["OUR-\u212a"], ["our-k", "our-K"]),
        ("\u0130ris", ["\u0130RIS"], ["iris", "i\u0307ris"]),
        ("\u00e9lan", ["\u00e9LAN"], ["\u00c9LAN"]),
    ],
)
async def test_a_models_price_is_found_by_the_case_of_ascii_letters_only(unicode_database, priced, same, others):
    await TenantRepository(unicode_database).create(actor="a", tenant_id="acme", name="acme")
    catalog, budgets = CatalogRepository(unicode_database), BudgetRepository(unicode_database)
    await catalog.put_provider(
        Provider(provider_id="openai", kind="openai", base_url="https://a.example", api_key_env="A"), actor="a"
    )
    usd = {"input_tokens": Decimal(1), "output_tokens": Decimal(1)}
    await catalog.put_price(PriceOverride("p", "openai", priced, usd), actor="a")
    for number, model in enumerate([priced, *same, *others]):
        # The rule of core, by which calls are admitted.
        assert (caseless(model) == caseless(priced)) == (model not in others)
        if model in others:
            with pytest.raises(InvalidError):
                await create(budgets, f"b{number}", subject_kind=SubjectKind.MODEL, subject=model)
        else:
            await create(budgets, f"b{number}", subject_kind=SubjectKind.MODEL, subject=model)


async def test_a_budget_that_is_there_can_be_set_again_when_its_model_is_gone(budgets, database, provider):
    catalog = CatalogRepository(database)
    price = PriceOverride("p", "openai", "ours", {"input_tokens": Decimal(1), "output_tokens": Decimal(1)})
    await catalog.put_price(price, actor="a")
    (first,) = await budgets.set_many(
        [draft(subject_kind=SubjectKind.MODEL, subject="ours")], actor="a", tenant_id="acme"
    )
    await catalog.put_price(replace(price, ends_at_ms=1_000), actor="a")
    again = [draft("b2", subject_kind=SubjectKind.MODEL, subject="ours", limit_nanos=7)]
    (second,) = await budgets.set_many(again, actor="a", tenant_id="acme")
    assert (second.budget_id, second.limit_nanos) == (first.budget_id, 7)


async def test_setting_many_tells_budgets_apart_by_subject_and_window(budgets, provider):
    drafts = [
        draft("b1"),
        draft("b2", zone="Asia/Tokyo"),
        draft("b3", anchor_day=2),
        draft("b4", window=WindowKind.ROLLING, rolling_ms=60_000),
        draft("b5", window=WindowKind.ROLLING, rolling_ms=60_001),
        draft("b6", subject_kind=SubjectKind.SESSION, subject="s"),
        draft("b7", subject_kind=SubjectKind.SESSION, each=True),
        draft("b8", subject_kind=SubjectKind.MODEL, subject="gpt-4o"),
    ]
    first = await budgets.set_many(drafts, actor="a", tenant_id="acme")
    again = [replace(one, budget_id=f"again-{one.budget_id}", threshold_bps=(9,)) for one in drafts]
    second = await budgets.set_many(again, actor="a", tenant_id="acme", remove_others=True)
    assert [one.budget_id for one in second] == [one.budget_id for one in first]
    assert {one.threshold_bps for one in second} == {(9,)}
    assert {one.spec_version for one in second} == {1}
