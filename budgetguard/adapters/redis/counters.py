"""Holds, ends and snapshots: one method a transition, one script a method, all of it decided inside Redis."""

from collections.abc import Sequence

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import Argument, RedisClient, Reply
from budgetguard.adapters.redis.scripts import Script, ScriptRunner
from budgetguard.adapters.redis.spelling import (
    all_counter_arguments,
    counter_of,
    extend_answer,
    fields_of,
    limit_arguments,
    operation_of,
    reserve_answer,
)
from budgetguard.core.budget import (
    BACKLOG_MAX,
    FORGOTTEN_CHARGED_MS,
    LEASE_EXPIRED,
    TOO_LATE_MS,
    NotReady,
    Reserve,
    Reserved,
    ReserveRefused,
    Settled,
    Settlement,
)
from budgetguard.core.counter import idle_before_ms, read_name, template_of
from budgetguard.core.counting import as_of
from budgetguard.core.events import (
    DETAIL_CHARS_MAX,
    facts_to_json,
    join_counters,
    split_counters,
    usage_to_json,
)
from budgetguard.core.extension import Extended, Extension, ExtensionRefused, NoHold
from budgetguard.core.handoff import Handoff
from budgetguard.core.operation import ENDED_KEPT_MS, LEASE_MS, RANK, End
from budgetguard.core.pricing import DEFAULT_TIER
from budgetguard.core.snapshot import CallerRecords, KeySnapshot, TenantSnapshot

RESERVE = Script("reserve")
RENEW = Script("renew")
EXTEND = Script("extend")
SETTLE = Script("settle")
EXPIRE = Script("expire")
PUBLISH = Script("publish")
LOAD_RECORDS = Script("load_records")

# Of each end, those that it replaces, as settle.lua reads them.
_REPLACES = {
    end: "".join(f" {other.value} " for other, lower in RANK.items() if lower < rank) for end, rank in RANK.items()
}


class Counters:
    """The counters of all shards of one Redis. Every method may raise ``CountersUnavailableError``.

    ``now_ms`` is the caller's clock when it calls (Unix milliseconds).
    """

    def __init__(self, redis: RedisClient, *, backlog_max: int = BACKLOG_MAX) -> None:
        self._redis = redis
        self._scripts = ScriptRunner(redis)
        self._backlog_max = backlog_max

    async def reserve(self, request: Reserve) -> Reserved | ReserveRefused:
        """Admit one call or say why not, all or nothing.

        After an exception it is unknown whether the money is held: release the operation, with a handoff of the same
        facts. That also refuses the reserve if it is still on its way.
        """
        facts, tenant_id = request.facts, request.facts.tenant_id
        shard = keys.shard_of(tenant_id)
        limits = request.limits()
        names = [limit.counter for limit in limits]
        arguments: list[Argument] = [
            request.now_ms,
            facts_to_json(facts),
            request.asked,
            request.tenant.version,
            request.key.version,
            self._backlog_max,
            *(limit for _, limit in request.request_limits()),
            request.input_nanos,
            request.hold_nanos,
            request.hold_nanos_min,
            request.token_nanos,
            request.output_tokens,
            request.output_tokens_min,
            request.tenant.unbounded_share if request.eighth else 0,
            keys.lease_member(tenant_id, facts.operation_id),
            request.now_ms + LEASE_MS,
            join_counters(names),
            TOO_LATE_MS,
            request.input_tokens,
            request.choices,
            len(limits),
            "\n".join(f"{limit.limit} {limit.whose}" for limit in limits),
        ]
        template_keys: list[str] = []
        templates: list[Argument] = []
        for number, limit in enumerate(limits, 1):
            name = read_name(limit.counter)
            arguments += limit_arguments(limit, name, request.now_ms)
            if limit.subjects_max is not None:
                template_keys.append(keys.subjects(tenant_id, template_of(name)))
                templates += (number, limit.subject, limit.subjects_max, idle_before_ms(name, request.now_ms))
        reply = await self._scripts.run(
            RESERVE,
            [
                keys.epoch(shard),
                keys.tenant(tenant_id),
                keys.api_key(tenant_id, facts.key_id),
                keys.operation(tenant_id, facts.operation_id),
                keys.leases(shard),
                keys.usage(shard),
                keys.tenant_requests(tenant_id),
                keys.key_requests(tenant_id, facts.key_id),
                *keys.counters(tenant_id, names),
                *template_keys,
            ],
            arguments + templates,
        )
        return reserve_answer(request, limits, reply)

    async def renew(self, *, tenant_id: str, operation_id: str, now_ms: int) -> bool:
        """Lengthen a hold's lease to ``LEASE_MS`` from now; ``False`` when the operation is not held."""
        renewed = await self._scripts.run(
            RENEW,
            [keys.operation(tenant_id, operation_id), keys.leases(keys.shard_of(tenant_id))],
            [keys.lease_member(tenant_id, operation_id), now_ms + LEASE_MS],
        )
        return bool(renewed)

    async def extend(self, extension: Extension) -> Extended | ExtensionRefused | NoHold | NotReady:
        """Raise a hold in all of its counters, or say why not; asked again, nothing changes.

        After an exception it is unknown whether it was raised: ask again.
        """
        names = extension.counters
        reply = await self._extend(extension, names)
        if reply[0] == "COUNTERS":
            # What was counted at admission counts; it cannot change, so the second answer is final.
            names = split_counters(reply[1])
            reply = await self._extend(extension, names)
        return extend_answer(names, reply)

    async def _extend(self, extension: Extension, names: Sequence[str]) -> Reply:
        tenant_id = extension.tenant_id
        return await self._scripts.run(
            EXTEND,
            [
                keys.epoch(keys.shard_of(tenant_id)),
                keys.operation(tenant_id, extension.operation_id),
                *keys.counters(tenant_id, names),
            ],
            [
                extension.hold_nanos,
                join_counters(names),
                int(extension.force),
                extension.hold_tokens,
                *all_counter_arguments(names, 0),
            ],
        )

    async def settle(self, settlement: Settlement, *, now_ms: int) -> Settled | NotReady:
        """End an operation by rank; the same settlement sent again gets the same answer and changes nothing.

        A replay keeps ``settlement.ended_at_ms`` and tells the true ``now_ms``.
        """
        names = settlement.handoff.counters
        reply = await self._settle(settlement, names, now_ms=now_ms)
        if reply[0] == "COUNTERS":
            # What was counted at admission counts; it cannot change, so the second answer is final.
            reply = await self._settle(settlement, split_counters(reply[1]), now_ms=now_ms)
        if reply[0] == "NOT_READY":
            return NotReady()
        _, end, amount_nanos, sequence = reply
        return Settled(end=End(end), amount_nanos=int(amount_nanos), sequence=int(sequence))

    async def _settle(self, settlement: Settlement, names: Sequence[str], *, now_ms: int) -> Reply:
        handoff, facts = settlement.handoff, settlement.handoff.facts
        tenant_id, operation_id = facts.tenant_id, facts.operation_id
        shard = keys.shard_of(tenant_id)
        return await self._scripts.run(
            SETTLE,
            [
                keys.epoch(shard),
                keys.operation(tenant_id, operation_id),
                keys.leases(shard),
                keys.usage(shard),
                *keys.counters(tenant_id, names),
            ],
            [
                now_ms,
                settlement.end.value,
                settlement.amount_nanos,
                handoff.hold_nanos,
                join_counters(names),
                facts_to_json(facts),
                usage_to_json(settlement.usage),
                settlement.ended_at_ms,
                settlement.status,
                # An upstream's text may be anything; what UTF-8 cannot carry is replaced.
                settlement.detail[:DETAIL_CHARS_MAX].encode(errors="replace"),
                settlement.rate_tier,
                facts.held_at_ms,
                keys.lease_member(tenant_id, operation_id),
                ENDED_KEPT_MS,
                FORGOTTEN_CHARGED_MS,
                _REPLACES[settlement.end],
                settlement.replaces,
                "" if settlement.tokens is None else settlement.tokens,
                handoff.tokens_bound,
                *all_counter_arguments(names, now_ms),
            ],
        )

    async def release(
        self, handoff: Handoff, *, now_ms: int, ended_at_ms: int, status: int, detail: str
    ) -> Settled | NotReady:
        """End an operation at no cost: it was never forwarded, or the upstream's own answer costs nothing.

        Of an operation that is not known it leaves a marker, so that its reserve, when still on its way, is refused.
        """
        released = Settlement(
            handoff=handoff,
            end=End.RELEASED,
            amount_nanos=0,
            usage=None,
            ended_at_ms=ended_at_ms,
            status=status,
            detail=detail,
        )
        return await self.settle(released, now_ms=now_ms)

    async def due_shards(self, *, now_ms: int) -> list[int]:
        """List the shards that have leases to expire, in one trip."""
        shards = range(keys.SHARDS)
        dues = await self._redis.pipeline([("ZCOUNT", keys.leases(shard), "-inf", now_ms) for shard in shards])
        return [shard for shard, due in zip(shards, dues, strict=True) if due]

    async def expire_due(self, shard: int, *, now_ms: int, limit: int) -> int:
        """End up to ``limit`` holds whose lease has run out, oldest first; answers how many were ended."""
        members: list[str] = await self._redis.command(
            "ZRANGEBYSCORE", keys.leases(shard), "-inf", now_ms, "LIMIT", 0, limit
        )
        operations = [keys.split_lease_member(member) for member in members]
        holds = await self._read_operations(operations)
        expired = 0
        for member, (tenant_id, operation_id), hold in zip(members, operations, holds, strict=True):
            # Which counters it is in never changes while it is held; that it still is, the script looks.
            names = split_counters(hold.get("counters", ""))
            expired += await self._scripts.run(
                EXPIRE,
                [
                    keys.epoch(shard),
                    keys.operation(tenant_id, operation_id),
                    keys.leases(shard),
                    keys.usage(shard),
                    *keys.counters(tenant_id, names),
                ],
                [
                    now_ms,
                    member,
                    ENDED_KEPT_MS,
                    join_counters(names),
                    DEFAULT_TIER,
                    LEASE_EXPIRED,
                    *all_counter_arguments(names, now_ms),
                ],
            )
        return expired

    async def publish_tenant(self, snapshot: TenantSnapshot) -> bool:
        """Store a tenant's snapshot if it is newer than the one there; says whether it was."""
        return await self._publish(keys.tenant(snapshot.tenant_id), snapshot.version, snapshot.to_json())

    async def publish_key(self, snapshot: KeySnapshot) -> bool:
        """Store an API key's snapshot if it is newer than the one there; says whether it was."""
        key = keys.api_key(snapshot.tenant_id, snapshot.key_id)
        return await self._publish(key, snapshot.version, snapshot.to_json())

    async def publish_catalog(self, record: bytes, *, version: int) -> bool:
        """Store the catalog (UTF-8 text) if it is newer than the one there; says whether it was."""
        return await self._publish(keys.catalog(), version, record)

    async def _publish(self, key: str, version: int, record: bytes) -> bool:
        return bool(await self._scripts.run(PUBLISH, [key], [version, record]))

    async def load_records(self, tenant_id: str, key_id: str) -> CallerRecords | NotReady:
        """Load an API key's snapshot and its tenant's, both as of one moment at which all that is true was there."""
        reply: list[str | None] = await self._scripts.run(
            LOAD_RECORDS,
            [keys.epoch(keys.shard_of(tenant_id)), keys.tenant(tenant_id), keys.api_key(tenant_id, key_id)],
            [],
        )
        if reply[0] == "NOT_READY":
            return NotReady()
        _, tenant, key = reply
        return CallerRecords(
            tenant=None if tenant is None else TenantSnapshot.from_json(tenant),
            key=None if key is None else KeySnapshot.from_json(key),
        )

    async def load_tenant(self, tenant_id: str) -> TenantSnapshot | None:
        """Load a tenant's snapshot; ``None`` when Redis has none."""
        record = await self._redis.command("HGET", keys.tenant(tenant_id), "record")
        return None if record is None else TenantSnapshot.from_json(record)

    async def load_key(self, tenant_id: str, key_id: str) -> KeySnapshot | None:
        """Load an API key's snapshot; ``None`` when Redis has none."""
        record = await self._redis.command("HGET", keys.api_key(tenant_id, key_id), "record")
        return None if record is None else KeySnapshot.from_json(record)

    async def load_catalog(self) -> bytes | None:
        """Load the catalog; ``None`` when Redis has none."""
        record: str | None = await self._redis.command("HGET", keys.catalog(), "record")
        return None if record is None else record.encode()

    async def read_counters(self, tenant_id: str, names: Sequence[str]) -> list[tuple[int, int]]:
        """Read (spent, held) of each counter as of its name's bucket; one that is not there has 0 of both."""
        rows = await self._redis.pipeline([("HGETALL", key) for key in keys.counters(tenant_id, names)])
        standing = [as_of(counter_of(fields_of(row)), read_name(name)) for row, name in zip(rows, names, strict=True)]
        return [(counter.spent, counter.held + counter.seed) for counter in standing]

    async def _read_operations(self, operations: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        texts = await self._redis.pipeline([("GET", keys.operation(*names)) for names in operations])
        return [operation_of(text) if text else {} for text in texts]
