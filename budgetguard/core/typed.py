"""Reads JSON that must be exactly what we once wrote: a value of another type is damage, never converted."""

from typing import Any, TypeVar

Value = TypeVar("Value")


def object_of(value: Any) -> dict[str, Any]:
    """Return a JSON object as it is.

    Raises:
        ValueError: something else.
    """
    if type(value) is not dict:
        raise ValueError("expected a JSON object")
    return value


def typed(values: Any, name: str, kind: type[Value]) -> Value:
    """Return the member of an object that has this name and this very type.

    Raises:
        KeyError: there is none.
        ValueError: it has another type.
    """
    value = values[name]
    if type(value) is not kind:  # True is no number here
        raise ValueError(f"{name} is no {kind.__name__}")
    return value


def texts_of(values: Any, name: str) -> tuple[str, ...]:
    """Return the member of an object that is a list of texts; raises as ``typed`` does."""
    texts = typed(values, name, list)
    if any(type(text) is not str for text in texts):
        raise ValueError(f"{name} is no list of texts")
    return tuple(texts)
