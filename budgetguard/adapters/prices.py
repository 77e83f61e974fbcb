"""Which rates a model is charged by now, and where its calls go: the catalog with resolved rate cards."""

import asyncio
import logging
from datetime import UTC, datetime
from typing import Protocol

from budgetguard.core.asking import PricedModel
from budgetguard.core.catalog import Catalog, ProviderSpec
from budgetguard.core.model_limits import output_tokens_largest
from budgetguard.core.pricing import (
    PriceOverride,
    PriceUnknownError,
    load_shipped_prices,
    shipped_context_window,
    shipped_model,
    shipped_rate_card,
)

# Rates may depend on the time of day, to the minute; model names come from callers, so the memory is bounded.
_MINUTE_MS = 60_000
PRICED_MODELS_MAX = 4_096

# A changed price or provider is in force everywhere within this time.
CATALOG_REFRESH_SECONDS = 1.0

logger = logging.getLogger(__name__)


class CatalogSource(Protocol):
    """Where the catalog comes from; raises ``CountersUnavailableError``."""

    async def load_catalog(self) -> bytes | None:
        """Return the published catalog's JSON, ``None`` before the first."""


class PriceBook:
    """Prices and providers, from the newest catalog that could be read."""

    def __init__(self, source: CatalogSource) -> None:
        load_shipped_prices()
        self._source = source
        self._catalog: Catalog | None = None
        self._record: bytes | None = None
        self._priced: dict[tuple[str, str], tuple[int, PricedModel]] = {}

    @property
    def ready(self) -> bool:
        """Whether a catalog was ever read."""
        return self._catalog is not None

    def provider_for(self, kind: str) -> ProviderSpec | None:
        """Return the provider that serves an API of this kind."""
        return None if self._catalog is None else self._catalog.provider_for(kind)

    def priced(self, *, provider_id: str, model: str, now_ms: int) -> PricedModel:
        """Resolve a model's rates and bounds as of ``now_ms``.

        Raises:
            PriceUnknownError: neither a row of our own nor genai-prices prices this model.
        """
        minute = now_ms // _MINUTE_MS
        known = self._priced.get((provider_id, model))
        if known is not None and known[0] == minute:
            return known[1]
        priced = self._resolve(provider_id=provider_id, model=model, now_ms=now_ms)
        if len(self._priced) >= PRICED_MODELS_MAX:
            self._priced.clear()
        self._priced[provider_id, model] = (minute, priced)
        return priced

    def _resolve(self, *, provider_id: str, model: str, now_ms: int) -> PricedModel:
        catalog = self._catalog
        override = None if catalog is None else catalog.price_for(provider_id=provider_id, model=model, at_ms=now_ms)
        at = datetime.fromtimestamp(now_ms / 1000, UTC)
        try:
            context_window = shipped_context_window(provider_id=provider_id, model=model)
        except PriceUnknownError:
            context_window = None
        return PricedModel(
            model=self._priced_model(override, provider_id=provider_id, model=model),
            rate_card=override.rate_card()
            if override
            else shipped_rate_card(provider_id=provider_id, model=model, at=at),
            context_window=context_window,
            output_tokens_largest=output_tokens_largest(provider_id=provider_id, model=model),
        )

    @staticmethod
    def _priced_model(override: PriceOverride | None, *, provider_id: str, model: str) -> str:
        """Name the model whose budgets a call counts in: a price of our own takes it out of none."""
        try:
            return shipped_model(provider_id=provider_id, model=model)
        except PriceUnknownError:
            if override is None:
                raise
            return override.model

    async def refresh(self) -> None:
        """Read the catalog once; a newer one replaces ours and every resolved price.

        Raises:
            CountersUnavailableError: Redis did not answer.
            ValueError: what Redis holds is no catalog.
        """
        record = await self._source.load_catalog()
        if record is not None and record != self._record:
            self._catalog, self._priced, self._record = Catalog.from_json(record), {}, record

    async def keep_fresh(self) -> None:
        """Refresh until cancelled. A catalog that cannot be read leaves the last one in force, and says so."""
        while True:
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001 - the loop must outlive whatever Redis answers
                logger.warning("catalog not refreshed", extra={"error": repr(error)})
            await asyncio.sleep(CATALOG_REFRESH_SECONDS)
