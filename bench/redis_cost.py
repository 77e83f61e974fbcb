"""What the decision costs inside Redis: microseconds a script and bytes a tenant, a hold, an ended call.

    python -m bench.redis_cost [--tenants 1 1000 100000]

A redis-server of its own, driven by the same code as in production. Times are Redis' own (INFO commandstats); with many
tenants loaded the calls go to random ones of them. Many calls are sent at once, so that Redis is busy, as it is when
its time matters; one that sleeps between two calls takes up to twice as long for each, its memory having gone cold. For
comparison each line tells what, in the same minute, the bare commands of a reserve cost: to read and to raise its
counters and to write its hold, in a script that decides nothing.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from random import Random
from typing import Any

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import Argument, CountersUnavailableError, RedisClient, Reply
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.scripts import info_field
from budgetguard.core.budget import Reserve, Reserved
from budgetguard.core.handoff import Handoff
from budgetguard.core.snapshot import KeySnapshot, TenantSnapshot, WindowKind
from tests.plugins.redis_calls import a_budget, a_key, a_settlement, a_tenant, the_facts, the_handoff
from tests.plugins.redis_server import running_redis_server, sign_off_all

TENANTS = (1, 1_000, 100_000)
BUDGETS = (1, 5, 10)
# Calls of one measurement, and how many of them are on their way at a time.
CALLS = 4_000
AT_A_TIME = 500
PIPELINE = 1_000
KEY_ID = "k" * 16
# Calendar windows in turn, so that a counter is one that ends, as most do.
WINDOWS = (WindowKind.MONTH, WindowKind.DAY, WindowKind.WEEK, WindowKind.YEAR, WindowKind.LIFETIME)
_NUMBERS = count(1)
BARE = """
for number = 3, #KEYS do redis.call('HMGET', KEYS[number], 'spent', 'held', 'seed') end
for number = 3, #KEYS do redis.call('HINCRBY', KEYS[number], 'held', '1') end
redis.call('SET', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], '1', ARGV[2])
"""
HOLD_BYTES = 1_000


def tenant_with(number: int, budgets: int) -> TenantSnapshot:
    """Make a tenant with ids as long as real ones and limits that nothing meets."""
    specs = (a_budget(f"{index:016}", 10**15, window=WINDOWS[index % len(WINDOWS)]) for index in range(budgets))
    return a_tenant(*specs, tenant_id=f"tenant-{number:08}", requests_per_minute=1_000_000)


def key_of(tenant: TenantSnapshot) -> KeySnapshot:
    return replace(a_key(tenant.tenant_id, KEY_ID), secret_sha256="0" * 64)


def pages(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Together(RedisClient):
    """Sends what all callers ask for in one turn of the loop in one piece."""

    def __init__(self, url: str) -> None:
        super().__init__(url, timeout_seconds=60)
        self._waiting: list[tuple[tuple[Argument, ...], asyncio.Future[Reply]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def command(self, *arguments: Argument) -> Reply:
        replied: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((arguments, replied))
        if len(self._waiting) == 1:
            self._sending = asyncio.create_task(self._send())
        return await replied

    async def _send(self) -> None:
        calls, self._waiting = self._waiting, []
        try:
            replies = await self.pipeline([arguments for arguments, _ in calls])
        except CountersUnavailableError as error:
            for _, replied in calls:
                replied.set_exception(error)
            return
        for (_, replied), reply in zip(calls, replies, strict=True):
            replied.set_result(reply)


class Bench:
    """One Redis."""

    def __init__(self, url: str) -> None:
        self.redis = RedisClient(url, timeout_seconds=60)
        self.together = Together(url)
        self.counters = Counters(self.together)
        self.random = Random(1)

    async def load(self, tenants: range, budgets: int) -> None:
        """Publish tenants with a key each."""
        for page in pages(tenants, PIPELINE):
            commands = []
            for number in page:
                tenant = tenant_with(number, budgets)
                key = key_of(tenant)
                for name, record in (
                    (keys.tenant(tenant.tenant_id), tenant),
                    (keys.api_key(tenant.tenant_id, key.key_id), key),
                ):
                    commands.append(("HSET", name, "version", record.version, "record", record.to_json()))
            await self.redis.pipeline(commands)

    async def reserve(self, number: int, budgets: int) -> tuple[Reserve, Reserved]:
        tenant = tenant_with(number, budgets)
        now_ms = time.time_ns() // 1_000_000
        operation_id = f"00000000-0000-4000-8000-{next(_NUMBERS):012}"
        request = Reserve(
            facts=the_facts(operation_id, tenant_id=tenant.tenant_id, key_id=KEY_ID, held_at_ms=now_ms),
            tenant=tenant,
            key=key_of(tenant),
            now_ms=now_ms,
            input_nanos=1_000,
            output_femtos=600_000_000,
            output_tokens=100,
            output_tokens_min=100,
        )
        answer = await self.counters.reserve(request)
        if not isinstance(answer, Reserved):
            raise RuntimeError(f"refused: {answer}")
        return request, answer

    async def settle(self, handoff: Handoff) -> None:
        await self.counters.settle(a_settlement(handoff, 500), now_ms=time.time_ns() // 1_000_000)

    async def reserve_many(self, numbers: list[int], budgets: int) -> list[Handoff]:
        found: list[Handoff] = []
        for page in pages(numbers, AT_A_TIME):
            told = await asyncio.gather(*(self.reserve(number, budgets) for number in page))
            found += [the_handoff(request, answer) for request, answer in told]
        return found

    async def settle_many(self, handoffs: list[Handoff]) -> None:
        for page in pages(handoffs, AT_A_TIME):
            await asyncio.gather(*(self.settle(handoff) for handoff in page))

    async def used_bytes(self) -> int:
        await self.redis.command("MEMORY", "PURGE")
        memory = await self.redis.command("INFO", "memory")
        used, clients, log = (
            int(info_field(memory, name)) for name in ("used_memory", "mem_clients_normal", "mem_aof_buffer")
        )
        return used - clients - log

    async def script_us(self) -> float:
        """Read the mean time of the scripts since the last reset."""
        stats = info_field(await self.redis.command("INFO", "commandstats"), "cmdstat_evalsha")
        fields = dict(field.split("=") for field in stats.split(","))
        return float(fields["usec_per_call"])

    async def bare_us(self, budgets: int) -> float:
        """Return the microseconds of a script that decides nothing, over counters of its own."""
        digest = await self.redis.command("SCRIPT", "LOAD", BARE)
        names = [f"bare:{number}" for number in range(2 + budgets)]
        calls = [
            ("EVALSHA", digest, len(names), *names, "x" * HOLD_BYTES, f"operation-{number}") for number in range(CALLS)
        ]
        await self.redis.command("CONFIG", "RESETSTAT")
        for page in pages(calls, AT_A_TIME):
            await self.redis.pipeline(page)
        bare_us = await self.script_us()
        await self.redis.command("DEL", *names)
        return bare_us

    async def time_scripts(self, tenants: int, budgets: int) -> tuple[float, float, float]:
        """Return the microseconds of a reserve, of a settle and of the bare commands."""
        # A window's first call makes its counter; the others find it. Few enough tenants that each is called again.
        numbers = [self.random.randrange(tenants) for _ in range(CALLS // 8)]
        # The first of all loads the scripts.
        await self.settle_many(await self.reserve_many(numbers[:1], budgets))
        await self.settle_many(await self.reserve_many(numbers, budgets))
        await self.redis.command("CONFIG", "RESETSTAT")
        handoffs = await self.reserve_many(numbers * 8, budgets)
        reserve_us = await self.script_us()
        await self.redis.command("CONFIG", "RESETSTAT")
        await self.settle_many(handoffs)
        return reserve_us, await self.script_us(), await self.bare_us(budgets)


async def measure(url: str, sizes: list[int]) -> None:
    bench = Bench(url)
    print(f"{'tenants':>9}{'budgets':>9}{'reserve us':>12}{'settle us':>11}{'bare commands us':>18}")
    loaded = 0
    for size in sizes:
        await bench.load(range(loaded, size), 1)
        loaded = size
        for budgets in BUDGETS:
            reserve_us, settle_us, bare_us = await bench.time_scripts(size, budgets)
            print(f"{size:>9}{budgets:>9}{reserve_us:>12.1f}{settle_us:>11.1f}{bare_us:>18.1f}", flush=True)
    print(f"\n{'budgets':>9}{'a tenant':>10}{'its counters':>14}{'a live hold':>13}{'an ended call':>15}   bytes")
    for budgets in BUDGETS:
        await bench.redis.command("FLUSHALL")
        await sign_off_all(bench.redis)
        empty = await bench.used_bytes()
        await bench.load(range(CALLS), budgets)
        with_tenants = await bench.used_bytes()
        every = list(range(CALLS))
        # The first call of each makes the counters and the minute of requests; what it leaves is taken away again.
        await bench.settle_many(await bench.reserve_many(every, budgets))
        await forget_operations(bench)
        with_counters = await bench.used_bytes()
        handoffs = await bench.reserve_many(every, budgets)
        with_holds = await bench.used_bytes()
        await bench.settle_many(handoffs)
        with_ended = await bench.used_bytes()
        figures = (with_tenants - empty, with_counters - with_tenants, with_holds - with_counters)
        tenant, counters, hold = (figure / CALLS for figure in figures)
        ended = (with_ended - with_counters) / CALLS
        print(f"{budgets:>9}{tenant:>10.0f}{counters:>14.0f}{hold:>13.0f}{ended:>15.0f}", flush=True)
    await bench.redis.close()
    await bench.together.close()


async def forget_operations(bench: Bench) -> None:
    """Take away markers and events, as time and the drain do."""
    cursor = "0"
    while True:
        cursor, page = await bench.redis.command("SCAN", cursor, "MATCH", "bg:*:operation:*", "COUNT", PIPELINE)
        if page:
            await bench.redis.command("DEL", *page)
        if cursor == "0":
            break
    await bench.redis.pipeline([("DEL", keys.usage(shard)) for shard in range(keys.SHARDS)])


async def run(url: str, sizes: list[int]) -> None:
    client = RedisClient(url)
    await sign_off_all(client)
    await client.close()
    await measure(url, sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, nargs="+", default=TENANTS, help="how many are loaded, in turn")
    arguments = parser.parse_args()
    with running_redis_server() as server:
        asyncio.run(server.wait_until_ready())
        asyncio.run(run(server.url, sorted(arguments.tenants)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
