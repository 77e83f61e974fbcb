"""Calls through the edge, and what became of each."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from budgetguard.core.money import parse_usd

CONCURRENCY = 200
CALL_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]


@dataclass(slots=True)
class Outcome:
    """What one call got. ``status`` is 0 when the connection broke, ``whole`` when the answer arrived to its end.

    The amounts are the caller's own knowledge, in nanos: from response headers when admitted, from the error when
    refused.
    """

    status: int = 0
    whole: bool = False
    operation_id: str = ""
    hold_nanos: int = 0
    remaining_nanos: int = 0
    error: dict[str, Any] = field(default_factory=dict)

    @property
    def refused_by_budget(self) -> bool:
        return self.status == 402

    @property
    def left_nanos(self) -> int:
        """What the refusal says was left."""
        limit, spent, held = (parse_usd(self.error[name]) for name in ("limit_usd", "spent_usd", "held_usd"))
        return limit - spent - held

    @property
    def refused_falsely(self) -> bool:
        """Whether the refusal's own numbers contradict it: its smallest hold would have fitted."""
        return self.refused_by_budget and self.left_nanos >= parse_usd(self.error["needed_usd"])


async def call(http: aiohttp.ClientSession, one: Call) -> Outcome:
    """Send one request and read its answer to the end."""
    outcome = Outcome()
    try:
        async with http.post(one.path, json=one.body, headers=one.headers) as answer:
            outcome.status = answer.status
            headers = answer.headers
            outcome.operation_id = headers.get("x-budgetguard-operation-id", "")
            outcome.hold_nanos = parse_usd(headers.get("x-budgetguard-estimated-cost-usd", "0"))
            outcome.remaining_nanos = parse_usd(headers.get("x-budgetguard-budget-remaining-usd", "0"))
            text = await answer.read()
            outcome.whole = True
    except (aiohttp.ClientError, TimeoutError):
        return outcome
    if answer.status >= 400:
        outcome.error = json.loads(text)["error"]
    return outcome


class Callers:
    """Any number of callers on one connection pool."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            self._base_url,
            connector=aiohttp.TCPConnector(limit=CONCURRENCY),
            timeout=aiohttp.ClientTimeout(total=CALL_SECONDS),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def one(self, one: Call) -> Outcome:
        return await call(self._http, one)

    async def all(self, calls: Iterable[Call], *, concurrency: int = CONCURRENCY) -> list[Outcome]:
        """Make calls, so many at a time."""
        waiting = iter(calls)

        async def caller() -> list[Outcome]:
            return [await call(self._http, one) for one in waiting]

        outcomes = await asyncio.gather(*(caller() for _ in range(concurrency)))
        return [outcome for one in outcomes for outcome in one]
