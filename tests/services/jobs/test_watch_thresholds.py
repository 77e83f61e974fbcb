import asyncio
from dataclasses import replace

import pytest

from budgetguard.adapters.postgres.budget_events import BudgetEventRepository
from budgetguard.adapters.postgres.ledger_activity import LedgerActivity
from budgetguard.adapters.postgres.top_ups import TopUpRepository
from budgetguard.core.entities import TopUpDraft
from budgetguard.core.errors import DependencyUnavailableError, InvalidError
from budgetguard.core.snapshot import Mode, SubjectKind, WindowKind
from control_plane.jobs.watch_thresholds import WatchThresholds
from tests.plugins.usage_events import a_delivery
from tests.services.jobs.conftest import KEY_ID, now_ms

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


class Watch:
    def __init__(self, plane):
        self.plane = plane
        self.events = BudgetEventRepository(plane.database)
        self.now_ms = now_ms()
        self.job = self.a_job()

    def a_job(self, **changes):
        return WatchThresholds(
            **{
                "events": self.events,
                "tenants": self.plane.tenants,
                "ledger": self.plane.ledger,
                "activity": LedgerActivity(self.plane.database),
                "counters": self.plane.counters,
                "now_ms": lambda: self.now_ms,
                **changes,
            }
        )

    async def spend(self, nanos: int, operation_id: str):
        await self.plane.call(operation_id, nanos)
        await self.drain()

    async def drain(self):
        while await self.plane.drain().run_once():
            pass

    async def seen(self, **wanted):
        """(budget, subject, threshold) of every event, oldest first."""
        page = await self.events.list(**wanted)
        return [(event.budget_id, event.subject, event.threshold_bps) for event in reversed(page.items)]


@pytest.fixture
async def watch(plane):
    await plane.make_tenant(limit_nanos=1_000)
    return Watch(plane)


async def test_each_threshold_is_told_once_with_its_numbers(watch):
    await watch.spend(499, "op-1")
    await watch.job.run_once()
    assert await watch.seen() == []
    await watch.spend(1, "op-2")
    await watch.job.run_once()
    (event,) = (await watch.events.list()).items
    assert (event.threshold_bps, event.spent_nanos, event.limit_nanos) == (5_000, 500, 1_000)
    assert (event.tenant_id, event.budget_id, event.mode) == ("acme", "acme-month", Mode.ENFORCE)
    assert event.window_starts_at_ms <= now_ms() < event.window_resets_at_ms
    await watch.spend(400, "op-3")
    for _ in range(3):
        await watch.job.run_once()
    assert await watch.seen() == [("acme-month", "", 5_000), ("acme-month", "", 8_000)]
    await watch.spend(100, "op-4")
    await watch.job.run_once()
    assert [bps for _, _, bps in await watch.seen()] == [5_000, 8_000, 10_000]


async def test_several_watchers_tell_it_once(watch):
    await watch.spend(950, "op-1")
    await asyncio.gather(*(watch.a_job().run_once() for _ in range(4)))
    await watch.a_job().run_once()
    assert [bps for _, _, bps in await watch.seen()] == [5_000, 8_000]


async def test_observed_budgets_and_those_of_a_key_are_watched_too(watch):
    plane = watch.plane
    await plane.make_budget("seen", mode=Mode.OBSERVE, window=WindowKind.DAY, limit_nanos=100, threshold_bps=(20_000,))
    await plane.make_budget(
        "mine", subject_kind=SubjectKind.API_KEY, subject=KEY_ID, limit_nanos=200, threshold_bps=(10_000,)
    )
    await plane.publisher.publish("acme")
    await watch.spend(200, "op-1")
    await watch.job.run_once()
    assert sorted(await watch.seen()) == [("mine", KEY_ID, 10_000), ("seen", "", 20_000)]
    assert await watch.seen(budget_id="seen") == [("seen", "", 20_000)]
    assert len(await watch.seen(tenant_id="acme")) == 2
    assert await watch.seen(tenant_id="other") == []


async def test_a_lowered_limit_is_crossed_without_a_call(watch):
    await watch.spend(300, "op-1")
    await watch.job.run_once()
    assert await watch.seen() == []
    await watch.plane.budgets.update("acme-month", {"limit_nanos": 300}, actor="a")
    await watch.job.run_once()
    assert len(await watch.seen()) == 3


async def test_thresholds_are_parts_of_the_whole_limit(watch):
    top_ups = TopUpRepository(watch.plane.database)
    draft = TopUpDraft(top_up_id="t1", amount_nanos=1_000, reason="x")
    await top_ups.add(draft, actor="a", budget_id="acme-month")
    watch.now_ms = now_ms()
    await watch.spend(900, "op-1")
    await watch.job.run_once()
    assert await watch.seen() == []
    await watch.spend(100, "op-2")
    await watch.job.run_once()
    (event,) = (await watch.events.list()).items
    assert (event.threshold_bps, event.limit_nanos, event.spent_nanos) == (5_000, 2_000, 1_000)


async def test_what_crossed_just_before_a_window_closed_is_told_for_that_window(watch):
    await watch.plane.make_budget("day", window=WindowKind.DAY, limit_nanos=100, threshold_bps=(10_000,))
    await watch.plane.publisher.publish("acme")
    await watch.spend(100, "op-1")
    today_ms = now_ms() // DAY_MS * DAY_MS
    watch.now_ms = today_ms + DAY_MS + HOUR_MS
    await watch.job.run_once()
    await watch.job.run_once()
    events = [event for event in (await watch.events.list()).items if event.budget_id == "day"]
    assert [(event.window_starts_at_ms, event.window_resets_at_ms) for event in events] == [
        (today_ms, today_ms + DAY_MS)
    ]


async def test_every_subject_of_a_template_is_watched_by_the_ledger(watch):
    plane = watch.plane
    kinds = {
        "session": SubjectKind.SESSION,
        "user": SubjectKind.END_USER,
        "tag": SubjectKind.TAG,
        "model": SubjectKind.MODEL,
        "provider": SubjectKind.PROVIDER,
        "key": SubjectKind.API_KEY,
    }
    for name, kind in kinds.items():
        await plane.make_budget(name, subject_kind=kind, each=True, limit_nanos=100, threshold_bps=(10_000,))
        await plane.budgets.mark_seeded(name, 1)
    rows = [
        {"session_id": "s1", "end_user": "ann", "tags": ("a", "a/b"), "delta_nanos": 60},
        {
            "session_id": "s1",
            "end_user": "bob",
            "tags": ("a",),
            "delta_nanos": 40,
            "model": "gpt-4o-mini-2024-07-18",
            "priced_model": "gpt-4o-mini",
        },
        {"session_id": "s2", "end_user": "bob", "tags": (), "delta_nanos": 59, "model": "other"},
        {"delta_nanos": 1, "model": "free"},
    ]
    for number, row in enumerate(rows):
        facts = {name: row.pop(name) for name in ("session_id", "end_user", "tags") if name in row}
        shard, event_id, event = a_delivery(f"op-{number}", held_at_ms=now_ms(), **row)
        event = replace(event, facts=replace(event.facts, **facts))
        await plane.ledger.insert_events([(shard, event_id, event)])
    await watch.job.run_once()
    await watch.job.run_once()
    assert sorted(await watch.seen()) == [
        ("key", KEY_ID, 10_000),
        ("model", "gpt-4o-mini", 10_000),
        ("provider", "openai", 10_000),
        ("session", "s1", 10_000),
        ("tag", "a", 10_000),
    ]


async def test_a_rolling_budget_tells_a_crossing_once_in_its_period(watch):
    plane = watch.plane
    await plane.make_budget(
        "rolling", window=WindowKind.ROLLING, rolling_ms=HOUR_MS, limit_nanos=100, threshold_bps=(10_000,)
    )
    await plane.budgets.mark_seeded("rolling", 1)
    moment_ms = now_ms()
    await plane.ledger.insert_events(
        [
            a_delivery("gone", held_at_ms=moment_ms - 2 * HOUR_MS, delta_nanos=99),
            a_delivery("there", held_at_ms=moment_ms - HOUR_MS // 2, delta_nanos=99),
        ]
    )
    await watch.job.run_once()
    assert await watch.seen(budget_id="rolling") == []
    await plane.ledger.insert_events([a_delivery("one-more", held_at_ms=moment_ms, delta_nanos=1)])
    watch.now_ms = moment_ms
    for _ in range(2):
        await watch.job.run_once()
    (event,) = (await watch.events.list(budget_id="rolling")).items
    assert event.window_starts_at_ms == moment_ms // HOUR_MS * HOUR_MS
    assert event.window_resets_at_ms - event.window_starts_at_ms == HOUR_MS
    assert event.spent_nanos == 100


async def test_a_budget_that_is_seeding_is_not_judged(watch):
    await watch.spend(900, "op-1")
    await watch.plane.budgets.update("acme-month", {"window": WindowKind.YEAR}, actor="a")
    await watch.job.run_once()
    assert await watch.seen() == []
    await watch.plane.publisher.publish("acme")
    await watch.job.run_once()
    assert len(await watch.seen()) == 2


async def test_one_tenant_that_cannot_be_looked_at_keeps_no_other_from_it_and_is_made_up_for(watch):
    plane = watch.plane
    await plane.make_tenant("beta", key_id="b" * 16, limit_nanos=100)
    await plane.call("op-1", 600)
    await plane.call("op-2", 100, tenant_id="beta", key_id="b" * 16)
    await watch.drain()

    class Broken:
        def __init__(self, events):
            self.events = events
            self.broken = True

        async def budgets(self, tenant_id):
            if self.broken and tenant_id == "acme":
                raise DependencyUnavailableError("Postgres")
            return await self.events.budgets(tenant_id)

        async def record(self, crossings):
            return await self.events.record(crossings)

    broken = Broken(watch.events)
    job = watch.a_job(events=broken)
    with pytest.raises(DependencyUnavailableError):
        await job.run_once()
    assert {budget_id for budget_id, _, _ in await watch.seen()} == {"beta-month"}
    broken.broken = False
    await job.run_once()
    assert await watch.seen(tenant_id="acme") == [("acme-month", "", 5_000)]


async def test_events_are_listed_newest_first_page_by_page(watch):
    await watch.spend(1_000, "op-1")
    await watch.job.run_once()
    first = await watch.events.list(page_size=2)
    second = await watch.events.list(page_size=2, page_token=first.next_page_token)
    assert [event.threshold_bps for event in (*first.items, *second.items)] == [10_000, 8_000, 5_000]
    assert second.next_page_token == ""
    with pytest.raises(InvalidError):
        await watch.events.list(tenant_id="acme", page_token=first.next_page_token)
