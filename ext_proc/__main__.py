"""Runs ext_proc: wires it by hand, serves until SIGTERM, drains."""

import gc
import logging
import os
import sys
import time
from functools import partial

import uvloop
from prometheus_client import REGISTRY

from budgetguard.adapters.grpc_wire.server import WireServer
from budgetguard.adapters.metrics import serve_metrics
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.epoch import incarnation_of
from budgetguard.adapters.serving import ListenError, serve, stop_on_signals
from budgetguard.adapters.settings import SettingsError
from budgetguard.adapters.telemetry import configure_logging
from ext_proc.exchange import Exchange
from ext_proc.leases import Leases
from ext_proc.service import ExternalProcessor
from ext_proc.settings import Settings
from ext_proc.settler import Settler
from ext_proc.spool import Spool, SpoolError

logger = logging.getLogger(__name__)

# A settlement that Redis does not take in this time goes to the spool.
REDIS_TIMEOUT_SECONDS = 0.25


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def run(settings: Settings) -> None:
    """Serve until a signal.

    Raises:
        ListenError: an address cannot be listened on.
        SpoolError: the spool folder cannot be used.
    """
    stopping = stop_on_signals()
    serve_metrics(settings.metrics_address, REGISTRY)
    redis = RedisClient(settings.redis_url, timeout_seconds=REDIS_TIMEOUT_SECONDS)
    counters = Counters(redis)
    spool = Spool(settings.spool_dir)
    settler = Settler(counters, spool, incarnation=partial(incarnation_of, redis), now_ms=_now_ms, registry=REGISTRY)
    leases = Leases(counters, now_ms=_now_ms)
    service = ExternalProcessor(lambda: Exchange(settler=settler, leases=leases, counters=counters, now_ms=_now_ms))
    server = WireServer(settings.address, bidirectional=service.methods())
    await settler.start()
    leases.start()
    # What was made so far stays: prices alone are a hundred thousand objects, which no collection has to walk again.
    gc.collect()
    gc.freeze()
    await server.set_serving(serving=True)

    async def close() -> None:
        # Calls have ended by now; what they owe is settled or spooled before Redis is let go.
        await leases.close()
        await settler.close()
        await redis.close()

    await serve(server, stopping=stopping, close=close)


def main() -> int:
    """Run the program; a wrong setting is one sentence and exit code 1."""
    try:
        settings = Settings.from_environment(os.environ)
        configure_logging("ext_proc")
        uvloop.run(run(settings))
    except (SettingsError, ListenError, SpoolError) as error:
        sys.stderr.write(f"ext_proc: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
