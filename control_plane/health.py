"""How the parts are: asked at most once a second, however many ask."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from budgetguard.adapters.postgres.ledger import LedgerRepository
from budgetguard.adapters.postgres.pool import Database
from budgetguard.adapters.redis.client import CountersUnavailableError, RedisClient
from budgetguard.adapters.redis.epoch import Epoch
from budgetguard.adapters.redis.events import UsageEvents
from budgetguard.adapters.redis.keys import SHARDS
from budgetguard.adapters.redis.scripts import info_field
from budgetguard.core.errors import DependencyUnavailableError

logger = logging.getLogger(__name__)

# Health is open to everybody, so asking it must not be a way to load the servers.
KEPT_SECONDS = 1.0
# A server that takes longer than this to say that it lives is as good as down.
PROBE_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresState:
    """Postgres, asked now. The alarms should be 0."""

    reachable: bool = False
    server_version: str = ""
    default_partition_rows: int = 0
    dead_events: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisState:
    """Redis, asked now. ``faults`` are settings in which money is not safe."""

    reachable: bool = False
    server_version: str = ""
    shards_ready: int = 0
    backlog_events: int = 0
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemState:
    """Both, and the background jobs whose last run failed (name -> failures in a row)."""

    postgres: PostgresState
    redis: RedisState
    failing_jobs: Mapping[str, int]

    @property
    def ready(self) -> bool:
        """Whether calls can be admitted: the data plane never waits for Postgres, only for signed-off counters."""
        return self.redis.reachable and self.redis.shards_ready == SHARDS

    def problems(self) -> list[str]:
        """Say everything that needs attention."""
        problems = []
        if not self.postgres.reachable:
            problems.append("Postgres does not answer: usage waits in Redis, nothing can be changed")
        if self.postgres.default_partition_rows:
            problems.append(
                f"{self.postgres.default_partition_rows} ledger rows are in the default partition: "
                "the migrating role must run rehome_ledger_default()"
            )
        if self.postgres.dead_events:
            problems.append(
                f"{self.postgres.dead_events} usage events could not become ledger rows: "
                "see /admin/usage/deadevents?state=STANDING, mend the cause and retry them, or discard them"
            )
        if not self.redis.reachable:
            problems.append("Redis does not answer: no call is admitted")
        elif self.redis.shards_ready < SHARDS:
            problems.append(
                f"the counters of {SHARDS - self.redis.shards_ready} of {SHARDS} shards are not ready: "
                "they are compared with the ledger first"
            )
        problems += [f"Redis: {fault}" for fault in self.redis.faults]
        problems += [f"job {name} failed {number} times in a row" for name, number in self.failing_jobs.items()]
        return problems


class HealthProbe:
    """Asks Postgres and Redis."""

    def __init__(
        self,
        *,
        database: Database,
        ledger: LedgerRepository,
        redis: RedisClient,
        epoch: Epoch,
        events: UsageEvents,
        failing_jobs: Callable[[], Mapping[str, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._redis = redis
        self._epoch = epoch
        self._events = events
        self._failing_jobs = failing_jobs
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self._known: tuple[float, SystemState] | None = None

    async def state(self) -> SystemState:
        """Return the state, at most ``KEPT_SECONDS`` old. Never raises."""
        async with self._one_at_a_time:
            if self._known is None or self._clock() - self._known[0] >= KEPT_SECONDS:
                postgres, redis = await asyncio.gather(self._postgres(), self._redis_state())
                state = SystemState(postgres=postgres, redis=redis, failing_jobs=self._failing_jobs())
                self._known = (self._clock(), state)
            return self._known[1]

    async def _postgres(self) -> PostgresState:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                async with self._database.transaction() as connection:
                    version = await connection.fetchval("SHOW server_version")
                alarms = await self._ledger.alarms()
        except (DependencyUnavailableError, TimeoutError):
            return PostgresState()
        except Exception:
            # No tables yet, no rights: the log has it, and calls that need Postgres would fail the same way.
            logger.exception("Postgres answers, but not as expected")
            return PostgresState()
        return PostgresState(
            reachable=True,
            server_version=version,
            default_partition_rows=alarms["default_partition_rows"],
            dead_events=alarms["dead_events"],
        )

    async def _redis_state(self) -> RedisState:
        shards = range(SHARDS)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                version = info_field(await self._redis.command("INFO", "server"), "redis_version")
                run_id = await self._epoch.run_id()
                signed = await self._epoch.signed_off(shards)
                backlog = await self._events.backlog(shards)
                faults = await self._epoch.faults()
        except (CountersUnavailableError, TimeoutError):
            return RedisState()
        return RedisState(
            reachable=True,
            server_version=version,
            shards_ready=sum(signed_for == run_id for signed_for in signed.values()),
            backlog_events=sum(backlog.values()),
            faults=faults,
        )
