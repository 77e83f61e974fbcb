"""Providers and price rows: what all tenants share. Each change raises the catalog's version in its transaction."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from budgetguard.adapters.postgres.journal import write_audit
from budgetguard.adapters.postgres.pool import Connection, Database, moment, moment_or_none
from budgetguard.core.api_key import TENANT_ID_PATTERN as ID_PATTERN
from budgetguard.core.catalog import Catalog, ProviderSpec, cluster_name, usd_from_json, usd_to_json
from budgetguard.core.entities import Provider
from budgetguard.core.errors import InvalidError, NotFoundError
from budgetguard.core.moments import EARLIEST_MS, LATEST_MS
from budgetguard.core.pricing import PriceOverride

PROVIDER = "provider"
PRICE = "price"

# Everything is read at once into one record; more would mean that prices come from elsewhere.
PROVIDERS_MAX = 1_000
PRICES_MAX = 10_000

_PROVIDER_COLUMNS = "provider_id, kind, base_url, api_key_env, enabled, version"
# A row may hold infinity, or years that no API spells. All tenants share what is built of these rows, so that one is
# read as from the earliest moment, or without an end, instead of failing all others with it.
_EARLIEST, _LATEST = (f"timestamptz '{moment(at_ms).isoformat()}'" for at_ms in (EARLIEST_MS, LATEST_MS))
_PRICE_COLUMNS = f"""
    price_id, provider_id, model, usd, epoch_ms(least(greatest(starts_at, {_EARLIEST}), {_LATEST})) AS starts_at_ms,
    epoch_ms(CASE WHEN ends_at <= {_LATEST} THEN ends_at END) AS ends_at_ms
"""


class CatalogRepository:
    """Providers, prices, and the record that the data plane reads of both."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put_provider(self, provider: Provider, *, actor: str) -> Provider:
        """Create or replace a provider; the given version is ignored. The same again changes nothing.

        Raises:
            InvalidError: a value cannot be.
        """
        check_provider(provider)
        async with self._database.transaction() as connection:
            await _lock_catalog(connection)
            row = await connection.fetchrow(
                f"SELECT {_PROVIDER_COLUMNS} FROM providers WHERE provider_id = $1",
                provider.provider_id,
            )
            before = None if row is None else Provider(**row)
            if before is not None and replace(provider, version=before.version) == before:
                return before
            row = await connection.fetchrow(
                f"""
                INSERT INTO providers (provider_id, kind, base_url, api_key_env, enabled, version)
                VALUES ($1, $2, $3, $4, $5, 1)
                ON CONFLICT (provider_id) DO UPDATE SET kind = excluded.kind, base_url = excluded.base_url,
                    api_key_env = excluded.api_key_env, enabled = excluded.enabled,
                    version = providers.version + 1, updated_at = now()
                RETURNING {_PROVIDER_COLUMNS}
                """,
                provider.provider_id,
                provider.kind,
                provider.base_url,
                provider.api_key_env,
                provider.enabled,
            )
            after = Provider(**row)
            await _changed(
                connection, actor=actor, kind=PROVIDER, resource_id=after.provider_id, before=before, after=after
            )
        return after

    async def providers(self) -> tuple[Provider, ...]:
        """List all providers by id, disabled ones too."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"SELECT {_PROVIDER_COLUMNS} FROM providers ORDER BY provider_id LIMIT {PROVIDERS_MAX}"
            )
        return tuple(Provider(**row) for row in rows)

    async def put_price(self, price: PriceOverride, *, actor: str) -> PriceOverride:
        """Create a price row, or end an existing one: only ``ends_at_ms`` of a row may change.

        Ledger rows name the row that they were charged by, so its rates must stay what they were.

        Raises:
            NotFoundError: there is no such provider.
            InvalidError: a value cannot be, or the id belongs to other rates.
        """
        usd_from_json(usd_to_json(price))
        for field, at_ms in (("starts_at_ms", price.starts_at_ms), ("ends_at_ms", price.ends_at_ms)):
            # What is read back otherwise would be another price than this one.
            if at_ms is not None and not EARLIEST_MS <= at_ms <= LATEST_MS:
                raise InvalidError(field, "expected a time in the years 1970 to 9999")
        async with self._database.transaction() as connection:
            await _lock_catalog(connection)
            if not await connection.fetchval("SELECT true FROM providers WHERE provider_id = $1", price.provider_id):
                raise NotFoundError(PROVIDER, price.provider_id)
            row = await connection.fetchrow(
                f"SELECT {_PRICE_COLUMNS} FROM prices WHERE price_id = $1",
                price.price_id,
            )
            before = None if row is None else _price(row)
            if before == price:
                return price
            if before is not None and replace(before, ends_at_ms=price.ends_at_ms) != price:
                raise InvalidError("price_id", "expected a new id for other rates; a row of this id exists")
            await connection.execute(
                """
                INSERT INTO prices (price_id, provider_id, model, usd, starts_at, ends_at)
                VALUES ($1, $2, $3, $4, $5, $6)
                ON CONFLICT (price_id) DO UPDATE SET ends_at = excluded.ends_at, updated_at = now()
                """,
                price.price_id,
                price.provider_id,
                price.model,
                usd_to_json(price),
                moment(price.starts_at_ms),
                moment_or_none(price.ends_at_ms),
            )
            await _changed(
                connection,
                actor=actor,
                kind=PRICE,
                resource_id=price.price_id,
                before=None if before is None else _price_json(before),
                after=_price_json(price),
            )
        return price

    async def prices(self) -> tuple[PriceOverride, ...]:
        """List all price rows, past ones too."""
        async with self._database.transaction() as connection:
            return await _prices(connection)

    async def catalog(self) -> Catalog:
        """Build the record that the data plane reads, as of one moment: enabled providers and all price rows."""
        async with self._database.transaction() as connection:
            version = await connection.fetchval("SELECT version FROM catalog_state FOR SHARE")
            rows = await connection.fetch(
                """
                SELECT provider_id, kind, base_url, api_key_env FROM providers WHERE enabled ORDER BY provider_id
                LIMIT $1
                """,
                PROVIDERS_MAX,
            )
            prices = await _prices(connection)
        providers = tuple(ProviderSpec(**row, cluster=cluster_name(row["provider_id"])) for row in rows)
        return Catalog(version=version, providers=providers, prices=prices)


def check_provider(provider: Provider) -> None:
    """Refuse what cannot be called.

    Raises:
        InvalidError: names the field.
    """
    if not ID_PATTERN.fullmatch(provider.provider_id):
        raise InvalidError("provider_id", "expected 1 to 63 of a-z, 0-9 and inner dashes")
    expected = "expected http(s)://host[:port][/path], without user, query or fragment"
    try:
        parts = urlsplit(provider.base_url)
        _ = parts.port
    except ValueError:
        raise InvalidError("base_url", expected) from None
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    printable = provider.base_url.isascii() and provider.base_url.isprintable() and " " not in provider.base_url
    if parts.scheme not in {"http", "https"} or not parts.hostname or not plain or not printable:
        raise InvalidError("base_url", expected)


async def _lock_catalog(connection: Connection) -> None:
    """One writer at a time; whoever builds the record waits for it."""
    await connection.execute("SELECT version FROM catalog_state FOR NO KEY UPDATE")


async def _changed(
    connection: Connection, *, actor: str, kind: str, resource_id: str, before: object, after: object
) -> None:
    await connection.execute("UPDATE catalog_state SET version = version + 1")
    await write_audit(
        connection,
        actor=actor,
        action="create" if before is None else "update",
        kind=kind,
        resource_id=resource_id,
        tenant_id=None,
        before=before,
        after=after,
    )


async def _prices(connection: Connection) -> tuple[PriceOverride, ...]:
    rows = await connection.fetch(
        f"SELECT {_PRICE_COLUMNS} FROM prices ORDER BY provider_id, model, starts_at, price_id LIMIT {PRICES_MAX}"
    )
    return tuple(_price(row) for row in rows)


def _price(row: Mapping[str, Any]) -> PriceOverride:
    usd: dict[str, Decimal] = usd_from_json(row["usd"])
    return PriceOverride(**{**row, "usd": usd})


def _price_json(price: PriceOverride) -> dict[str, object]:
    return {**asdict(price), "usd": usd_to_json(price)}
