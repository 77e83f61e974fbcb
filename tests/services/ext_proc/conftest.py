import pytest
from prometheus_client import CollectorRegistry

from ext_proc.exchange import Exchange
from ext_proc.leases import Leases
from ext_proc.settler import Settler
from ext_proc.spool import Spool
from tests.services.ext_proc.support import ModelCounters, Stream


@pytest.fixture
async def counters():
    return ModelCounters()


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
async def settler(counters, registry, tmp_path):
    settler = Settler(
        counters,
        Spool(tmp_path / "spool"),
        incarnation=counters.run_id,
        now_ms=lambda: counters.now_ms,
        registry=registry,
        watch_every_seconds=0.01,
    )
    await settler.start()
    yield settler
    counters.gate.set()
    await settler.close()


@pytest.fixture
async def leases(counters):
    return Leases(counters, now_ms=lambda: counters.now_ms)


@pytest.fixture
def open_stream(counters, settler, leases):
    def open_stream():
        return Stream(Exchange(settler=settler, leases=leases, counters=counters, now_ms=lambda: counters.now_ms))

    return open_stream


@pytest.fixture
def stream(open_stream):
    return open_stream()
