import asyncio
import signal
import time

import pytest

from budgetguard.adapters.redis.client import CountersUnavailableError, RedisClient, RedisReplyError
from budgetguard.adapters.redis.scripts import Script, ScriptRunner, info_field
from budgetguard.cli.local.parts import free_port

GET_RUN_ID = Script("renew")
GET_RUN_ID.name, GET_RUN_ID.body = "get_run_id", "redis.call('INCR', KEYS[1]) return RUN_ID"


@pytest.fixture
async def own_redis(own_redis_server):
    await own_redis_server.wait_until_ready()
    client = RedisClient(own_redis_server.url, timeout_seconds=1)
    yield client
    await client.close()


async def test_replies_are_plain(redis):
    assert await redis.command("SET", "x", "ü") == "OK"
    assert await redis.pipeline([("GET", "x"), ("STRLEN", "x"), ("HMGET", "y", "a", "b")]) == ["ü", 2, [None, None]]
    assert await redis.pipeline([]) == []


async def test_an_error_reply_is_raised_and_the_connection_stays_in_step(redis):
    await redis.command("SET", "x", "1")
    with pytest.raises(RedisReplyError, match="WRONGTYPE") as raised:
        await redis.pipeline([("GET", "x"), ("HGET", "x", "y"), ("SET", "z", "2")])
    assert raised.value.says("WRONGTYPE")
    assert await redis.command("GET", "z") == "2"


async def connections_received(redis):
    return int(info_field(await redis.command("INFO", "stats"), "total_connections_received"))


async def connected_clients(redis):
    return int(info_field(await redis.command("INFO", "clients"), "connected_clients"))


async def pin_and_increment(client):
    async with client.pinned() as connection:
        return (await connection.pipeline([("INCR", "n"), ("PING",)]))[0]


async def test_all_callers_share_one_connection(redis_server, redis):
    client = RedisClient(redis_server.url)
    before = await connections_received(redis)
    answers = await asyncio.gather(*(client.command("INCR", "n") for _ in range(100)))
    assert sorted(answers) == list(range(1, 101))
    assert await connections_received(redis) == before + 1
    await client.close()


async def test_more_callers_than_connections_to_pin_wait_their_turn(redis_server, redis):
    small = RedisClient(redis_server.url, connections_max=3)
    before = await connections_received(redis)
    answers = await asyncio.gather(*(pin_and_increment(small) for _ in range(100)))
    assert sorted(answers) == list(range(1, 101))
    assert await connections_received(redis) == before + 3
    await small.close()


async def test_who_waits_for_a_connection_to_pin_waits_no_longer_than_the_timeout(redis_server, redis):
    small = RedisClient(redis_server.url, connections_max=1, timeout_seconds=0.3)
    first, second = (asyncio.create_task(block(small)) for _ in range(2))
    for call in (first, second):
        with pytest.raises(CountersUnavailableError, match=r"within 0.3 s"):
            await call
    assert await pin_and_increment(small) == 1
    await small.close()


async def block(client):
    async with client.pinned() as connection:
        return await connection.command("BLPOP", "nothing-comes", 0)


async def test_what_blocks_a_pinned_connection_stops_nobody_else(redis):
    blocking = asyncio.create_task(block(redis))
    async with asyncio.timeout(5):
        while info_field(await redis.command("INFO", "clients"), "blocked_clients") == "0":  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.01)
    assert await pin_and_increment(redis) == 1
    await redis.command("RPUSH", "nothing-comes", "something")
    assert await blocking == ["nothing-comes", "something"]


async def pinned_id(client):
    async with client.pinned() as connection:
        return await connection.command("CLIENT", "ID")


async def test_a_pinned_connection_is_lent_again_only_when_no_reply_is_due(redis):
    first = await pinned_id(redis)
    async with redis.pinned() as connection:
        assert await connection.pipeline([]) == []
        with pytest.raises(RedisReplyError, match="wrong number"):
            await connection.pipeline([("PING",), ("GET",), ("PING",)])
    assert await pinned_id(redis) == first
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await block(redis)
    second = await pinned_id(redis)
    assert second != first
    # What the caller raises itself has nothing to do with the connection.
    with pytest.raises(KeyError):
        async with redis.pinned() as connection:
            raise KeyError
    assert await pinned_id(redis) == second


@pytest.mark.parametrize("url", ["unix:///tmp/bg-nobody-is-here.sock", "redis://127.0.0.1:1/0"])
async def test_nobody_there_is_one_kind_of_error(url):
    with pytest.raises(CountersUnavailableError):
        await RedisClient(url).command("PING")


async def test_it_speaks_tcp(own_redis_server):
    port = free_port()
    await own_redis_server.wait_until_ready()
    local = RedisClient(own_redis_server.url)
    await local.command("CONFIG", "SET", "port", port)
    remote = RedisClient(f"redis://127.0.0.1:{port}/0")
    assert await remote.command("PING") == "PONG"
    await remote.close()
    await local.close()


async def test_a_redis_that_hangs_is_given_up_and_a_late_reply_answers_nobody_else(own_redis_server, own_redis):
    await own_redis.command("SET", "x", "before")
    own_redis_server.send(signal.SIGSTOP)
    with pytest.raises(CountersUnavailableError, match="within"):
        await own_redis.command("GETSET", "x", "late")
    own_redis_server.send(signal.SIGCONT)
    # It ran, and its reply ("before") was thrown away with its connection.
    assert await own_redis.pipeline([("GET", "x"), ("PING",)]) == ["late", "PONG"]


async def test_a_cancelled_call_leaves_no_reply_behind(own_redis_server, own_redis):
    own_redis_server.send(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await own_redis.command("SET", "x", "late")
    own_redis_server.send(signal.SIGCONT)
    assert await own_redis.command("PING") == "PONG"


async def test_everyone_waiting_for_a_redis_that_hangs_fails_with_the_first(own_redis_server, own_redis):
    await own_redis.command("PING")
    own_redis_server.send(signal.SIGSTOP)
    calls = []
    for number in range(30):
        calls.append(asyncio.create_task(own_redis.command("RPUSH", "late", number)))
        await asyncio.sleep(0.02)
    calls[0].cancel()  # keeps its place: its reply is overdue all the same
    calls[20].cancel()
    started = time.monotonic()
    failures = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - started < 0.7
    for call in (20, 0):
        assert isinstance(failures.pop(call), asyncio.CancelledError)
    assert {type(failure) for failure in failures} == {CountersUnavailableError}
    own_redis_server.send(signal.SIGCONT)
    answers = await asyncio.gather(*(own_redis.command("ECHO", number) for number in range(30)))
    assert answers == [str(number) for number in range(30)]
    # Each was sent once, and all of them ran.
    assert await own_redis.command("LRANGE", "late", 0, -1) == answers


async def test_everyone_waiting_for_a_redis_that_is_killed_fails_at_once(own_redis_server):
    client = RedisClient(own_redis_server.url, timeout_seconds=30)
    await own_redis_server.wait_until_ready()
    await client.command("PING")
    own_redis_server.send(signal.SIGSTOP)
    pinned = asyncio.create_task(pin_and_increment(client))
    calls = [asyncio.create_task(client.command("ECHO", number)) for number in range(50)]
    await asyncio.sleep(0.05)
    own_redis_server.kill()
    async with asyncio.timeout(5):
        failures = await asyncio.gather(pinned, *calls, return_exceptions=True)
    assert {type(failure) for failure in failures} == {CountersUnavailableError}
    own_redis_server.start()
    await own_redis_server.wait_until_ready()
    assert await pin_and_increment(client) == 1
    assert await client.command("GET", "n") == "1"
    await client.close()


async def test_after_a_restart_no_call_meets_a_dead_connection(own_redis_server, own_redis):
    await asyncio.gather(*(own_redis.command("PING") for _ in range(10)))
    own_redis_server.kill()
    with pytest.raises(CountersUnavailableError):
        await own_redis.command("PING")
    own_redis_server.start()
    await own_redis_server.wait_until_ready()
    assert await asyncio.gather(*(own_redis.command("PING") for _ in range(10))) == ["PONG"] * 10


async def test_a_script_runs_once_a_call_and_always_under_its_process_own_name(own_redis_server, own_redis):
    runner = ScriptRunner(own_redis)

    async def run_id():
        return info_field(await own_redis.command("INFO", "server"), "run_id")

    first = await run_id()
    assert [await runner.run(GET_RUN_ID, ["n"], []) for _ in range(3)] == [first] * 3
    await own_redis.command("SCRIPT", "FLUSH")
    assert await runner.run(GET_RUN_ID, ["n"], []) == first
    own_redis_server.kill()
    own_redis_server.start()
    await own_redis_server.wait_until_ready()
    second = await run_id()
    assert second != first
    assert await asyncio.gather(*(runner.run(GET_RUN_ID, ["n"], []) for _ in range(5))) == [second] * 5
    assert await own_redis.command("GET", "n") == "9"


async def test_a_script_that_fails_says_so(redis):
    broken = Script("renew")
    broken.name, broken.body = "broken", "return redis.call('NOSUCH')"
    runner = ScriptRunner(redis)
    for _ in range(2):
        with pytest.raises(RedisReplyError, match="Unknown Redis command"):
            await runner.run(broken, [], [])


def test_a_field_that_info_lacks_is_empty():
    assert info_field("# Server\r\nredis_version:6.2\r\n", "run_id") == ""


async def test_a_closed_client_keeps_no_connection(redis_server, redis):
    client = RedisClient(redis_server.url)
    before = await connected_clients(redis)
    await asyncio.gather(client.command("PING"), *(pin_and_increment(client) for _ in range(5)))
    async with client.pinned() as connection:
        await client.close()
        await until_connected_clients(redis, before + 1)
        assert await connection.command("PING") == "PONG"
    await until_connected_clients(redis, before)
    await client.close()
    for call in (client.command("PING"), client.pipeline([("PING",)]), pin_and_increment(client)):
        with pytest.raises(CountersUnavailableError, match="closed"):
            await call


async def until_connected_clients(redis, count):
    async with asyncio.timeout(5):
        while await connected_clients(redis) != count:  # noqa: ASYNC110 - Redis forgets one when it gets to it
            await asyncio.sleep(0.01)
