import json
import os
import shutil
import subprocess
from io import FileIO
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.budget import Settlement
from budgetguard.core.handoff import Handoff
from budgetguard.core.operation import End, OperationFacts
from budgetguard.core.slices import StreamSlices
from budgetguard.core.usage import USAGE_KINDS, Usage
from ext_proc import spool as spool_module
from ext_proc.spool import Spool, SpoolError, SpoolFullError, Waiting, settlement_from_line, settlement_to_line
from tests.services.ext_proc.support import CARD, NOW_MS, ModelCounters


@pytest.fixture
async def settlements():
    counters = ModelCounters()
    return [
        Settlement(
            handoff=counters.admit(f"op-{number}", stream=True, inject_usage=True),
            end=End.CONFIRMED if number % 2 else End.ESTIMATED,
            amount_nanos=number,
            usage=Usage(input_tokens=number, output_tokens=0) if number % 2 else None,
            ended_at_ms=NOW_MS + number,
            status=200,
            detail="détail\nof two lines",
            rate_tier="default",
        )
        for number in range(9)
    ]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "not" / "there" / "yet"


@pytest.fixture
def opened():
    spools = []

    def opened(folder, **options):
        spools.append(Spool(folder, **options))
        spools[-1].open()
        return spools[-1]

    yield opened
    for spool in spools:
        spool.close()


def everything_in(spool):
    found = []
    below = spool.seal()
    while segment := spool.oldest(below=below):
        found += segment.settlements
        spool.remove(segment)
    return found


def after_kill(folder):
    """What a killed process leaves: its files, but not its lock."""
    left = folder.with_name(f"{folder.name}-left")
    shutil.copytree(folder, left)
    return left


def test_a_line_carries_all_of_a_settlement(settlements):
    for settlement in settlements:
        line = settlement_to_line(settlement)
        assert line.count(b"\n") == 1
        assert settlement_from_line(line) == settlement


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"7", b'{"handoff":{}}', b"\x00\x00\x00"])
def test_other_lines_are_refused(line):
    with pytest.raises(ValueError):
        settlement_from_line(line)


class Encoded:
    """JSON that is a text in other JSON."""

    def __init__(self, value):
        self.value = value


def opened_up(line):
    """Decode a line, and the texts of JSON in it."""
    settlement = json.loads(line)
    call = json.loads(settlement["handoff"]["call"])
    call["rate_card"] = Encoded(json.loads(call["rate_card"]))
    settlement["handoff"]["call"] = Encoded(call)
    return settlement


def places(value):
    """Return the ways to all values in it."""
    value = value.value if isinstance(value, Encoded) else value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(name, *way) for name, inner in inside for way in [(), *places(inner)]]


def with_other(value, way, other):
    """Encode it again, with another value at the end of this way; ``None`` leads nowhere."""
    if way == ():
        return other
    if isinstance(value, Encoded):
        return json.dumps(with_other(value.value, way, other))

    def inside(name, inner):
        return with_other(inner, way[1:] if way and way[0] == name else None, other)

    if isinstance(value, dict):
        return {name: inside(name, inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [inside(number, inner) for number, inner in enumerate(value)]
    return value


COUNTS = st.none() | st.integers(0, 10**9)
TEXTS = st.text(max_size=9)
SETTLEMENTS = st.builds(
    Settlement,
    handoff=st.builds(
        Handoff,
        facts=st.builds(
            OperationFacts,
            **dict.fromkeys(("operation_id", "tenant_id", "key_id", "api", "provider_id", "model"), TEXTS),
            **dict.fromkeys(("session_id", "end_user", "session_name", "session_path", "priced_model"), TEXTS),
            held_at_ms=st.integers(0, 2**53),
            price_version=st.just(CARD.version),
            stream=st.booleans(),
            tags=st.lists(TEXTS, max_size=2).map(tuple),
        ),
        counters=st.lists(TEXTS, max_size=2).map(tuple),
        hold_nanos=st.integers(0, 10**15),
        input_tokens_bound=st.integers(0, 10**9),
        output_tokens_bound=st.integers(0, 10**9),
        rate_card=st.just(CARD),
        service_tier=TEXTS,
        clamped_output_tokens=COUNTS,
        inject_usage=st.booleans(),
        slices=st.none()
        | st.builds(
            StreamSlices,
            slice_tokens=st.integers(1, 10**6),
            choices=st.integers(1, 128),
            output_femtos=st.integers(0, 10**19),
            output_tokens_largest=st.integers(1, 10**6),
            overrun=st.booleans(),
        ),
        search_nanos=st.integers(0, 10**9),
    ),
    end=st.sampled_from([End.CONFIRMED, End.ESTIMATED]),
    amount_nanos=st.integers(0, 10**15),
    usage=st.none() | st.builds(Usage, **dict.fromkeys(USAGE_KINDS, COUNTS)),
    ended_at_ms=st.integers(0, 2**53),
    status=st.integers(0, 599),
    detail=TEXTS,
    rate_tier=TEXTS,
)

# Values of every JSON type; none of the objects is one that could stand anywhere.
OTHERS = (None, False, True, 0, 1, 1.0, 5.5, "", "1", "x", [], [1], [[1, 2]], {"x": 1})
# What may be missing. The rest has one type.
MAY_BE_NULL = {("usage",), ("handoff", "call", "clamped_output_tokens"), ("handoff", "call", "slices")}


def json_type(value):
    return str if isinstance(value, Encoded) else type(value)


@given(SETTLEMENTS)
def test_any_settlement_survives_its_line(settlement):
    assert settlement_from_line(settlement_to_line(settlement)) == settlement
    assert settlement_from_line(orjson.dumps(with_other(opened_up(settlement_to_line(settlement)), None, None))) == (
        settlement
    )


@given(SETTLEMENTS, st.data())
def test_a_value_of_another_type_is_damage_wherever_it_is(settlement, data):
    line = opened_up(settlement_to_line(settlement))
    way = data.draw(st.sampled_from(places(line)))
    found = line
    for name in way:
        found = (found.value if isinstance(found, Encoded) else found)[name]
    other = data.draw(st.sampled_from(OTHERS).filter(lambda other: json_type(other) is not json_type(found)))
    if way in MAY_BE_NULL and (
        other is None or (found is None and way[-1].startswith("clamped") and type(other) is int)
    ):
        assert settlement_from_line(orjson.dumps(with_other(line, way, other))) != settlement
        return
    with pytest.raises(ValueError, match=r".+"):
        settlement_from_line(orjson.dumps(with_other(line, way, other)))


@pytest.mark.parametrize("change", [{"ended_at_ms": "1"}, {"amount_nanos": 5.5}, {"status": True}, {"usage": {"x": 1}}])
def test_a_line_of_wrong_types_is_kept_for_people_and_not_sent(opened, folder, settlements, caplog, change):
    opened(folder).append(settlements[:2])
    left = after_kill(folder)
    (path,) = left.glob("*.jsonl")
    lines = path.read_bytes().splitlines()
    damaged = orjson.dumps(orjson.loads(lines[0]) | change)
    path.write_bytes(damaged + b"\n" + lines[1] + b"\n")
    assert everything_in(opened(left)) == settlements[1:2]
    assert damaged_files(left) == {path.with_suffix(".damaged").name: damaged + b"\n"}
    (alarm,) = alarms(caplog)
    assert alarm.startswith("alarm=spool_damaged lines=1 ")


def test_settlements_come_back_in_order(opened, folder, settlements):
    spool = opened(folder)
    for start in range(0, 9, 2):
        spool.append(settlements[start : start + 2])
    assert everything_in(spool) == settlements
    assert spool.oldest(below=spool.seal()) is None
    spool.append(settlements[:1])
    assert everything_in(spool) == settlements[:1]


def test_they_survive_a_kill(opened, folder, settlements):
    opened(folder, segment_bytes_max=1).append(settlements[:3])
    left = opened(after_kill(folder), segment_bytes_max=1)
    left.append(settlements[3:4])
    assert everything_in(left) == settlements[:4]


def test_a_spool_says_whether_there_is_anything_to_deliver(folder, settlements):
    spool = Spool(folder)
    assert not spool.open()
    assert everything_in(spool) == []
    spool.append(settlements)
    spool.close()
    assert spool.open()
    spool.close()


def damaged_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.damaged")}


def alarms(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if (record.levelname, record.name) == ("CRITICAL", "ext_proc.spool")
    ]


@pytest.mark.parametrize("kept_bytes", [1, 50, -2])
def test_a_torn_last_line_is_kept_for_people(opened, folder, settlements, caplog, kept_bytes):
    opened(folder).append(settlements[:2])
    left = after_kill(folder)
    (path,) = left.glob("*.jsonl")
    torn = settlement_to_line(settlements[2])[:kept_bytes]
    path.write_bytes(path.read_bytes() + torn)
    assert everything_in(opened(left)) == settlements[:2]
    assert list(left.glob("*.jsonl")) == []
    assert damaged_files(left) == {path.with_suffix(".damaged").name: torn + b"\n"}
    (alarm,) = alarms(caplog)
    assert alarm.startswith("alarm=spool_damaged lines=1 ")


def test_a_line_that_lacks_nothing_but_its_end_is_delivered(opened, folder, settlements, caplog):
    opened(folder).append(settlements[:2])
    left = after_kill(folder)
    (path,) = left.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-1])
    assert everything_in(opened(left)) == settlements[:2]
    assert (damaged_files(left), alarms(caplog)) == ({}, [])


# Flipped bits, a hole of zeros, another write over it, a line that lost its end to the next one's.
@pytest.mark.parametrize(
    "damage", [lambda line: b"\xff" + line[1:], lambda line: bytes(len(line)), lambda _: b"garbage"]
)
def test_a_damaged_line_is_kept_for_people_and_loses_no_other(opened, folder, settlements, caplog, damage):
    opened(folder).append(settlements[:3])
    left = after_kill(folder)
    (path,) = left.glob("*.jsonl")
    lines = path.read_bytes().split(b"\n")
    damaged = damage(lines[1])
    path.write_bytes(b"\n".join([lines[0], damaged, lines[2], b""]))
    assert everything_in(opened(left)) == [settlements[0], settlements[2]]
    assert list(left.glob("*.jsonl")) == []
    (kept,) = damaged_files(left).items()
    assert kept == (path.with_suffix(".damaged").name, damaged + b"\n")
    (alarm,) = alarms(caplog)
    assert alarm.startswith(f"alarm=spool_damaged lines=1 bytes={len(damaged) + 1} kept={left}")


def damage_all(folder):
    """Leave no line in any segment, and say what they are now."""
    found = []
    for path in folder.glob("*.jsonl"):
        found.append(b"damaged in " + path.name.encode() + b"\n")
        path.write_bytes(found[-1])
    return found


def test_damaged_lines_of_an_earlier_process_are_not_written_over(opened, folder, settlements):
    opened(folder).append(settlements[:1])
    left = after_kill(folder)
    found = damage_all(left)
    everything_in(opened(left))
    # It is empty now, and numbers could begin again.
    again = after_kill(left)
    opened(again).append(settlements[1:2])
    last = after_kill(again)
    found += damage_all(last)
    everything_in(opened(last))
    assert sorted(damaged_files(last).values()) == sorted(found)
    assert len(set(found)) == 2


def test_damaged_lines_are_bounded_and_the_last_are_kept(opened, folder, settlements, caplog):
    opened(folder, segment_bytes_max=1)
    spool = opened(after_kill(folder), segment_bytes_max=1)
    for settlement in settlements:
        spool.append([settlement])
    left = after_kill(folder.with_name(f"{folder.name}-left"))
    found = sorted(damage_all(left))
    bound = 2 * len(found[0]) + 1
    everything_in(opened(left, damaged_bytes_max=bound))
    assert sorted(damaged_files(left).values()) == found[-2:]
    assert sum("dropped=" in alarm for alarm in alarms(caplog)) == len(found) - 2
    # One that is larger than the bound alone is kept all the same.
    tiny = after_kill(left)
    spool = opened(tiny, damaged_bytes_max=1)
    spool.append(settlements[:1])
    spool.seal()
    (last,) = damage_all(tiny)
    everything_in(spool)
    assert list(damaged_files(tiny).values()) == [last]


def test_a_spool_knows_what_waits_in_it_also_what_was_left(opened, folder, settlements):
    sizes = [len(settlement_to_line(settlement)) for settlement in settlements]
    spool = opened(folder, segment_bytes_max=1)
    assert spool.waiting == Waiting(0, 0, None)
    spool.append(settlements[5:7])
    spool.append(settlements[2:3])
    expected = Waiting(3, sum(sizes[5:7]) + sizes[2], NOW_MS + 2)
    assert spool.waiting == expected
    left = opened(after_kill(folder))
    assert left.waiting == expected
    left.remove(left.oldest(below=left.seal()))
    assert left.waiting == Waiting(1, sizes[2], NOW_MS + 2)
    assert everything_in(left) == settlements[2:3]
    assert left.waiting == Waiting(0, 0, None)


def test_what_cannot_be_read_waits_too(opened, folder, settlements):
    opened(folder).append(settlements[:2])
    left = after_kill(folder)
    (path,) = left.glob("*.jsonl")
    path.write_bytes(b"garbage\n" + settlement_to_line(settlements[1]))
    os.utime(path, (5, 7))
    assert opened(left).waiting == Waiting(2, path.stat().st_size, 7_000)
    torn = after_kill(left)
    next(torn.glob("*.jsonl")).write_bytes(b"torn")
    assert opened(torn).waiting == Waiting(0, 4, None)


def test_what_is_appended_while_a_segment_is_delivered_comes_after_it(opened, folder, settlements):
    spool = opened(folder)
    spool.append(settlements[:1])
    below = spool.seal()
    segment = spool.oldest(below=below)
    spool.append(settlements[1:2])
    spool.remove(segment)
    assert spool.oldest(below=below) is None
    assert everything_in(spool) == settlements[1:2]


def test_segments_are_bounded(opened, folder, settlements):
    spool = opened(folder, segment_bytes_max=len(settlement_to_line(settlements[0])))
    for settlement in settlements:
        spool.append([settlement])
    assert len(list(folder.glob("*.jsonl"))) == 9
    assert everything_in(spool) == settlements


def test_the_spool_is_bounded_also_by_what_was_left(opened, folder, settlements):
    line_bytes = len(settlement_to_line(settlements[0]))
    opened(folder).append(settlements[:2])
    left = opened(after_kill(folder), bytes_max=3 * line_bytes + 200)
    left.append(settlements[2:3])
    with pytest.raises(SpoolFullError):
        left.append(settlements[3:4])
    assert everything_in(left) == settlements[:3]
    left.append(settlements[3:4])


def test_what_is_put_back_may_pass_the_bound_as_long_as_its_segment_is_there(opened, folder, settlements):
    spool = opened(folder, bytes_max=sum(len(settlement_to_line(settlement)) for settlement in settlements[:3]))
    spool.append(settlements[:3])
    with pytest.raises(SpoolFullError):
        spool.append(settlements[3:4])
    spool.remove(spool.oldest(below=spool.seal()), put_back=settlements[:3])
    assert spool.waiting.size_bytes == spool.bytes_max
    with pytest.raises(SpoolFullError):
        spool.append(settlements[3:4])
    assert everything_in(spool) == settlements[:3]


class Kills:
    """Copies the folder whenever something of it is about to change: what a kill would leave at that moment."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.left = folder, []
        self.before(monkeypatch, os, "fsync")
        self.before(monkeypatch, Path, "unlink")
        self.before(monkeypatch, Path, "open")
        self.before(monkeypatch, Path, "rename")
        kills = self

        class TornFile(FileIO):
            """Writes one half, then the other."""

            def write(self, content):
                kills.copy()
                written = super().write(content[: (len(content) + 1) // 2])
                kills.copy()
                return written

        monkeypatch.setattr(spool_module, "FileIO", TornFile)

    def before(self, monkeypatch, owner, name):
        really = getattr(owner, name)

        def copy_first(*args, **kwargs):
            self.copy()
            return really(*args, **kwargs)

        monkeypatch.setattr(owner, name, copy_first)

    def copy(self):
        self.left.append(self.folder.with_name(f"left-{len(self.left)}"))
        subprocess.run(["cp", "-r", self.folder, self.left[-1]], check=True)


def test_a_kill_at_any_moment_of_a_removal_loses_nothing(opened, folder, settlements, monkeypatch):
    spool = opened(folder)
    spool.append(settlements[:4])
    below = spool.seal()
    (path,) = folder.glob("*.jsonl")
    path.write_bytes(path.read_bytes() + b"garbage\n")
    with monkeypatch.context() as patched:
        kills = Kills(folder, patched)
        # The second and the last of them are delivered.
        spool.remove(spool.oldest(below=below), put_back=[settlements[0], settlements[2]])
        kills.copy()
    assert len(kills.left) > 6
    for left in kills.left:
        found = everything_in(opened(left))
        assert all(settlement in found for settlement in (settlements[0], settlements[2])), left
        assert b"garbage\n" in damaged_files(left).values(), left
    assert everything_in(spool) == [settlements[0], settlements[2]]


def test_a_write_that_fails_leaves_room_for_the_next(opened, folder, settlements, monkeypatch):
    spool = opened(folder)
    spool.append(settlements[:1])

    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            spool.append(settlements[1:2])
    spool.append(settlements[2:3])
    assert everything_in(spool)[-1] == settlements[2]


def test_two_processes_cannot_share_a_spool(opened, folder, settlements):
    first = opened(folder)
    with pytest.raises(SpoolError, match="another running process"):
        Spool(folder).open()
    first.close()
    opened(folder)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="cannot be used"):
        Spool(tmp_path / "file" / "spool").open()
