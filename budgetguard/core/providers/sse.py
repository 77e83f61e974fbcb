"""Server-sent events, sans I/O: bytes in, whole events out, with the very bytes that they came in."""

import re
from dataclasses import dataclass

# A larger event is passed on unread: its usage is then unknown, memory is not.
EVENT_BYTES_MAX = 8 * 2**20

_LINE_END = re.compile(rb"\r\n|\r(?!\n|\Z)|\n")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its bytes with the blank line that ends it, its type, and its data lines joined."""

    raw: bytes
    kind: str
    data: bytes


class EventSplitter:
    """Splits a stream into events. What ``feed`` and ``rest`` return adds up to exactly what was fed."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._scanned = 0  # lines up to here are in _kind and _data
        self._searched = 0  # no line ends before here, but for a final CR that may yet become CRLF
        self._kind = ""
        self._data: list[bytes] = []
        self._first = True
        self._oversized = False

    def feed(self, piece: bytes) -> list[Event]:
        """Take the next bytes; return the events that they complete."""
        self._text += piece
        events: list[Event] = []
        while (line_end := _LINE_END.search(self._text, self._searched)) is not None:
            line = bytes(self._text[self._scanned : line_end.start()])
            self._scanned = self._searched = line_end.end()
            if line:
                self._line(line)
            else:
                events.append(self._cut())
        self._searched = max(self._scanned, len(self._text) - 1)
        if len(self._text) > EVENT_BYTES_MAX:
            # Out it goes, as bytes without a meaning; so does what follows up to the next blank line.
            self._oversized = True
            self._data.clear()
            events.append(Event(raw=bytes(self._text[: self._scanned]), kind="", data=b""))
            del self._text[: self._scanned]
            self._scanned = self._searched = 0
            if len(self._text) > EVENT_BYTES_MAX:
                events.append(Event(raw=bytes(self._text), kind="", data=b""))
                self._text.clear()
        return events

    def rest(self) -> Event | None:
        """End the stream: the event that no blank line ended, if any. Servers that forget the last line are read."""
        if not self._text:
            return None
        line = bytes(self._text[self._scanned :]).rstrip(b"\r")
        if line:
            self._line(line)
        self._scanned = len(self._text)
        return self._cut()

    def _line(self, line: bytes) -> None:
        if self._first:
            line = line.removeprefix(_BOM)
            self._first = False
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if self._oversized:
            return
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._kind = value.decode("utf-8", "replace")

    def _cut(self) -> Event:
        event = Event(raw=bytes(self._text[: self._scanned]), kind=self._kind, data=b"\n".join(self._data))
        del self._text[: self._scanned]
        self._scanned = self._searched = 0
        self._kind, self._data, self._oversized = "", [], False
        return event
