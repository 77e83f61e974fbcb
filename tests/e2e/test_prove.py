"""The short form of `make prove`: the same rows with fewer calls. And that the proof can fail."""

import asyncio
from random import Random

import pytest

from bench.prove.afterwards import look_again
from bench.prove.books import CheckedBudget, Counted, difference_nanos
from bench.prove.cell import Result, hold_of, prove_cell
from bench.prove.cells import ROUTES, SUBJECTS, WINDOWS, diagonal
from bench.prove.faults import faults_of, prove_fault
from bench.prove.load import Callers, Outcome
from bench.prove.system import running_system
from bench.prove.trace import Trace, TraceError

CALLS = 300
SEED = 20_251_125


@pytest.fixture(scope="module")
def system():
    with running_system(ext_authz_processes=2) as running:
        yield running


@pytest.fixture(scope="module")
def holds(system):
    async def ask():
        async with Callers(system.running.base_url) as callers:
            return {route.name: await hold_of(system, callers, route, Random(SEED)) for route in ROUTES}

    return asyncio.run(ask())


@pytest.mark.timeout(120)
def test_each_kind_of_budget_is_exact_at_its_last_cent(system, holds):
    """Every subject, window and route is in some row, if not in every combination: that is what `make prove` is for."""
    random = Random(SEED)
    for subject, window, route in diagonal(SUBJECTS, WINDOWS, ROUTES):
        result = asyncio.run(
            prove_cell(system, subject, window, route, calls=CALLS, hold_nanos=holds[route.name], random=random)
        )
        assert result.faults == [], result


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["kill -9 ext_authz_2", "kill -9 ext_proc", "redis stopped for 1 s", "redis FLUSHALL"])
def test_and_after_a_fault_the_books_balance(system, holds, name):
    (fault,) = (fault for fault in faults_of(system) if fault.name == name)
    result = asyncio.run(
        prove_fault(
            *(system, fault), subjects=SUBJECTS, windows=WINDOWS, calls=CALLS, hold_nanos=holds, random=Random(SEED)
        )
    )
    assert result.faults == [], result


@pytest.mark.timeout(120)
def test_and_what_was_rebuilt_stays(system, holds):
    """A new process compares everything of the day: also of who has not called since the loss, it finds all right."""
    random = Random(SEED)
    (fault,) = (fault for fault in faults_of(system) if fault.name == "redis FLUSHALL")
    quiet = asyncio.run(
        prove_cell(
            system, SUBJECTS[0], WINDOWS[0], ROUTES[0], calls=60, hold_nanos=holds[ROUTES[0].name], random=random
        )
    )
    calling = asyncio.run(
        prove_fault(*(system, fault), subjects=SUBJECTS, windows=WINDOWS, calls=100, hold_nanos=holds, random=random)
    )
    assert asyncio.run(look_again(system, [quiet, calling])) == []


# --- The proof itself: each of its looks sees what is wrong.

KEY = "bg:{00}:counter:acme:b1%3A1%3A0%3A"


def written(*commands: str) -> bytes:
    """Spell commands as Redis writes them."""
    text = b""
    for command in commands:
        words = command.split(" ")
        text += b"*%d\r\n" % len(words)
        text += b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words)
    return text


def traced(tmp_path, data: bytes) -> Trace:
    path = tmp_path / "appendonly.aof"
    path.write_bytes(b"")
    trace = Trace(path)
    trace.watch({"b1": 100})
    path.write_bytes(data)
    trace.follow()
    return trace


def test_a_moment_over_the_limit_is_seen_though_it_passed(tmp_path):
    data = written(f"HINCRBY {KEY} held 100", f"HINCRBY {KEY} held 5", f"HINCRBY {KEY} held -105")
    assert traced(tmp_path, data).over_nanos == {"b1:1:0:": 5}


def test_what_one_script_does_is_one_moment(tmp_path):
    moved = written(f"HINCRBY {KEY} held 100", "MULTI", f"HINCRBY {KEY} spent 90", f"HINCRBY {KEY} held -100", "EXEC")
    assert traced(tmp_path, moved).over_nanos == {"b1:1:0:": 0}
    assert traced(tmp_path, moved[: -len(written("EXEC"))]).over_nanos == {"b1:1:0:": 0}


def test_a_trace_goes_on_where_a_write_was_cut(tmp_path):
    data = written(f"HSET {KEY} spent 101")
    trace = traced(tmp_path, data[:-3])
    assert trace.over_nanos == {}
    (tmp_path / "appendonly.aof").write_bytes(data)
    trace.follow()
    assert trace.over_nanos == {"b1:1:0:": 1}
    (tmp_path / "appendonly.aof").write_bytes(b"")
    with pytest.raises(TraceError, match="shorter"):
        trace.follow()


def test_a_flush_tells_what_it_took(tmp_path):
    held = "HELD\x1f70\x1f9\x1fb1:1:0:\x1f{}\x1fasked\x1ftold\x1flimits"
    event = '{"operation_id":"op-1"}'
    data = written(
        f"SET bg:{{00}}:operation:acme:op-2 {held}",
        f"XADD bg:{{00}}:usage 1-1 facts {event} delta 30",
        f"XADD bg:{{00}}:usage 1-2 facts {event} delta 40",
        "XACK bg:{00}:usage ledger 1-2",
        "FLUSHALL",
    )
    lost = traced(tmp_path, data).lost
    assert (lost.nanos, lost.operations) == (100, {"op-1"})


def a_row(**changes):
    return {"held_at_ms": 5, "delta_nanos": 10, "tags": "[]", "key_id": "k", "session_id": "", **changes}


def test_the_ledger_and_the_counters_are_compared_by_subject_and_window():
    of_key = CheckedBudget(budget_id="b1", limit_nanos=1, fields={"api_key_id": "k"})
    of_tag = CheckedBudget(budget_id="b2", limit_nanos=1, fields={"tag_id": "team"})
    each = CheckedBudget(budget_id="b3", limit_nanos=1, fields={"each": "session"}, column="session_id")
    budgets = [of_key, of_tag, each]
    rows = [
        a_row(key_id="other"),
        a_row(tags='["team"]'),
        a_row(session_id="s1"),
        a_row(session_id="s2", delta_nanos=1),
        a_row(held_at_ms=99, session_id="s1"),
    ]
    names = {"b1:1:0:50": 21, "b2:1:0:": 10, "b3:1:0:50:s1": 10, "b3:1:0:50:s2": 1, "b3:1:0:50:": 20}
    counters = [Counted(name=name, spent_nanos=spent, held_nanos=0) for name, spent in names.items()]
    assert difference_nanos(budgets, counters, rows) == {}
    assert difference_nanos(budgets, counters[:3] + counters[4:], rows) == {"b3": 1}
    assert difference_nanos(budgets, counters, rows[1:]) == {"b3": -10}
    assert difference_nanos(budgets, [], rows)["b1"] == 31


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"over_nanos": 1}, "overspent by 1"),
        ({"false_refusals": 1}, "would have fitted"),
        ({"leaked": 1}, "holds without an end"),
        ({"difference_nanos": -1}, "the ledger has -1"),
        ({"unmetered": 1}, "no ledger row"),
        ({"expired": 1}, "nobody saw"),
    ],
)
def test_each_broken_expectation_is_named(changes, said):
    result = Result(name=("x",), calls=2, **changes)
    result.statuses.update([200, 402])
    (fault,) = result.judge().faults
    assert said in fault


def test_a_refusal_is_held_against_its_own_numbers():
    numbers = {"limit_usd": "0.000000100", "spent_usd": "0.000000060", "held_usd": "0.000000010"}
    assert Outcome(status=402, error={**numbers, "needed_usd": "0.000000030"}).refused_falsely
    assert not Outcome(status=402, error={**numbers, "needed_usd": "0.000000031"}).refused_falsely
