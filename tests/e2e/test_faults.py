"""Each part killed under load: then nothing is held, spent is the ledger, no limit is passed, and calls go on."""

import asyncio
import json
import signal
import time
from collections import Counter
from decimal import Decimal

import httpx
import pytest
import redis

from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.epoch import Epoch
from budgetguard.adapters.redis.keys import SHARDS
from tests.e2e.admin import TenantUnderTest, monthly

PATH = "/v1/chat/completions"
LIMIT = Decimal("0.05")
# A hold that nobody renews runs out after 90 s, and its event is drained soon after.
LEASE_SECONDS = 110.0
CLIENTS = 16
RECOVERY_SECONDS = 40.0


def ask(**asked):
    return [{"role": "user", "content": "fake:" + json.dumps(asked)}]


async def load(tenant: TenantUnderTest, *, seconds: float, fault) -> Counter:
    """Call from 16 clients for a while, with ``fault`` run in the middle; count statuses, 0 for a broken connection."""
    statuses: Counter = Counter()
    until = time.monotonic() + seconds
    bodies = [
        {"model": "gpt-4o-mini", "max_tokens": 50, "messages": ask(completion_tokens=5, delay_ms=20)},
        {
            "model": "gpt-4o-mini",
            "max_tokens": 50,
            "messages": ask(completion_tokens=5, chunk_delay_ms=10),
            "stream": True,
        },
    ]

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=tenant.base_url, timeout=15) as http:
            while time.monotonic() < until:
                try:
                    answer = await http.post(PATH, json=bodies[number % 2], headers=tenant.headers)
                    statuses[answer.status_code] += 1
                except httpx.HTTPError:
                    statuses[0] += 1
                    await asyncio.sleep(0.05)
                if statuses and answer_is_error(statuses):
                    await asyncio.sleep(0.01)

    async def strike() -> None:
        await asyncio.sleep(seconds / 3)
        await asyncio.to_thread(fault)

    await asyncio.gather(strike(), *(client(number) for number in range(CLIENTS)))
    return statuses


def answer_is_error(statuses: Counter) -> bool:
    return statuses[503] > 0


def calls_go_on(tenant: TenantUnderTest) -> None:
    body = {"model": "gpt-4o-mini", "max_tokens": 5, "messages": ask(completion_tokens=1)}
    deadline = time.monotonic() + RECOVERY_SECONDS
    while True:
        try:
            answer = httpx.post(f"{tenant.base_url}{PATH}", json=body, headers=tenant.headers, timeout=10)
            if answer.status_code == 200:
                return
            said = answer.text
        except httpx.HTTPError as error:
            said = repr(error)
        assert time.monotonic() < deadline, f"calls do not go on: {said}"
        time.sleep(0.2)


def admin_is_back(tenant: TenantUnderTest) -> None:
    deadline = time.monotonic() + RECOVERY_SECONDS
    while True:
        try:
            if tenant.http.get(f"/admin/tenant/{tenant.tenant_id}/budgets").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, "the control plane is not back"
        time.sleep(0.2)


def the_books_balance(tenant: TenantUnderTest) -> list[dict]:
    admin_is_back(tenant)
    spent = tenant.settled(seconds=LEASE_SECONDS)
    deadline = time.monotonic() + 30
    while (booked := tenant.ledger_sum(at_least=1)) != spent:
        assert time.monotonic() < deadline, f"spent ${spent}, ledger ${booked}"
        time.sleep(0.2)
    assert spent <= LIMIT
    rows = tenant.rows(at_least=1)
    assert len({(row["operationId"], row.get("sequence")) for row in rows}) == len(rows)
    return rows


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", ["ext_proc", "ext_authz", "control_plane", "redis", "postgres", "envoy"])
def test_a_part_killed_under_load(stack, new_tenant, part):
    tenant = new_tenant(monthly(str(LIMIT)))
    statuses = asyncio.run(load(tenant, seconds=4, fault=lambda: stack.kill(part)))
    assert statuses[200] > 5  # how many more is the machine's affair
    calls_go_on(tenant)
    rows = the_books_balance(tenant)
    answered = statuses[200]
    metered = {row["operationId"] for row in rows if row["end"] != "RELEASED"}
    assert len(metered) >= answered
    if part == "ext_proc":
        # Those under way, and those admitted before ext_authz saw it go: two for each client at the very most.
        assert sum(row["end"] == "EXPIRED" for row in rows) <= 2 * CLIENTS
    if part in ("control_plane", "postgres"):
        assert set(statuses) == {200}  # the data plane never waits on them


@pytest.mark.timeout(300)
def test_redis_stopped_for_five_seconds_and_back(stack, new_tenant):
    tenant = new_tenant(monthly(str(LIMIT)))

    def pause() -> None:
        stack.send("redis", signal.SIGSTOP)
        time.sleep(5)
        stack.send("redis", signal.SIGCONT)

    statuses = asyncio.run(load(tenant, seconds=10, fault=pause))
    assert statuses[503] > 0
    assert set(statuses) <= {200, 503}
    calls_go_on(tenant)
    the_books_balance(tenant)


def test_a_redis_that_has_lost_its_data_makes_no_key_unknown(stack, new_tenant):
    """Also none that ext_authz has never seen, as long as nobody can say what the true records are."""
    known, new = new_tenant(monthly(str(LIMIT))), new_tenant(monthly(str(LIMIT)))
    calls_go_on(known)
    # The control plane would have told it all again within the second.
    stack.send("control_plane", signal.SIGSTOP)
    url = stack.stack.supervisor.part("ext_authz").environment["REDIS_URL"]
    try:
        with redis.Redis.from_url(url) as client:
            client.flushall()
        body = {"model": "gpt-4o-mini", "max_tokens": 5, "messages": ask(completion_tokens=1)}
        for tenant in (known, new):
            answer = httpx.post(f"{tenant.base_url}{PATH}", json=body, headers=tenant.headers, timeout=10)
            told = answer.json()["error"]
            assert (answer.status_code, told["code"]) == (503, "COUNTERS_NOT_READY"), answer.text
            assert answer.headers["retry-after"] == "1"
    finally:
        stack.send("control_plane", signal.SIGCONT)
    calls_go_on(new)
    stranger = {"X-API-Key": new.key[:-1] + ("A" if new.key[-1] != "A" else "B")}
    answer = httpx.post(f"{new.base_url}{PATH}", json=body, headers=stranger, timeout=10)
    assert answer.status_code == 401
    # Others use this stack too, and each shard opens by itself.
    asyncio.run(every_shard_is_open(url))


async def every_shard_is_open(url: str) -> None:
    client = RedisClient(url)
    epoch = Epoch(client)
    deadline = time.monotonic() + RECOVERY_SECONDS
    while set((await epoch.signed_off(range(SHARDS))).values()) != {await epoch.run_id()}:
        assert time.monotonic() < deadline, "some shards stay closed"
        await asyncio.sleep(0.1)
    await client.close()
