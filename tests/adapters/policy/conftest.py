import multiprocessing
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor

import pytest

from budgetguard.cli.local.parts import free_port
from tests.adapters.policy.engines import Embedded, Opa


@pytest.fixture(scope="session")
def alone():
    """Run a function of ``alone.py``."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=60)


@pytest.fixture(params=["embedded", "opa over a Unix socket", "opa over TCP"])
async def engine(request):
    folder = tempfile.mkdtemp(prefix="bg-opa-", dir="/tmp")
    if request.param == "embedded":
        engine = Embedded()
    elif request.param == "opa over TCP":
        address = f"127.0.0.1:{free_port()}"
        engine = Opa(address, f"http://{address}")
    else:
        engine = Opa(f"unix://{folder}/opa.sock", f"unix:{folder}/opa.sock")
    yield engine
    await engine.close()
    shutil.rmtree(folder)
