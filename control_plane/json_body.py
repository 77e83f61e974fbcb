"""Reads the JSON body of a REST call into its request message: strictly, exactly, with the path of every wrong field.

Envoy's transcoder hands the body over as raw bytes (``google.api.HttpBody``), because its own reading drops unknown
members in silence and turns every number into a double. Here a number keeps the digits it was written with.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from budgetguard.core.errors import FieldViolation, InvalidError

HTTP_BODY = "http_body"
UPDATE_MASK = "update_mask"
# The largest request sets a thousand budgets.
BODY_BYTES_MAX = 2**20
# An answer has to fit into the trailers of a gRPC call (8 KiB), so it names the first few.
VIOLATIONS_MAX = 10
# The whole body, as the field of a violation.
WHOLE_BODY = "(body)"

Json: TypeAlias = Any


class Number(str):
    """A JSON number as it was spelled."""

    __slots__ = ()


class Members(list[tuple[str, Json]]):
    """A JSON object with its members in order, duplicates included."""


def read_http_body(request: Message) -> None:
    """Fill ``request`` from the JSON in its ``http_body``, if it has one, and take that away.

    Path and query have filled their fields already; the body may repeat them but not contradict them. A request with an
    ``update_mask`` that names nothing gets the members of the body, ``null`` ones too, as its mask.

    Raises:
        InvalidError: names every wrong field, up to ``VIOLATIONS_MAX``.
    """
    if HTTP_BODY not in request.DESCRIPTOR.fields_by_name or not request.HasField(HTTP_BODY):
        return
    body: bytes = request.http_body.data  # type: ignore[attr-defined] # every field of this name is an HttpBody
    request.ClearField(HTTP_BODY)
    members = parse_object(body)
    reader = _Reader()
    given = reader.fill(request, members, path="")
    if reader.violations:
        raise InvalidError.of(tuple(reader.violations[:VIOLATIONS_MAX]))
    mask = request.DESCRIPTOR.fields_by_name.get(UPDATE_MASK)
    if mask is not None and not request.HasField(UPDATE_MASK):
        request.update_mask.paths.extend(given)  # type: ignore[attr-defined] # every field of this name is a FieldMask


def parse_object(body: bytes) -> Members:
    """Parse a JSON object; an empty body is an empty one.

    Raises:
        InvalidError: not a JSON object in UTF-8, or too large.
    """
    if len(body) > BODY_BYTES_MAX:
        raise InvalidError(WHOLE_BODY, f"expected at most {BODY_BYTES_MAX} bytes, got {len(body)}")
    try:
        parsed = _DECODER.decode(body.decode()) if body.strip() else Members()
    except UnicodeDecodeError:
        raise InvalidError(WHOLE_BODY, "expected JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidError(WHOLE_BODY, f"expected JSON: {error.msg} at line {error.lineno}") from None
    except (ValueError, RecursionError):
        raise InvalidError(WHOLE_BODY, "expected JSON without NaN or Infinity, and not nested so deeply") from None
    if not isinstance(parsed, Members):
        raise InvalidError(WHOLE_BODY, "expected a JSON object")
    return parsed


def _refuse_constant(name: str) -> Json:
    raise ValueError(name)


_DECODER = json.JSONDecoder(
    object_pairs_hook=Members, parse_float=Number, parse_int=Number, parse_constant=_refuse_constant
)


class _WrongValueError(Exception):
    """What was expected instead."""


class _Reader:
    """Fills messages and collects what is wrong."""

    def __init__(self) -> None:
        self.violations: list[FieldViolation] = []

    def _refuse(self, path: str, expected: str) -> None:
        shown = path[:100].encode(errors="replace").decode()
        self.violations.append(FieldViolation(shown, expected))

    def fill(self, message: Message, members: Members, *, path: str) -> list[str]:
        """Fill a message and return the fields that the body names and that had no value before."""
        given: list[str] = []
        seen: set[str] = set()
        for name, value in members:
            here = f"{path}.{name}" if path else name
            field = _field_named(message, name)
            if field is None:
                self._refuse(here, f"unknown field; expected one of {', '.join(_names(message))}")
            elif field.name in seen:
                self._refuse(here, "expected once, given twice")
            else:
                seen.add(field.name)
                if not _is_set(message, field):
                    given.append(field.name)
                    self._set(message, field, value, here)
                else:
                    self._compare(message, field, value, here)
        return given

    def _compare(self, message: Message, field: FieldDescriptor, value: Json, path: str) -> None:
        before = type(message)()
        self._set(before, field, value, path)
        if getattr(before, field.name) != getattr(message, field.name):
            self._refuse(path, "expected the same value as in the path or the query")

    def _set(self, message: Message, field: FieldDescriptor, value: Json, path: str) -> None:
        if value is None:
            return
        if field.is_repeated:
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                self._set_map(message, field, value, path)
            else:
                self._set_list(message, field, value, path)
        elif _is_plain_message(field):
            if not isinstance(value, Members):
                self._refuse(path, "expected an object")
            else:
                nested = getattr(message, field.name)
                nested.SetInParent()
                self.fill(nested, value, path=path)
        else:
            try:
                scalar = _scalar(field, value, is_money=field.name.endswith("_usd"))
            except _WrongValueError as wrong:
                self._refuse(path, str(wrong))
                return
            if isinstance(scalar, Message):
                getattr(message, field.name).CopyFrom(scalar)
            else:
                setattr(message, field.name, scalar)

    def _set_list(self, message: Message, field: FieldDescriptor, value: Json, path: str) -> None:
        if not isinstance(value, list) or isinstance(value, Members):
            self._refuse(path, "expected a list")
            return
        for index, item in enumerate(value):
            here = f"{path}[{index}]"
            if not _is_plain_message(field):
                self._append(message, field, item, here)
            elif not isinstance(item, Members):
                self._refuse(here, "expected an object")
            else:
                self.fill(getattr(message, field.name).add(), item, path=here)

    def _append(self, message: Message, field: FieldDescriptor, item: Json, path: str) -> None:
        try:
            getattr(message, field.name).append(_scalar(field, item, is_money=field.name.endswith("_usd")))
        except _WrongValueError as wrong:
            self._refuse(path, str(wrong))

    def _set_map(self, message: Message, field: FieldDescriptor, value: Json, path: str) -> None:
        if not isinstance(value, Members):
            self._refuse(path, "expected an object")
            return
        target = getattr(message, field.name)
        entry = target.GetEntryClass().DESCRIPTOR.fields_by_name["value"]
        for name, item in value:
            try:
                if _text(name) in target:
                    raise _WrongValueError("expected once, given twice")
                target[name] = _scalar(entry, item, is_money=field.name == "usd")
            except _WrongValueError as wrong:
                self._refuse(f"{path}[{name}]", str(wrong))


def _fields(message: Message) -> Iterator[FieldDescriptor]:
    fields: Iterable[Any] = message.DESCRIPTOR.fields  # typed as one of two descriptor classes, by implementation
    return (field for field in fields if field.name != HTTP_BODY)


def _names(message: Message) -> list[str]:
    return [field.json_name for field in _fields(message)]


def _field_named(message: Message, name: str) -> FieldDescriptor | None:
    return next((field for field in _fields(message) if name in (field.json_name, field.name)), None)


def _is_set(message: Message, field: FieldDescriptor) -> bool:
    if field.has_presence:
        return message.HasField(field.name)
    return bool(getattr(message, field.name))


def _is_plain_message(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.full_name not in _SPECIAL


def _scalar(field: FieldDescriptor, value: Json, *, is_money: bool) -> Any:
    """Read one value that is not an object of ours."""
    if field.message_type is not None:
        return _SPECIAL[field.message_type.full_name](value)
    if field.enum_type is not None:
        return _enum_number(field.enum_type, value)
    if field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise _WrongValueError("expected true or false")
        return value
    if field.type == FieldDescriptor.TYPE_INT32:
        return _int32(value)
    if is_money:
        # The digits as they were written: what they are worth is decided, exactly, by core/money.py.
        if not isinstance(value, str):
            raise _WrongValueError("expected US dollars as a number or a decimal string")
        return _text(str(value))
    if not isinstance(value, str) or isinstance(value, Number):
        raise _WrongValueError("expected a string")
    return _text(value)


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _WrongValueError("expected text without lone surrogates") from None
    return value


def _int32(value: Json) -> int:
    expected = "expected a whole number"
    # Ten digits hold every int32; more would only cost time.
    if not isinstance(value, Number) or not value.lstrip("-").isdigit():
        raise _WrongValueError(expected)
    if len(value) > len("-2147483648") or not -(2**31) <= int(value) < 2**31:
        raise _WrongValueError(f"{expected} up to {2**31 - 1}")
    return int(value)


def _enum_number(enum: EnumDescriptor, value: Json) -> int:
    known = {name: number.number for name, number in enum.values_by_name.items() if number.number != 0}
    if isinstance(value, Number) or not isinstance(value, str):
        raise _WrongValueError(f"expected one of {', '.join(known)}")
    # Where values have the enum's name for a prefix, a body may leave it out.
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    for name in (value.upper(), prefix + value.upper()):
        if name in known:
            return known[name]
    raise _WrongValueError(f"expected one of {', '.join(known)}")


def _timestamp(value: Json) -> Timestamp:
    expected = "expected a time in RFC 3339, such as 2026-01-31T12:00:00Z"
    if isinstance(value, Number) or not isinstance(value, str):
        raise _WrongValueError(expected)
    timestamp = Timestamp()
    try:
        timestamp.FromJsonString(value)
    except ValueError:
        raise _WrongValueError(expected) from None
    return timestamp


# What a Duration may hold: 10,000 years.
_DURATION_SECONDS_MAX = 315_576_000_000
_DURATION = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?([smhd])", re.ASCII)
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration(value: Json) -> Duration:
    expected = 'expected a duration, such as "3600s", "30m", "12h" or "90d"'
    found = None if isinstance(value, Number) or not isinstance(value, str) else _DURATION.fullmatch(value)
    if found is None or (found[2] and found[3] != "s"):
        raise _WrongValueError(expected)
    seconds = int(found[1]) * _UNIT_SECONDS[found[3]]
    if seconds > _DURATION_SECONDS_MAX:
        raise _WrongValueError(f"{expected}, of at most {_DURATION_SECONDS_MAX} s")
    return Duration(seconds=seconds, nanos=int((found[2] or "0").ljust(9, "0")))


def _field_mask(value: Json) -> FieldMask:
    if isinstance(value, Number) or not isinstance(value, str):
        raise _WrongValueError("expected field names, separated by commas")
    # Both spellings of a name, as everywhere in a body.
    paths = [name.strip() for name in _text(value).split(",") if name.strip()]
    return FieldMask(paths=["".join(f"_{c.lower()}" if c.isupper() else c for c in name) for name in paths])


_SPECIAL: Mapping[str, Any] = {
    "google.protobuf.Duration": _duration,
    "google.protobuf.Timestamp": _timestamp,
    "google.protobuf.FieldMask": _field_mask,
}
