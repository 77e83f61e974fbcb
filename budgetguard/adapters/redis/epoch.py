"""Whether the counters may be trusted: sign-off of each shard for one Redis process, and their rebuild.

A shard whose epoch is not the running process' id admits and settles nothing. The control plane compares the shard
with the ledger, rebuilds what is missing, then signs it off. Until then the epoch names the opening: data that Redis
loses meanwhile takes that name with it, and nothing is opened on what is left.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from uuid import uuid4

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.scripts import Script, ScriptRunner, info_field, run_id_of
from budgetguard.adapters.redis.spelling import all_counter_arguments, commands_to_remember, counter_arguments
from budgetguard.core.budget import RememberedEnd
from budgetguard.core.counter import read_name
from budgetguard.core.events import join_counters, split_counters
from budgetguard.core.operation import ENDED_KEPT_MS
from budgetguard.core.shard import SignOff

WRITE_COUNTER = Script("write_counter")
REMEMBER_ENDED = Script("remember_ended")
SIGN_OFF = Script("sign_off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """One attempt at opening closed shards: the Redis process that it began with, and the name it has left there."""

    run_id: str
    name: str


class Epoch:
    """The epochs of all shards of one Redis; used by the control plane only.

    Every method may raise ``CountersUnavailableError``.
    """

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._scripts = ScriptRunner(redis)

    async def run_id(self) -> str:
        """Return the id of the Redis process that answers now."""
        return run_id_of(await self._redis.command("INFO", "server"))

    async def signed_off(self, shards: Sequence[int]) -> dict[int, str | None]:
        """Return for each shard the run id it was signed off for."""
        epochs = await self._redis.pipeline([("GET", keys.epoch(shard)) for shard in shards])
        return dict(zip(shards, epochs, strict=True))

    async def mark_incarnation(self) -> None:
        """Name the data that this Redis has, unless they have a name: lost with them, it is another one afterwards."""
        await self._redis.command("SET", keys.incarnation(), uuid4().hex, "NX")

    async def begin_opening(self, shards: Iterable[int], run_id: str) -> Opening:
        """Close shards until they are signed off: from here on nothing but this opening writes their counters.

        ``run_id`` is the process that was found to be running; if Redis was restarted since, this will open nothing.
        """
        opening = Opening(run_id=run_id, name=f"opening-{uuid4().hex}")
        await self._redis.pipeline([("SET", keys.epoch(shard), opening.name) for shard in shards])
        return opening

    async def sign_off(
        self, opening: Opening, shard: int, *, position: tuple[int, int] = (0, 0), rebuilt: bool = False
    ) -> SignOff:
        """Declare the shard's counters right, if nothing was lost since the opening began.

        ``position`` is the newest event that the ledger has, as (ms, sequence). ``rebuilt``: the counters were written
        from the ledger as of that position, and the stream, of which nothing is left to be read, goes on after it.
        """
        answer = await self._scripts.run(
            SIGN_OFF,
            [keys.epoch(shard), keys.generation(shard), keys.usage(shard)],
            [opening.name, opening.run_id, uuid4().hex, *position, int(rebuilt), keys.LEDGER_GROUP],
        )
        return SignOff(answer)

    async def write_counter(
        self, opening: Opening, tenant_id: str, counter: str, spent: int | Mapping[int, int], *, now_ms: int
    ) -> bool:
        """Set what a counter has spent, by bucket if it rolls; what it holds is left alone.

        ``False`` when the shard is not in this opening, or not any more.
        """
        name = read_name(counter)
        kept_until_ms, _, bucket, number = counter_arguments(name, now_ms)
        amounts = [spent] if isinstance(spent, int) else chain.from_iterable(spent.items())
        written = await self._scripts.run(
            WRITE_COUNTER,
            [keys.epoch(keys.shard_of(tenant_id)), keys.counter(tenant_id, counter)],
            [opening.name, kept_until_ms, bucket, number, *amounts],
        )
        if written:
            await self._redis.pipeline(commands_to_remember(tenant_id, name, now_ms))
        return bool(written)

    async def remember_ended(self, opening: Opening, remembered: RememberedEnd) -> bool:
        """Write the marker of an end that the ledger has, so that its replay charges nothing.

        To be done before the sign-off for every operation that ended in the last ``ENDED_KEPT_MS``; a hold of that
        operation, which a rolled-back Redis has revived, is dropped. ``False`` when the shard is not in this opening.
        """
        reply = await self._remember_ended(opening, remembered, remembered.counters)
        if reply[0] == "COUNTERS":
            reply = await self._remember_ended(opening, remembered, split_counters(reply[1]))
        return reply[0] == "REMEMBERED"

    async def _remember_ended(self, opening: Opening, remembered: RememberedEnd, names: Sequence[str]) -> list[str]:
        shard = keys.shard_of(remembered.tenant_id)
        reply: list[str] = await self._scripts.run(
            REMEMBER_ENDED,
            [
                keys.epoch(shard),
                keys.operation(remembered.tenant_id, remembered.operation_id),
                keys.leases(shard),
                *keys.counters(remembered.tenant_id, names),
            ],
            [
                opening.name,
                remembered.end.value,
                remembered.amount_nanos,
                remembered.hold_nanos,
                remembered.sequence,
                join_counters(names),
                keys.lease_member(remembered.tenant_id, remembered.operation_id),
                ENDED_KEPT_MS,
                remembered.tokens,
                # A hold that is dropped was there before: nothing is new, so nothing is kept until another time.
                *all_counter_arguments(names, 0),
            ],
        )
        return reply

    async def faults(self) -> tuple[str, ...]:
        """Say what is wrong with how this Redis is set up; empty when money is safe in it."""
        memory, persistence = await self._redis.pipeline([("INFO", "memory"), ("INFO", "persistence")])
        faults = []
        policy = info_field(memory, "maxmemory_policy")
        if policy != "noeviction":
            faults.append(f"maxmemory-policy is {policy}, expected noeviction: Redis would forget counters when full")
        if info_field(persistence, "aof_enabled") != "1":
            faults.append("appendonly is off: Redis would forget every hold and undrained event when restarted")
        return tuple(faults)


async def incarnation_of(redis: RedisClient) -> str | None:
    """Say which Redis this is: another process, or another one's data, is another one. ``None``: not known yet.

    Raises:
        CountersUnavailableError: it does not answer.
    """
    info, data = await redis.pipeline([("INFO", "server"), ("GET", keys.incarnation())])
    return f"{run_id_of(info)} {data}" if data else None
