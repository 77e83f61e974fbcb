"""Reads how counters stand, as far as they are to be trusted, and writes nothing. Used by the control plane only."""

from collections.abc import Sequence

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.reconciling import CounterBook
from budgetguard.adapters.redis.spelling import fields_of
from budgetguard.core.budget import AppliedLimit, Reserve
from budgetguard.core.counter import idle_before_ms, read_name, template_of
from budgetguard.core.counting import as_of
from budgetguard.core.quoting import Standing
from budgetguard.core.rate_limit import Minute

_BOUNDS = ("total", "first", "last")


class StandingReader:
    """The counters of one Redis as one call would meet them. Every method may raise ``CountersUnavailableError``."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._book = CounterBook(redis)

    async def read(self, request: Reserve) -> Standing:
        """Read what ``reserve`` would look at: the counters in one step, the rest right after."""
        tenant_id, key_id = request.facts.tenant_id, request.facts.key_id
        limits = request.limits()
        reading = await self._book.read(tenant_id, [limit.counter for limit in limits])
        backlog, tenant_requests, key_requests = await self._redis.pipeline(
            [
                ("XLEN", keys.usage(keys.shard_of(tenant_id))),
                ("HGETALL", keys.tenant_requests(tenant_id)),
                ("HGETALL", keys.key_requests(tenant_id, key_id)),
            ]
        )
        return Standing(
            ready=bool(reading.generation),
            backlog=int(backlog),
            counters=reading.counters,
            tenant_requests=_minute(tenant_requests),
            key_requests=_minute(key_requests),
            full=await self._full(tenant_id, limits, request.now_ms),
        )

    async def counted(self, tenant_id: str, names: Sequence[str]) -> list[tuple[int, int]] | None:
        """Read (spent, held) of each counter as of its name's bucket; ``None`` while the counters are not signed off.

        Until then a counter that is not there is lost, not 0.
        """
        reading = await self._book.read(tenant_id, names)
        if not reading.generation:
            return None
        counters = [as_of(counter, read_name(name)) for counter, name in zip(reading.counters, names, strict=True)]
        return [(counter.spent, counter.held + counter.seed) for counter in counters]

    async def _full(self, tenant_id: str, limits: Sequence[AppliedLimit], now_ms: int) -> frozenset[int]:
        full: set[int] = set()
        for place, limit in enumerate(limits):
            if limit.subjects_max is None:
                continue
            name = read_name(limit.counter)
            key = keys.subjects(tenant_id, template_of(name))
            seen, live = await self._redis.pipeline(
                [("ZSCORE", key, limit.subject), ("ZCOUNT", key, idle_before_ms(name, now_ms), "+inf")]
            )
            if seen is None and live >= limit.subjects_max:
                full.add(place)
        return frozenset(full)


def _minute(reply: Sequence[str]) -> Minute:
    fields = fields_of(reply)
    return Minute(
        **{name: int(fields.get(name, 0)) for name in _BOUNDS},
        counts={int(second): int(count) for second, count in fields.items() if second not in _BOUNDS},
    )
