"""Tags. Every change that calls must see raises the tenant's version, so that none is decided by the old tree."""

from collections.abc import Iterable, Mapping
from typing import Any

from budgetguard.adapters.postgres.journal import keep_answer, replayed_answer, write_audit
from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.adapters.postgres.pool import Connection, Database
from budgetguard.adapters.postgres.tenant_rows import living, lock_tenant, raise_version, read_tenant
from budgetguard.core.entities import NAME_CHARACTERS_MAX, TAGS_LISTED_MAX, Page, Tag, TagChanges, TagStatus
from budgetguard.core.errors import AlreadyExistsError, EtagMismatchError, InvalidError, NotFoundError
from budgetguard.core.snapshot import TagSpec
from budgetguard.core.tags import (
    PATH_SEPARATOR,
    TAG_DEPTH_MAX,
    TAG_ID_EXPECTED,
    TAG_ID_PATTERN,
    TAGS_PER_TENANT_MAX,
    depth_of,
    is_at_or_below,
    moved_path,
    path_of,
)

TAG = "tag"
_CREATE = "tags.create"

_COLUMNS = """
    tenant_id, tag_id, name, parent_id, path, status, version, epoch_ms(created_at) AS created_at_ms,
    epoch_ms(updated_at) AS updated_at_ms
"""


class TagRepository:
    """Tags by tenant and id. None is ever deleted: an inactive one keeps its id, its place and its spend."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self, *, actor: str, tenant_id: str, tag_id: str, name: str, parent_id: str = "", request_id: str = ""
    ) -> Tag:
        """Create a tag, at the root or below another one.

        Raises:
            NotFoundError: there is no such tenant, or no such parent.
            AlreadyExistsError: the tenant has the id already.
            RequestIdReusedError: the request id came with another body before.
            InvalidError: a value cannot be.
        """
        if not TAG_ID_PATTERN.fullmatch(tag_id):
            raise InvalidError("tag_id", f"expected {TAG_ID_EXPECTED}")
        _check_name(name)
        body = {"tenant_id": tenant_id, "tag_id": tag_id, "name": name, "parent_id": parent_id}
        async with self._database.transaction() as connection:
            known = await replayed_answer(connection, method=_CREATE, request_id=request_id, body=body)
            if known is not None:
                return _tag(known)
            await lock_tenant(connection, tenant_id)
            path = path_of(tag_id, parent_path=await _path_of_parent(connection, tenant_id, parent_id))
            _check_depth(depth_of(path))
            row = await connection.fetchrow(
                f"""
                INSERT INTO tags (tenant_id, tag_id, name, parent_id, path, status, version)
                VALUES ($1, $2, $3, $4, $5, 'ACTIVE', 1) ON CONFLICT DO NOTHING RETURNING {_COLUMNS}
                """,
                tenant_id,
                tag_id,
                name,
                parent_id,
                path,
            )
            if row is None:
                raise AlreadyExistsError(TAG, tag_id)
            number = await connection.fetchval("SELECT count(*) FROM tags WHERE tenant_id = $1", tenant_id)
            if number > TAGS_PER_TENANT_MAX:
                raise InvalidError("tag_id", f"expected at most {TAGS_PER_TENANT_MAX} tags a tenant, inactive ones too")
            tag = _tag(row)
            await _audit(connection, actor, "create", None, tag)
            await raise_version(connection, tenant_id)
            await keep_answer(connection, method=_CREATE, request_id=request_id, answer=tag)
        return tag

    async def get(self, tenant_id: str, tag_id: str) -> Tag:
        """Return one tag, active or not.

        Raises:
            NotFoundError: there is no such tenant, or it has no such tag.
        """
        async with self._database.transaction() as connection:
            living(await read_tenant(connection, tenant_id), tenant_id)
            return await _read(connection, tenant_id, tag_id)

    async def list(self, tenant_id: str, *, page_size: int = 0, page_token: str = "") -> Page[Tag]:
        """List a tenant's tags, inactive ones too, by path: each right before what is below it.

        Raises:
            NotFoundError: there is no such tenant.
            InvalidError: not a page token of this listing.
        """
        listing = f"{TAG}/{tenant_id}"
        limit = page_limit(page_size)
        after = read_token(page_token, listing, [str])
        async with self._database.transaction() as connection:
            living(await read_tenant(connection, tenant_id), tenant_id)
            # Compared as lists of ids: as texts, "a-b" would stand between "a" and "a/c".
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS} FROM tags
                WHERE tenant_id = $1 AND ($2::text IS NULL OR string_to_array(path, '/') > string_to_array($2, '/'))
                ORDER BY string_to_array(path, '/') LIMIT $3
                """,
                tenant_id,
                after[0] if after else None,
                limit + 1,
            )
        return make_page([_tag(row) for row in rows], limit=limit, listing=listing, position=lambda tag: [tag.path])

    async def update(
        self, tenant_id: str, tag_id: str, changes: TagChanges, *, actor: str, expected_version: int | None = None
    ) -> Tag:
        """Change the given fields; when nothing differs, nothing is written. INACTIVE closes all tags below it too.

        Raises:
            NotFoundError: there is no such tenant, or it has no such tag.
            EtagMismatchError: it has another version than expected.
            InvalidError: a value cannot be, or the tenant requires a tag that would be closed.
        """
        if "name" in changes:
            _check_name(changes["name"])
        async with self._database.transaction() as connection:
            before = await _lock(connection, tenant_id, tag_id, expected_version)
            if all(getattr(before, field) == value for field, value in changes.items()):
                return before
            status = changes.get("status", before.status)
            if status is TagStatus.INACTIVE:
                await _check_not_required(connection, before)
            row = await connection.fetchrow(
                f"""
                UPDATE tags SET name = $3, status = $4, version = version + 1, updated_at = now()
                WHERE tenant_id = $1 AND tag_id = $2 RETURNING {_COLUMNS}
                """,
                tenant_id,
                tag_id,
                changes.get("name", before.name),
                status,
            )
            after = _tag(row)
            await _audit(connection, actor, "update", before, after)
            if after.status is not before.status:
                await raise_version(connection, tenant_id)
        return after

    async def move(
        self, tenant_id: str, tag_id: str, *, parent_id: str, actor: str, expected_version: int | None = None
    ) -> Tag:
        """Put a tag, with all that is below it, under another parent (empty: at the root).

        What was spent stays with the ancestors of its time; only later calls roll up to the new ones.

        Raises:
            NotFoundError: there is no such tenant, tag or parent.
            EtagMismatchError: it has another version than expected.
            InvalidError: the parent is the tag itself or below it, or the tree would grow too deep, or a closed parent
                would close a tag that the tenant requires.
        """
        async with self._database.transaction() as connection:
            before = await _lock(connection, tenant_id, tag_id, expected_version)
            if before.parent_id == parent_id:
                return before
            parent_path = await _path_of_parent(connection, tenant_id, parent_id)
            if parent_path and is_at_or_below(parent_path, before.path):
                raise InvalidError("parent_id", f"expected a tag that is not {tag_id!r} itself nor below it")
            new_root = path_of(tag_id, parent_path=parent_path)
            below = await connection.fetch(
                f"SELECT tag_id, path FROM tags WHERE tenant_id = $1 AND {_AT_OR_BELOW}", tenant_id, before.path
            )
            paths = {row["tag_id"]: moved_path(row["path"], old_root=before.path, new_root=new_root) for row in below}
            _check_depth(max(map(depth_of, paths.values())))
            await connection.execute(
                """
                UPDATE tags SET path = moved.path, version = version + 1, updated_at = now(),
                    parent_id = CASE WHEN tags.tag_id = $4 THEN $5 ELSE tags.parent_id END
                FROM unnest($2::text[], $3::text[]) AS moved (tag_id, path)
                WHERE tags.tenant_id = $1 AND tags.tag_id = moved.tag_id
                """,
                tenant_id,
                list(paths),
                list(paths.values()),
                tag_id,
                parent_id,
            )
            after = await _read(connection, tenant_id, tag_id)
            if await _closed_on(connection, tenant_id, new_root.split(PATH_SEPARATOR)[:-1]):
                await _check_not_required(connection, after, field="parent_id")
            await _audit(connection, actor, "move", before, after)
            await raise_version(connection, tenant_id)
        return after


async def tag_specs(connection: Connection, tenant_id: str) -> tuple[TagSpec, ...]:
    """Read what the data plane needs of a tenant's tags, inactive ones too."""
    rows = await connection.fetch(
        "SELECT tag_id, parent_id, status = 'ACTIVE' AS active FROM tags WHERE tenant_id = $1 ORDER BY tag_id",
        tenant_id,
    )
    return tuple(TagSpec(**row) for row in rows)


async def check_open_tags(connection: Connection, tenant_id: str, tag_ids: Iterable[str], *, field: str) -> None:
    """Refuse a list of tags that calls could not carry, or that is too long.

    Raises:
        InvalidError: names the tag.
    """
    wanted = list(tag_ids)
    if len(wanted) > TAGS_LISTED_MAX or len(set(wanted)) < len(wanted):
        raise InvalidError(field, f"expected at most {TAGS_LISTED_MAX} ids of tags, each once")
    rows = await connection.fetch(
        "SELECT tag_id, path FROM tags WHERE tenant_id = $1 AND tag_id = ANY($2::text[])", tenant_id, wanted
    )
    paths = {row["tag_id"]: row["path"] for row in rows}
    for tag_id in wanted:
        if tag_id not in paths:
            raise InvalidError(field, f"expected tags of the tenant; there is no {tag_id[:80]!r}")
        closed = await _closed_on(connection, tenant_id, paths[tag_id].split(PATH_SEPARATOR))
        if closed:
            raise InvalidError(field, f"expected active tags; {tag_id!r} is closed by {closed[0]!r}")


# LIKE would take the _ of an id for any character.
_AT_OR_BELOW = "(path = $2 OR starts_with(path, $2 || '/'))"


def _tag(row: Mapping[str, Any]) -> Tag:
    return Tag(**{**row, "status": TagStatus(row["status"])})


def _check_name(name: str) -> None:
    if not (0 < len(name) <= NAME_CHARACTERS_MAX and name.isprintable()):
        raise InvalidError("name", f"expected 1 to {NAME_CHARACTERS_MAX} printable characters")


def _check_depth(depth: int) -> None:
    if depth > TAG_DEPTH_MAX:
        raise InvalidError("parent_id", f"expected a tree of at most {TAG_DEPTH_MAX} levels, got {depth}")


async def _read(connection: Connection, tenant_id: str, tag_id: str) -> Tag:
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM tags WHERE tenant_id = $1 AND tag_id = $2", tenant_id, tag_id
    )
    if row is None:
        raise NotFoundError(TAG, tag_id)
    return _tag(row)


async def _lock(connection: Connection, tenant_id: str, tag_id: str, expected_version: int | None) -> Tag:
    """Every writer locks the tenant first, so tags need no locks of their own."""
    await lock_tenant(connection, tenant_id)
    tag = await _read(connection, tenant_id, tag_id)
    if expected_version is not None and expected_version != tag.version:
        raise EtagMismatchError(TAG, tag_id, etag=str(tag.version))
    return tag


async def _path_of_parent(connection: Connection, tenant_id: str, parent_id: str) -> str:
    return (await _read(connection, tenant_id, parent_id)).path if parent_id else ""


async def _closed_on(connection: Connection, tenant_id: str, tag_ids: Iterable[str]) -> list[str]:
    rows = await connection.fetch(
        "SELECT tag_id FROM tags WHERE tenant_id = $1 AND tag_id = ANY($2::text[]) AND status = 'INACTIVE'",
        tenant_id,
        list(tag_ids),
    )
    return [row["tag_id"] for row in rows]


async def _check_not_required(connection: Connection, tag: Tag, *, field: str = "status") -> None:
    """Keep a tenant from requiring what no call may carry: it would refuse them all."""
    required = await connection.fetchval(
        f"""
        SELECT min(tag_id) FROM tags WHERE tenant_id = $1 AND {_AT_OR_BELOW}
            AND tag_id = ANY(SELECT unnest(required_tags) FROM tenants WHERE tenant_id = $1)
        """,
        tag.tenant_id,
        tag.path,
    )
    if required is not None:
        raise InvalidError(field, f"expected {required!r} to stay open: the tenant's required_tags name it")


async def _audit(connection: Connection, actor: str, action: str, before: Tag | None, after: Tag) -> None:
    await write_audit(
        connection,
        actor=actor,
        action=action,
        kind=TAG,
        resource_id=after.tag_id,
        tenant_id=after.tenant_id,
        before=before,
        after=after,
    )
