"""Where calls can go and what our own price rows say: one record for all tenants, published to Redis as JSON."""

from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

import orjson

from budgetguard.core.pricing import UNITS, PriceOverride, caseless

CLUSTER_PREFIX = "provider-"


def cluster_name(provider_id: str) -> str:
    """Name a provider's Envoy cluster."""
    return f"{CLUSTER_PREFIX}{provider_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderSpec:
    """One enabled provider as the data plane needs it; ``cluster`` names its Envoy cluster."""

    provider_id: str
    kind: str
    base_url: str
    api_key_env: str
    cluster: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """Enabled providers and price overrides. ``version`` rises with every change of either."""

    version: int
    providers: tuple[ProviderSpec, ...] = ()
    prices: tuple[PriceOverride, ...] = ()

    def provider_for(self, kind: str) -> ProviderSpec | None:
        """Return the provider that serves an API of this kind: the first by id."""
        return next((provider for provider in self.providers if provider.kind == kind), None)

    def price_for(self, *, provider_id: str, model: str, at_ms: int) -> PriceOverride | None:
        """Return the override in force at ``at_ms``: of several, the one that started last.

        A name in another case than any row's is priced by the row that it would be in its own.
        """
        found = [
            price
            for price in self.prices
            if price.provider_id == provider_id
            and caseless(price.model) == caseless(model)
            and price.starts_at_ms <= at_ms
            and (price.ends_at_ms is None or at_ms < price.ends_at_ms)
        ]
        return max(found, key=lambda price: (price.model == model, price.starts_at_ms, price.price_id), default=None)

    def to_json(self) -> bytes:
        """Encode for Redis."""
        return orjson.dumps(
            {
                "version": self.version,
                "providers": [asdict(provider) for provider in self.providers],
                "prices": [
                    {
                        "price_id": price.price_id,
                        "provider_id": price.provider_id,
                        "model": price.model,
                        "usd": usd_to_json(price),
                        "starts_at_ms": price.starts_at_ms,
                        "ends_at_ms": price.ends_at_ms,
                    }
                    for price in self.prices
                ],
            }
        )

    @classmethod
    def from_json(cls, text: bytes | str) -> "Catalog":
        """Decode what ``to_json`` wrote.

        Raises:
            ValueError: not a catalog.
        """
        try:
            raw: dict[str, Any] = orjson.loads(text)
            return cls(
                version=int(raw["version"]),
                providers=tuple(ProviderSpec(**provider) for provider in raw["providers"]),
                prices=tuple(PriceOverride(**{**price, "usd": usd_from_json(price["usd"])}) for price in raw["prices"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            msg = "malformed catalog"
            raise ValueError(msg) from error


def usd_to_json(price: PriceOverride) -> dict[str, str]:
    """Spell a price's rates as decimal strings by unit."""
    return {unit: str(usd) for unit, usd in price.usd.items()}


def usd_from_json(usd: dict[str, str]) -> dict[str, Decimal]:
    """Read rates by unit.

    Raises:
        ValueError: an unknown unit, or not a finite decimal number of 0 or more.
    """
    rates: dict[str, Decimal] = {}
    for unit, spelled in usd.items():
        if unit not in UNITS:
            msg = f"unknown unit {unit[:40]!r}"
            raise ValueError(msg)
        try:
            rate = Decimal(spelled)
        except ArithmeticError:
            rate = Decimal("NaN")
        if not rate.is_finite() or rate < 0:
            msg = f"{unit}: expected US dollars as a decimal string of 0 or more"
            raise ValueError(msg)
        rates[unit] = rate
    return rates
