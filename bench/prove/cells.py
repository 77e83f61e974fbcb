"""What is proven: one table each of subjects, windows and routes. A cell is one of each.

A row that this build's API does not know yet (a field or period of ``CreateBudgetRequest``) is left out, and named.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import product
from random import Random
from typing import Any

from budgetguard.v1 import budget_pb2

FIELDS = budget_pb2.CreateBudgetRequest.DESCRIPTOR.fields_by_name
# Of a template: how many subjects share the calls. Each has the whole limit for itself.
TEMPLATE_SUBJECTS = 4
# Bytes, hence at least so many tokens of every bound.
PADDING = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Whose spend a budget limits.

    ``budget`` are its fields of ``CreateBudgetRequest``; ``{key_id}`` and ``{model}`` stand for the cell's own.
    ``callers`` are the headers of who calls; a template (``each``) has a counter for each of them. ``tags`` are made
    first, as (tag, parent). ``column`` is the ledger's, by which a template's rows are told apart.
    """

    name: str
    budget: Mapping[str, str] = field(default_factory=dict)
    callers: tuple[Mapping[str, str], ...] = ({},)
    tags: tuple[tuple[str, str], ...] = ()
    column: str = ""


def _each(header: str, prefix: str) -> tuple[Mapping[str, str], ...]:
    return tuple({header: f"{prefix}-{number}"} for number in range(TEMPLATE_SUBJECTS))


# A call carries the leaf, the budget is two levels up.
_TREE = (("org", ""), ("org-team", "org"), ("org-team-app", "org-team"))

SUBJECTS = (
    Subject(name="tenant"),
    Subject(name="API key", budget={"api_key_id": "{key_id}"}),
    Subject(name="tag", budget={"tag_id": "org"}, callers=({"X-Tags": "org-team-app"},), tags=_TREE),
    Subject(name="session", budget={"session_id": "session-0"}, callers=({"X-Session-Id": "session-0"},)),
    Subject(name="end user", budget={"end_user": "user-0"}, callers=({"X-User-Id": "user-0"},)),
    Subject(name="model", budget={"model": "{model}"}),
    Subject(name="provider", budget={"provider_id": "openai"}),
    Subject(
        name="each session",
        budget={"each": "session"},
        callers=_each("X-Session-Id", "session"),
        column="session_id",
    ),
    Subject(name="each end user", budget={"each": "end_user"}, callers=_each("X-User-Id", "user"), column="end_user"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """When a budget starts afresh: fields of ``CreateBudgetRequest``."""

    name: str
    budget: Mapping[str, str]


def _day(days: int) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).date().isoformat()


WINDOWS = (
    Window(name="day", budget={"period": "daily"}),
    Window(name="week", budget={"period": "weekly"}),
    Window(name="month", budget={"period": "monthly"}),
    Window(name="quarter", budget={"period": "quarterly"}),
    Window(name="year", budget={"period": "yearly"}),
    Window(name="rolling", budget={"period": "rolling", "rolling_period": "6h"}),
    Window(name="dates", budget={"period": "custom", "start_date": _day(-2), "end_date": _day(2)}),
    Window(name="lifetime", budget={"period": "lifetime"}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What is called: ``body`` makes a request that the fake provider bills at random, below the hold.

    All bodies of a route have one length and one output bound, so all their holds are alike.
    """

    name: str
    path: str
    model: str
    stream: bool
    output_field: str = ""
    input_field: str = "input"
    # For a body that is to take a while: with it calls are under way whenever something is killed.
    delays: Mapping[str, int] = field(default_factory=dict)

    def body(self, random: Random, *, slow: bool = False) -> dict[str, Any]:
        """Make one request."""
        # Two digits each: the length of the text is what bounds the input.
        asked: dict[str, int] = {"prompt_tokens": random.randint(10, 40)}
        if self.output_field:
            asked["completion_tokens"] = random.randint(10, 20)
        if slow:
            asked |= self.delays
        # The padding is what an input's bound is made of: the bill must not be above it.
        text = "fake:" + json.dumps(asked) + " " * PADDING
        content: Any = [{"role": "user", "content": text}] if self.input_field == "messages" else text
        body: dict[str, Any] = {"model": self.model, self.input_field: content}
        if self.output_field:
            body[self.output_field] = 20
        if self.stream:
            body["stream"] = True
        return body


_CHAT = {"path": "/v1/chat/completions", "model": "gpt-4o-mini", "output_field": "max_tokens"}
_RESPONSES = {"path": "/v1/responses", "model": "gpt-4o-mini", "output_field": "max_output_tokens"}
_SLOW, _SLOW_STREAM = {"delay_ms": 150}, {"chunk_delay_ms": 10}

ROUTES = (
    Route(name="chat JSON", input_field="messages", stream=False, delays=_SLOW, **_CHAT),
    Route(name="chat SSE", input_field="messages", stream=True, delays=_SLOW_STREAM, **_CHAT),
    Route(name="responses JSON", stream=False, delays=_SLOW, **_RESPONSES),
    Route(name="responses SSE", stream=True, delays=_SLOW_STREAM, **_RESPONSES),
    Route(name="embeddings", path="/v1/embeddings", model="text-embedding-3-small", stream=False, delays=_SLOW),
)


def missing(row: Subject | Window) -> str | None:
    """Say what this build's API lacks for a row, or ``None``."""
    for name in row.budget:
        if name not in FIELDS:
            return f"CreateBudgetRequest.{name}"
    period = row.budget.get("period", "").upper()
    if period and period not in FIELDS["period"].enum_type.values_by_name:
        return f"Budget.Period.{period}"
    return None


def able(rows: tuple[Any, ...]) -> tuple[Any, ...]:
    """Keep the rows that this build can do."""
    return tuple(row for row in rows if missing(row) is None)


def chosen(rows: tuple[Any, ...], names: list[str] | None) -> tuple[Any, ...]:
    """Pick rows by name, all when there are no names."""
    unknown = set(names or ()) - {row.name for row in rows}
    if unknown:
        raise SystemExit(f"expected some of {', '.join(row.name for row in rows)}; got {', '.join(sorted(unknown))}")
    return tuple(row for row in rows if not names or row.name in names)


def cells(
    subjects: tuple[Subject, ...], windows: tuple[Window, ...], routes: tuple[Route, ...]
) -> Iterator[tuple[Subject, Window, Route]]:
    """List every combination that this build can do."""
    for subject, window in product(able(subjects), able(windows)):
        for route in routes:
            yield subject, window, route


def diagonal(
    subjects: tuple[Subject, ...], windows: tuple[Window, ...], routes: tuple[Route, ...]
) -> list[tuple[Subject, Window, Route]]:
    """List the fewest combinations in which each row is that this build can do."""
    columns = (able(subjects), able(windows), routes)
    rows = range(max(map(len, columns)))
    return [tuple(column[number % len(column)] for column in columns) for number in rows]
