from datetime import UTC, datetime, timedelta

import pytest

from budgetguard.adapters.postgres.carries import CarryRepository
from budgetguard.adapters.postgres.ledger_activity import LedgerActivity
from budgetguard.adapters.postgres.top_ups import TopUpRepository
from budgetguard.core.entities import TopUpDraft
from budgetguard.core.limits import limit_nanos
from budgetguard.core.operation import End
from budgetguard.core.snapshot import WindowKind
from budgetguard.core.window import bounds
from control_plane.jobs import carry_over
from control_plane.jobs.carry_over import CarryOver
from tests.plugins.usage_events import a_delivery
from tests.services.jobs.conftest import now_ms

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
LIMIT = 1_000


class Days:
    """A daily budget with a cap, a clock that stands where it is put, and days counted from today (0)."""

    def __init__(self, plane, owner):
        self.plane = plane
        self.owner = owner
        self.today_ms = now_ms() // DAY_MS * DAY_MS
        self.now_ms = self.today_ms + HOUR_MS
        self.job = self.a_job()

    def a_job(self):
        return CarryOver(
            carries=CarryRepository(self.plane.database),
            ledger=self.plane.ledger,
            activity=LedgerActivity(self.plane.database),
            counters=self.plane.counters,
            publisher=self.plane.publisher,
            now_ms=lambda: self.now_ms,
        )

    async def budget(self, *, carries_since_day: float = -10, cap_nanos: int = 5_000, **changes):
        await self.plane.make_tenant()
        fields = {"window": WindowKind.DAY, **changes}
        await self.plane.make_budget("day", limit_nanos=LIMIT, rollover_cap_nanos=cap_nanos, **fields)
        await self.carries_since(carries_since_day)
        await self.plane.publisher.publish("acme")

    async def carries_since(self, day: float):
        since = datetime.fromtimestamp((self.today_ms + day * DAY_MS) / 1000, UTC)
        await self.owner.execute("UPDATE budgets SET carries_since = $1 WHERE budget_id = 'day'", since)

    async def spend(self, nanos: int, *, day: int = -1, operation_id: str = "op", hour: int = 12, **changes):
        event = {"held_at_ms": self.today_ms + day * DAY_MS + hour * HOUR_MS, "delta_nanos": nanos, **changes}
        inserted = await self.plane.ledger.insert_events([a_delivery(operation_id, **event)])
        assert inserted.rows == 1

    async def carried(self) -> int:
        """What the published record adds to the limit of the day that it is."""
        snapshot = await self.plane.counters.load_tenant("acme")
        (spec,) = [spec for spec in snapshot.budgets if spec.budget_id == "day"]
        return limit_nanos(spec, bounds(spec, self.now_ms), self.now_ms) - spec.limit_nanos


@pytest.fixture
def days(plane, owner):
    return Days(plane, owner)


async def test_what_yesterday_left_is_published_for_today_only(days):
    await days.budget(carries_since_day=-1)
    await days.spend(300)
    await days.job.run_once()
    assert await days.carried() == 700
    assert await days.plane.counters.load_tenant("acme") == await days.plane.tenants.snapshot("acme")
    # The record says which day it is for; tomorrow it is nothing until the job has run.
    days.now_ms += DAY_MS
    assert await days.carried() == 0


async def test_never_more_than_the_cap_and_never_a_debt(days):
    await days.budget(carries_since_day=-1, cap_nanos=250)
    await days.job.run_once()
    assert await days.carried() == 250
    await days.spend(LIMIT + 400)
    await days.job.run_once()
    assert await days.carried() == 0


async def test_what_is_late_lowers_it_and_a_correction_raises_it_again(days):
    await days.budget(carries_since_day=-1)
    await days.spend(300)
    await days.job.run_once()
    await days.spend(500, operation_id="late")
    await days.job.run_once()
    assert await days.carried() == 200
    await days.spend(-100, operation_id="late", end=End.CORRECTED, sequence=2, amount_nanos=400)
    await days.job.run_once()
    assert await days.carried() == 300


async def test_a_run_without_news_changes_nothing(days):
    await days.budget(carries_since_day=-1)
    await days.spend(300)
    await days.job.run_once()
    before = await days.plane.tenants.get("acme")
    for _ in range(3):
        await days.job.run_once()
    await days.a_job().run_once()
    assert await days.plane.tenants.get("acme") == before


@pytest.mark.parametrize(("began_days_ago", "left"), [(1, 700), (2, LIMIT)])
async def test_a_day_later_what_was_left_is_final(days, began_days_ago, left):
    first_day = datetime.fromtimestamp(days.today_ms / 1000, UTC) - timedelta(days=began_days_ago)
    days.now_ms = days.today_ms + 59 * 60_000
    await days.budget(window=WindowKind.WEEK, anchor_day=first_day.isoweekday())
    await days.carries_since(-began_days_ago)
    await days.job.run_once()
    assert await days.carried() == 0
    await days.carries_since(-began_days_ago - 0.5)
    await days.job.run_once()
    assert await days.carried() == LIMIT
    await days.spend(300, day=-began_days_ago - 1)
    await days.job.run_once()
    assert await days.carried() == left


async def test_calls_that_still_run_are_not_given_away(days):
    """A hold of yesterday may yet be spent: it is taken for spent until it has ended."""
    await days.budget(carries_since_day=0)
    held = await days.plane.hold("op-1", nanos=400)
    tomorrow_ms = days.now_ms + DAY_MS
    days.now_ms = tomorrow_ms
    await days.job.run_once()
    assert await days.carried() == 600
    await days.plane.counters.release(held, now_ms=now_ms(), ended_at_ms=now_ms(), status=503, detail="")
    while await days.plane.drain().run_once():
        pass
    await days.job.run_once()
    assert await days.carried() == LIMIT


async def test_usage_that_is_not_in_the_ledger_yet_counts(days):
    await days.budget(carries_since_day=0)
    await days.plane.call("op-1", 60)
    days.now_ms += DAY_MS
    await days.job.run_once()
    assert await days.carried() == LIMIT - 60


async def test_what_was_carried_is_carried_on_day_by_day(days):
    await days.budget(carries_since_day=-3)
    await days.spend(300, day=-3, operation_id="a")
    await days.spend(1_200, day=-2, operation_id="b")
    await days.spend(100, day=-1, operation_id="c")
    # No control plane ran on those days: they are made up for, oldest first. 700, then 500, then 1,400.
    await days.job.run_once()
    assert await days.carried() == 1_400


async def test_a_late_end_of_the_day_before_yesterday_goes_through_the_chain(days):
    await days.budget(carries_since_day=-2)
    days.now_ms = days.today_ms + 30 * 60_000
    await days.job.run_once()
    assert await days.carried() == 2_000
    await days.spend(600, day=-2, hour=23)
    await days.job.run_once()
    assert await days.carried() == 1_400


async def test_only_from_the_window_on_in_which_it_was_made(days):
    await days.budget(carries_since_day=-0.5)
    await days.job.run_once()
    # Made yesterday at noon: yesterday counts, the day before does not.
    assert await days.carried() == LIMIT
    await days.owner.execute("DELETE FROM budget_carries")
    await days.carries_since(0)
    await days.plane.budgets.update("day", {"limit_nanos": LIMIT + 1}, actor="a")
    await days.plane.publisher.publish("acme")
    await days.job.run_once()
    assert await days.carried() == 0


async def test_a_cap_that_is_set_later_begins_with_the_open_window(days):
    await days.plane.make_tenant()
    await days.plane.make_budget("day", window=WindowKind.DAY, limit_nanos=LIMIT)
    await days.carries_since(-10)
    await days.plane.budgets.update("day", {"rollover_cap_nanos": 500}, actor="a")
    await days.plane.publisher.publish("acme")
    await days.job.run_once()
    assert await days.carried() == 0
    days.now_ms += DAY_MS
    await days.job.run_once()
    assert await days.carried() == 500


async def test_another_window_does_not_get_what_the_old_one_left(days):
    await days.budget(carries_since_day=-1)
    await days.job.run_once()
    assert await days.carried() == LIMIT
    await days.plane.budgets.update("day", {"window": WindowKind.WEEK}, actor="a")
    await days.plane.publisher.publish("acme")
    await days.job.run_once()
    assert await days.carried() == 0


async def test_a_limit_that_is_raised_afterwards_was_not_left_over(days):
    await days.budget(carries_since_day=-1)
    await days.spend(300)
    await days.job.run_once()
    await days.plane.budgets.update("day", {"limit_nanos": 50_000}, actor="a")
    await days.plane.publisher.publish("acme")
    await days.spend(1, operation_id="late")
    await days.job.run_once()
    assert await days.carried() == 699


async def test_top_ups_that_applied_as_the_window_closed_are_part_of_it(days):
    await days.budget(carries_since_day=-1)
    top_ups = TopUpRepository(days.plane.database)
    yesterday = days.today_ms - DAY_MS

    async def top_up(top_up_id, nanos, starts_ms, expires_ms=None, *, created_ms=yesterday, removed_ms=None):
        draft = TopUpDraft(top_up_id=top_up_id, amount_nanos=nanos, reason="x")
        await top_ups.add(draft, actor="a", budget_id="day")
        moments = [
            None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)
            for ms in (starts_ms, expires_ms, created_ms, removed_ms)
        ]
        await days.owner.execute(
            "UPDATE budget_top_ups SET starts_at = $2, expires_at = $3, created_at = $4, removed_at = $5 "
            "WHERE top_up_id = $1",
            top_up_id,
            *moments,
        )

    await top_up("stayed", 1, yesterday, days.today_ms)
    await top_up("removed-today", 2, yesterday, None, removed_ms=days.today_ms + 1)
    await top_up("expired", 10, yesterday, days.today_ms - 1)
    await top_up("removed", 20, yesterday, None, removed_ms=days.today_ms - 1)
    await top_up("began-today", 40, days.today_ms, None)
    await top_up("made-today", 80, yesterday, days.today_ms + 1, created_ms=days.today_ms)
    await days.spend(LIMIT)
    await days.job.run_once()
    carries = await CarryRepository(days.plane.database).read(await days.plane.budgets.get("day"), from_ms=0)
    assert [carry.carried_nanos for carry in carries.values()] == [3]


async def test_a_deleted_budget_carries_nothing(days):
    await days.budget(carries_since_day=-1)
    await days.plane.budgets.delete("day", actor="a")
    await days.job.run_once()
    assert await days.owner.fetchval("SELECT count(*) FROM budget_carries") == 0


async def test_what_was_computed_for_another_budget_is_not_written(days):
    await days.budget(carries_since_day=-1)
    stale = await days.plane.budgets.get("day")
    await days.plane.budgets.update("day", {"rollover_cap_nanos": 1}, actor="a")
    await days.job.run_once()
    carries = CarryRepository(days.plane.database)
    (carry,) = (await carries.read(stale, from_ms=0)).values()
    assert carry.carried_nanos == 1
    assert not await carries.write(stale, carry, actor="a")
    await days.plane.budgets.delete("day", actor="a")
    assert not await carries.write(stale, carry, actor="a")


async def test_carried_money_admits_a_call_that_the_limit_alone_would_refuse(days):
    await days.budget(carries_since_day=-1)
    assert (await days.plane.hold("op-1", nanos=LIMIT + 1)).budget_id == "day"
    days.now_ms = now_ms()
    await days.job.run_once()
    held = await days.plane.hold("op-2", nanos=LIMIT + 1)
    assert held.hold_nanos == LIMIT + 1


async def test_every_budget_with_a_cap_is_looked_at_page_by_page(days, monkeypatch):
    monkeypatch.setattr(carry_over, "PAGE", 2)
    await days.budget(carries_since_day=-1)
    for number in range(4):
        await days.plane.make_budget(f"more-{number}", window=WindowKind.DAY, rollover_cap_nanos=number + 1)
    yesterday = datetime.fromtimestamp((days.today_ms - DAY_MS) / 1000, UTC)
    await days.owner.execute("UPDATE budgets SET carries_since = $1", yesterday)
    await days.plane.publisher.publish("acme")
    await days.job.run_once()
    specs = (await days.plane.counters.load_tenant("acme")).budgets
    carried = {spec.budget_id: spec.carried_nanos for spec in specs}
    assert carried == {"acme-month": 0, "day": LIMIT, "more-0": 1, "more-1": 2, "more-2": 3, "more-3": 4}
