"""Top-ups: money added to a budget once. Each change raises the tenant's version, so it holds for the next call."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from budgetguard.adapters.postgres.budgets import lock_budget, read_budget
from budgetguard.adapters.postgres.journal import keep_answer, replayed_answer, write_audit
from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.postgres.pool import Connection, Database, moment_or_none
from budgetguard.adapters.postgres.tenant_rows import raise_version
from budgetguard.core.entities import REASON_CHARACTERS_MAX, TOP_UPS_PER_BUDGET_MAX, BudgetTopUp, Page, TopUpDraft
from budgetguard.core.errors import AlreadyExistsError, InvalidError, NotFoundError
from budgetguard.core.money import COUNTER_NANOS_MAX, format_usd

TOP_UP = "top-up"
_ADD = "top_ups.add"

_COLUMNS = """
    top_up_id, budget_id, amount_nanos, reason, epoch_ms(starts_at) AS starts_at_ms,
    epoch_ms(expires_at) AS expires_at_ms, epoch_ms(created_at) AS created_at_ms, epoch_ms(removed_at) AS removed_at_ms,
    (SELECT tenant_id FROM budgets WHERE budgets.budget_id = budget_top_ups.budget_id) AS tenant_id
"""


class TopUpRepository:
    """Top-ups of budgets. ``actor`` names who changes something, for the audit."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, draft: TopUpDraft, *, actor: str, budget_id: str, request_id: str = "") -> BudgetTopUp:
        """Add money to a budget.

        Raises:
            NotFoundError: there is no such budget.
            AlreadyExistsError: the id is taken.
            RequestIdReusedError: the request id came with another body before.
            InvalidError: a value cannot be.
        """
        _check(draft)
        # The id is made anew for each attempt, so it is no part of what makes two requests the same.
        body = {"budget_id": budget_id, **asdict(draft), "top_up_id": ""}
        async with self._database.transaction() as connection:
            known = await replayed_answer(connection, method=_ADD, request_id=request_id, body=body)
            if known is not None:
                return _top_up_of(known)
            budget = await lock_budget(connection, budget_id)
            # Those that may still apply, now or later.
            if len(budget.top_ups) >= TOP_UPS_PER_BUDGET_MAX:
                raise InvalidError(
                    "budget_id", f"expected a budget with less than {TOP_UPS_PER_BUDGET_MAX} top-ups: remove some first"
                )
            row = await connection.fetchrow(
                f"""
                INSERT INTO budget_top_ups (top_up_id, budget_id, amount_nanos, reason, starts_at, expires_at)
                SELECT $1, $2, $3, $4, starts_at, $6 FROM (SELECT coalesce($5, now()) AS starts_at) AS given
                WHERE ($6 > greatest(starts_at, now())) IS NOT false
                ON CONFLICT DO NOTHING RETURNING {_COLUMNS}
                """,
                draft.top_up_id,
                budget_id,
                draft.amount_nanos,
                draft.reason,
                _moment("start_time", draft.starts_at_ms),
                _moment("expire_time", draft.expires_at_ms),
            )
            if row is None:
                if await connection.fetchval("SELECT true FROM budget_top_ups WHERE top_up_id = $1", draft.top_up_id):
                    raise AlreadyExistsError(TOP_UP, draft.top_up_id)
                raise InvalidError("expire_time", "expected a time to come, after the start")
            top_up = _top_up_of(row)
            await _audit(connection, actor, "add", None, top_up)
            await raise_version(connection, budget.tenant_id)
            await keep_answer(connection, method=_ADD, request_id=request_id, answer=top_up)
        return top_up

    async def list(self, budget_id: str, *, page_size: int = 0, page_token: str = "") -> Page[BudgetTopUp]:
        """List a budget's top-ups, newest first, also those that no longer apply.

        Raises:
            NotFoundError: there is no such budget.
            InvalidError: not a page token of this listing.
        """
        listing = f"{TOP_UP}/{budget_id}"
        limit = page_limit(page_size)
        after = read_token(page_token, listing, [int, str])
        async with self._database.transaction() as connection:
            await read_budget(connection, budget_id)
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS} FROM budget_top_ups
                WHERE budget_id = $1 AND ($2::bigint IS NULL OR (epoch_ms(created_at), top_up_id) < ($2, $3))
                ORDER BY epoch_ms(created_at) DESC, top_up_id DESC LIMIT $4
                """,
                budget_id,
                *(after or (None, "")),
                limit + 1,
            )
        return make_page(
            [_top_up_of(row) for row in rows],
            limit=limit,
            listing=listing,
            position=lambda top_up: [top_up.created_at_ms, top_up.top_up_id],
        )

    async def remove(self, budget_id: str, top_up_id: str, *, actor: str) -> BudgetTopUp:
        """Take a top-up back. What was spent of it stays spent, so the budget may be over its limit then.

        Raises:
            NotFoundError: there is no such budget, or no such top-up of it, or it was removed already.
        """
        async with self._database.transaction() as connection:
            budget = await lock_budget(connection, budget_id)
            row = await connection.fetchrow(
                f"SELECT {_COLUMNS} FROM budget_top_ups WHERE top_up_id = $1 AND budget_id = $2 AND removed_at IS NULL",
                top_up_id,
                budget_id,
            )
            if row is None:
                raise NotFoundError(TOP_UP, top_up_id)
            removed = await connection.fetchrow(
                f"UPDATE budget_top_ups SET removed_at = now() WHERE top_up_id = $1 RETURNING {_COLUMNS}", top_up_id
            )
            after = _top_up_of(removed)
            await _audit(connection, actor, "remove", _top_up_of(row), after)
            await raise_version(connection, budget.tenant_id)
        return after


def _check(draft: TopUpDraft) -> None:
    if not 0 < draft.amount_nanos <= COUNTER_NANOS_MAX:
        raise InvalidError(
            "amount_nanos", f"expected US dollars, more than 0 and at most {format_usd(COUNTER_NANOS_MAX)}"
        )
    if not draft.reason.strip():
        raise InvalidError("reason", "expected why the money is added")
    if len(draft.reason) > REASON_CHARACTERS_MAX or not draft.reason.isprintable():
        raise InvalidError("reason", f"expected at most {REASON_CHARACTERS_MAX} printable characters")


def _moment(field: str, milliseconds: int | None) -> Any:
    try:
        return moment_or_none(milliseconds)
    except OverflowError:
        raise InvalidError(field, "expected a time in the years 1 to 9999") from None


def _top_up_of(row: Mapping[str, Any]) -> BudgetTopUp:
    """Read a row, or an answer that was kept as JSON."""
    return BudgetTopUp(**row)


async def _audit(
    connection: Connection, actor: str, action: str, before: BudgetTopUp | None, after: BudgetTopUp
) -> None:
    await write_audit(
        connection,
        actor=actor,
        action=action,
        kind=TOP_UP,
        resource_id=after.top_up_id,
        tenant_id=after.tenant_id,
        before=before,
        after=after,
    )
