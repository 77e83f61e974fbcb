import asyncio
from dataclasses import replace
from decimal import Decimal

import pytest

from budgetguard.adapters.postgres.catalog import CatalogRepository
from budgetguard.adapters.postgres.pool import moment
from budgetguard.core.catalog import Catalog
from budgetguard.core.entities import Provider
from budgetguard.core.errors import InvalidError, NotFoundError
from budgetguard.core.moments import EARLIEST_MS, LATEST_MS
from budgetguard.core.pricing import PriceOverride

OPENAI = Provider(provider_id="openai", kind="openai", base_url="https://api.openai.com", api_key_env="OPENAI_API_KEY")
PRICE = PriceOverride(
    price_id="p1", provider_id="openai", model="m", usd={"input_tokens": Decimal("0.000000001")}, starts_at_ms=5
)


@pytest.fixture
def catalog(database):
    return CatalogRepository(database)


async def test_a_provider_is_put_replaced_and_disabled(catalog):
    before = (await catalog.catalog()).version
    assert await catalog.put_provider(OPENAI, actor="a") == OPENAI
    assert await catalog.put_provider(replace(OPENAI, version=9), actor="a") == OPENAI
    first = await catalog.catalog()
    assert first.version == before + 1
    assert first.providers[0].cluster == "provider-openai"
    moved = await catalog.put_provider(replace(OPENAI, base_url="http://localhost:1", enabled=False), actor="a")
    assert moved.version == 2
    second = await catalog.catalog()
    assert (second.version, second.providers) == (before + 2, ())
    assert await catalog.providers() == (moved,)
    assert Catalog.from_json(first.to_json()) == first


async def test_concurrent_changes_each_raise_the_version(catalog):
    before = (await catalog.catalog()).version
    await asyncio.gather(
        *(catalog.put_provider(replace(OPENAI, provider_id=f"p{number}"), actor="a") for number in range(6))
    )
    after = await catalog.catalog()
    assert (after.version, len(after.providers)) == (before + 6, 6)


async def test_a_prices_rates_stay_what_they_were(catalog):
    with pytest.raises(NotFoundError):
        await catalog.put_price(PRICE, actor="a")
    await catalog.put_provider(OPENAI, actor="a")
    assert await catalog.put_price(PRICE, actor="a") == PRICE
    version = (await catalog.catalog()).version
    assert await catalog.put_price(PRICE, actor="a") == PRICE
    assert (await catalog.catalog()).version == version
    ended = await catalog.put_price(replace(PRICE, ends_at_ms=99), actor="a")
    assert await catalog.prices() == (ended,)
    assert (await catalog.catalog()).prices == (ended,)
    with pytest.raises(InvalidError, match="new id"):
        await catalog.put_price(replace(PRICE, usd={"input_tokens": Decimal(2)}), actor="a")


@pytest.mark.parametrize("field", ["starts_at_ms", "ends_at_ms"])
@pytest.mark.parametrize("at_ms", [-62_135_596_800_000, EARLIEST_MS - 1, LATEST_MS + 1, 10**18])
async def test_a_price_s_time_that_would_not_be_read_back_is_refused(catalog, field, at_ms):
    await catalog.put_provider(OPENAI, actor="a")
    with pytest.raises(InvalidError) as invalid:
        await catalog.put_price(replace(PRICE, **{field: at_ms}), actor="a")
    assert [one.field for one in invalid.value.violations] == [field]
    assert await catalog.prices() == ()


@pytest.mark.parametrize("milliseconds", [-62_135_596_800_000, -62_135_596_800_001, LATEST_MS + 1])
def test_no_parameter_is_infinite(milliseconds):
    with pytest.raises(OverflowError):
        moment(milliseconds)


@pytest.mark.parametrize("milliseconds", [-62_135_596_799_999, EARLIEST_MS, LATEST_MS])
async def test_the_moments_between_come_back_to_the_millisecond(owner, milliseconds):
    assert await owner.fetchval("SELECT epoch_ms($1)", moment(milliseconds)) == milliseconds


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "api.openai.com",
        "ftp://h",
        "https://",
        "https://u:p@h",
        "https://h?x=1",
        "https://h#f",
        "https://h:99999",
        "https://h/ x",
        "https://h\n",
        "https://hé",
    ],
)
async def test_what_is_no_base_url_is_refused(catalog, base_url):
    with pytest.raises(InvalidError) as invalid:
        await catalog.put_provider(replace(OPENAI, base_url=base_url), actor="a")
    assert invalid.value.violations[0].field == "base_url"
    with pytest.raises(InvalidError):
        await catalog.put_provider(replace(OPENAI, provider_id="Open AI"), actor="a")
