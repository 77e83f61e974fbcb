"""Every moment of every counter, out of Redis' append-only file.

Whoever polls a counter misses what happens between two looks. Redis writes each change into its append-only file in the
order in which it made it, a script's changes as one transaction: replaying that shows all states that ever were.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from budgetguard.adapters.redis.spelling import HELD, operation_of

# Fields of a counter.
_SPENT, _HELD = b"spent", b"held"


@dataclass(slots=True)
class Lost:
    """What a FLUSHALL took: the money of calls under way, and usage that may not have been in the ledger yet."""

    nanos: int = 0
    operations: set[str] = field(default_factory=set)


class TraceError(Exception):
    """The file is not the one that was followed."""


class Trace:
    """Follows one append-only file. ``limits``: of each budget to watch its limit in nanos, by id.

    ``over_nanos`` has, by counter name, the most that spent and held together ever were above the limit (0: never).
    """

    def __init__(self, path: Path) -> None:
        self.limits: dict[str, int] = {}
        self.over_nanos: dict[str, int] = {}
        self.lost = Lost()
        self._path = path
        self._offset = 0
        self._counters: dict[bytes, dict[bytes, int]] = {}
        self._holds: dict[bytes, int] = {}
        self._undrained: dict[tuple[bytes, bytes], tuple[str, int]] = {}

    def watch(self, limits: dict[str, int]) -> None:
        """Begin anew with these budgets."""
        self.follow()
        self.limits, self.over_nanos, self.lost = limits, {}, Lost()

    def follow(self) -> None:
        """Read on, to the last transaction that is complete.

        Raises:
            TraceError: the file was rewritten, or is shorter than what was read of it.
        """
        with self._path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                raise TraceError(f"{self._path} is shorter than what was read of it")
            file.seek(self._offset)
            data = file.read()
        position, done = 0, 0
        transaction: list[list[bytes]] | None = None
        while (parsed := _command(data, position)) is not None:
            words, position = parsed
            name = words[0].upper()
            if name == b"MULTI":
                transaction = []
            elif transaction is not None and name != b"EXEC":
                transaction.append(words)
            else:
                self._apply([words] if transaction is None else transaction)
                transaction, done = None, position
        self._offset += done

    def _apply(self, transaction: list[list[bytes]]) -> None:
        touched: dict[bytes, None] = {}
        for words in transaction:
            self._change(words)
            if len(words) > 1 and b":counter:" in words[1]:
                touched[words[1]] = None
        for key in touched:
            counter = self._counters.get(key, {})
            name = unquote(key.rpartition(b":")[2].decode())
            limit = self.limits.get(name.partition(":")[0])
            if limit is not None:
                over = max(counter.get(_SPENT, 0), 0) + max(counter.get(_HELD, 0), 0) - limit
                self.over_nanos[name] = max(self.over_nanos.get(name, 0), over)

    def _change(self, words: list[bytes]) -> None:
        match words[0].upper():
            case b"HINCRBY":
                self._add(words)
            case b"HSET" | b"HMSET":
                self._set_fields(words)
            case b"SET":
                self._set(words)
            case b"DEL" | b"UNLINK":
                self._delete(words)
            case b"XADD":
                self._tell(words)
            case b"XACK":
                self._acknowledge(words)
            case b"FLUSHALL":
                self._flush()

    def _add(self, words: list[bytes]) -> None:
        _, key, name, amount = words
        if b":counter:" in key and name in (_SPENT, _HELD):
            counter = self._counters.setdefault(key, {})
            counter[name] = counter.get(name, 0) + int(amount)

    def _set_fields(self, words: list[bytes]) -> None:
        if b":counter:" in words[1]:
            counter = self._counters.setdefault(words[1], {})
            counter |= {n: int(v) for n, v in zip(words[2::2], words[3::2], strict=True) if n in (_SPENT, _HELD)}

    def _set(self, words: list[bytes]) -> None:
        if b":operation:" in words[1]:
            operation = operation_of(words[2].decode())
            if operation["state"] == HELD:
                self._holds[words[1]] = int(operation["hold"])
            else:
                self._holds.pop(words[1], None)

    def _delete(self, words: list[bytes]) -> None:
        for key in words[1:]:
            self._counters.pop(key, None)
            self._holds.pop(key, None)

    def _tell(self, words: list[bytes]) -> None:
        if words[1].endswith(b":usage"):
            event = dict(zip(words[3::2], words[4::2], strict=True))
            operation_id = json.loads(event[b"facts"])["operation_id"]
            self._undrained[(words[1], words[2])] = (operation_id, int(event[b"delta"]))

    def _acknowledge(self, words: list[bytes]) -> None:
        for event_id in words[3:]:
            self._undrained.pop((words[1], event_id), None)

    def _flush(self) -> None:
        lost = self.lost
        lost.nanos += sum(self._holds.values()) + sum(max(delta, 0) for _, delta in self._undrained.values())
        lost.operations |= {operation_id for operation_id, _ in self._undrained.values()}
        self._counters.clear()
        self._holds.clear()
        self._undrained.clear()


def _command(data: bytes, position: int) -> tuple[list[bytes], int] | None:
    """Parse one command: its words and where the next begins; ``None`` when it is not all there."""
    end = data.find(b"\r\n", position)
    if end < 0:
        return None
    if data[position : position + 1] != b"*":
        raise TraceError("the append-only file was rewritten")
    count, position = int(data[position + 1 : end]), end + 2
    words = []
    for _ in range(count):
        end = data.find(b"\r\n", position)
        if end < 0:
            return None
        length = int(data[position + 1 : end])
        position = end + 2 + length + 2
        if position > len(data):
            return None
        words.append(data[end + 2 : end + 2 + length])
    return words, position
