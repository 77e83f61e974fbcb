"""Reads OpenAI's answers as they pass: whole JSON bodies and event streams."""

from collections.abc import Callable
from typing import Any

import orjson

from budgetguard.core.providers.json_text import without_null
from budgetguard.core.providers.openai_errors import error_object
from budgetguard.core.providers.openai_usage import read_usage, text_bytes
from budgetguard.core.providers.sse import Event, EventSplitter
from budgetguard.core.reasons import Deny
from budgetguard.core.usage import Usage

# A longer JSON answer passes unread. Embeddings of a full batch (2,048 inputs of 3,072 floats) stay below it.
BODY_BYTES_MAX = 160 * 2**20

# Responses API: the events that end a stream and carry the whole response with its usage.
_RESPONSE_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})

# As providers write it, anywhere but in first place.
_NULL_USAGE = b',"usage":null'


class JsonReader:
    """Reads one JSON answer. Bytes pass unchanged; ``complete`` once the body's last byte was fed."""

    def __init__(self, *, content_length: int | None) -> None:
        self._content_length = content_length
        self._pieces: list[bytes] = []
        self._bytes = 0
        self.usage: Usage | None = None
        self.complete = False
        self.output_tokens_seen = 0
        self.service_tier: str | None = None
        self.model: str | None = None
        self.error = False

    def feed(self, data: bytes, *, end: bool) -> bytes:
        """Take the next bytes and return them."""
        if self.complete:
            return data
        self._bytes += len(data)
        if self._bytes <= BODY_BYTES_MAX:
            self._pieces.append(data)
        else:
            self._pieces.clear()
        # A client that was told the length knows the end before the end is said.
        if end or self._bytes == self._content_length:
            self.complete = True
            self._read()
        return data

    def closing(self, deny: Deny) -> bytes:
        """Nothing can be added to a JSON answer."""
        del deny
        return b""

    def _read(self) -> None:
        answer = _json_object(b"".join(self._pieces))
        self._pieces.clear()
        self.usage = read_usage(answer.get("usage"), answer.get("tool_usage"))
        self.service_tier = _text(answer.get("service_tier"))
        self.model = _text(answer.get("model"))
        self.error = isinstance(answer.get("error"), dict)


class StreamReader:
    """Reads an event stream. ``of_chunk`` takes each JSON object of the stream and updates the reader.

    With ``hides_usage`` the caller did not ask for usage: the chunk that only carries it, and the ``"usage":null`` of
    the others, are kept from it. Then, and with ``whole_events``, events pass on when they are whole. Otherwise bytes
    pass at once, unchanged. ``last_event`` spells the reason why a stream is ended early.
    """

    def __init__(
        self,
        of_chunk: Callable[["StreamReader", dict[str, Any]], bool],
        *,
        hides_usage: bool,
        whole_events: bool = False,
        last_event: Callable[["StreamReader", Deny], bytes],
    ) -> None:
        self._of_chunk = of_chunk
        self._hides_usage = hides_usage
        self._whole_events = whole_events
        self._last_event = last_event
        self._events = EventSplitter()
        self.usage: Usage | None = None
        self.complete = False
        self.output_tokens_seen = 0
        self.service_tier: str | None = None
        self.model: str | None = None
        self.error = False
        # Responses API: the response as its first event gave it, and the number of the last event.
        self.opening: dict[str, Any] = {}
        self.sequence_number = -1

    def feed(self, data: bytes, *, end: bool) -> bytes:
        """Take the next bytes and return those to pass on."""
        events = self._events.feed(data)
        if end:
            self.complete = True
            rest = self._events.rest()
            events += [rest] if rest else []
        passed = [self._read(event) for event in events]
        return b"".join(passed) if self._hides_usage or self._whole_events else data

    def closing(self, deny: Deny) -> bytes:
        """Spell the stream's last event, when it is ended here."""
        return self._last_event(self, deny)

    def _read(self, event: Event) -> bytes:
        """Take one event; return its bytes as the caller is to see them."""
        if event.data == b"[DONE]":
            self.complete = True
            return event.raw
        chunk = _json_object(event.data)
        self.service_tier = _text(chunk.get("service_tier")) or self.service_tier
        self.model = _text(chunk.get("model")) or self.model
        self.error = self.error or isinstance(chunk.get("error"), dict) or event.kind == "error"
        usage_only = self._of_chunk(self, chunk)
        if not self._hides_usage or "usage" not in chunk:
            return event.raw
        if usage_only:
            return b""
        if chunk["usage"] is None and event.raw.count(event.data) == 1:
            return event.raw.replace(event.data, _without_null_usage(event.data))
        return event.raw


def of_chat_chunk(reader: StreamReader, chunk: dict[str, Any]) -> bool:
    """Read a chat completion chunk; say whether it carries usage and nothing else."""
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        written = text_bytes(choice.get("delta")) if isinstance(choice, dict) else 0
        # The role of the first delta is no output, but never to count below a token a delta is the point.
        reader.output_tokens_seen += written
    usage = read_usage(chunk.get("usage"))
    if usage is not None:
        reader.usage = usage
    # Usage beside choices is a running total (some providers send it with every chunk); alone it is the last word.
    alone = choices == [] and isinstance(chunk.get("usage"), dict)
    reader.complete = reader.complete or (alone and usage is not None)
    return alone


def of_response_event(reader: StreamReader, chunk: dict[str, Any]) -> bool:
    """Read an event of the Responses API. Nothing is ever kept from the caller."""
    kind = _text(chunk.get("type")) or ""
    if kind.endswith(".delta"):
        reader.output_tokens_seen += text_bytes(chunk.get("delta"))
    elif kind == "response.output_item.added":
        # The name of a function that is called is written by the model too, and in no delta.
        reader.output_tokens_seen += text_bytes(chunk.get("item"))
    number = chunk.get("sequence_number")
    if type(number) is int:
        reader.sequence_number = number
    response = chunk.get("response")
    if kind == "response.created" and isinstance(response, dict):
        reader.opening = response
    if kind in _RESPONSE_ENDS and isinstance(response, dict):
        reader.usage = read_usage(response.get("usage"), response.get("tool_usage"))
        reader.service_tier = _text(response.get("service_tier"))
        reader.model = _text(response.get("model"))
        reader.complete = True
    if kind == "error":
        reader.error = True
    return False


def last_chat_event(reader: StreamReader, deny: Deny) -> bytes:
    """End a stream of chunks as the API itself does when it fails on the way: an error object, which SDKs raise."""
    del reader
    return b"data: " + orjson.dumps({"error": error_object(deny)}) + b"\n\ndata: [DONE]\n\n"


def last_response_event(reader: StreamReader, deny: Deny) -> bytes:
    """End a stream of the Responses API: the response has failed, which is the last event that it documents."""
    error = error_object(deny)
    event: dict[str, Any]
    kind = "response.failed" if reader.opening else "error"
    if reader.opening:
        # The error of a response has no type and no param.
        failed = {"code": error["code"], "message": error["message"], **deny.facts}
        event = {"type": kind, "response": {**reader.opening, "status": "failed", "error": failed}}
    else:
        event = {**error, "type": kind}
    event["sequence_number"] = reader.sequence_number + 1
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


def _without_null_usage(chunk: bytes) -> bytes:
    """Remove a chunk's own ``"usage":null``, which it is known to have. Run for every piece of a stream."""
    # These bytes are a member, since no string can hold a bare quote; the chunk's own, since the key is spelled once.
    if chunk.count(b'"usage"') == 1 and b"\\u" not in chunk and _NULL_USAGE in chunk:
        return chunk.replace(_NULL_USAGE, b"")
    return without_null(chunk, "usage")


def _json_object(text: bytes) -> dict[str, Any]:
    """Parse what should be an object; anything else, also what is no JSON, says nothing."""
    if not text.startswith(b"{"):
        text = text.lstrip()
    if not text.startswith(b"{"):
        return {}
    try:
        value: dict[str, Any] = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
