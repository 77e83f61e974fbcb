import asyncio
import json
from dataclasses import replace
from decimal import Decimal

import pytest

from budgetguard.adapters.postgres.top_ups import TopUpRepository
from budgetguard.adapters.redis import keys
from budgetguard.core.budget import Refusal
from budgetguard.core.catalog import Catalog
from budgetguard.core.entities import Provider, TopUpDraft
from budgetguard.core.errors import NotFoundError
from budgetguard.core.moments import EARLIEST_MS, LATEST_MS
from budgetguard.core.pricing import PriceOverride
from budgetguard.core.snapshot import KeyStatus, Status, SubjectKind, WindowKind
from control_plane.jobs.publish_catalog import PublishCatalog
from control_plane.jobs.publish_snapshots import FULL_SWEEP_EVERY_S, PublishSnapshots
from tests.services.jobs.conftest import KEY_ID


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


async def test_what_is_published_is_what_postgres_has(plane):
    await plane.make_tenant()
    assert await plane.counters.load_tenant("acme") == await plane.tenants.snapshot("acme")
    assert await plane.counters.load_key("acme", KEY_ID) == await plane.api_keys.snapshot(KEY_ID)
    with pytest.raises(NotFoundError):
        await plane.publisher.publish("nobody")
    with pytest.raises(NotFoundError):
        await plane.publisher.publish_key("z" * 16)


async def test_a_deleted_tenant_and_its_keys_stop_with_one_publish(plane):
    await plane.make_tenant()
    await plane.tenants.delete("acme", actor="a")
    await plane.publisher.publish("acme")
    assert (await plane.counters.load_tenant("acme")).status is Status.DELETED
    assert (await plane.counters.load_key("acme", KEY_ID)).status is KeyStatus.REVOKED


async def test_the_sweep_brings_what_no_rpc_published(plane):
    await plane.make_tenant()
    clock = Clock()
    job = PublishSnapshots(plane.publisher, clock=clock)
    await job.run_once()
    await plane.tenants.update("acme", {"requests_per_minute": 5}, actor="a")
    await plane.api_keys.revoke(KEY_ID, actor="a")
    await job.run_once()
    assert (await plane.counters.load_tenant("acme")).requests_per_minute == 5
    assert (await plane.counters.load_key("acme", KEY_ID)).status is KeyStatus.REVOKED


async def test_what_redis_lost_without_a_change_comes_with_the_full_sweep(plane, owner):
    await plane.make_tenant()
    clock = Clock()
    job = PublishSnapshots(plane.publisher, clock=clock)
    await job.run_once()
    await owner.execute("UPDATE tenants SET updated_at = now() - interval '1 day'")
    await owner.execute("UPDATE api_keys SET updated_at = now() - interval '1 day'")
    await plane.redis.command("DEL", keys.tenant("acme"))
    await plane.redis.command("DEL", keys.api_key("acme", KEY_ID))
    await job.run_once()
    assert await plane.counters.load_tenant("acme") is None
    clock.now_s += FULL_SWEEP_EVERY_S
    await job.run_once()
    assert await plane.counters.load_tenant("acme") is not None
    assert await plane.counters.load_key("acme", KEY_ID) is not None


async def test_a_sweep_goes_through_all_pages(plane, owner):
    await owner.execute(
        """
        INSERT INTO tenants (tenant_id, name, status, version, requests_per_minute, output_tokens_max, clamp)
        SELECT 't' || number, 'x', 'ACTIVE', 1, 0, 1, true FROM generate_series(1, 501) AS number
        """
    )
    await owner.execute(
        """
        INSERT INTO api_keys (key_id, tenant_id, name, secret_sha256, status, version)
        SELECT lpad(number::text, 16, '0'), 't1', 'x', repeat('0', 64), 'ACTIVE', 1
        FROM generate_series(1, 501) AS number
        """
    )
    assert await plane.publisher.sweep() == 1002
    assert await plane.publisher.sweep() == 0


async def test_a_budget_made_mid_window_starts_at_what_was_spent(plane):
    await plane.make_tenant()
    await plane.call("op-1", 60)
    while await plane.drain().run_once():
        pass
    await plane.make_budget("day", window=WindowKind.DAY, limit_nanos=150)
    await plane.make_budget("mine", subject_kind=SubjectKind.API_KEY, subject=KEY_ID, window=WindowKind.LIFETIME)
    await plane.publisher.publish("acme")
    assert await plane.counted() == {"acme-month": (60, 0), "day": (60, 0), "mine": (60, 0)}
    refused = await plane.hold("op-2", nanos=100)
    assert (refused.kind, refused.budget_id, refused.spent) == (Refusal.BUDGET, "day", 60)
    await plane.budgets.update("day", {"window": WindowKind.WEEK, "limit_nanos": 10**9}, actor="a")
    await plane.publisher.publish("acme")
    assert (await plane.counted())["day"] == (60, 0)


async def test_a_budget_made_while_a_job_compares_its_tenant_gets_its_past_all_the_same(plane):
    await plane.make_tenant()
    await plane.call("op-1", 60)
    while await plane.drain().run_once():
        pass
    await plane.make_budget("day", window=WindowKind.DAY, limit_nanos=150)
    async with plane.database.exclusive("reconcile acme"):
        publishing = asyncio.create_task(plane.publisher.publish("acme"))
        await asyncio.wait([publishing], timeout=0.5)
        assert not await plane.publisher.give_past("acme"), "a job has others to look at"
        assert not publishing.done()
    await publishing
    assert await plane.counted() == {"acme-month": (60, 0), "day": (60, 0)}
    assert (await plane.hold("op-2", nanos=100)).kind is Refusal.BUDGET


async def test_nothing_is_published_that_would_not_be_enforced(plane):
    await plane.make_tenant()
    await plane.budgets.update("acme-month", {"window": WindowKind.DAY}, actor="a")
    assert [spec.seeding for spec in (await plane.tenants.snapshot("acme")).budgets] == [True, False]
    await plane.publisher.publish("acme")
    (published,) = (await plane.counters.load_tenant("acme")).budgets
    assert (published.window, published.seeding) == (WindowKind.DAY, False)
    assert await plane.counters.load_tenant("acme") == await plane.tenants.snapshot("acme")
    assert await plane.publisher.sweep() == 0


async def test_a_top_up_admits_the_next_call_until_it_is_taken_back(plane):
    await plane.make_tenant(limit_nanos=100)
    top_ups = TopUpRepository(plane.database)
    assert (await plane.hold("op-1", nanos=150)).kind is Refusal.BUDGET
    draft = TopUpDraft(top_up_id="t1", amount_nanos=50, reason="x")
    await top_ups.add(draft, actor="a", budget_id="acme-month")
    await plane.publisher.publish("acme")
    await plane.call("op-2", 150)
    await top_ups.remove("acme-month", "t1", actor="a")
    await plane.publisher.publish("acme")
    refused = await plane.hold("op-3", nanos=1)
    assert (refused.kind, refused.limit, refused.spent) == (Refusal.BUDGET, 100, 150)


async def test_another_limit_leaves_the_counter_alone(plane):
    await plane.make_tenant()
    await plane.call("op-1", 60)  # not drained: only the counter knows
    await plane.budgets.update("acme-month", {"limit_nanos": 150}, actor="a")
    await plane.publisher.publish("acme")
    assert await plane.counted() == {"acme-month": (60, 0)}


async def test_providers_reach_envoy_and_the_data_plane(plane, tmp_path):
    path = tmp_path / "clusters.json"
    job = PublishCatalog(plane.catalog, plane.counters, clusters_path=path)
    await job.run_once()
    assert json.loads(path.read_text()).get("resources", []) == []
    provider = Provider(
        provider_id="openai", kind="openai", base_url="http://127.0.0.1:9", api_key_env="OPENAI_API_KEY"
    )
    await plane.catalog.put_provider(provider, actor="a")
    await job.run_once()
    assert [cluster["name"] for cluster in json.loads(path.read_text())["resources"]] == ["provider-openai"]
    assert await plane.counters.load_catalog() == (await plane.catalog.catalog()).to_json()
    inode = path.stat().st_ino
    await job.run_once()
    assert path.stat().st_ino == inode
    path.unlink()
    await plane.redis.command("DEL", keys.catalog())
    await job.run_once()
    assert path.exists()
    assert await plane.counters.load_catalog() is not None


@pytest.mark.parametrize(
    ("starts_at", "ends_at", "starts_at_ms"),
    [
        ("-infinity", None, EARLIEST_MS),
        ("0044-03-15 12:00+00 BC", None, EARLIEST_MS),
        ("-infinity", "infinity", EARLIEST_MS),
        ("infinity", None, LATEST_MS),
        ("1970-01-01 00:00+00", "294276-01-01 00:00+00", 0),
    ],
)
async def test_a_price_without_a_readable_time_keeps_no_other_from_being_published(
    plane, owner, starts_at, ends_at, starts_at_ms
):
    provider = Provider(provider_id="openai", kind="openai", base_url="http://127.0.0.1:9", api_key_env="OPENAI_KEY")
    await plane.catalog.put_provider(provider, actor="a")
    good = PriceOverride(
        price_id="good", provider_id="openai", model="g", usd={"input_tokens": Decimal(1)}, starts_at_ms=5
    )
    await plane.catalog.put_price(good, actor="a")
    await owner.execute(
        f"""
        INSERT INTO prices (price_id, provider_id, model, usd, starts_at, ends_at)
        VALUES ('bad', 'openai', 'b', '{{"input_tokens": "2"}}', '{starts_at}',
            {"NULL" if ends_at is None else f"'{ends_at}'"})
        """
    )
    await owner.execute("UPDATE catalog_state SET version = version + 1")
    job = PublishCatalog(plane.catalog, plane.counters, clusters_path=None)
    await job.run_once()
    published = Catalog.from_json(await plane.counters.load_catalog())
    bad = replace(good, price_id="bad", model="b", usd={"input_tokens": Decimal(2)}, starts_at_ms=starts_at_ms)
    assert {price.price_id: price for price in published.prices} == {"good": good, "bad": bad}

    # It is listed, said again, and ended, as any other.
    assert await plane.catalog.prices() == (bad, good)
    assert await plane.catalog.put_price(bad, actor="a") == bad
    if starts_at_ms < LATEST_MS:
        ended = await plane.catalog.put_price(replace(bad, ends_at_ms=99), actor="a")
        await job.run_once()
        assert ended in Catalog.from_json(await plane.counters.load_catalog()).prices


async def test_a_change_while_a_budget_is_given_its_past_is_published_with_its_own(plane, monkeypatch):
    await plane.make_tenant()
    await plane.call("op-1", 60)
    while await plane.drain().run_once():
        pass
    mark_seeded, changes = plane.budgets.mark_seeded, [WindowKind.WEEK, WindowKind.YEAR]

    async def overtaken(budget_id, spec_version):
        if changes:
            await plane.budgets.update(budget_id, {"window": changes.pop()}, actor="a")
        return await mark_seeded(budget_id, spec_version)

    monkeypatch.setattr(plane.budgets, "mark_seeded", overtaken)
    await plane.budgets.update("acme-month", {"window": WindowKind.DAY}, actor="a")
    await plane.publisher.publish("acme")
    (published,) = (await plane.counters.load_tenant("acme")).budgets
    assert (published.window, published.spec_version, published.seeding) == (WindowKind.WEEK, 4, False)
    assert await plane.counted() == {"acme-month": (60, 0)}
