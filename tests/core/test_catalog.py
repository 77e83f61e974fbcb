from decimal import Decimal

import orjson
import pytest

from budgetguard.core.catalog import Catalog, ProviderSpec, cluster_name, usd_from_json
from budgetguard.core.entities import Budget
from budgetguard.core.pricing import PriceOverride
from budgetguard.core.snapshot import BudgetSpec, Mode, SubjectKind, WindowKind


def provider(provider_id="openai", kind="openai"):
    return ProviderSpec(
        provider_id=provider_id, kind=kind, base_url="https://h", api_key_env="KEY", cluster=cluster_name(provider_id)
    )


def price(price_id="p1", *, starts_at_ms=0, ends_at_ms=None, model="m", provider_id="openai"):
    usd = {"input_tokens": Decimal("0.10"), "output_tokens": Decimal("1E-9")}
    return PriceOverride(price_id, provider_id, model, usd, starts_at_ms, ends_at_ms)


def test_it_survives_its_json_to_the_last_digit():
    catalog = Catalog(version=2**53 - 1, providers=(provider(), provider("b", "x")), prices=(price(ends_at_ms=9),))
    assert Catalog.from_json(catalog.to_json()) == catalog
    assert Catalog.from_json(Catalog(version=0).to_json().decode()) == Catalog(version=0)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", "{}", '{"version":"x","providers":[],"prices":[]}', '{"version":1,"providers":[{}],"prices":[]}'],
)
def test_what_is_no_catalog_is_refused(text):
    with pytest.raises(ValueError, match="malformed catalog"):
        Catalog.from_json(text)


def test_a_price_that_is_no_number_is_refused_by_unit():
    for usd in ({"input_tokens": "x"}, {"input_tokens": "NaN"}, {"input_tokens": "-1"}, {"bananas": "1"}):
        with pytest.raises(ValueError, match=next(iter(usd))):
            usd_from_json(usd)
        raw = orjson.loads(Catalog(version=1, prices=(price(),)).to_json())
        raw["prices"][0]["usd"] = usd
        with pytest.raises(ValueError, match="malformed"):
            Catalog.from_json(orjson.dumps(raw))


def test_the_provider_of_a_kind_is_the_first_by_id():
    catalog = Catalog(version=1, providers=(provider("a", "x"), provider("b"), provider("c")))
    assert catalog.provider_for("openai") == provider("b")
    assert catalog.provider_for("none") is None


def test_a_price_is_a_model_s_in_whatever_case_it_is_named():
    catalog = Catalog(version=1, prices=(price("a", model="Mine"), price("b", model="mine")))

    def found(model):
        return catalog.price_for(provider_id="openai", model=model, at_ms=0).price_id

    assert (found("Mine"), found("mine"), found("MINE")) == ("a", "b", "b")


def test_the_price_in_force_is_the_one_that_started_last():
    old, new, ended = price("old"), price("new", starts_at_ms=10), price("ended", starts_at_ms=20, ends_at_ms=30)
    catalog = Catalog(version=1, prices=(old, new, ended, price("x", model="n"), price("y", provider_id="z")))

    def found(at_ms):
        return catalog.price_for(provider_id="openai", model="m", at_ms=at_ms)

    assert [found(at_ms) for at_ms in (0, 9, 10, 20, 29, 30)] == [old, old, new, ended, ended, new]
    assert found(-1) is None


def test_a_budget_tells_the_data_plane_what_it_needs():
    shared = {
        "budget_id": "b",
        "subject_kind": SubjectKind.API_KEY,
        "subject": "k" * 16,
        "window": WindowKind.FIXED,
        "zone": "Europe/Berlin",
        "mode": Mode.OBSERVE,
        "limit_nanos": 5,
        "spec_version": 3,
        "starts_at_ms": 1,
        "ends_at_ms": 2,
    }
    budget = Budget(tenant_id="acme", version=7, created_at_ms=0, updated_at_ms=0, **shared)
    assert budget.spec() == BudgetSpec(**shared)
