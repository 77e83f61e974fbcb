"""Runs the control plane: wires it by hand, serves until SIGTERM, drains."""

import asyncio
import logging
import os
import secrets
import string
import sys
import time
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import grpc
import uvloop
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from budgetguard.adapters.grpc_server import GrpcServer
from budgetguard.adapters.postgres.api_keys import ApiKeyRepository
from budgetguard.adapters.postgres.audit_trail import AuditTrail
from budgetguard.adapters.postgres.budget_events import BudgetEventRepository
from budgetguard.adapters.postgres.budgets import BudgetRepository
from budgetguard.adapters.postgres.carries import CarryRepository
from budgetguard.adapters.postgres.catalog import CatalogRepository
from budgetguard.adapters.postgres.dead_events import DeadEventRepository
from budgetguard.adapters.postgres.ledger import LedgerRepository
from budgetguard.adapters.postgres.ledger_activity import LedgerActivity
from budgetguard.adapters.postgres.ledger_reader import LedgerReader
from budgetguard.adapters.postgres.ledger_sums import LedgerSums
from budgetguard.adapters.postgres.maintenance import MaintenanceRepository
from budgetguard.adapters.postgres.pool import Database, open_database
from budgetguard.adapters.postgres.refusals import RefusalRepository
from budgetguard.adapters.postgres.sessions import SessionRepository
from budgetguard.adapters.postgres.tags import TagRepository
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.adapters.postgres.top_ups import TopUpRepository
from budgetguard.adapters.prices import PriceBook
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.epoch import Epoch
from budgetguard.adapters.redis.events import UsageEvents
from budgetguard.adapters.redis.published import Published
from budgetguard.adapters.redis.reconciling import CounterBook
from budgetguard.adapters.redis.refusals import Refusals
from budgetguard.adapters.redis.standing import StandingReader
from budgetguard.adapters.serving import ListenError, serve, stop_on_signals
from budgetguard.adapters.settings import SettingsError
from budgetguard.adapters.telemetry import configure_logging
from budgetguard.core.api_key import SECRET_BYTES
from budgetguard.v1 import (
    api_key_pb2,
    api_key_pb2_grpc,
    budget_event_pb2,
    budget_event_pb2_grpc,
    budget_pb2,
    budget_pb2_grpc,
    correction_pb2,
    correction_pb2_grpc,
    dead_event_pb2,
    dead_event_pb2_grpc,
    price_pb2,
    price_pb2_grpc,
    provider_pb2,
    provider_pb2_grpc,
    quote_pb2,
    quote_pb2_grpc,
    rate_limit_pb2,
    rate_limit_pb2_grpc,
    refusal_pb2,
    refusal_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
    tag_pb2,
    tag_pb2_grpc,
    tenant_pb2,
    tenant_pb2_grpc,
    top_up_pb2,
    top_up_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from control_plane.callers import Callers
from control_plane.corrections import Corrections
from control_plane.errors import AdminInterceptor
from control_plane.health import HealthProbe
from control_plane.jobs.carry_over import CarryOver
from control_plane.jobs.drain_refusals import DrainRefusals, DrainRefusalsMetrics
from control_plane.jobs.drain_usage import DrainMetrics, DrainUsage, LedgerWriter
from control_plane.jobs.expire_holds import ExpireHolds
from control_plane.jobs.maintain_ledger import MaintainLedger
from control_plane.jobs.publish_catalog import PublishCatalog
from control_plane.jobs.publish_snapshots import PublishSnapshots, SnapshotPublisher
from control_plane.jobs.rebuild_counters import RebuildCounters
from control_plane.jobs.reconcile_counters import ReconcileCounters
from control_plane.jobs.runner import JobMetrics, JobRunner
from control_plane.jobs.watch_alarms import AlarmMetrics, WatchAlarms
from control_plane.jobs.watch_thresholds import WatchThresholds
from control_plane.publisher import Publisher
from control_plane.reconciler import ReconcileMetrics, Reconciler
from control_plane.services.api_keys import ApiKeyService
from control_plane.services.budget_events import BudgetEventService
from control_plane.services.budgets import BudgetService
from control_plane.services.catalog import PriceService, ProviderService
from control_plane.services.corrections import CorrectionService
from control_plane.services.dead_events import DeadEventService
from control_plane.services.quotes import QuoteService
from control_plane.services.refusals import RefusalService
from control_plane.services.sessions import SessionService
from control_plane.services.system import SystemService
from control_plane.services.tags import TagService
from control_plane.services.tenants import RateLimitService, TenantService
from control_plane.services.top_ups import TopUpService
from control_plane.services.usage import UsageService
from control_plane.settings import Settings

logger = logging.getLogger(__name__)

# A job may wait for Redis a little longer than a call does: it rewrites counters in bulk.
JOBS_TIMEOUT_SECONDS = 5.0
HEALTH_EVERY_SECONDS = 1.0
_ID_LETTERS = string.ascii_lowercase + string.digits
ID_LENGTH = 16

SERVICES = (
    api_key_pb2.DESCRIPTOR,
    budget_event_pb2.DESCRIPTOR,
    budget_pb2.DESCRIPTOR,
    correction_pb2.DESCRIPTOR,
    dead_event_pb2.DESCRIPTOR,
    price_pb2.DESCRIPTOR,
    provider_pb2.DESCRIPTOR,
    quote_pb2.DESCRIPTOR,
    rate_limit_pb2.DESCRIPTOR,
    refusal_pb2.DESCRIPTOR,
    session_pb2.DESCRIPTOR,
    system_pb2.DESCRIPTOR,
    tag_pb2.DESCRIPTOR,
    tenant_pb2.DESCRIPTOR,
    top_up_pb2.DESCRIPTOR,
    usage_pb2.DESCRIPTOR,
)


def new_id() -> str:
    """Make an id: 16 letters and digits, 82 bits of chance."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(ID_LENGTH))


def now_ms() -> int:
    """Read the clock."""
    return time.time_ns() // 1_000_000


class ControlPlane:
    """Everything that runs, wired. ``start`` it on a running loop; ``close`` it after the server has drained."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._redis = RedisClient(settings.redis_url)
        # Of its own: an administrator's call must not wait behind the replies of a job's thousand commands.
        self._jobs_redis = RedisClient(settings.redis_url, timeout_seconds=JOBS_TIMEOUT_SECONDS)
        self.registry = CollectorRegistry()
        self.server = GrpcServer(settings.address, interceptors=(AdminInterceptor(settings.admin_key),))

        self._tenants = TenantRepository(database)
        self._api_keys = ApiKeyRepository(database)
        self._budgets = BudgetRepository(database)
        self._catalog = CatalogRepository(database)
        self._ledger = LedgerRepository(database)
        self._refusals = RefusalRepository(database)
        self._counters = Counters(self._redis)
        self._standings = StandingReader(self._redis)
        self.prices = PriceBook(self._counters)
        self._reconcile_metrics = ReconcileMetrics(self.registry)
        # One set for all of this process: what an RPC leaves to be followed, the job follows.
        self._waiting: set[str] = set()
        self._snapshots = self._snapshot_publisher(self._redis)
        self._publish_catalog = PublishCatalog(
            self._catalog, self._counters, clusters_path=settings.edge_clusters_path, ca_bundle=settings.ca_bundle
        )
        self.jobs = self._job_runner()
        self.probe = HealthProbe(
            database=database,
            ledger=self._ledger,
            redis=self._redis,
            epoch=Epoch(self._redis),
            events=UsageEvents(self._redis),
            failing_jobs=self.jobs.failing,
        )
        self._add_services()

    def _snapshot_publisher(self, redis: RedisClient) -> SnapshotPublisher:
        return SnapshotPublisher(
            tenants=self._tenants,
            api_keys=self._api_keys,
            budgets=self._budgets,
            counters=Counters(redis),
            published=Published(redis),
            reconciler=self._reconciler(redis),
            waiting=self._waiting,
        )

    def _reconciler(self, redis: RedisClient) -> Reconciler:
        return Reconciler(
            database=self._database,
            sums=LedgerSums(self._database),
            audit=AuditTrail(self._database),
            counters=Counters(redis),
            book=CounterBook(redis),
            events=UsageEvents(redis),
            metrics=self._reconcile_metrics,
            now_ms=now_ms,
        )

    def _job_runner(self) -> JobRunner:
        redis = self._jobs_redis
        snapshots = self._snapshot_publisher(redis)
        alarms = AlarmMetrics(self.registry)
        writer = LedgerWriter(UsageEvents(redis), self._ledger, metrics=DrainMetrics(self.registry))
        return JobRunner(
            (
                PublishSnapshots(snapshots),
                self._publish_catalog,
                # A new name each time: what an earlier process left pending is claimed, not taken for ours.
                DrainUsage(writer, consumer=f"control-plane-{uuid4().hex[:12]}"),
                DrainRefusals(Refusals(redis), self._refusals, metrics=DrainRefusalsMetrics(self.registry)),
                ExpireHolds(Counters(redis), now_ms=now_ms),
                RebuildCounters(
                    database=self._database,
                    tenants=self._tenants,
                    ledger=self._ledger,
                    sums=LedgerSums(self._database),
                    epoch=Epoch(redis),
                    book=CounterBook(redis),
                    publisher=snapshots,
                    writer=writer,
                    now_ms=now_ms,
                ),
                ReconcileCounters(
                    budgets=self._budgets,
                    tenants=self._tenants,
                    activity=LedgerActivity(self._database),
                    refusals=self._refusals,
                    reconciler=self._reconciler(redis),
                    publisher=snapshots,
                    waiting=self._waiting,
                ),
                CarryOver(
                    carries=CarryRepository(self._database),
                    ledger=self._ledger,
                    activity=LedgerActivity(self._database),
                    counters=Counters(redis),
                    publisher=snapshots,
                    now_ms=now_ms,
                ),
                WatchThresholds(
                    events=BudgetEventRepository(self._database),
                    tenants=self._tenants,
                    ledger=self._ledger,
                    activity=LedgerActivity(self._database),
                    counters=Counters(redis),
                    now_ms=now_ms,
                ),
                MaintainLedger(MaintenanceRepository(self._database), self._refusals, metrics=alarms),
                WatchAlarms(self._ledger, metrics=alarms),
            ),
            metrics=JobMetrics(self.registry),
        )

    def _add_services(self) -> None:
        self._add_configuration(self.server.grpc)
        self._add_spend(self.server.grpc)

    def _add_configuration(self, server: grpc.aio.Server) -> None:
        publisher = Publisher(snapshots=self._snapshots, catalog=self._publish_catalog)
        tenant_pb2_grpc.add_TenantServiceServicer_to_server(
            TenantService(tenants=self._tenants, publisher=publisher), server
        )
        rate_limit_pb2_grpc.add_RateLimitServiceServicer_to_server(
            RateLimitService(tenants=self._tenants, publisher=publisher), server
        )
        api_key_pb2_grpc.add_ApiKeyServiceServicer_to_server(
            ApiKeyService(
                api_keys=self._api_keys,
                publisher=publisher,
                new_id=new_id,
                new_secret=lambda: secrets.token_bytes(SECRET_BYTES),
            ),
            server,
        )
        budget_pb2_grpc.add_BudgetServiceServicer_to_server(
            BudgetService(
                budgets=self._budgets,
                counters=self._standings,
                publisher=publisher,
                new_id=new_id,
                now_ms=now_ms,
            ),
            server,
        )
        top_up_pb2_grpc.add_TopUpServiceServicer_to_server(
            TopUpService(top_ups=TopUpRepository(self._database), publisher=publisher, new_id=new_id), server
        )
        tag_pb2_grpc.add_TagServiceServicer_to_server(
            TagService(tags=TagRepository(self._database), publisher=publisher), server
        )
        session_pb2_grpc.add_SessionServiceServicer_to_server(
            SessionService(sessions=SessionRepository(self._database), publisher=publisher), server
        )
        provider_pb2_grpc.add_ProviderServiceServicer_to_server(
            ProviderService(catalog=self._catalog, publisher=publisher), server
        )
        price_pb2_grpc.add_PriceServiceServicer_to_server(
            PriceService(catalog=self._catalog, publisher=publisher, new_id=new_id, now_ms=now_ms), server
        )

    def _add_spend(self, server: grpc.aio.Server) -> None:
        budget_event_pb2_grpc.add_BudgetEventServiceServicer_to_server(
            BudgetEventService(events=BudgetEventRepository(self._database)), server
        )
        correction_pb2_grpc.add_CorrectionServiceServicer_to_server(
            CorrectionService(
                corrections=Corrections(
                    ledger=LedgerReader(self._database),
                    counting=self._reconciler(self._redis),
                    counters=self._counters,
                    audit=AuditTrail(self._database),
                    now_ms=now_ms,
                ),
                tenants=self._tenants,
            ),
            server,
        )
        dead_event_pb2_grpc.add_DeadEventServiceServicer_to_server(
            DeadEventService(events=DeadEventRepository(self._database), counting=self._reconciler(self._redis)), server
        )
        usage_pb2_grpc.add_UsageServiceServicer_to_server(
            UsageService(ledger=LedgerReader(self._database), tenants=self._tenants, book=CounterBook(self._redis)),
            server,
        )
        refusal_pb2_grpc.add_RefusalServiceServicer_to_server(RefusalService(refusals=self._refusals), server)
        quote_pb2_grpc.add_QuoteServiceServicer_to_server(
            QuoteService(
                callers=Callers(self._counters, now_ms=now_ms),
                prices=self.prices,
                standings=self._standings,
                now_ms=now_ms,
            ),
            server,
        )
        system_pb2_grpc.add_SystemServiceServicer_to_server(
            SystemService(probe=self.probe, registry=self.registry, version=version("budgetguard")), server
        )
        names = [service.full_name for file in SERVICES for service in file.services_by_name.values()]
        grpc_server: Any = server
        reflection.enable_server_reflection([*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], grpc_server)

    async def tell_health(self) -> None:
        """Keep grpc.health.v1 up to date: serving means that calls can be admitted and settings be changed."""
        serving: bool | None = None
        while True:
            state = await self.probe.state()
            now_serving = state.ready and state.postgres.reachable
            if now_serving != serving:
                serving = now_serving
                logger.info("serving=%s %s", serving, "; ".join(state.problems()))
                await self.server.set_serving(serving=serving)
            await asyncio.sleep(HEALTH_EVERY_SECONDS)

    async def close(self) -> None:
        """Let the jobs end their runs, then close every connection."""
        await self.jobs.stop()
        await self._jobs_redis.close()
        await self._redis.close()
        await self._database.close()


async def run(settings: Settings) -> None:
    """Serve until a signal. Servers that are down are waited for; health says so meanwhile.

    Raises:
        SettingsError: a URL is malformed.
        ListenError: the address cannot be listened on.
    """
    stopping = stop_on_signals()
    try:
        database = await open_database(settings.database_url, application="control_plane")
    except ValueError:
        raise SettingsError("DATABASE_URL: expected postgresql://user@host:port/database") from None
    try:
        control_plane = ControlPlane(settings, database)
    except ValueError:
        raise SettingsError("REDIS_URL: expected redis://host:port/0 or unix:///path.sock") from None
    await control_plane.server.set_serving(serving=False)
    control_plane.jobs.start()
    telling = asyncio.create_task(control_plane.tell_health())
    pricing = asyncio.create_task(control_plane.prices.keep_fresh())

    async def close() -> None:
        telling.cancel()
        pricing.cancel()
        await control_plane.close()

    await serve(control_plane.server, stopping=stopping, close=close)


def main() -> int:
    """Run the program; a wrong setting is one sentence and exit code 1."""
    try:
        settings = Settings.from_environment(os.environ)
        configure_logging("control_plane")
        uvloop.run(run(settings))
    except (SettingsError, ListenError) as error:
        sys.stderr.write(f"control_plane: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
