"""Reads counters as of one event of their stream, and adds what they lack. Used by the control plane only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import Argument, RedisClient
from budgetguard.adapters.redis.scripts import Script, ScriptRunner
from budgetguard.adapters.redis.spelling import (
    HELD,
    commands_to_remember,
    counter_arguments,
    counter_of,
    fields_of,
    operation_of,
)
from budgetguard.core.counter import read_name
from budgetguard.core.counting import Counter
from budgetguard.core.events import facts_from_json, split_counters
from budgetguard.core.operation import OperationFacts

READ_COUNTERS = Script("read_counters")
CORRECT_COUNTER = Script("correct_counter")

# One page of a look through a shard's leases.
_SCAN_COUNT = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Counters as of one event: what they have spent is the sum of the events up to ``event_id``.

    ``generation`` is empty while the counters are not ready, and another one after each rebuild.
    """

    generation: str
    event_id: str
    counters: tuple[Counter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveHold:
    """A call under way: what it holds, and the names of the counters that it is counted in."""

    facts: OperationFacts
    hold_nanos: int
    counters: tuple[str, ...]


class CounterBook:
    """The counters of one Redis, for comparing. Every method may raise ``CountersUnavailableError``."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._scripts = ScriptRunner(redis)

    async def read(self, tenant_id: str, names: Sequence[str]) -> Reading:
        """Read a tenant's counters, all as of the same event; a rolling one with all that it still has."""
        shard = keys.shard_of(tenant_id)
        reply = await self._scripts.run(
            READ_COUNTERS,
            [keys.epoch(shard), keys.usage(shard), keys.generation(shard), *keys.counters(tenant_id, names)],
            [],
        )
        generation, event_id, *rows = reply
        return Reading(
            generation=generation, event_id=event_id, counters=tuple(counter_of(fields_of(row)) for row in rows)
        )

    async def subjects(self, tenant_id: str, template: str) -> list[str]:
        """List the subjects that a template has counters of (``core.shard.template_of`` names it)."""
        members: list[str] = await self._redis.command("ZRANGE", keys.subjects(tenant_id, template), 0, -1)
        return members

    async def correct(
        self,
        tenant_id: str,
        counter: str,
        deltas: int | Mapping[int, int],
        *,
        seed: int,
        generation: str,
        now_ms: int,
    ) -> bool:
        """Add to what a counter has spent, by bucket if it rolls, and set what calls hold that are not counted in it.

        ``False`` when the counters were rebuilt since they were read.
        """
        name = read_name(counter)
        kept_until_ms, _, bucket, number = counter_arguments(name, now_ms)
        shard = keys.shard_of(tenant_id)
        pairs: list[tuple[Argument, Argument]] = [("", deltas)] if isinstance(deltas, int) else list(deltas.items())
        corrected = await self._scripts.run(
            CORRECT_COUNTER,
            [keys.epoch(shard), keys.counter(tenant_id, counter), keys.generation(shard)],
            [generation, seed, kept_until_ms, int(name.slides), bucket, number, *chain.from_iterable(pairs)],
        )
        if corrected:
            await self._redis.pipeline(commands_to_remember(tenant_id, name, now_ms))
        return bool(corrected)

    async def live_holds(self, tenant_id: str) -> tuple[LiveHold, ...]:
        """List a tenant's calls under way. Looks through the whole shard: for jobs and people, not for calls."""
        operation_ids: set[str] = set()
        cursor, leases = "0", keys.leases(keys.shard_of(tenant_id))
        while True:
            cursor, page = await self._redis.command("ZSCAN", leases, cursor, "COUNT", _SCAN_COUNT)
            for member in page[::2]:
                owner, operation_id = keys.split_lease_member(member)
                if owner == tenant_id:
                    operation_ids.add(operation_id)
            if cursor == "0":
                break
        texts = await self._redis.pipeline([("GET", keys.operation(tenant_id, name)) for name in operation_ids])
        operations = [operation_of(text) for text in texts if text]
        # Some may have ended since.
        return tuple(
            LiveHold(
                facts=facts_from_json(operation["facts"]),
                hold_nanos=int(operation["hold"]),
                counters=split_counters(operation["counters"]),
            )
            for operation in operations
            if operation["state"] == HELD
        )
