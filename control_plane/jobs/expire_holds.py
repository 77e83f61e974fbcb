"""Ends holds whose lease ran out: nobody saw how the call ended, so its whole hold counts until better is known."""

import logging
from collections.abc import Callable

from budgetguard.adapters.redis.counters import Counters

logger = logging.getLogger(__name__)

# Of one shard in one go.
EXPIRE_COUNT = 500


class ExpireHolds:
    """Looks at all shards. Several may run: each hold ends once."""

    name = "expire_holds"
    interval_s = 2.0

    def __init__(self, counters: Counters, *, now_ms: Callable[[], int]) -> None:
        self._counters = counters
        self._now_ms = now_ms

    async def run_once(self) -> bool:
        """Expire what is due; says whether there is more. A shard that is not signed off waits."""
        more = False
        for shard in await self._counters.due_shards(now_ms=self._now_ms()):
            expired = await self._counters.expire_due(shard, now_ms=self._now_ms(), limit=EXPIRE_COUNT)
            if expired:
                logger.warning("job=%s shard=%d expired=%d: their ends were not seen", self.name, shard, expired)
            more = more or expired == EXPIRE_COUNT
        return more
