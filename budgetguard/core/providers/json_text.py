"""JSON as text: strict parsing of requests, and changes to single members that leave every other byte alone."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from budgetguard.core.providers.api import InvalidRequestError

# Deeper than any real request; a parser's stack must not be the caller's to exhaust.
DEPTH_MAX = 64

_SPACE = re.compile(r"[ \t\n\r]*+")
_raw_decode = json.JSONDecoder().raw_decode


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a request body, which must be one JSON object in UTF-8.

    Duplicate keys are refused wherever they are and however they are spelled: a parser may take the first or the last,
    and what we meter must be what the provider reads.

    Raises:
        InvalidRequestError: anything else.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"expected a JSON object in UTF-8; byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"expected a JSON object, but the body is not JSON: {error.msg} at character {error.pos}"
        ) from None
    except InvalidRequestError:
        raise
    except ValueError:  # an integer of thousands of digits
        raise InvalidRequestError("expected JSON numbers of an ordinary size") from None
    except RecursionError:
        raise _too_deep() from None
    # Text with fewer brackets needs no look at what they hold.
    if body.count(b"{") + body.count(b"[") > DEPTH_MAX:
        _check_depth(value)
    if not isinstance(value, dict):
        raise InvalidRequestError("expected a JSON object")
    return value


def _check_depth(value: Any) -> None:
    """Refuse what is nested too deeply, level by level: a walk that needs no stack."""
    level = [value]
    for _ in range(DEPTH_MAX):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"expected JSON of at most {DEPTH_MAX} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counted = Counter(name for name, _ in pairs)
        twice = next(name for name, times in counted.items() if times > 1)[:60]
        # Half of a surrogate pair is valid JSON, but no answer could be encoded with it.
        twice = twice.encode("utf-8", "replace").decode()
        raise InvalidRequestError(f"expected each key once, got {twice!r} twice", param=twice)
    return found


def _no_constant(text: str) -> Any:
    raise InvalidRequestError(f"expected JSON, got {text}")


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an object in its text: where key and value stand, as byte offsets."""

    key: str
    key_start: int
    value_start: int
    value_end: int


def members(text: bytes, start: int = 0) -> list[Member]:
    """List the members of the object that begins at or after ``start``, without reading into their values.

    ``text`` must be valid JSON; of text that breaks off, the members that are whole.
    """
    # Latin-1 makes every byte one character, so that places in the string are places in the bytes; the parser of the
    # standard library then skips a value at C's speed. Whatever it makes of the value is thrown away.
    spelled = text.decode("latin-1")
    found: list[Member] = []
    at = _after_space(spelled, spelled.index("{", start) + 1)
    while spelled[at : at + 1] == '"':
        try:
            _, key_end = _raw_decode(spelled, at)
            value_start = _after_space(spelled, _after_space(spelled, key_end) + 1)
            _, value_end = _raw_decode(spelled, value_start)
        except json.JSONDecodeError:
            break
        after = _after_space(spelled, value_end)
        if spelled[after : after + 1] not in (",", "}"):
            break
        key = json.loads(text[at:key_end])
        found.append(Member(key=key, key_start=at, value_start=value_start, value_end=value_end))
        if spelled[after] == "}":
            break
        at = _after_space(spelled, after + 1)
    return found


def _after_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()


def set_member(text: bytes, key: str, value: bytes, *, start: int = 0) -> bytes:
    """Give one member of the object at ``start`` a value: in its place, or as a new first member."""
    found = members(text, start)
    for member in found:
        if member.key == key:
            return text[: member.value_start] + value + text[member.value_end :]
    brace = text.index(b"{", start) + 1
    return text[:brace] + b'"' + key.encode() + b'":' + value + (b"," if found else b"") + text[brace:]


def without_null(text: bytes, key: str) -> bytes:
    """Remove a top-level member whose value is null, with its comma."""
    suffix = b',"' + key.encode() + b'":null}'
    if text.endswith(suffix):  # as providers write it: nothing but a last top-level member can end like this
        return text[: -len(suffix)] + b"}"
    found = members(text)
    for index, member in enumerate(found):
        if member.key != key or text[member.value_start : member.value_end] != b"null":
            continue
        if index > 0:
            return text[: found[index - 1].value_end] + text[member.value_end :]
        if len(found) > 1:
            return text[: member.key_start] + text[found[1].key_start :]
        return text[: member.key_start] + text[member.value_end :]
    return text
