"""API keys. Each has a version of its own; the secret's hash leaves only with the snapshot."""

from collections.abc import Mapping
from typing import Any

from budgetguard.adapters.postgres.journal import keep_answer, replayed_answer, write_audit
from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.postgres.pool import Connection, Database, moment_or_none
from budgetguard.adapters.postgres.tags import check_open_tags
from budgetguard.adapters.postgres.tenant_rows import living, lock_tenant, read_tenant
from budgetguard.core.entities import (
    CONCURRENT_CALLS_MAX,
    NAME_CHARACTERS_MAX,
    REQUESTS_PER_MINUTE_MAX,
    TOKENS_PER_MINUTE_MAX,
    ApiKey,
    ApiKeyChanges,
    Page,
)
from budgetguard.core.errors import AlreadyExistsError, EtagMismatchError, InvalidError, NotFoundError
from budgetguard.core.snapshot import KeySnapshot, KeyStatus

API_KEY = "api key"
_CREATE = "api_keys.create"

_COLUMNS = """
    tenant_id, key_id, name, status, version, requests_per_minute, tokens_per_minute, concurrent_calls, tags,
    epoch_ms(expires_at) AS expires_at_ms, epoch_ms(created_at) AS created_at_ms, epoch_ms(revoked_at) AS revoked_at_ms
"""


class ApiKeyRepository:
    """API keys by id; ids are unique over all tenants, and never used again."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        *,
        actor: str,
        tenant_id: str,
        key_id: str,
        name: str,
        secret_sha256: str,
        request_id: str = "",
        requests_per_minute: int | None = None,
        expires_at_ms: int | None = None,
        tokens_per_minute: int | None = None,
        concurrent_calls: int | None = None,
        tags: tuple[str, ...] = (),
    ) -> ApiKey:
        """Create a key.

        Sent again with the same ``request_id`` it answers the first key, whose ``key_id`` is then another one than
        given: the first secret cannot be shown again.

        Raises:
            NotFoundError: there is no such tenant.
            AlreadyExistsError: the key id is taken.
            RequestIdReusedError: the request id came with another body before.
            InvalidError: a value cannot be.
        """
        changes = ApiKeyChanges(
            name=name,
            requests_per_minute=requests_per_minute,
            expires_at_ms=expires_at_ms,
            tokens_per_minute=tokens_per_minute,
            concurrent_calls=concurrent_calls,
            tags=tags,
        )
        _check(changes)
        async with self._database.transaction() as connection:
            # Id and secret are made anew for each attempt, so they are no part of what makes two requests the same; nor
            # is a name that is only the id.
            body = {"tenant_id": tenant_id, **changes, "name": "" if name == key_id else name}
            known = await replayed_answer(connection, method=_CREATE, request_id=request_id, body=body)
            if known is not None:
                return _api_key(known)
            await lock_tenant(connection, tenant_id)
            await check_open_tags(connection, tenant_id, tags, field="tags")
            row = await connection.fetchrow(
                f"""
                INSERT INTO api_keys (key_id, tenant_id, name, secret_sha256, status, version, requests_per_minute,
                    expires_at, tokens_per_minute, concurrent_calls, tags)
                VALUES ($1, $2, $3, $4, 'ACTIVE', 1, $5, $6, $7, $8, $9)
                ON CONFLICT DO NOTHING RETURNING {_COLUMNS}
                """,
                key_id,
                tenant_id,
                name,
                secret_sha256,
                requests_per_minute,
                moment_or_none(expires_at_ms),
                tokens_per_minute,
                concurrent_calls,
                tags,
            )
            if row is None:
                raise AlreadyExistsError(API_KEY, key_id)
            api_key = _api_key(row)
            await _audit(connection, actor, "create", None, api_key)
            await keep_answer(connection, method=_CREATE, request_id=request_id, answer=api_key)
        return api_key

    async def get(self, key_id: str) -> ApiKey:
        """Return one key, revoked or not.

        Raises:
            NotFoundError: there is none.
        """
        async with self._database.transaction() as connection:
            return await _read(connection, key_id)

    async def list(self, tenant_id: str, *, page_size: int = 0, page_token: str = "") -> Page[ApiKey]:
        """List a tenant's keys by id, revoked ones too.

        Raises:
            NotFoundError: there is no such tenant.
            InvalidError: not a page token of this listing.
        """
        listing = f"{API_KEY}/{tenant_id}"
        limit = page_limit(page_size)
        after = read_token(page_token, listing, [str])
        async with self._database.transaction() as connection:
            living(await read_tenant(connection, tenant_id), tenant_id)
            rows = await connection.fetch(
                f"SELECT {_COLUMNS} FROM api_keys WHERE tenant_id = $1 AND key_id > $2 ORDER BY key_id LIMIT $3",
                tenant_id,
                after[0] if after else "",
                limit + 1,
            )
        return make_page([_api_key(row) for row in rows], limit=limit, listing=listing, position=lambda k: [k.key_id])

    async def update(
        self, key_id: str, changes: ApiKeyChanges, *, actor: str, expected_version: int | None = None
    ) -> ApiKey:
        """Change the given fields; when nothing differs, nothing is written.

        Raises:
            NotFoundError: there is no such key.
            EtagMismatchError: it has another version than expected.
            InvalidError: a value cannot be.
        """
        _check(changes)
        async with self._database.transaction() as connection:
            before = await _read(connection, key_id, locking="FOR UPDATE")
            if expected_version is not None and expected_version != before.version:
                raise EtagMismatchError(API_KEY, key_id, etag=str(before.version))
            if all(getattr(before, field) == value for field, value in changes.items()):
                return before
            if "tags" in changes:
                await check_open_tags(connection, before.tenant_id, changes["tags"], field="tags")
            row = await connection.fetchrow(
                f"""
                UPDATE api_keys SET name = $2, requests_per_minute = $3, expires_at = $4, tokens_per_minute = $5,
                    concurrent_calls = $6, tags = $7, version = version + 1, updated_at = now()
                WHERE key_id = $1 RETURNING {_COLUMNS}
                """,
                key_id,
                changes.get("name", before.name),
                changes.get("requests_per_minute", before.requests_per_minute),
                moment_or_none(changes.get("expires_at_ms", before.expires_at_ms)),
                changes.get("tokens_per_minute", before.tokens_per_minute),
                changes.get("concurrent_calls", before.concurrent_calls),
                changes.get("tags", before.tags),
            )
            after = _api_key(row)
            await _audit(connection, actor, "update", before, after)
        return after

    async def revoke(self, key_id: str, *, actor: str, expected_version: int | None = None) -> ApiKey:
        """Revoke a key for good. Revoking it again changes nothing.

        Raises:
            NotFoundError: there is no such key.
            EtagMismatchError: it has another version than expected.
        """
        async with self._database.transaction() as connection:
            before = await _read(connection, key_id, locking="FOR UPDATE")
            if expected_version is not None and expected_version != before.version:
                raise EtagMismatchError(API_KEY, key_id, etag=str(before.version))
            if before.status is KeyStatus.REVOKED:
                return before
            row = await connection.fetchrow(
                f"""
                UPDATE api_keys SET status = 'REVOKED', version = version + 1, revoked_at = now(), updated_at = now()
                WHERE key_id = $1 RETURNING {_COLUMNS}
                """,
                key_id,
            )
            after = _api_key(row)
            await _audit(connection, actor, "revoke", before, after)
        return after

    async def snapshot(self, key_id: str) -> KeySnapshot:
        """Build what the data plane must know of one key.

        Raises:
            NotFoundError: there is no such key.
        """
        found = await self._snapshots("key_id = $1", key_id)
        if not found:
            raise NotFoundError(API_KEY, key_id)
        return found[0]

    async def snapshots(self, tenant_id: str) -> tuple[KeySnapshot, ...]:
        """Build the snapshots of all keys of a tenant, deleted or not."""
        return await self._snapshots("tenant_id = $1", tenant_id)

    async def snapshots_after(
        self, key_id: str, *, limit: int, changed_within_s: float | None = None
    ) -> tuple[KeySnapshot, ...]:
        """Build the snapshots of all tenants' keys by id, for whoever compares them with Redis.

        ``changed_within_s`` restricts to what changed lately by the server's clock.
        """
        return await self._snapshots(
            """
            key_id > $1 AND ($3::float8 IS NULL OR updated_at > now() - make_interval(secs => $3))
            ORDER BY key_id LIMIT $2
            """,
            key_id,
            limit,
            changed_within_s,
        )

    async def _snapshots(self, condition: str, *arguments: object) -> tuple[KeySnapshot, ...]:
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                SELECT tenant_id, key_id, version, secret_sha256, status, epoch_ms(expires_at) AS expires_at_ms,
                    requests_per_minute, tokens_per_minute, concurrent_calls, tags
                FROM api_keys WHERE {condition}
                """,
                *arguments,
            )
        return tuple(_snapshot(row) for row in rows)


def _api_key(row: Mapping[str, Any]) -> ApiKey:
    # An answer that was kept before keys had tags has none.
    return ApiKey(**{**row, "status": KeyStatus(row["status"]), "tags": tuple(row.get("tags", ()))})


def _snapshot(row: Mapping[str, Any]) -> KeySnapshot:
    return KeySnapshot(**{**row, "status": KeyStatus(row["status"]), "tags": tuple(row["tags"])})


def _check(changes: ApiKeyChanges) -> None:
    name = changes.get("name")
    if name is not None and not (0 < len(name) <= NAME_CHARACTERS_MAX and name.isprintable()):
        raise InvalidError("name", f"expected 1 to {NAME_CHARACTERS_MAX} printable characters")
    if not 0 <= (changes.get("requests_per_minute") or 0) <= REQUESTS_PER_MINUTE_MAX:
        raise InvalidError("requests_per_minute", f"expected 0 (unlimited) to {REQUESTS_PER_MINUTE_MAX}")
    if not 0 <= (changes.get("tokens_per_minute") or 0) <= TOKENS_PER_MINUTE_MAX:
        raise InvalidError("tokens_per_minute", f"expected 0 (unlimited) to {TOKENS_PER_MINUTE_MAX}")
    if not 0 <= (changes.get("concurrent_calls") or 0) <= CONCURRENT_CALLS_MAX:
        raise InvalidError("concurrent_calls", f"expected 0 (unlimited) to {CONCURRENT_CALLS_MAX}")
    try:
        moment_or_none(changes.get("expires_at_ms"))
    except OverflowError:
        raise InvalidError("expires_at_ms", "expected a time before the year 10000") from None


async def _read(connection: Connection, key_id: str, *, locking: str = "") -> ApiKey:
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM api_keys WHERE key_id = $1 {locking}",
        key_id,
    )
    if row is None:
        raise NotFoundError(API_KEY, key_id)
    return _api_key(row)


async def _audit(connection: Connection, actor: str, action: str, before: ApiKey | None, after: ApiKey) -> None:
    await write_audit(
        connection,
        actor=actor,
        action=action,
        kind=API_KEY,
        resource_id=after.key_id,
        tenant_id=after.tenant_id,
        before=before,
        after=after,
    )
