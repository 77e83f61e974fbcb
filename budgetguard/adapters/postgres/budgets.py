"""Budgets. Every change raises the tenant's version, so that no call is decided by the old ones."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from budgetguard.adapters.postgres.budget_checks import check_draft
from budgetguard.adapters.postgres.budget_subjects import check_subject
from budgetguard.adapters.postgres.journal import keep_answer, replayed_answer, write_audit
from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.postgres.pool import Connection, Database, moment_or_none
from budgetguard.adapters.postgres.tenant_rows import living, lock_tenant, raise_version, read_tenant
from budgetguard.core.entities import BUDGETS_PER_TENANT_MAX, Budget, BudgetChanges, BudgetDraft, Page
from budgetguard.core.errors import AlreadyExistsError, EtagMismatchError, InvalidError, NotFoundError
from budgetguard.core.snapshot import BudgetSpec, Mode, SubjectKind, TopUp, WindowKind
from budgetguard.core.window import CALENDAR

BUDGET = "budget"
_CREATE = "budgets.create"

COLUMNS = """
    budget_id, tenant_id, subject_kind, subject, window_kind AS "window", zone, mode, limit_nanos,
    spec_version, version, epoch_ms(starts_at) AS starts_at_ms, epoch_ms(ends_at) AS ends_at_ms,
    epoch_ms(created_at) AS created_at_ms, epoch_ms(updated_at) AS updated_at_ms, epoch_ms(deleted_at) AS deleted_at_ms,
    each, subjects_max, anchor_day, anchor_month, rolling_ms, rollover_cap_nanos, threshold_bps, seeding, previous_spec,
    epoch_ms(carries_since) AS carries_since_ms,
    coalesce((
        SELECT carried_nanos FROM budget_carries AS carry
        WHERE carry.budget_id = budgets.budget_id AND carry.spec_version = budgets.spec_version
        ORDER BY window_starts_at DESC LIMIT 1
    ), 0) AS carried_nanos,
    (
        SELECT epoch_ms(max(window_starts_at)) FROM budget_carries AS carry
        WHERE carry.budget_id = budgets.budget_id AND carry.spec_version = budgets.spec_version
    ) AS carried_into_ms,
    coalesce((
        SELECT jsonb_agg(jsonb_build_object('amount_nanos', amount_nanos, 'starts_at_ms', epoch_ms(top_up.starts_at),
            'expires_at_ms', epoch_ms(expires_at)) ORDER BY top_up.created_at, top_up_id)
        FROM budget_top_ups AS top_up
        WHERE top_up.budget_id = budgets.budget_id AND removed_at IS NULL AND (expires_at > now()) IS NOT false
    ), '[]') AS top_ups
"""

# What a budget counts; a change of any of them starts another counter. (Its subject never changes.)
_WINDOW_FIELDS = ("window", "zone", "starts_at_ms", "ends_at_ms", "anchor_day", "anchor_month", "rolling_ms")
# What a draft of an existing budget may change of it.
_TERMS = ("limit_nanos", "mode", "subjects_max", "rollover_cap_nanos", "threshold_bps")


class BudgetRepository:
    """Budgets by id, which are unique over all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, draft: BudgetDraft, *, actor: str, tenant_id: str, request_id: str = "") -> Budget:
        """Create a budget.

        Raises:
            NotFoundError: there is no such tenant, or the tenant has no such API key.
            AlreadyExistsError: the id is taken.
            RequestIdReusedError: the request id came with another body before.
            InvalidError: a value cannot be, or no call can be of such a subject.
        """
        check_draft(draft)
        # The id is made anew for each attempt, so it is no part of what makes two requests the same.
        body = {"tenant_id": tenant_id, **asdict(draft), "budget_id": ""}
        async with self._database.transaction() as connection:
            known = await replayed_answer(connection, method=_CREATE, request_id=request_id, body=body)
            if known is not None:
                return budget_of(known)
            await lock_tenant(connection, tenant_id)
            budget = await _insert(connection, tenant_id, draft, actor=actor)
            await _check_number(connection, tenant_id)
            await raise_version(connection, tenant_id)
            await keep_answer(connection, method=_CREATE, request_id=request_id, answer=budget)
        return budget

    async def set_many(
        self, drafts: Sequence[BudgetDraft], *, actor: str, tenant_id: str, remove_others: bool = False
    ) -> tuple[Budget, ...]:
        """Set several budgets at once, all or none, and return them in the order given.

        A draft whose subject and window a budget has already changes that one's limit and other terms and keeps its
        id, so sending the same again changes nothing. ``remove_others`` deletes the tenant's budgets that no draft
        names.

        Raises:
            NotFoundError: there is no such tenant, or the tenant has no such API key.
            AlreadyExistsError: a new budget's id is taken.
            InvalidError: a value cannot be (``budgets[1].limit_nanos``), no call can be of a subject, or two drafts
                have one subject and window.
        """
        for index, draft in enumerate(drafts):
            check_draft(draft, path=f"budgets[{index}].")
        if len({_identity(draft) for draft in drafts}) < len(drafts):
            raise InvalidError("budgets", "expected each subject and window once")
        async with self._database.transaction() as connection:
            await lock_tenant(connection, tenant_id)
            standing = {_identity(budget): budget for budget in reversed(await live_budgets(connection, tenant_id))}
            budgets: list[Budget] = []
            for index, draft in enumerate(drafts):
                known = standing.get(_identity(draft))
                if known is None:
                    place = f"budgets[{index}]."
                    budgets.append(await _insert(connection, tenant_id, draft, actor=actor, path=place))
                else:
                    wanted = replace(known, **{field: getattr(draft, field) for field in _TERMS})
                    budgets.append(await _write(connection, known, wanted, actor=actor))
            kept = {budget.budget_id for budget in budgets}
            others = [budget for budget in await live_budgets(connection, tenant_id) if budget.budget_id not in kept]
            for budget in others if remove_others else []:
                await _delete(connection, budget, actor=actor)
            await _check_number(connection, tenant_id)
            if (others and remove_others) or any(standing.get(_identity(budget)) != budget for budget in budgets):
                await raise_version(connection, tenant_id)
        return tuple(budgets)

    async def get(self, budget_id: str) -> Budget:
        """Return one budget that is not deleted, of a tenant that is not deleted.

        Raises:
            NotFoundError: there is none.
        """
        async with self._database.transaction() as connection:
            return await read_budget(connection, budget_id)

    async def list(self, tenant_id: str, *, page_size: int = 0, page_token: str = "") -> Page[Budget]:
        """List a tenant's budgets by id.

        Raises:
            NotFoundError: there is no such tenant.
            InvalidError: not a page token of this listing.
        """
        listing = f"{BUDGET}/{tenant_id}"
        limit = page_limit(page_size)
        after = read_token(page_token, listing, [str])
        async with self._database.transaction() as connection:
            living(await read_tenant(connection, tenant_id), tenant_id)
            rows = await connection.fetch(
                f"""
                SELECT {COLUMNS} FROM budgets WHERE tenant_id = $1 AND deleted_at IS NULL AND budget_id > $2
                ORDER BY budget_id LIMIT $3
                """,
                tenant_id,
                after[0] if after else "",
                limit + 1,
            )
        return make_page(
            [budget_of(row) for row in rows], limit=limit, listing=listing, position=lambda b: [b.budget_id]
        )

    async def update(
        self, budget_id: str, changes: BudgetChanges, *, actor: str, expected_version: int | None = None
    ) -> Budget:
        """Change the given fields. Another limit keeps what was spent; another window counts afresh from the ledger.

        Raises:
            NotFoundError: there is no such budget.
            EtagMismatchError: it has another version than expected.
            InvalidError: a value cannot be.
        """
        async with self._database.transaction() as connection:
            before = await lock_budget(connection, budget_id)
            if expected_version is not None and expected_version != before.version:
                raise EtagMismatchError(BUDGET, budget_id, etag=str(before.version))
            wanted = _changed(before, changes)
            check_draft(_draft_of(wanted))
            after = await _write(connection, before, wanted, actor=actor)
            if after != before:
                await raise_version(connection, before.tenant_id)
        return after

    async def delete(self, budget_id: str, *, actor: str, expected_version: int | None = None) -> Budget:
        """Delete a budget: calls are no longer held against it. The ledger is not touched.

        Raises:
            NotFoundError: there is no such budget.
            EtagMismatchError: it has another version than expected.
        """
        async with self._database.transaction() as connection:
            before = await lock_budget(connection, budget_id)
            if expected_version is not None and expected_version != before.version:
                raise EtagMismatchError(BUDGET, budget_id, etag=str(before.version))
            after = await _delete(connection, before, actor=actor)
            await raise_version(connection, before.tenant_id)
        return after

    async def seeding_tenants(self) -> tuple[str, ...]:
        """List the tenants with budgets whose counters do not have their past yet."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                "SELECT DISTINCT tenant_id FROM budgets WHERE seeding AND deleted_at IS NULL ORDER BY tenant_id"
            )
        return tuple(row["tenant_id"] for row in rows)

    async def mark_seeded(self, budget_id: str, spec_version: int) -> bool:
        """Say that a budget's counters have the past now, so it is enforced as it stands; ``False``: it is outdated.

        The etag stays: nothing that an administrator decides has changed.
        """
        async with self._database.transaction() as connection:
            try:
                before = await lock_budget(connection, budget_id)
            except NotFoundError:
                return False
            if not before.seeding or before.spec_version != spec_version:
                return False
            await connection.execute(
                "UPDATE budgets SET seeding = false, previous_spec = NULL WHERE budget_id = $1", budget_id
            )
            await raise_version(connection, before.tenant_id)
        return True


async def live_budgets(connection: Connection, tenant_id: str) -> list[Budget]:
    """Read a tenant's budgets that are not deleted, oldest first."""
    rows = await connection.fetch(
        f"""
        SELECT {COLUMNS} FROM budgets WHERE tenant_id = $1 AND deleted_at IS NULL
        ORDER BY created_at, budget_id
        """,
        tenant_id,
    )
    return [budget_of(row) for row in rows]


def budget_of(row: Mapping[str, Any]) -> Budget:
    """Read a row, or an answer that was kept as JSON."""
    values = {**row, **_typed(row)}
    previous = values.get("previous_spec")
    # An answer that was kept before these columns were there has none of them.
    values["previous_spec"] = None if previous is None else BudgetSpec(**{**previous, **_typed(previous)})
    if "threshold_bps" in values:
        values["threshold_bps"] = tuple(values["threshold_bps"])
    return Budget(**values)


def _typed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields that a budget and its specification share, and that JSON and SQL spell otherwise."""
    return {
        "subject_kind": SubjectKind(row["subject_kind"]),
        "window": WindowKind(row["window"]),
        "mode": Mode(row["mode"]),
        "top_ups": tuple(TopUp(**top_up) for top_up in row.get("top_ups", ())),
    }


def _identity(budget: Budget | BudgetDraft) -> tuple[object, ...]:
    return (budget.subject_kind, budget.subject, budget.each, *(getattr(budget, field) for field in _WINDOW_FIELDS))


def _draft_of(budget: Budget) -> BudgetDraft:
    return BudgetDraft(**{field.name: getattr(budget, field.name) for field in fields(BudgetDraft)})


def _changed(before: Budget, changes: BudgetChanges) -> Budget:
    """Apply changes. Of another kind of window what belonged to the old kind is dropped, unless it is given anew.

    Raises:
        InvalidError: the dates of a fixed window would no longer be days of its zone.
    """
    wanted = replace(before, **changes)
    if wanted.window is before.window:
        is_moved = wanted.window is WindowKind.FIXED and wanted.zone != before.zone
        if is_moved and not {"starts_at_ms", "ends_at_ms"} <= changes.keys():
            # Kept as instants, they would be other times of day in that zone.
            raise InvalidError("zone", "expected start_date and end_date with it: they are days of the zone")
        return wanted
    return replace(
        wanted,
        starts_at_ms=changes.get("starts_at_ms"),
        ends_at_ms=changes.get("ends_at_ms"),
        rolling_ms=changes.get("rolling_ms"),
        anchor_day=changes.get("anchor_day", 1),
        anchor_month=changes.get("anchor_month", 1),
        rollover_cap_nanos=(
            wanted.rollover_cap_nanos if wanted.window in CALENDAR else changes.get("rollover_cap_nanos")
        ),
    )


async def read_budget(connection: Connection, budget_id: str) -> Budget:
    """Read a budget that is not deleted, of a tenant that is not deleted.

    Raises:
        NotFoundError: there is none.
    """
    row = await connection.fetchrow(
        f"SELECT {COLUMNS} FROM budgets WHERE budget_id = $1 AND deleted_at IS NULL",
        budget_id,
    )
    if row is None:
        raise NotFoundError(BUDGET, budget_id)
    budget = budget_of(row)
    living(await read_tenant(connection, budget.tenant_id), budget.tenant_id)
    return budget


async def lock_budget(connection: Connection, budget_id: str) -> Budget:
    """Read a budget and keep others from changing it until the commit.

    Every writer locks the tenant first, so budgets need no locks of their own; read again under it.

    Raises:
        NotFoundError: there is none.
    """
    budget = await read_budget(connection, budget_id)
    await lock_tenant(connection, budget.tenant_id)
    return await read_budget(connection, budget_id)


async def _insert(connection: Connection, tenant_id: str, draft: BudgetDraft, *, actor: str, path: str = "") -> Budget:
    await check_subject(connection, tenant_id, draft, path=path)
    row = await connection.fetchrow(
        f"""
        INSERT INTO budgets (budget_id, tenant_id, subject_kind, subject, window_kind, zone, mode, limit_nanos,
            spec_version, version, starts_at, ends_at, each, subjects_max, anchor_day, anchor_month, rolling_ms,
            rollover_cap_nanos, threshold_bps, seeding)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 1, 1, $9, $10, $11, $12, $13, $14, $15, $16, $17, true)
        ON CONFLICT DO NOTHING RETURNING {COLUMNS}
        """,
        draft.budget_id,
        tenant_id,
        draft.subject_kind,
        draft.subject,
        draft.window,
        draft.zone,
        draft.mode,
        draft.limit_nanos,
        _moment("starts_at_ms", draft.starts_at_ms),
        _moment("ends_at_ms", draft.ends_at_ms),
        draft.each,
        draft.subjects_max,
        draft.anchor_day,
        draft.anchor_month,
        draft.rolling_ms,
        draft.rollover_cap_nanos,
        list(draft.threshold_bps),
    )
    if row is None:
        raise AlreadyExistsError(BUDGET, draft.budget_id)
    budget = budget_of(row)
    await _audit(connection, actor, "create", None, budget)
    return budget


async def _write(connection: Connection, before: Budget, wanted: Budget, *, actor: str) -> Budget:
    if wanted == before:
        return before
    counts_other = any(getattr(before, field) != getattr(wanted, field) for field in _WINDOW_FIELDS)
    begins_to_carry = counts_other or (before.rollover_cap_nanos is None and wanted.rollover_cap_nanos is not None)
    # What is enforced until the new counters have the past: of several changes in a row, what was before the first.
    previous = before.spec() if counts_other and not before.seeding else before.previous_spec
    row = await connection.fetchrow(
        f"""
        UPDATE budgets SET window_kind = $2, zone = $3, mode = $4, limit_nanos = $5, starts_at = $6, ends_at = $7,
            spec_version = spec_version + $8, version = version + 1, updated_at = now(), subjects_max = $9,
            anchor_day = $10, anchor_month = $11, rolling_ms = $12, rollover_cap_nanos = $13, threshold_bps = $14,
            seeding = $15, previous_spec = $16, carries_since = CASE WHEN $17 THEN now() ELSE carries_since END
        WHERE budget_id = $1 RETURNING {COLUMNS}
        """,
        before.budget_id,
        wanted.window,
        wanted.zone,
        wanted.mode,
        wanted.limit_nanos,
        _moment("starts_at_ms", wanted.starts_at_ms),
        _moment("ends_at_ms", wanted.ends_at_ms),
        int(counts_other),
        wanted.subjects_max,
        wanted.anchor_day,
        wanted.anchor_month,
        wanted.rolling_ms,
        wanted.rollover_cap_nanos,
        list(wanted.threshold_bps),
        before.seeding or counts_other,
        None if previous is None else asdict(previous),
        begins_to_carry,
    )
    after = budget_of(row)
    await _audit(connection, actor, "update", before, after)
    return after


async def _delete(connection: Connection, before: Budget, *, actor: str) -> Budget:
    row = await connection.fetchrow(
        f"""
        UPDATE budgets SET deleted_at = now(), updated_at = now(), version = version + 1
        WHERE budget_id = $1 RETURNING {COLUMNS}
        """,
        before.budget_id,
    )
    after = budget_of(row)
    await _audit(connection, actor, "delete", before, after)
    return after


async def _check_number(connection: Connection, tenant_id: str) -> None:
    number = await connection.fetchval(
        "SELECT count(*) FROM budgets WHERE tenant_id = $1 AND deleted_at IS NULL", tenant_id
    )
    if number > BUDGETS_PER_TENANT_MAX:
        raise InvalidError("budgets", f"expected at most {BUDGETS_PER_TENANT_MAX} budgets a tenant")


def _moment(field: str, milliseconds: int | None) -> Any:
    try:
        return moment_or_none(milliseconds)
    except OverflowError:
        raise InvalidError(field, "expected a time before the year 10000") from None


async def _audit(connection: Connection, actor: str, action: str, before: Budget | None, after: Budget) -> None:
    await write_audit(
        connection,
        actor=actor,
        action=action,
        kind=BUDGET,
        resource_id=after.budget_id,
        tenant_id=after.tenant_id,
        before=before,
        after=after,
    )
