import os
import shutil

import pytest

from budgetguard.core.budget import Settlement
from budgetguard.core.operation import End
from budgetguard.core.usage import Usage
from ext_proc.spool import Spool, SpoolError, SpoolFullError, Waiting, settlement_from_line, settlement_to_line
from tests.services.ext_proc.support import NOW_MS, ModelCounters


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


@pytest.mark.parametrize("kept_bytes", [1, 50, -1])
def test_a_torn_last_line_is_ignored(opened, folder, settlements, kept_bytes):
    opened(folder).append(settlements[:2])
    left = after_kill(folder)
    (path,) = left.glob("*.jsonl")
    path.write_bytes(path.read_bytes() + settlement_to_line(settlements[2])[:kept_bytes])
    assert everything_in(opened(left)) == settlements[:2]
    assert list(left.glob("settlements*")) == []


def test_a_damaged_line_is_kept_for_people_and_loses_no_other(opened, folder, settlements, caplog):
    opened(folder).append(settlements[:3])
    left = after_kill(folder)
    (path,) = left.glob("*.jsonl")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"garbage", lines[2], b""]))
    assert everything_in(opened(left)) == [settlements[0], settlements[2]]
    assert [path.suffix for path in left.glob("settlements*")] == [".damaged"]
    assert "CRITICAL" in caplog.text


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
