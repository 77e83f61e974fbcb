"""Keyset paging: a page token names the last row seen, so rows that come or go meanwhile shift nothing."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, TypeVar

import orjson

from budgetguard.core.entities import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX, Page
from budgetguard.core.errors import InvalidError

ItemT = TypeVar("ItemT")

_TOKEN_CHARACTERS_MAX = 2_000


def page_limit(page_size: int) -> int:
    """Bound what a caller asks for; 0 is the default.

    Raises:
        InvalidError: negative.
    """
    if page_size < 0:
        raise InvalidError("page_size", "expected 0 (the default) or more")
    return min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)


def write_token(listing: str, position: Sequence[str | int]) -> str:
    """Spell a token. ``listing`` says what is listed, with its filters: a token fits no other listing."""
    return urlsafe_b64encode(orjson.dumps([_mark(listing), *position])).decode().rstrip("=")


def read_token(token: str, listing: str, types: Sequence[type]) -> list[Any] | None:
    """Read a token back into the position's values, ``None`` for the first page.

    Raises:
        InvalidError: not a token of this very listing.
    """
    if not token:
        return None
    expected = "expected the next_page_token of a page of this same listing"
    if len(token) > _TOKEN_CHARACTERS_MAX:
        raise InvalidError("page_token", expected)
    try:
        values = orjson.loads(urlsafe_b64decode(token.encode("ascii") + b"=" * (-len(token) % 4)))
    except ValueError:
        raise InvalidError("page_token", expected) from None
    if not isinstance(values, list) or values[:1] != [_mark(listing)] or [*map(type, values[1:])] != [*types]:
        raise InvalidError("page_token", expected)
    return values[1:]


def make_page(
    items: Sequence[ItemT], *, limit: int, listing: str, position: Callable[[ItemT], Sequence[str | int]]
) -> Page[ItemT]:
    """Make a page of ``limit`` items out of a query that asked for one more."""
    shown = tuple(items[:limit])
    more = len(items) > limit
    return Page(items=shown, next_page_token=write_token(listing, position(shown[-1])) if more else "")


def _mark(listing: str) -> str:
    return sha256(listing.encode()).hexdigest()[:12]
