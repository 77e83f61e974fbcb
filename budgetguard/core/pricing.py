"""Prices: which rates a call is charged by, and the one place where tokens become money.

Rates come from genai-prices' shipped data (dated, by token kind and service tier) or from a row of our own that
overrides it. A ``RateCard`` is resolved once, at admission; it travels with the call, so that a later change of prices
cannot move what an admitted call costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import cache
from importlib.metadata import version
from typing import Any, TypeAlias

import orjson
from genai_prices import data_snapshot
from genai_prices.types import ModelInfo, ModelPrice, Provider, TieredPrices

from budgetguard.core.money import CALL_NANOS_MAX, ceil_div, femtos_per_unit
from budgetguard.core.typed import object_of, typed
from budgetguard.core.usage import Usage

FEMTOS_PER_NANO = 10**6
DEFAULT_TIER = "default"

# The service tiers of the providers' APIs that genai-prices tells apart.
SERVICE_TIERS = ("flex", "priority", "fast")

# Billed unit -> (genai-prices' price key, units a price is for, the unit that contains it).
_UNITS: dict[str, tuple[str, int, str | None]] = {
    "input_tokens": ("input_mtok", 10**6, None),
    "cache_read_tokens": ("cache_read_mtok", 10**6, "input_tokens"),
    "cache_write_tokens": ("cache_write_mtok", 10**6, "input_tokens"),
    "input_audio_tokens": ("input_audio_mtok", 10**6, "input_tokens"),
    "output_tokens": ("output_mtok", 10**6, None),
    "output_audio_tokens": ("output_audio_mtok", 10**6, "output_tokens"),
    "web_searches": ("web_searches_kcount", 10**3, None),
}
UNITS = tuple(_UNITS)

# A rate in femto-USD (10**-15) a unit: the base, then (threshold, rate) in rising order. Above a threshold of total
# input tokens its rate applies to every unit of the call.
Rate: TypeAlias = tuple[tuple[int, int], ...]


class PriceUnknownError(LookupError):
    """No price for this model: the call must be refused, never charged $0."""


@dataclass(frozen=True, slots=True)
class RateCard:
    """The rates of one model at one moment, for each service tier.

    ``rates[tier][unit]`` is a ``Rate``; a tier lists only what differs from ``DEFAULT_TIER``. ``version`` says where
    the rates came from and goes into the ledger row.
    """

    version: str
    rates: Mapping[str, Mapping[str, Rate]]

    def _rate(self, unit: str, *, tier: str, input_tokens: int) -> int | None:
        rate = self.rates.get(tier, {}).get(unit) or self.rates[DEFAULT_TIER].get(unit)
        if rate is None:
            return None
        applicable = 0
        for threshold, femtos in rate:
            # The first row is the base and has threshold -1, so that 0 tokens find it too.
            if input_tokens > threshold:
                applicable = femtos
        return applicable

    def has_tier(self, tier: str) -> bool:
        """Say whether this service tier has rates of its own (``DEFAULT_TIER`` always has)."""
        return tier in self.rates

    def cost_nanos(self, usage: Usage, *, tier: str = DEFAULT_TIER) -> int:
        """Charge what was used: exact products, summed, rounded up once.

        A part that exceeds its total (a provider's slip) is charged in full at its own rate.
        A count is bounded by ``CALL_NANOS_MAX`` worth of money; more is clamped there, the most one call can carry.
        """
        counts = usage.reported()
        input_tokens = counts.get("input_tokens", 0)
        femtos = 0
        parts_of: dict[str, int] = {}
        for unit, (_, _, parent) in _UNITS.items():
            count = counts.get(unit, 0)
            if parent is None or not count:
                continue
            rate = self._rate(unit, tier=tier, input_tokens=input_tokens)
            if rate is None:
                continue  # priced as its parent
            femtos += count * rate
            parts_of[parent] = parts_of.get(parent, 0) + count
        for unit, (_, _, parent) in _UNITS.items():
            if parent is not None:
                continue
            rest = max(0, counts.get(unit, 0) - parts_of.get(unit, 0))
            femtos += rest * (self._rate(unit, tier=tier, input_tokens=input_tokens) or 0)
        return min(ceil_div(femtos, FEMTOS_PER_NANO), CALL_NANOS_MAX)

    def input_nanos_max(self, input_tokens: int, *, tier: str = DEFAULT_TIER, audio: bool = False) -> int:
        """Bound the cost of at most ``input_tokens``: the dearest kind that the input can turn out to be."""
        units = ["input_tokens", "cache_write_tokens"] + (["input_audio_tokens"] if audio else [])
        femtos = self._dearest(units, tier=tier, input_tokens=input_tokens)
        return min(ceil_div(input_tokens * femtos, FEMTOS_PER_NANO), CALL_NANOS_MAX)

    def output_femtos_max(self, input_tokens: int, *, tier: str = DEFAULT_TIER, audio: bool = False) -> int:
        """Bound what one output token can cost, in femto-USD, when the input is at most ``input_tokens``."""
        units = ["output_tokens"] + (["output_audio_tokens"] if audio else [])
        return self._dearest(units, tier=tier, input_tokens=input_tokens)

    def web_search_nanos_max(self, *, tier: str = DEFAULT_TIER) -> int:
        """Bound what one web search is charged; 0 when it has no price here."""
        return ceil_div(self._dearest(["web_searches"], tier=tier, input_tokens=CALL_NANOS_MAX), FEMTOS_PER_NANO)

    def _dearest(self, units: list[str], *, tier: str, input_tokens: int) -> int:
        dearest = 0
        for unit in units:
            rate = self.rates.get(tier, {}).get(unit) or self.rates[DEFAULT_TIER].get(unit) or ()
            # Any tier up to the bound can apply, and the dearer one need not be the last.
            dearest = max([dearest, *(femtos for threshold, femtos in rate if input_tokens > threshold)])
        return dearest

    def to_json(self) -> str:
        """Encode for the handoff."""
        return orjson.dumps({"v": self.version, "r": self.rates}).decode()

    @classmethod
    def from_json(cls, text: str) -> "RateCard":
        """Decode what ``to_json`` wrote.

        Raises:
            ValueError: not a rate card.
        """
        try:
            raw = object_of(orjson.loads(text))
            rates = {
                tier: {unit: _rate(rows) for unit, rows in object_of(units).items()}
                for tier, units in typed(raw, "r", dict).items()
            }
            if DEFAULT_TIER not in rates:
                raise KeyError(DEFAULT_TIER)
            return cls(version=typed(raw, "v", str), rates=rates)
        except (KeyError, TypeError, ValueError) as error:
            msg = "malformed rate card"
            raise ValueError(msg) from error


def _rate(rows: Any) -> Rate:
    rate = tuple((threshold, femtos) for threshold, femtos in rows)
    if type(rows) is not list or any(type(number) is not int for row in rate for number in row):
        raise ValueError("expected pairs of integers")
    return rate


@dataclass(frozen=True, slots=True)
class PriceOverride:
    """A price row of our own: replaces genai-prices for one provider's model.

    ``usd_per_unit`` maps a unit of ``UNITS`` to USD for one million tokens (for one thousand searches), as genai-prices
    quotes them; ``starts_at_ms``/``ends_at_ms`` bound admission times (end exclusive, ``None`` is open).
    """

    price_id: str
    provider_id: str
    model: str
    usd: Mapping[str, Decimal]
    starts_at_ms: int = 0
    ends_at_ms: int | None = None

    def rate_card(self) -> RateCard:
        """Resolve into rates."""
        rates = {unit: ((-1, femtos_per_unit(price, per_units=_UNITS[unit][1])),) for unit, price in self.usd.items()}
        return RateCard(version=f"price/{self.price_id}", rates={DEFAULT_TIER: rates})


_SHIPPED_VERSION = version("genai-prices")


def caseless(model: str) -> str:
    """Spell a model's name in one way whatever its case: ASCII only, which Postgres' "C" collation does the same to."""
    return model.encode().lower().decode()


def load_shipped_prices() -> None:
    """Read genai-prices' data now: it takes a tenth of a second, once a process, that no call should wait for."""
    data_snapshot.get_snapshot()


def shipped_rate_card(*, provider_id: str, model: str, at: datetime) -> RateCard:
    """Resolve a model's rates from genai-prices' shipped data, as of ``at`` (aware).

    Raises:
        PriceUnknownError: the provider does not list this model, or lists it without a price per token.
    """
    found = _find(provider_id=provider_id, model=model)
    standard = _rates(found.get_prices(at))
    if "input_tokens" not in standard:
        raise PriceUnknownError(model)
    rates = {DEFAULT_TIER: standard}
    for tier in SERVICE_TIERS:
        priced = _rates(found.get_prices(at, {"service_tier": tier}))
        differing = {unit: rate for unit, rate in priced.items() if standard.get(unit) != rate}
        if differing:
            rates[tier] = differing
    return RateCard(version=f"genai-prices/{_SHIPPED_VERSION}/{provider_id}/{found.id}", rates=rates)


def shipped_model(*, provider_id: str, model: str) -> str:
    """Return the id of the price record of a model: one for its aliases, its dated snapshots, and any case.

    Raises:
        PriceUnknownError: the provider does not list this model.
    """
    record: str = _find(provider_id=provider_id, model=model).id
    return record


def shipped_context_window(*, provider_id: str, model: str) -> int | None:
    """Return the most tokens that a call of this model can take in, where genai-prices knows it."""
    return _find(provider_id=provider_id, model=model).context_window


def _find(*, provider_id: str, model: str) -> ModelInfo:
    provider = _provider(provider_id)
    # Not by the snapshot's own look-up: it remembers every name it was ever asked for, and names come from callers.
    found = None if provider is None else provider.find_model(model)
    if found is None:
        raise PriceUnknownError(model)
    return found


@cache
def _provider(provider_id: str) -> Provider | None:
    return next((provider for provider in data_snapshot.get_snapshot().providers if provider.id == provider_id), None)


def _rates(price: ModelPrice) -> dict[str, Rate]:
    rates: dict[str, Rate] = {}
    for unit, (price_key, per_units, _) in _UNITS.items():
        quoted: Any = getattr(price, price_key)
        if isinstance(quoted, TieredPrices):
            rows = [(-1, quoted.base), *((tier.start, tier.price) for tier in quoted.tiers)]
        elif quoted is not None:
            rows = [(-1, quoted)]
        else:
            continue
        rates[unit] = tuple((start, femtos_per_unit(usd, per_units=per_units)) for start, usd in rows)
    return rates
