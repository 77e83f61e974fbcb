"""Runs ext_authz: wires it by hand, serves until SIGTERM, drains."""

import asyncio
import gc
import logging
import os
import sys
import time
from functools import partial
from uuid import uuid4

import uvloop
from prometheus_client import REGISTRY

from budgetguard.adapters.grpc_wire.server import WireServer
from budgetguard.adapters.metrics import serve_metrics
from budgetguard.adapters.policy import open_policy
from budgetguard.adapters.prices import PriceBook
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.epoch import incarnation_of
from budgetguard.adapters.redis.refusals import Refusals
from budgetguard.adapters.serving import ListenError, serve, stop_on_signals
from budgetguard.adapters.settings import SettingsError
from budgetguard.adapters.telemetry import configure_logging
from budgetguard.core.policy import PolicyLoadError
from ext_authz.attempts import RefusalLog
from ext_authz.check import Checker
from ext_authz.failures import CLOSED, POLICY_SKIPPED, Failures
from ext_authz.large_bodies import LargeBodies
from ext_authz.meter import Meter
from ext_authz.records import Records
from ext_authz.releases import Releases
from ext_authz.service import AuthorizationService
from ext_authz.settings import POLICY_SKIP, Settings

logger = logging.getLogger(__name__)

# Of Redis' own silence, not of the time that a call waits for its turn in here: docs/decisions/016.
REDIS_TIMEOUT_SECONDS = 0.2


def now_ms() -> int:
    """Read the clock."""
    return time.time_ns() // 1_000_000


async def run(settings: Settings) -> None:
    """Serve until a signal.

    Raises:
        ListenError: an address cannot be listened on.
        PolicyLoadError: the policies cannot be loaded.
    """
    stopping = stop_on_signals()
    serve_metrics(settings.metrics_address, REGISTRY)
    redis = RedisClient(settings.redis_url, timeout_seconds=REDIS_TIMEOUT_SECONDS)
    counters = Counters(redis)
    # Of its own, so that no call's command stands behind a refusal's.
    refusals_redis = RedisClient(settings.redis_url, timeout_seconds=REDIS_TIMEOUT_SECONDS)
    # A new name each time: a count that begins anew must not be taken for an older one.
    refusals = RefusalLog(
        Refusals(refusals_redis),
        source=uuid4().hex[:12],
        incarnation=partial(incarnation_of, refusals_redis),
        now_ms=now_ms,
    )
    releases = Releases(counters, now_ms=now_ms)
    prices = PriceBook(counters)
    meter = Meter(settings.ext_proc_address)
    large_bodies = LargeBodies()
    await large_bodies.start()
    policy = await open_policy(opa_url=settings.opa_url, policy_dir=settings.policy_dir)
    checker = Checker(
        counters=counters,
        releases=releases,
        records=Records(counters),
        prices=prices,
        policy=policy,
        provider_key=settings.provider_key,
        now_ms=now_ms,
        failures=Failures(POLICY_SKIPPED if settings.policy_failure == POLICY_SKIP else CLOSED),
        large_bodies=large_bodies,
        refusals=refusals,
        is_metered=lambda: meter.is_there,
    )
    server = WireServer(settings.address, unary=AuthorizationService(checker).methods())
    background = [asyncio.create_task(task) for task in (prices.keep_fresh(), meter.watch(), refusals.keep_telling())]
    # What was made so far stays: prices alone are a hundred thousand objects, which no collection has to walk again.
    gc.collect()
    gc.freeze()
    await server.set_serving(serving=True)

    async def close() -> None:
        for task in background:
            task.cancel()
        await releases.drain()
        await refusals.drain()
        await large_bodies.close()
        await policy.close()
        await refusals_redis.close()
        await redis.close()

    await serve(server, stopping=stopping, close=close)


def main() -> int:
    """Run the program; a wrong setting is one sentence and exit code 1."""
    try:
        settings = Settings.from_environment(os.environ)
        configure_logging("ext_authz")
        uvloop.run(run(settings))
    except (SettingsError, ListenError, PolicyLoadError) as error:
        sys.stderr.write(f"ext_authz: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
