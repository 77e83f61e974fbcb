"""Settlements that Redis could not take, on disk until it can.

One JSON line a settlement, in numbered segments, each line on disk before ``append`` returns. A segment is deleted
once all of it was delivered; a killed process finds its segments again, and delivers some lines twice, which changes
nothing: a settlement is idempotent by its operation's id. What cannot be read is kept in a file beside them, for
people: it may be somebody's money.
"""

import fcntl
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO

import orjson

from budgetguard.core.budget import Settlement
from budgetguard.core.handoff import Handoff
from budgetguard.core.operation import End
from budgetguard.core.typed import object_of, typed
from budgetguard.core.usage import Usage

logger = logging.getLogger(__name__)

# About 150,000 settlements: hours of an outage, in which nothing new is admitted anyway.
SPOOL_BYTES_MAX = 256 * 2**20
# A segment is read whole when it is delivered.
SEGMENT_BYTES_MAX = 4 * 2**20
# Of damaged lines; beyond that the oldest go. Far more than kills tear, and a disk that does worse has other witnesses.
DAMAGED_BYTES_MAX = 16 * 2**20

_SEGMENT_NAME = re.compile(r"settlements-([0-9]{12})\.jsonl")
_DAMAGED_NAME = re.compile(r"settlements-([0-9]{12})\.damaged")


class SpoolError(OSError):
    """The folder cannot be used; the message is one sentence that says why."""


class SpoolFullError(OSError):
    """The spool has reached its bound: nothing was written."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Settlements in the order in which they were appended, and its lines that are none."""

    number: int
    settlements: tuple[Settlement, ...]
    damaged: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits on disk. ``oldest_ended_at_ms`` is when the first of those calls ended, ``None`` without any."""

    settlements: int = 0
    size_bytes: int = 0
    oldest_ended_at_ms: int | None = None


class Spool:
    """A folder of segments, for one process at a time. Blocking: call it from a thread, one call at a time."""

    def __init__(
        self,
        folder: Path,
        *,
        bytes_max: int = SPOOL_BYTES_MAX,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
        damaged_bytes_max: int = DAMAGED_BYTES_MAX,
    ) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._segment_bytes_max = segment_bytes_max
        self._damaged_bytes_max = damaged_bytes_max
        self._lock: IO[bytes] | None = None
        # The segment that is appended to, if any: the last one in ``_kept``.
        self._file: FileIO | None = None
        # Segment number -> what is in it, oldest first.
        self._kept: dict[int, Waiting] = {}
        self._next_number = 1
        # Replaced, never changed: any thread may look at it.
        self.waiting = Waiting()

    @property
    def bytes_max(self) -> int:
        """How many bytes may wait."""
        return self._bytes_max

    def open(self) -> bool:
        """Take the folder and look what an earlier process left; say whether there is anything to deliver.

        Raises:
            SpoolError: it cannot be made or written, or another process has it.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._kept = {number: _look_into(path) for number, path in self._files(_SEGMENT_NAME)}
            damaged = [number for number, _ in self._files(_DAMAGED_NAME)]
        except BlockingIOError as error:
            self.close()
            raise SpoolError(f"the spool {self._folder} belongs to another running process") from error
        except OSError as error:
            self.close()
            raise SpoolError(f"the spool {self._folder} cannot be used: {error.strerror}") from error
        # Nor may a segment have the number of a damaged one, whose file it would overwrite.
        self._next_number = 1 + max([*self._kept, *damaged], default=0)
        self._note()
        return bool(self._kept)

    def append(self, settlements: Sequence[Settlement], *, were_kept: bool = False) -> None:
        """Keep settlements; they are on disk when this returns.

        ``were_kept``: they are in a segment that is removed right after, so they may pass the bound for that long.

        Raises:
            SpoolFullError: the bound is reached.
            OSError: the disk refused.
        """
        lines = b"".join(settlement_to_line(settlement) for settlement in settlements)
        if not were_kept and self.waiting.size_bytes + len(lines) > self._bytes_max:
            raise SpoolFullError(f"the spool {self._folder} has reached {self._bytes_max} bytes")
        try:
            self._write(lines, settlements)
        except OSError:
            # What is left of a failed write is a torn line: nothing may be appended behind it.
            self._close_file()
            raise

    def _write(self, lines: bytes, settlements: Sequence[Settlement]) -> None:
        if self._file is None:
            number = self._next_number
            self._file = FileIO(self._path(number), "xb")
            self._next_number = number + 1
            self._kept[number] = Waiting()
            self._sync_folder()
        written = 0
        while written < len(lines):
            written += self._file.write(lines[written:])
        os.fsync(self._file.fileno())
        number = self._next_number - 1
        oldest_ended_at_ms = min((settlement.ended_at_ms for settlement in settlements), default=None)
        self._kept[number] = _sum([self._kept[number], Waiting(len(settlements), len(lines), oldest_ended_at_ms)])
        self._note()
        if self._kept[number].size_bytes >= self._segment_bytes_max:
            self._close_file()

    def seal(self) -> int:
        """End the current segment; return a number that all segments so far are below."""
        self._close_file()
        return self._next_number

    def oldest(self, *, below: int) -> Segment | None:
        """Return the first sealed segment; ``None`` when there is none with a number below this."""
        number = next(iter(self._kept), below)
        return self._read(number) if number < below else None

    def remove(self, segment: Segment, *, put_back: Sequence[Settlement] = ()) -> None:
        """Forget a segment that was delivered, except for those of it that are to be tried again after all others.

        They and its damaged lines are elsewhere on disk before it goes: a kill in between leaves something twice, and
        nothing nowhere.

        Raises:
            OSError: the disk refused; the segment is still there.
        """
        if segment.damaged:
            self._keep_damaged(segment)
        if put_back:
            self.append(put_back, were_kept=True)
        self._path(segment.number).unlink()
        del self._kept[segment.number]
        self._note()

    def close(self) -> None:
        """Give the folder back."""
        self._close_file()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _read(self, number: int) -> Segment:
        lines = self._path(number).read_bytes().split(b"\n")
        if not lines[-1]:
            lines.pop()
        # A last line without its end was torn by a kill in the middle of a write, unless nothing else of it lacks.
        settlements, damaged = [], []
        for line in lines:
            try:
                settlements.append(settlement_from_line(line))
            except ValueError:
                damaged.append(line)
        return Segment(number, tuple(settlements), tuple(damaged))

    def _keep_damaged(self, segment: Segment) -> None:
        path = self._path(segment.number).with_suffix(".damaged")
        content = b"".join(line + b"\n" for line in segment.damaged)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._sync_folder()
        logger.critical(
            "alarm=spool_damaged lines=%d bytes=%d kept=%s: settlements that cannot be read, their holds will expire",
            *(len(segment.damaged), len(content), path),
        )
        sizes = {path: path.stat().st_size for _, path in self._files(_DAMAGED_NAME)}
        for oldest in list(sizes)[:-1]:
            if sum(sizes.values()) <= self._damaged_bytes_max:
                break
            logger.critical("alarm=spool_damaged dropped=%s: more than %d bytes", oldest, self._damaged_bytes_max)
            oldest.unlink()
            del sizes[oldest]

    def _files(self, name: re.Pattern[str]) -> list[tuple[int, Path]]:
        """List the files of one kind, by their numbers."""
        return sorted((int(match[1]), path) for path in self._folder.iterdir() if (match := name.fullmatch(path.name)))

    def _path(self, number: int) -> Path:
        return self._folder / f"settlements-{number:012d}.jsonl"

    def _sync_folder(self) -> None:
        """Put a new file's name on disk; its bytes alone would not be found again."""
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _note(self) -> None:
        self.waiting = _sum(self._kept.values())

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _look_into(path: Path) -> Waiting:
    """Say what an earlier process left in a segment, by its lines and the first of them."""
    content = path.read_bytes()
    first, end, _ = content.partition(b"\n")
    if not end:
        return Waiting(size_bytes=len(content))
    try:
        oldest_ended_at_ms = settlement_from_line(first).ended_at_ms
    except ValueError:
        # Damaged, which is told when it is delivered; its call ended before the last write.
        oldest_ended_at_ms = int(path.stat().st_mtime * 1000)
    return Waiting(content.count(b"\n"), len(content), oldest_ended_at_ms)


def _sum(parts: Iterable[Waiting]) -> Waiting:
    whole = tuple(parts)
    return Waiting(
        sum(part.settlements for part in whole),
        sum(part.size_bytes for part in whole),
        min((part.oldest_ended_at_ms for part in whole if part.oldest_ended_at_ms is not None), default=None),
    )


def settlement_to_line(settlement: Settlement) -> bytes:
    """Encode one settlement as one line of JSON."""
    usage = settlement.usage
    return (
        orjson.dumps(
            {
                "handoff": settlement.handoff.to_metadata(),
                "end": settlement.end.value,
                "amount_nanos": settlement.amount_nanos,
                "usage": None if usage is None else usage.reported(),
                "ended_at_ms": settlement.ended_at_ms,
                "status": settlement.status,
                "detail": settlement.detail,
                "rate_tier": settlement.rate_tier,
            }
        )
        + b"\n"
    )


def settlement_from_line(line: bytes) -> Settlement:
    """Decode what ``settlement_to_line`` wrote.

    Raises:
        ValueError: not a settlement.
    """
    try:
        raw = object_of(orjson.loads(line))
        usage = raw["usage"]
        return Settlement(
            handoff=Handoff.from_metadata(typed(raw, "handoff", dict)),
            end=End(typed(raw, "end", str)),
            amount_nanos=typed(raw, "amount_nanos", int),
            usage=None if usage is None else Usage.from_reported(usage),
            ended_at_ms=typed(raw, "ended_at_ms", int),
            status=typed(raw, "status", int),
            detail=typed(raw, "detail", str),
            rate_tier=typed(raw, "rate_tier", str),
        )
    except KeyError as error:
        msg = "malformed settlement"
        raise ValueError(msg) from error
