"""Usage events on their way to the ledger: read by a consumer group, acknowledged after the commit, then trimmed."""

from collections.abc import Mapping, Sequence

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import Argument, RedisClient, RedisReplyError, Reply
from budgetguard.adapters.redis.scripts import Script, ScriptRunner
from budgetguard.core.events import MalformedEvent, UsageEvent, entry_order

TRIM = Script("trim")


class UsageEvents:
    """The usage streams of all shards, as one consumer group sees them.

    Several consumers share the work; each event goes to one of them and stays pending until it is acknowledged. Every
    method may raise ``CountersUnavailableError``.
    """

    def __init__(self, redis: RedisClient, *, group: str = keys.LEDGER_GROUP) -> None:
        self._redis = redis
        self._scripts = ScriptRunner(redis)
        self._group = group

    async def read(
        self, shards: Sequence[int], *, consumer: str, count: int, pending: bool = False
    ) -> list[tuple[int, str, UsageEvent | MalformedEvent]]:
        """Take new events, at most ``count`` of each shard, oldest first.

        ``pending`` gives again what this consumer has taken and not acknowledged. All streams are in one command, so an
        idle reader costs one a look. Redis Cluster takes streams of one slot only: there, read shard by shard.
        """
        by_key = {keys.usage(shard): shard for shard in shards}
        start = "0" if pending else ">"
        command = ("XREADGROUP", "GROUP", self._group, consumer, "COUNT", count, "STREAMS")
        arguments: list[Argument] = [*command, *by_key, *(start for _ in by_key)]
        try:
            reply = await self._redis.command(*arguments)
        except RedisReplyError as error:
            if not error.says("NOGROUP"):
                raise
            await self._create_groups(shards)
            reply = await self._redis.command(*arguments)
        return [row for key, entries in reply or () for row in _decode(by_key[key], entries)]

    async def claim(
        self, shards: Sequence[int], *, consumer: str, idle_ms: int, count: int
    ) -> list[tuple[int, str, UsageEvent | MalformedEvent]]:
        """Take over what other consumers took over ``idle_ms`` ago and never acknowledged: they are dead.

        At most ``count`` of each shard. One command a shard: for once a minute.
        """
        try:
            replies = await self._redis.pipeline(
                [
                    ("XAUTOCLAIM", keys.usage(shard), self._group, consumer, idle_ms, "0-0", "COUNT", count)
                    for shard in shards
                ]
            )
        except RedisReplyError as error:
            if not error.says("NOGROUP"):
                raise
            # A stream without its group has nothing to claim; the others get their turn next time.
            await self._create_groups(shards)
            return []
        claimed: list[tuple[int, str, UsageEvent | MalformedEvent]] = []
        for shard, (_, entries, *_) in zip(shards, replies, strict=True):
            claimed += _decode(shard, entries)
        return claimed

    async def ack(self, shard: int, ids: Sequence[str]) -> int:
        """Acknowledge events that the ledger has; answers how many were still pending."""
        if not ids:
            return 0
        return int(await self._redis.command("XACK", keys.usage(shard), self._group, *ids))

    async def trim(self, shard: int) -> int:
        """Drop every event below the oldest one that some group has not acknowledged; answers how many."""
        return int(await self._scripts.run(TRIM, [keys.usage(shard)], []))

    async def drained(self, shard: int, event_id: str) -> bool:
        """Whether every event of a shard up to this one was acknowledged, which is after its commit."""
        try:
            groups, (pending, oldest, *_) = await self._redis.pipeline(
                [("XINFO", "GROUPS", keys.usage(shard)), ("XPENDING", keys.usage(shard), self._group)]
            )
        except RedisReplyError as error:
            if error.says("NOGROUP") or error.says("no such key"):
                return event_id == "0-0"
            raise
        fields = [dict(zip(group[::2], group[1::2], strict=True)) for group in groups]
        delivered = next(group["last-delivered-id"] for group in fields if group["name"] == self._group)
        wanted = entry_order(event_id)
        return entry_order(delivered) >= wanted and (not pending or entry_order(oldest) > wanted)

    async def backlog(self, shards: Sequence[int]) -> dict[int, int]:
        """Count each shard's events that are not trimmed, in one trip."""
        lengths = await self._redis.pipeline([("XLEN", keys.usage(shard)) for shard in shards])
        return dict(zip(shards, lengths, strict=True))

    async def _create_groups(self, shards: Sequence[int]) -> None:
        commands = [("XGROUP", "CREATE", keys.usage(shard), self._group, "0", "MKSTREAM") for shard in shards]
        try:
            await self._redis.pipeline(commands)
        except RedisReplyError as error:
            if not error.says("BUSYGROUP"):  # most exist, or another consumer was faster
                raise


def _decode(shard: int, entries: Reply) -> list[tuple[int, str, UsageEvent | MalformedEvent]]:
    rows: list[tuple[int, str, UsageEvent | MalformedEvent]] = []
    for entry in entries:
        if entry is None:
            continue  # claimed, but somebody has deleted it from the stream
        entry_id, pairs = entry
        fields = dict(zip(pairs[::2], pairs[1::2], strict=True)) if pairs else {}
        try:
            rows.append((shard, entry_id, event_of(shard, fields)))
        except ValueError:
            rows.append((shard, entry_id, MalformedEvent(fields)))
    return rows


def event_of(shard: int, fields: Mapping[str, str]) -> UsageEvent:
    """Read an entry of a shard's stream.

    Raises:
        ValueError: it cannot be read, or is of a tenant of another shard: no script of ours has written that.
    """
    event = UsageEvent.from_fields(fields)
    if keys.shard_of(event.facts.tenant_id) != shard:
        raise ValueError(f"an event of tenant {event.facts.tenant_id} in shard {shard}")
    return event
