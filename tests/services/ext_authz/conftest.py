import pytest

from budgetguard.core.catalog import Catalog
from tests.services.ext_authz.test_check import PROVIDER, RECORD, TENANT, Bench


@pytest.fixture
async def bench(ready_redis):
    bench = Bench(ready_redis)
    await bench.counters.publish_tenant(TENANT)
    await bench.counters.publish_key(RECORD)
    await bench.counters.publish_catalog(Catalog(version=1, providers=(PROVIDER,)).to_json(), version=1)
    await bench.prices.refresh()
    yield bench
    await bench.large_bodies.close()
