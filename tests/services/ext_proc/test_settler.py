import asyncio
from dataclasses import replace

import pytest

from budgetguard.core import shard as model
from budgetguard.core.budget import Settlement
from budgetguard.core.operation import End
from ext_proc import settler as settler_module
from ext_proc.leases import Leases
from ext_proc.settler import Settler
from ext_proc.spool import Spool, SpoolFullError, settlement_to_line
from tests.services.ext_proc.support import HOLD_NANOS, NOW_MS, RUN_ID, eventually


def settlement_of(handoff, amount_nanos=7):
    return Settlement(
        handoff=handoff, end=End.CONFIRMED, amount_nanos=amount_nanos, usage=None, ended_at_ms=NOW_MS, status=200
    )


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(settler_module, "BACK_OFF_SECONDS_MIN", 0.001)
    monkeypatch.setattr(settler_module, "BACK_OFF_SECONDS_MAX", 0.02)


@pytest.fixture
def segments(tmp_path):
    return lambda: list((tmp_path / "spool").glob("settlements-*"))


@pytest.fixture
async def started(counters, registry):
    """Start settlers on spools of the test's own."""
    settlers = []

    async def started(spool):
        settlers.append(
            Settler(
                counters,
                spool,
                incarnation=counters.run_id,
                now_ms=lambda: NOW_MS,
                registry=registry,
                watch_every_seconds=0.01,
            )
        )
        await settlers[-1].start()
        return settlers[-1]

    yield started
    for settler in settlers:
        await settler.close()


async def test_a_settlement_goes_straight_to_redis(settler, counters, segments):
    await settler.submit(settlement_of(counters.admit()))
    assert counters.ends == [(End.CONFIRMED, 7)]
    assert segments() == []


async def test_what_redis_does_not_take_is_on_disk_and_then_delivered_in_order(settler, counters, segments):
    handoffs = [counters.admit(f"op-{number}") for number in range(5)]
    counters.silent = True
    for number, handoff in enumerate(handoffs):
        await settler.submit(settlement_of(handoff, number))
    assert len(segments()) > 0
    assert counters.ends == []
    counters.silent = False
    await eventually(lambda: not segments())
    assert counters.ends == [(End.CONFIRMED, number) for number in range(5)]
    assert counters.counter.held == 0


async def test_many_at_once_share_a_write(settler, counters, segments):
    handoffs = [counters.admit(f"op-{number}") for number in range(200)]
    counters.silent = True
    await asyncio.gather(*(settler.submit(settlement_of(handoff)) for handoff in handoffs))
    counters.silent = False
    await eventually(lambda: not segments())
    assert len(counters.ends) == 200


async def test_counters_that_are_being_rebuilt_get_it_later(settler, counters, segments):
    handoff = counters.admit()
    counters.shard.epoch = None
    await settler.submit(settlement_of(handoff))
    assert counters.ends == []
    assert len(segments()) == 1
    counters.shard.epoch = RUN_ID
    await eventually(lambda: not segments())
    assert counters.ends == [(End.CONFIRMED, 7)]


async def test_one_that_redis_refuses_does_not_hold_up_the_others(settler, counters, segments):
    handoffs = [counters.admit(f"op-{number}") for number in range(3)]
    counters.silent = True
    counters.refusing.add("op-0")
    for number, handoff in enumerate(handoffs):
        await settler.submit(settlement_of(handoff, number))
    counters.silent = False
    await eventually(lambda: len(counters.ends) == 2)
    assert segments()
    counters.refusing.clear()
    await eventually(lambda: not segments())
    assert counters.ends == [(End.CONFIRMED, 1), (End.CONFIRMED, 2), (End.CONFIRMED, 0)]


async def test_one_that_redis_refuses_for_ever_holds_up_no_other_in_a_full_spool(counters, started, tmp_path, registry):
    handoffs = [counters.admit(f"op-{number}") for number in range(6)]
    settlements = [settlement_of(handoff, number) for number, handoff in enumerate(handoffs)]
    lines = [len(settlement_to_line(settlement)) for settlement in settlements]
    # Full to the last byte, and each in a segment of its own.
    spool = Spool(tmp_path / "spool", bytes_max=sum(lines), segment_bytes_max=1)
    counters.refusing |= {"op-0", "op-3"}
    counters.silent = True
    settler = await started(spool)
    for settlement in settlements:
        await settler.submit(settlement)
    assert spool.waiting.size_bytes == spool.bytes_max
    counters.silent = False
    await eventually(lambda: len(counters.ends) == 4)
    assert counters.ends == [(End.CONFIRMED, number) for number in (1, 2, 4, 5)]
    settles = counters.settles
    await eventually(lambda: counters.settles > settles + 4)  # it goes round with what is refused, which stays
    assert registry.get_sample_value(LOST, {"why": "spool_full"}) == 0
    counters.refusing.clear()
    await eventually(lambda: spool.waiting.settlements == 0)
    # Whichever of them the round had come to.
    assert sorted(amount_nanos for _, amount_nanos in counters.ends[4:]) == [0, 3]
    assert counters.counter.held == 0


async def test_what_cannot_be_read_is_counted_once_and_kept(counters, started, tmp_path, registry):
    folder = tmp_path / "spool"
    spool = Spool(folder)
    spool.open()
    spool.append([settlement_of(counters.admit(f"op-{number}"), number) for number in range(3)])
    spool.close()
    (path,) = folder.glob("*.jsonl")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"garbage", lines[2][:40]]))
    counters.silent = True
    await started(Spool(folder))
    assert registry.get_sample_value(DAMAGED) == 0
    settles = counters.settles
    await eventually(lambda: counters.settles > settles + 2)  # read again and again
    assert registry.get_sample_value(DAMAGED) == 0
    counters.silent = False
    await eventually(lambda: registry.get_sample_value(DAMAGED) == 2)
    assert counters.ends == [(End.CONFIRMED, 0)]
    (kept,) = folder.glob("settlements-*")
    assert kept.read_bytes() == b"garbage\n" + lines[2][:40] + b"\n"


async def test_a_fault_of_ours_loses_no_settlement(settler, counters, segments, monkeypatch):
    handoff = counters.admit()
    with monkeypatch.context() as patched:
        patched.setattr(counters, "settle", lambda *_, **__: 1 / 0)
        await settler.submit(settlement_of(handoff))
        assert segments()
    await eventually(lambda: not segments())
    assert counters.ends == [(End.CONFIRMED, 7)]


async def test_what_an_earlier_process_left_is_delivered_at_the_start(counters, tmp_path, segments):
    spool = Spool(tmp_path / "spool")
    spool.open()
    spool.append([settlement_of(counters.admit())])
    spool.close()
    settler = Settler(counters, Spool(tmp_path / "spool"), incarnation=counters.run_id, now_ms=lambda: NOW_MS)
    await settler.start()
    await eventually(lambda: not segments())
    assert counters.ends == [(End.CONFIRMED, 7)]
    await settler.close()


async def test_a_redis_that_came_back_older_is_told_again(settler, counters):
    handoff = counters.admit()
    await settler.submit(settlement_of(handoff))
    assert counters.ends == [(End.CONFIRMED, 7)]
    # The process before is gone, and with it the end of this operation.
    lost = model.Shard(epoch="run-2", records=counters.shard.records)
    counters.shard, counters.run_id_now = lost, "run-2"
    await eventually(lambda: counters.ends)
    assert counters.ends == [(End.CONFIRMED, 7)]
    assert counters.shard.events[0].forgotten


async def test_a_redis_that_came_back_whole_is_told_again_for_nothing(settler, counters, segments):
    await settler.submit(settlement_of(counters.admit()))
    counters.shard.epoch = counters.run_id_now = "run-2"
    told_again = []
    settle = counters.settle

    async def settle_and_note(settlement, *, now_ms):
        told_again.append(settlement)
        return await settle(settlement, now_ms=now_ms)

    counters.settle = settle_and_note
    await eventually(lambda: told_again and not segments())
    assert counters.ends == [(End.CONFIRMED, 7)]


async def test_only_the_last_seconds_are_remembered_but_an_outage_does_not_age_them(settler, counters, monkeypatch):
    await settler.submit(settlement_of(counters.admit()))
    counters.silent = True
    monkeypatch.setattr(settler_module, "RECENT_SECONDS", -1.0)
    await asyncio.sleep(0.05)
    assert len(settler._recent) == 1
    counters.silent = False
    await eventually(lambda: not settler._recent)


async def test_without_redis_and_disk_an_alarm_names_the_operations(settler, counters, monkeypatch, caplog):
    handoff = counters.admit()
    counters.silent = True

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(settler._spool, "append", full)
    await settler.submit(settlement_of(handoff))
    (record,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert "op-1" in record.getMessage()
    # The hold stays: it will expire at its full amount, which is never too little.
    assert counters.counter.held == HOLD_NANOS


DAMAGED = "budgetguard_spool_damaged_lines_total"
SPOOLED, DELIVERED, LOST = (f"budgetguard_settlements_{name}_total" for name in ("spooled", "delivered", "lost"))
WAITING, WAITING_BYTES, OLDEST_AGE, ANSWERS = (
    "budgetguard_spool_settlements",
    "budgetguard_spool_bytes",
    "budgetguard_spool_oldest_age_seconds",
    "budgetguard_redis_answers",
)


async def test_an_outage_shows_in_the_metrics_and_so_does_its_end(settler, counters, registry, segments):
    def told(*names):
        return [registry.get_sample_value(name) for name in names]

    def ended(end):
        return registry.get_sample_value("budgetguard_settlements_total", {"end": end})

    handoffs = [counters.admit(f"op-{number}") for number in range(3)]
    assert told(SPOOLED, DELIVERED, WAITING, WAITING_BYTES, OLDEST_AGE, ANSWERS) == [0, 0, 0, 0, 0, 1]
    await settler.submit(settlement_of(handoffs[0]))
    assert (ended("CONFIRMED"), *told(SPOOLED, WAITING)) == (1, 0, 0)
    counters.silent = True
    for handoff in handoffs[1:]:
        await settler.submit(settlement_of(handoff))
    counters.now_ms = NOW_MS + 90_000
    assert told(SPOOLED, DELIVERED, WAITING, OLDEST_AGE, ANSWERS) == [2, 0, 2, 90, 0]
    assert told(WAITING_BYTES) == [sum(path.stat().st_size for path in segments())]
    assert told("budgetguard_spool_bytes_max") == [256 * 2**20]
    counters.silent = False
    await eventually(lambda: not segments())
    await eventually(lambda: told(DELIVERED, ANSWERS) == [2, 1])
    assert told(SPOOLED, WAITING, WAITING_BYTES, OLDEST_AGE) == [2, 0, 0, 0]
    assert (ended("CONFIRMED"), ended("ESTIMATED")) == (3, 0)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "No space left on device"), "disk_failed"),
        (SpoolFullError("it has reached its bound"), "spool_full"),
    ],
)
async def test_what_nobody_takes_is_counted(settler, counters, registry, monkeypatch, error, why):
    counters.silent = True

    def refuse(_):
        raise error

    monkeypatch.setattr(settler._spool, "append", refuse)
    await settler.submit(settlement_of(counters.admit()))
    lost = {why: registry.get_sample_value(LOST, {"why": why}) for why in ("disk_failed", "spool_full")}
    assert lost == {"disk_failed": 0, "spool_full": 0} | {why: 1}
    assert registry.get_sample_value(SPOOLED) == 0


@pytest.fixture
async def own_settler(counters, tmp_path):
    """One that the test closes itself."""
    settler = Settler(counters, Spool(tmp_path / "own"), incarnation=counters.run_id, now_ms=lambda: NOW_MS)
    await settler.start()
    return settler


async def test_closing_waits_for_every_settlement(own_settler, counters):
    handoff = counters.admit()
    counters.gate.clear()
    own_settler.submit(settlement_of(handoff))
    closing = asyncio.create_task(own_settler.close())
    await asyncio.sleep(0.02)
    assert not closing.done()
    counters.gate.set()
    await closing
    assert counters.ends == [(End.CONFIRMED, 7)]


async def test_closing_does_not_wait_for_ever(own_settler, counters, monkeypatch, caplog):
    monkeypatch.setattr(settler_module, "CLOSE_SECONDS", 0.01)
    handoff = counters.admit()
    counters.gate.clear()
    own_settler.submit(settlement_of(handoff))
    await own_settler.close()
    counters.gate.set()
    assert "1 settlements were not taken in time" in caplog.text


async def test_a_renewal_that_fails_is_tried_again(counters):
    leases = Leases(counters, now_ms=lambda: counters.now_ms, sweep_every_seconds=0.001)
    handoffs = [counters.admit(f"op-{number}") for number in range(40)]
    for handoff in handoffs:
        leases.add(handoff)
    before = dict(counters.shard.leases)
    counters.silent = True
    counters.now_ms += 30_000
    leases.start()
    await asyncio.sleep(0.02)
    assert counters.shard.leases == before
    counters.silent = False
    await eventually(lambda: all(lease > before[key] for key, lease in counters.shard.leases.items()))
    await leases.close()


async def test_a_hold_that_is_gone_is_not_renewed_again(counters, caplog):
    leases = Leases(counters, now_ms=lambda: counters.now_ms)
    handoff = counters.admit()
    leases.add(replace(handoff, facts=replace(handoff.facts, operation_id="unknown")))
    counters.now_ms += 30_000
    await leases.sweep()
    await leases.sweep()
    assert len([record for record in caplog.records if "gone" in record.getMessage()]) == 1


async def test_renewing_can_stop_before_it_started(counters):
    await Leases(counters, now_ms=lambda: 0).close()
