"""What every change writes beside itself, in its own transaction: who did it, and which request asked for it."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from typing import Any

import orjson

from budgetguard.adapters.postgres.pool import Connection
from budgetguard.core.errors import InvalidError, RequestIdReusedError

REQUEST_ID_CHARACTERS_MAX = 128

# A create that is sent again later than this makes a second resource (or fails, when its id is taken).
REQUEST_IDS_KEPT = "7 days"


async def write_audit(
    connection: Connection,
    *,
    actor: str,
    action: str,
    kind: str,
    resource_id: str,
    tenant_id: str | None,
    before: object = None,
    after: object = None,
) -> None:
    """Record one change. ``before`` and ``after`` are entities, which carry no secrets; ``None``: there is none."""
    await connection.execute(
        """
        INSERT INTO admin_audit (actor, action, kind, resource_id, tenant_id, before, after)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        actor,
        action,
        kind,
        resource_id,
        tenant_id,
        _as_json(before),
        _as_json(after),
    )


async def replayed_answer(
    connection: Connection, *, method: str, request_id: str, body: Mapping[str, object]
) -> Any | None:
    """Claim a request id at the start of a create; a caller that holds the same id meanwhile waits for our commit.

    Returns:
        The first call's answer when this is the same request again, ``None`` when it is new (or has no id): go on, and
        end with ``keep_answer``.

    Raises:
        RequestIdReusedError: the id was used for another body.
        InvalidError: the id is too long.
    """
    if not request_id:
        return None
    if len(request_id) > REQUEST_ID_CHARACTERS_MAX or not request_id.isprintable():
        raise InvalidError("request_id", f"expected at most {REQUEST_ID_CHARACTERS_MAX} printable characters")
    fingerprint = sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()
    claimed = await connection.fetchval(
        """
        INSERT INTO request_ids (method, request_id, fingerprint) VALUES ($1, $2, $3)
        ON CONFLICT DO NOTHING RETURNING true
        """,
        method,
        request_id,
        fingerprint,
    )
    if claimed:
        return None
    known = await connection.fetchrow(
        "SELECT fingerprint, answer FROM request_ids WHERE method = $1 AND request_id = $2", method, request_id
    )
    if known["fingerprint"] != fingerprint:
        raise RequestIdReusedError(request_id)
    return known["answer"]


async def keep_answer(connection: Connection, *, method: str, request_id: str, answer: object) -> None:
    """Keep what a create answers, for the same request sent again."""
    if request_id:
        await connection.execute(
            "UPDATE request_ids SET answer = $3 WHERE method = $1 AND request_id = $2",
            method,
            request_id,
            _as_json(answer),
        )


async def forget_request_ids(connection: Connection) -> int:
    """Drop the request ids that are older than ``REQUEST_IDS_KEPT``; returns how many."""
    status = await connection.execute(
        "DELETE FROM request_ids WHERE created_at < now() - $1::text::interval", REQUEST_IDS_KEPT
    )
    return int(status.rpartition(" ")[2])


def _as_json(value: object) -> object:
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
