"""SystemService."""

from typing import Any, Protocol

from google.api.httpbody_pb2 import HttpBody
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from budgetguard.adapters.redis.keys import SHARDS
from budgetguard.core.errors import DependencyUnavailableError
from budgetguard.v1 import system_pb2, system_pb2_grpc
from control_plane.health import SystemState


class Probe(Protocol):
    """Asks the parts how they are."""

    async def state(self) -> SystemState: ...


class SystemService(system_pb2_grpc.SystemServiceServicer):
    """Health and metrics."""

    def __init__(self, *, probe: Probe, registry: CollectorRegistry, version: str) -> None:
        self._probe = probe
        self._registry = registry
        self._version = version

    async def CheckHealth(
        self, _request: system_pb2.CheckHealthRequest, _context: Any
    ) -> system_pb2.CheckHealthResponse:
        state = await self._probe.state()
        # Anybody may ask, so it says which dependency and no more.
        if not state.redis.reachable:
            raise DependencyUnavailableError("Redis")
        if not state.ready:
            raise DependencyUnavailableError("the counters' sign-off")
        return system_pb2.CheckHealthResponse(status="ok")

    async def GetHealth(self, _request: system_pb2.GetHealthRequest, _context: Any) -> system_pb2.SystemHealth:
        state = await self._probe.state()
        return system_pb2.SystemHealth(
            ready=state.ready,
            problems=state.problems(),
            postgres=system_pb2.PostgresHealth(
                reachable=state.postgres.reachable,
                server_version=state.postgres.server_version,
                default_partition_rows=state.postgres.default_partition_rows,
                dead_events=state.postgres.dead_events,
            ),
            redis=system_pb2.RedisHealth(
                reachable=state.redis.reachable,
                server_version=state.redis.server_version,
                shards_ready=state.redis.shards_ready,
                shards_total=SHARDS,
                backlog_events=state.redis.backlog_events,
            ),
            version=self._version,
        )

    async def GetMetrics(self, _request: system_pb2.GetMetricsRequest, _context: Any) -> HttpBody:
        return HttpBody(content_type=CONTENT_TYPE_LATEST, data=generate_latest(self._registry))
