"""Reads single members of a request, each with one way to say what was expected."""

from typing import Any

from budgetguard.core.providers.api import InvalidRequestError

# Larger counts are slips; they would also leave what arithmetic on one call's money is exact for.
COUNT_MAX = 2**31 - 1
MODEL_CHARS_MAX = 256
SHOWN_CHARS_MAX = 40


def text(request: dict[str, Any], name: str) -> str | None:
    """Return a string member, ``None`` when it is absent or null."""
    value = request.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(name, "a string", value)
    return value


def flag(request: dict[str, Any], name: str) -> bool:
    """Return a boolean member; absent and null are false."""
    value = request.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return bool(value)


def count(request: dict[str, Any], name: str, *, minimum: int = 1) -> int | None:
    """Return a whole number of at least ``minimum``, ``None`` when it is absent or null."""
    value = request.get(name)
    if value is None:
        return None
    if type(value) is not int or not minimum <= value <= COUNT_MAX:
        raise wrong(name, f"a whole number from {minimum} to {COUNT_MAX}", value)
    return value


def array(request: dict[str, Any], name: str) -> list[Any]:
    """Return an array member; absent and null are empty."""
    value = request.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong(name, "an array", value)
    return value


def model(request: dict[str, Any]) -> str:
    """Return the model's name, which is required."""
    name = request.get("model")
    if not isinstance(name, str) or not name.strip() or len(name) > MODEL_CHARS_MAX or not name.isprintable():
        raise wrong("model", f"the name of a model, a string of at most {MODEL_CHARS_MAX} characters", name)
    return name


def wrong(name: str, expected: str, value: Any) -> InvalidRequestError:
    """Make the error for a member of the wrong type or range; the value itself is shown only when it is short."""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if len(shown) > SHOWN_CHARS_MAX:
        shown = {"str": "a string", "list": "an array", "dict": "an object"}.get(type(value).__name__, "a number")
    return InvalidRequestError(f"{name}: expected {expected}, got {shown}", param=name)


def named(value: Any, name: str, kind: type, expected: str) -> Any:
    """Return a value that was found at ``name`` (a path), or ``None``, when it is of one kind."""
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise wrong(name, expected, value)
    return value
