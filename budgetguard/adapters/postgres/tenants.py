"""Tenants. Whatever the data plane knows of one raises its version in the same transaction."""

from budgetguard.adapters.postgres.budgets import live_budgets
from budgetguard.adapters.postgres.journal import keep_answer, replayed_answer, write_audit
from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.postgres.pool import Connection, Database
from budgetguard.adapters.postgres.sessions import closed_sessions
from budgetguard.adapters.postgres.tags import check_open_tags, tag_specs
from budgetguard.adapters.postgres.tenant_rows import (
    TENANT,
    TENANT_COLUMNS,
    living,
    lock_tenant,
    read_tenant,
    tenant_of,
)
from budgetguard.core.entities import (
    CONCURRENT_CALLS_MAX,
    NAME_CHARACTERS_MAX,
    OUTPUT_TOKENS_MAX,
    REQUESTS_PER_MINUTE_MAX,
    STREAM_SLICE_TOKENS_MIN,
    TOKENS_PER_MINUTE_MAX,
    UNBOUNDED_SHARE_MAX,
    Page,
    Tenant,
    TenantChanges,
)
from budgetguard.core.errors import AlreadyExistsError, EtagMismatchError, InvalidError, NotFoundError
from budgetguard.core.snapshot import Status, TenantSnapshot

_CREATE = "tenants.create"


class TenantRepository:
    """Tenants by id. ``actor`` names who changes something, for the audit."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        *,
        actor: str,
        tenant_id: str,
        name: str,
        request_id: str = "",
        requests_per_minute: int = 0,
        output_tokens_max: int = 4096,
        clamp: bool = True,
        tokens_per_minute: int = 0,
        concurrent_calls: int = 0,
        unbounded_share: int = 8,
        stream_slice_tokens: int = 4096,
        overrun: bool = False,
    ) -> Tenant:
        """Create a tenant. A deleted one keeps its id. It has no tags yet, so it can require none.

        Raises:
            AlreadyExistsError: the id is taken.
            RequestIdReusedError: the request id came with another body before.
            InvalidError: a value cannot be.
        """
        changes = TenantChanges(
            name=name,
            requests_per_minute=requests_per_minute,
            output_tokens_max=output_tokens_max,
            clamp=clamp,
            tokens_per_minute=tokens_per_minute,
            concurrent_calls=concurrent_calls,
            unbounded_share=unbounded_share,
            stream_slice_tokens=stream_slice_tokens,
            overrun=overrun,
        )
        _check(changes)
        async with self._database.transaction() as connection:
            known = await replayed_answer(
                connection, method=_CREATE, request_id=request_id, body={"tenant_id": tenant_id, **changes}
            )
            if known is not None:
                return tenant_of(known)
            row = await connection.fetchrow(
                f"""
                INSERT INTO tenants (tenant_id, name, status, version, requests_per_minute, output_tokens_max, clamp,
                    tokens_per_minute, concurrent_calls, unbounded_share, stream_slice_tokens, overrun)
                VALUES ($1, $2, 'ACTIVE', 1, $3, $4, $5, $6, $7, $8, $9, $10)
                ON CONFLICT DO NOTHING RETURNING {TENANT_COLUMNS}
                """,
                tenant_id,
                name,
                requests_per_minute,
                output_tokens_max,
                clamp,
                tokens_per_minute,
                concurrent_calls,
                unbounded_share,
                stream_slice_tokens,
                overrun,
            )
            if row is None:
                raise AlreadyExistsError(TENANT, tenant_id)
            tenant = tenant_of(row)
            await _audit(connection, actor, "create", None, tenant)
            await keep_answer(connection, method=_CREATE, request_id=request_id, answer=tenant)
        return tenant

    async def get(self, tenant_id: str) -> Tenant:
        """Return one tenant that is not deleted.

        Raises:
            NotFoundError: there is none.
        """
        async with self._database.transaction() as connection:
            return living(await read_tenant(connection, tenant_id), tenant_id)

    async def list(self, *, page_size: int = 0, page_token: str = "") -> Page[Tenant]:
        """List the tenants that are not deleted, by id.

        Raises:
            InvalidError: not a page token of this listing.
        """
        limit = page_limit(page_size)
        after = read_token(page_token, TENANT, [str])
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {TENANT_COLUMNS} FROM tenants WHERE status <> 'DELETED' AND tenant_id > $1
                ORDER BY tenant_id LIMIT $2
                """,
                after[0] if after else "",
                limit + 1,
            )
        return make_page(
            [tenant_of(row) for row in rows], limit=limit, listing=TENANT, position=lambda t: [t.tenant_id]
        )

    async def update(
        self, tenant_id: str, changes: TenantChanges, *, actor: str, expected_version: int | None = None
    ) -> Tenant:
        """Change the given fields; when nothing differs, nothing is written.

        Raises:
            NotFoundError: there is no such tenant.
            EtagMismatchError: it has another version than expected.
            InvalidError: a value cannot be.
        """
        _check(changes)
        async with self._database.transaction() as connection:
            before = await lock_tenant(connection, tenant_id)
            if expected_version is not None and expected_version != before.version:
                raise EtagMismatchError(TENANT, tenant_id, etag=str(before.version))
            if all(getattr(before, field) == value for field, value in changes.items()):
                return before
            if "required_tags" in changes:
                await check_open_tags(connection, tenant_id, changes["required_tags"], field="required_tags")
            row = await connection.fetchrow(
                f"""
                UPDATE tenants SET name = $2, status = $3, requests_per_minute = $4, output_tokens_max = $5, clamp = $6,
                    tokens_per_minute = $7, concurrent_calls = $8, unbounded_share = $9, stream_slice_tokens = $10,
                    overrun = $11, required_tags = $12,
                    version = version + 1, updated_at = now()
                WHERE tenant_id = $1 RETURNING {TENANT_COLUMNS}
                """,
                tenant_id,
                changes.get("name", before.name),
                changes.get("status", before.status),
                changes.get("requests_per_minute", before.requests_per_minute),
                changes.get("output_tokens_max", before.output_tokens_max),
                changes.get("clamp", before.clamp),
                changes.get("tokens_per_minute", before.tokens_per_minute),
                changes.get("concurrent_calls", before.concurrent_calls),
                changes.get("unbounded_share", before.unbounded_share),
                changes.get("stream_slice_tokens", before.stream_slice_tokens),
                changes.get("overrun", before.overrun),
                changes.get("required_tags", before.required_tags),
            )
            after = tenant_of(row)
            await _audit(connection, actor, "update", before, after)
        return after

    async def delete(self, tenant_id: str, *, actor: str, expected_version: int | None = None) -> Tenant:
        """Leave a tombstone: the record stays, every key is revoked. Returns the deleted tenant.

        Raises:
            NotFoundError: there is no such tenant.
            EtagMismatchError: it has another version than expected.
        """
        async with self._database.transaction() as connection:
            before = await lock_tenant(connection, tenant_id)
            if expected_version is not None and expected_version != before.version:
                raise EtagMismatchError(TENANT, tenant_id, etag=str(before.version))
            await connection.execute(
                """
                UPDATE api_keys SET status = 'REVOKED', version = version + 1, revoked_at = now(), updated_at = now()
                WHERE tenant_id = $1 AND status <> 'REVOKED'
                """,
                tenant_id,
            )
            row = await connection.fetchrow(
                f"""
                UPDATE tenants SET status = 'DELETED', version = version + 1, updated_at = now(), deleted_at = now()
                WHERE tenant_id = $1 RETURNING {TENANT_COLUMNS}
                """,
                tenant_id,
            )
            after = tenant_of(row)
            await _audit(connection, actor, "delete", before, after)
        return after

    async def snapshot(self, tenant_id: str) -> TenantSnapshot:
        """Build what the data plane must know, of a deleted tenant too, as of one moment.

        Raises:
            NotFoundError: there never was such a tenant.
        """
        async with self._database.transaction() as connection:
            # Shared with readers, not with a change of what belongs to it: version and content belong together.
            tenant = await read_tenant(connection, tenant_id, locking="FOR SHARE")
            if tenant is None:
                raise NotFoundError(TENANT, tenant_id)
            budgets = await live_budgets(connection, tenant_id)
            tags = await tag_specs(connection, tenant_id)
            closed = await closed_sessions(connection, tenant_id)
        return TenantSnapshot(
            tenant_id=tenant.tenant_id,
            version=tenant.version,
            status=tenant.status,
            requests_per_minute=tenant.requests_per_minute,
            budgets=tuple(spec for budget in budgets for spec in budget.specs()),
            output_tokens_max=tenant.output_tokens_max,
            clamp=tenant.clamp,
            tokens_per_minute=tenant.tokens_per_minute,
            concurrent_calls=tenant.concurrent_calls,
            unbounded_share=tenant.unbounded_share,
            stream_slice_tokens=tenant.stream_slice_tokens,
            overrun=tenant.overrun,
            tags=tags,
            required_tags=tenant.required_tags,
            closed_sessions=closed,
        )

    async def versions(
        self, *, after: str, limit: int, changed_within_s: float | None = None
    ) -> tuple[tuple[str, int], ...]:
        """List (tenant id, version) by id, deleted tenants too, for whoever compares them with Redis.

        ``changed_within_s`` restricts to what changed lately by the server's clock.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT tenant_id, version FROM tenants
                WHERE tenant_id > $1 AND ($3::float8 IS NULL OR updated_at > now() - make_interval(secs => $3))
                ORDER BY tenant_id LIMIT $2
                """,
                after,
                limit,
                changed_within_s,
            )
        return tuple((row["tenant_id"], row["version"]) for row in rows)


def _check(changes: TenantChanges) -> None:
    name = changes.get("name")
    if name is not None and not (0 < len(name) <= NAME_CHARACTERS_MAX and name.isprintable()):
        raise InvalidError("name", f"expected 1 to {NAME_CHARACTERS_MAX} printable characters")
    if changes.get("status") is Status.DELETED:
        raise InvalidError("status", "expected ACTIVE or SUSPENDED; a tenant is deleted by its own method")
    if not 0 <= changes.get("requests_per_minute", 0) <= REQUESTS_PER_MINUTE_MAX:
        raise InvalidError("requests_per_minute", f"expected 0 (unlimited) to {REQUESTS_PER_MINUTE_MAX}")
    if not 0 < changes.get("output_tokens_max", 1) <= OUTPUT_TOKENS_MAX:
        raise InvalidError("output_tokens_max", f"expected 1 to {OUTPUT_TOKENS_MAX}")
    if not 0 <= changes.get("tokens_per_minute", 0) <= TOKENS_PER_MINUTE_MAX:
        raise InvalidError("tokens_per_minute", f"expected 0 (unlimited) to {TOKENS_PER_MINUTE_MAX}")
    if not 0 <= changes.get("concurrent_calls", 0) <= CONCURRENT_CALLS_MAX:
        raise InvalidError("concurrent_calls", f"expected 0 (unlimited) to {CONCURRENT_CALLS_MAX}")
    if not 0 < changes.get("unbounded_share", 1) <= UNBOUNDED_SHARE_MAX:
        raise InvalidError("unbounded_share", f"expected 1 (all that is left) to {UNBOUNDED_SHARE_MAX}")
    slice_tokens = changes.get("stream_slice_tokens", 0)
    if slice_tokens != 0 and not STREAM_SLICE_TOKENS_MIN <= slice_tokens <= OUTPUT_TOKENS_MAX:
        raise InvalidError(
            "stream_slice_tokens", f"expected 0 (no slices), or {STREAM_SLICE_TOKENS_MIN} to {OUTPUT_TOKENS_MAX}"
        )


async def _audit(connection: Connection, actor: str, action: str, before: Tenant | None, after: Tenant) -> None:
    await write_audit(
        connection,
        actor=actor,
        action=action,
        kind=TENANT,
        resource_id=after.tenant_id,
        tenant_id=after.tenant_id,
        before=before,
        after=after,
    )
