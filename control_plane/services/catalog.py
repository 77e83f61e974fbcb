"""ProviderService and PriceService."""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Protocol

from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token
from budgetguard.core.api_key import TENANT_ID_PATTERN
from budgetguard.core.catalog import usd_from_json
from budgetguard.core.entities import Provider
from budgetguard.core.errors import FieldViolation, InvalidError
from budgetguard.core.pricing import UNITS, PriceOverride
from budgetguard.v1 import price_pb2, price_pb2_grpc, provider_pb2, provider_pb2_grpc
from control_plane.fields import instant
from control_plane.messages import price_message, provider_message
from control_plane.services import ACTOR

KINDS = ("openai",)
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")
_MODEL_CHARACTERS_MAX = 200
# A thousand dollars a token: more is a slip of the keyboard, and so are more digits than a femto-dollar a token has.
_USD_MAX = Decimal(10**9)
_USD_DIGITS_MAX = 30


class CatalogStore(Protocol):
    """Where providers and prices are kept; see ``CatalogRepository`` for what each may raise."""

    async def put_provider(self, provider: Provider, *, actor: str) -> Provider: ...
    async def providers(self) -> tuple[Provider, ...]: ...
    async def put_price(self, price: PriceOverride, *, actor: str) -> PriceOverride: ...
    async def prices(self) -> tuple[PriceOverride, ...]: ...


class CatalogPublisher(Protocol):
    """Tells the data plane of providers and prices; raises ``NotPublishedError``."""

    async def catalog(self) -> None: ...


class ProviderService(provider_pb2_grpc.ProviderServiceServicer):
    """Providers."""

    def __init__(self, *, catalog: CatalogStore, publisher: CatalogPublisher) -> None:
        self._catalog = catalog
        self._publisher = publisher

    async def ListProviders(
        self, request: provider_pb2.ListProvidersRequest, _context: Any
    ) -> provider_pb2.ListProvidersResponse:
        limit = page_limit(request.page_size)
        after = read_token(request.page_token, "provider", [str])
        rows = [row for row in await self._catalog.providers() if after is None or [row.provider_id] > after]
        page = make_page(rows[: limit + 1], limit=limit, listing="provider", position=lambda row: [row.provider_id])
        return provider_pb2.ListProvidersResponse(
            providers=[provider_message(provider) for provider in page.items], next_page_token=page.next_page_token
        )

    async def PutProvider(self, request: provider_pb2.PutProviderRequest, _context: Any) -> provider_pb2.Provider:
        if request.kind not in KINDS:
            raise InvalidError("kind", f"expected {' or '.join(KINDS)}")
        if not _VARIABLE.fullmatch(request.api_key_env):
            raise InvalidError("api_key_env", "expected the name of an environment variable, such as OPENAI_API_KEY")
        provider = await self._catalog.put_provider(
            Provider(
                provider_id=request.provider_id,
                kind=request.kind,
                base_url=request.base_url,
                api_key_env=request.api_key_env,
                enabled=request.enabled if request.HasField("enabled") else True,
            ),
            actor=ACTOR,
        )
        await self._publisher.catalog()
        return provider_message(provider)


class PriceService(price_pb2_grpc.PriceServiceServicer):
    """Prices of our own."""

    def __init__(
        self,
        *,
        catalog: CatalogStore,
        publisher: CatalogPublisher,
        new_id: Callable[[], str],
        now_ms: Callable[[], int],
    ) -> None:
        self._catalog = catalog
        self._publisher = publisher
        self._new_id = new_id
        self._now_ms = now_ms

    async def ListPrices(self, request: price_pb2.ListPricesRequest, _context: Any) -> price_pb2.ListPricesResponse:
        limit = page_limit(request.page_size)
        after = read_token(request.page_token, "price", [str])
        prices = sorted(await self._catalog.prices(), key=lambda price: price.price_id)
        rows = [row for row in prices if after is None or [row.price_id] > after]
        page = make_page(rows[: limit + 1], limit=limit, listing="price", position=lambda row: [row.price_id])
        return price_pb2.ListPricesResponse(
            prices=[price_message(price) for price in page.items], next_page_token=page.next_page_token
        )

    async def PutPrice(self, request: price_pb2.PutPriceRequest, _context: Any) -> price_pb2.Price:
        if request.price_id and not TENANT_ID_PATTERN.fullmatch(request.price_id):
            raise InvalidError("price_id", "expected 1 to 63 of a-z, 0-9 and inner hyphens")
        if not 0 < len(request.model) <= _MODEL_CHARACTERS_MAX or not request.model.isprintable():
            raise InvalidError("model", f"expected 1 to {_MODEL_CHARACTERS_MAX} printable characters")
        usd = _rates(dict(request.usd))
        ends_at_ms = instant(request.end_date, field="end_date") if request.end_date else None
        starts_at_ms = await self._starts_at_ms(request)
        if ends_at_ms is not None and ends_at_ms <= starts_at_ms:
            raise InvalidError("end_date", "expected it after start_date")
        price = await self._catalog.put_price(
            PriceOverride(
                price_id=request.price_id or self._new_id(),
                provider_id=request.provider_id,
                model=request.model,
                usd=usd,
                starts_at_ms=starts_at_ms,
                ends_at_ms=ends_at_ms,
            ),
            actor=ACTOR,
        )
        await self._publisher.catalog()
        return price_message(price)

    async def _starts_at_ms(self, request: price_pb2.PutPriceRequest) -> int:
        if request.start_date:
            return instant(request.start_date, field="start_date")
        known = [price for price in await self._catalog.prices() if price.price_id == request.price_id]
        return known[0].starts_at_ms if known else self._now_ms()


def _rates(spelled: dict[str, str]) -> dict[str, Decimal]:
    """Read rates by unit; a model needs at least what its input and output cost."""
    violations = []
    for unit, usd in spelled.items():
        try:
            # What is huge or tiny only by its exponent would be written out in full.
            rate = usd_from_json({unit: usd})[unit]
            if rate > _USD_MAX or abs(rate.adjusted()) > _USD_DIGITS_MAX or len(usd) > _USD_DIGITS_MAX:
                raise ValueError(f"expected at most {_USD_MAX} US dollars in {_USD_DIGITS_MAX} digits")
        except ValueError as error:
            violations.append(FieldViolation(f"usd[{unit[:40]}]", str(error)))
    if "input_tokens" not in spelled:
        violations.append(FieldViolation("usd", f"expected a price for input_tokens, and any of {', '.join(UNITS)}"))
    if violations:
        raise InvalidError.of(tuple(violations))
    return usd_from_json(spelled)
