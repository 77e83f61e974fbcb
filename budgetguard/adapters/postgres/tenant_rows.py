"""A tenant's row: read, locked, raised to its next version. Shared by the repositories of what belongs to tenants."""

from collections.abc import Mapping
from typing import Any

from budgetguard.adapters.postgres.pool import Connection
from budgetguard.core.entities import Tenant
from budgetguard.core.errors import NotFoundError
from budgetguard.core.snapshot import Status

TENANT = "tenant"

TENANT_COLUMNS = """
    tenant_id, name, status, version, requests_per_minute, output_tokens_max, clamp,
    tokens_per_minute, concurrent_calls, unbounded_share, stream_slice_tokens, overrun, required_tags,
    epoch_ms(created_at) AS created_at_ms, epoch_ms(updated_at) AS updated_at_ms, epoch_ms(deleted_at) AS deleted_at_ms
"""


async def read_tenant(connection: Connection, tenant_id: str, *, locking: str = "") -> Tenant | None:
    """Read a tenant, deleted or not; ``locking`` is SQL's locking clause."""
    row = await connection.fetchrow(
        f"SELECT {TENANT_COLUMNS} FROM tenants WHERE tenant_id = $1 {locking}",
        tenant_id,
    )
    return None if row is None else tenant_of(row)


async def lock_tenant(connection: Connection, tenant_id: str) -> Tenant:
    """Read a tenant and keep others from changing it or what it owns until the commit.

    Raises:
        NotFoundError: there is none, or it is deleted.
    """
    return living(await read_tenant(connection, tenant_id, locking="FOR NO KEY UPDATE"), tenant_id)


async def raise_version(connection: Connection, tenant_id: str) -> None:
    """Tell the data plane that its record of this tenant is old."""
    await connection.execute(
        "UPDATE tenants SET version = version + 1, updated_at = now() WHERE tenant_id = $1", tenant_id
    )


def living(tenant: Tenant | None, tenant_id: str) -> Tenant:
    """Refuse what is not there or is deleted."""
    if tenant is None or tenant.status is Status.DELETED:
        raise NotFoundError(TENANT, tenant_id)
    return tenant


def tenant_of(row: Mapping[str, Any]) -> Tenant:
    """Read a row, or an answer that was kept as JSON."""
    # An answer that was kept before tenants could require tags has none.
    return Tenant(**{**row, "status": Status(row["status"]), "required_tags": tuple(row.get("required_tags", ()))})
