"""What the connection does when Redis, the network or the callers behave badly; the server is a fake that obeys."""

import asyncio
import gc
import random
import signal
import socket
import ssl
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from budgetguard.adapters.redis.address import Address
from budgetguard.adapters.redis.client import CountersUnavailableError, NotRunError, RedisClient, RedisReplyError
from budgetguard.adapters.redis.connection import REPLIES_OUTSTANDING_MAX

TLS = Path(__file__).parents[2] / "fixtures" / "tls"


class FakeRedis:
    """Keeps what it hears, says what it is told to; ``handle`` is the whole of a connection's life."""

    def __init__(self, folder):
        self.path = folder / "fake.sock"
        self.heard = []
        self.connections = 0

    @asynccontextmanager
    async def serving(self, handle, **client_options):
        async def serve(reader, writer):
            self.connections += 1
            try:
                await handle(reader, writer)
            except ConnectionError:
                pass  # given up by the client, as it should
            finally:
                writer.close()

        server = await asyncio.start_unix_server(serve, self.path)
        client = RedisClient(f"unix://{self.path}", **{"timeout_seconds": 0.2, **client_options})
        try:
            yield client
        finally:
            await client.close()
            server.close()
            await server.wait_closed()
            await asyncio.sleep(0)

    async def hear(self, reader):
        """One command, as a list of texts."""
        count = int((await reader.readline())[1:])
        words = []
        for _ in range(count):
            length = int((await reader.readline())[1:])
            words.append((await reader.readexactly(length + 2))[:-2].decode())
        self.heard.append(words)
        return words


@pytest.fixture
def fake(tmp_path_factory):
    # A Unix socket's path is short.
    return FakeRedis(tmp_path_factory.mktemp("r"))


def once(*says, then_wait=True):
    """Hear a command, say this; to every further one nothing."""

    async def handle(fake, reader, writer):
        await fake.hear(reader)
        for piece in says:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        while then_wait and await reader.read(1000):
            pass

    return handle


async def ask(fake, handle, *arguments, **options):
    async with fake.serving(lambda reader, writer: handle(fake, reader, writer), **options) as client:
        return await client.command(*(arguments or ("PING",)))


REPLIES = b"*4\r\n$2\r\n\xc3\xbc\r\n$-1\r\n:-7\r\n*2\r\n-WRONGTYPE no\r\n$0\r\n\r\n"


async def test_a_reply_in_any_pieces_is_the_same(fake):
    whole = await ask(fake, once(REPLIES))
    assert whole[:3] == ["ü", None, -7]
    nested, empty = whole[3]
    assert isinstance(nested, RedisReplyError)
    assert nested.says("WRONGTYPE")
    assert empty == ""
    in_bytes = await ask(fake, once(*(REPLIES[at : at + 1] for at in range(len(REPLIES)))))
    assert in_bytes[:3] == whole[:3]
    assert in_bytes[3][1] == ""


@pytest.mark.parametrize(
    ("says", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not what Redis speaks"),
        (b"$5\r\nhello", "Redis closed the connection"),
        (b"*3\r\n+a\r\n+b\r\n", "Redis closed the connection"),
        (b"", "Redis closed the connection"),
    ],
)
async def test_what_is_no_reply_to_the_command_says_that_it_may_have_run(fake, says, error):
    with pytest.raises(CountersUnavailableError, match=error) as raised:
        await ask(fake, once(says, then_wait=False))
    assert type(raised.value) is CountersUnavailableError
    assert fake.heard == [["PING"]]  # never sent twice


@pytest.mark.parametrize(
    ("says", "error"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "LOADING"),
        (b"-ERR max number of clients reached\r\n", "max number of clients reached"),
    ],
)
async def test_a_redis_that_serves_nobody_says_that_the_command_did_not_run(fake, says, error):
    with pytest.raises(NotRunError, match=error):
        await ask(fake, once(says, then_wait=False))
    assert fake.heard == [["PING"]]


async def test_half_a_reply_is_no_answer(fake):
    with pytest.raises(CountersUnavailableError, match=r"no answer from Redis within 0.2 s"):
        await ask(fake, once(b"$5\r\nhel"))


async def test_what_came_whole_before_garbage_is_its_callers(fake):
    async def handle(reader, writer):
        for _ in range(3):
            await fake.hear(reader)
        writer.write(b"+first\r\n-ERR second\r\n?\r\n+third\r\n")
        await reader.read()

    async with fake.serving(handle) as client:
        first, second, third = await asyncio.gather(*map(client.command, "abc"), return_exceptions=True)
    assert first == "first"
    assert isinstance(second, RedisReplyError)
    assert type(third) is CountersUnavailableError


async def test_bytes_that_are_not_utf_8_are_spelled_and_hide_nothing_beside_them(redis):
    await redis.pipeline([("SET", "x", b'{"a":"\xff"}'), ("RPUSH", "y", "a", b"\xff", "\u00fc")])
    assert await redis.command("GET", "x") == '{"a":"\\xff"}', "which is no JSON"
    assert await redis.command("LRANGE", "y", 0, -1) == ["a", "\\xff", "\u00fc"]


async def test_a_reply_that_nobody_asked_for_ends_the_connection_and_answers_nobody(fake):
    async def handle(reader, writer):
        words = await fake.hear(reader)
        writer.write(b"+to %s\r\n+unasked\r\n" % words[0].encode())
        await reader.read()

    async with fake.serving(handle) as client:
        assert await client.command("a") == "to a"
        assert await client.command("b") == "to b"
        assert fake.connections == 2


async def test_a_late_reply_answers_nobody(fake):
    async def handle(reader, writer):
        while True:
            words = await fake.hear(reader)
            if words == ["slow"]:
                await asyncio.sleep(0.3)
            writer.write(b"+to %s\r\n" % words[0].encode())

    async with fake.serving(handle) as client:
        assert await client.command("a") == "to a"
        slow, behind = await asyncio.gather(client.command("slow"), client.command("b"), return_exceptions=True)
        assert "within 0.2 s" in str(slow)
        # Behind a reply that is overdue nobody waits for longer.
        assert type(behind) is CountersUnavailableError
        assert await client.command("c") == "to c"
        await asyncio.sleep(0.2)
        assert await client.command("d") == "to d"
        assert fake.connections == 2
        assert fake.heard.count(["slow"]) == 1


async def test_a_reply_that_came_while_this_process_was_busy_is_in_time(fake):
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(fake.path))
        listening.listen()
        listening.setblocking(False)
        client = RedisClient(f"unix://{fake.path}", timeout_seconds=0.1)
        call = asyncio.create_task(client.command("PING"))
        redis, _ = await loop.sock_accept(listening)
        await loop.sock_recv(redis, 100)
        await loop.sock_sendall(redis, b"+PONG\r\n")
        await call
        call = asyncio.create_task(client.command("PING"))
        await loop.sock_recv(redis, 100)
        one, other = socket.socketpair()

        class Busy(asyncio.Protocol):
            def data_received(self, data):
                redis.send(b"+in time\r\n")
                time.sleep(0.3)

        busy, _ = await loop.create_connection(Busy, sock=one)
        other.send(b"x")
        assert await call == "in time"
        await client.close()
        busy.close()
        other.close()
        redis.close()


async def test_the_timeout_begins_when_the_command_is_sent(fake):
    async def handle(reader, writer):
        while True:
            pause, _ = await fake.hear(reader)
            await asyncio.sleep(float(pause))
            writer.write(b"+OK\r\n")

    async with fake.serving(handle, timeout_seconds=0.4) as client:
        # Whatever the timer was set for: a call in good time, the next ones, one after a silence and a busy moment.
        for pause in ("0.25", "0.25", "0.25"):
            assert await client.command(pause, "") == "OK"
        await asyncio.sleep(0.5)
        time.sleep(0.5)  # noqa: ASYNC251 - a busy process is the case
        assert await client.command("0.25", "") == "OK"
        await asyncio.sleep(0.5)
        async with asyncio.timeout(2):
            with pytest.raises(CountersUnavailableError, match=r"within 0.4 s"):
                await client.command("5", "")
        assert await client.command("0", "") == "OK"


async def test_an_idle_connection_is_never_overdue(redis_server):
    await redis_server.wait_until_ready()
    client = RedisClient(redis_server.url, timeout_seconds=0.2)
    for _ in range(2):
        first = await client.command("CLIENT", "ID")
        await asyncio.sleep(0.45)
        assert await client.command("CLIENT", "ID") == first
    await client.close()


async def test_in_a_storm_of_cancellations_each_survivor_gets_its_own_answer(redis_server, redis):
    chance = random.Random(7)

    async def echo(number):
        if number % 3 == 0:
            return await redis.command("ECHO", f"payload {number}")
        if number % 3 == 1:
            return (await redis.pipeline([("ECHO", "x"), ("GET",), ("ECHO", f"payload {number}")]))[-1]
        async with redis.pinned() as connection:
            return (await connection.pipeline([("PING",), ("ECHO", f"payload {number}")]))[-1]

    for _ in range(20):
        calls = [asyncio.create_task(echo(number)) for number in range(200)]
        for call in chance.sample(calls, 100):
            call.get_loop().call_later(chance.random() * 0.02, call.cancel)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for number, answer in enumerate(answers):
            if isinstance(answer, RedisReplyError):
                assert number % 3 == 1
                assert "wrong number" in str(answer)
            else:
                assert isinstance(answer, asyncio.CancelledError) or answer == f"payload {number}"
        assert any(isinstance(answer, str) for answer in answers)
    assert await redis.command("ECHO", "in step") == "in step"


async def test_one_error_among_many_is_its_callers_alone(redis):
    await redis.command("SET", "x", "text")
    calls = [redis.command("INCR" if number % 10 == 5 else "ECHO", "x") for number in range(100)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [number for number, answer in enumerate(answers) if isinstance(answer, RedisReplyError)] == [
        *range(5, 100, 10)
    ]
    assert {answer for answer in answers if isinstance(answer, str)} == {"x"}


async def test_on_a_broken_connection_nothing_is_asked_any_more(fake):
    async with fake.serving(lambda reader, _: fake.hear(reader)) as client, client.pinned() as connection:
        for _ in range(3):
            with pytest.raises(CountersUnavailableError, match="Redis closed the connection"):
                await connection.command("PING")
    assert fake.heard == [["PING"]]


async def test_what_a_redis_that_hangs_never_read_does_not_keep_the_connection(own_redis_server):
    await own_redis_server.wait_until_ready()
    client = RedisClient(own_redis_server.url, timeout_seconds=0.2)
    await client.command("PING")
    own_redis_server.send(signal.SIGSTOP)
    with pytest.raises(CountersUnavailableError):
        await client.command("SET", "x", "x" * 20_000_000)
    async with asyncio.timeout(1):
        await client.close()


async def test_an_attempt_that_hangs_is_given_up_for_the_next():
    connections = []

    async def say_nothing(reader, writer):
        connections.append(writer)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    # It waits for the other side of TLS.
    client = RedisClient(f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_seconds=0.1)
    for _ in range(3):  # one may join the attempt in its last moment
        with pytest.raises(CountersUnavailableError, match="within"):
            await client.command("PING")
    assert len(connections) >= 2
    await client.close()
    server.close()
    await server.wait_closed()
    await asyncio.sleep(0.01)


async def test_all_share_one_attempt_to_connect_and_its_failure(fake):
    async def handle(reader, writer):
        if fake.connections > 1:
            while True:
                await fake.hear(reader)
                writer.write(b"+OK\r\n")

    async with fake.serving(handle) as client:
        failures = await asyncio.gather(*(client.command("a") for _ in range(20)), return_exceptions=True)
        assert {type(failure) for failure in failures} == {CountersUnavailableError}
        assert fake.connections == 1
        assert await asyncio.gather(*(client.command("b") for _ in range(20))) == ["OK"] * 20
        assert fake.connections == 2


async def test_who_gives_up_while_connecting_does_not_stop_the_others(fake):
    greeted = asyncio.Event()

    async def handle(reader, writer):
        assert await fake.hear(reader) == ["SELECT", "3"]
        await greeted.wait()
        writer.write(b"+OK\r\n")
        while True:
            await fake.hear(reader)
            writer.write(b"+PONG\r\n")

    async with fake.serving(handle) as _:
        client = RedisClient(f"unix://{fake.path}?db=3", timeout_seconds=1)
        first, second = (asyncio.create_task(client.command("PING")) for _ in range(2))
        await asyncio.sleep(0.02)
        first.cancel()
        await asyncio.sleep(0)
        greeted.set()
        assert await second == "PONG"
        assert first.cancelled()
        await client.close()
    assert fake.heard == [["SELECT", "3"], ["PING"]]


async def test_an_attempt_that_everyone_has_given_up_fails_unheard(fake):
    heard = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))

    async def handle(reader, writer):
        await fake.hear(reader)
        await asyncio.sleep(0.05)

    async with fake.serving(handle):
        client = RedisClient(f"unix://{fake.path}?db=3", timeout_seconds=1)
        call = asyncio.create_task(client.command("PING"))
        await asyncio.sleep(0.02)
        call.cancel()
        await asyncio.sleep(0.1)
        del call
        with pytest.raises(CountersUnavailableError):
            await client.command("PING")
        await client.close()
        del client
        gc.collect()
        await asyncio.sleep(0)
    assert heard == []


@pytest.mark.parametrize("url", ["unix://{path}", "unix://{path}?db=3", "unix://user:word@{path}"])
async def test_connecting_and_asking_end_within_the_timeout_together(fake, url):
    async def handle(reader, writer):
        await asyncio.sleep(0.15)
        writer.write(b"+OK\r\n" * ("?" in url or "@" in url))
        await reader.read()

    async with fake.serving(handle):
        client = RedisClient(url.format(path=fake.path), timeout_seconds=0.2)
        started = time.monotonic()
        with pytest.raises(CountersUnavailableError, match="within"):
            await client.command("PING")
        with pytest.raises(CountersUnavailableError, match="within"):
            async with client.pinned() as connection:
                await connection.command("PING")
        assert time.monotonic() - started < 0.6
        await client.close()


async def test_a_client_that_is_closed_fails_who_is_connecting_and_who_waits(fake):
    async def handle(reader, writer):
        await reader.read()

    async with fake.serving(handle, timeout_seconds=5) as client:
        waiting = asyncio.create_task(client.command("PING"))
        connecting_client = RedisClient(f"unix://{fake.path}?db=1", timeout_seconds=5)
        connecting = asyncio.create_task(connecting_client.command("PING"))
        await asyncio.sleep(0.05)
        await client.close()
        await connecting_client.close()
        for call in (waiting, connecting):
            with pytest.raises(CountersUnavailableError, match="closed"):
                await call
        for call in (client.command("PING"), client.pipeline([("PING",)]), client.pinned().__aenter__()):
            with pytest.raises(CountersUnavailableError, match="closed"):
                await call


async def test_more_than_redis_can_answer_in_time_is_refused_unsent(fake):
    async def handle(reader, writer):
        await fake.hear(reader)
        writer.write(b"+OK\r\n")
        for _ in range(REPLIES_OUTSTANDING_MAX):
            await fake.hear(reader)
        await asyncio.sleep(0.05)
        writer.write(b"+OK\r\n" * REPLIES_OUTSTANDING_MAX)
        while True:
            await fake.hear(reader)
            writer.write(b"+after\r\n")

    async with fake.serving(handle, timeout_seconds=5) as client:
        await client.command("PING")
        taken = [asyncio.create_task(client.command("PING")) for _ in range(REPLIES_OUTSTANDING_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(NotRunError, match=f"owes {REPLIES_OUTSTANDING_MAX} replies"):
            await client.command("ONE-MORE")
        assert set(await asyncio.gather(*taken)) == {"OK"}
        assert await client.command("PING") == "after"
    assert ["ONE-MORE"] not in fake.heard


async def test_a_pipeline_may_be_longer_than_the_bound(redis):
    many = 3 * REPLIES_OUTSTANDING_MAX
    assert await redis.pipeline([("ECHO", number) for number in range(many)]) == [str(number) for number in range(many)]


async def test_large_writes_and_replies_pass_whole(redis):
    text = "x" * 5_000_000
    answers = await asyncio.gather(*(redis.command("ECHO", f"{number}{text}") for number in range(6)))
    assert [answer[0] for answer in answers] == ["0", "1", "2", "3", "4", "5"]
    assert {len(answer) for answer in answers} == {5_000_001}


async def test_giving_up_while_connecting_leaves_no_connection_behind(redis_server, redis):
    for pause in range(30):
        client = RedisClient(f"{redis_server.url}?db=2")
        calls = [asyncio.create_task(client.command("PING")), asyncio.create_task(pin(client))]
        for _ in range(pause % 10):
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await client.close()
    async with asyncio.timeout(2):
        while "db=2" in await redis.command("CLIENT", "LIST"):  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.01)


async def pin(client):
    async with client.pinned() as connection:
        return await connection.command("PING")


async def test_the_greeting_names_user_name_and_database(fake):
    async def handle(reader, writer):
        for _ in range(4):
            await fake.hear(reader)
            writer.write(b"+OK\r\n")
        await reader.read()

    async with fake.serving(handle):
        client = RedisClient(f"unix://me:p%40ss@{fake.path}?db=3&client_name=guard")
        assert await client.command("GET", "x") == "OK"
        await client.close()
    assert fake.heard == [["AUTH", "me", "p@ss"], ["CLIENT", "SETNAME", "guard"], ["SELECT", "3"], ["GET", "x"]]


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("unix://:wrong@{path}", "WRONGPASS"),
        ("unix://nobody:right@{path}", "WRONGPASS"),
        ("unix://:right@{path}?db=99", "DB index is out of range"),
        ("unix://{path}?db=1", "NOAUTH"),
        ("unix://{path}", "NOAUTH"),
    ],
)
async def test_a_redis_that_turns_us_away_says_why(own_redis_server, url, error):
    await own_redis_server.wait_until_ready()
    owner = RedisClient(own_redis_server.url)
    await owner.command("CONFIG", "SET", "requirepass", "right")
    client = RedisClient(url.format(path=own_redis_server.socket))
    for _ in range(2):
        with pytest.raises(CountersUnavailableError, match=error) as raised:
            await client.command("PING")
        assert not isinstance(raised.value, RedisReplyError)
    allowed = RedisClient(f"unix://:right@{own_redis_server.socket}?db=1")
    assert await allowed.command("SET", "x", "1") == "OK"
    assert "right" not in repr(allowed._address)
    for each in (owner, client, allowed):
        await each.close()


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("http://localhost", "scheme"),
        ("unix://", "path"),
        ("unix://redis.sock", "path"),
        ("redis://h?db=x", "db"),
        ("redis://h?nonsense=1", "nonsense"),
        ("rediss://h?ssl_cert_reqs=sometimes", "sometimes"),
        ("redis://h:99999", "Port"),
    ],
)
def test_a_wrong_url_is_said_at_once(url, error):
    with pytest.raises(ValueError, match=error):
        RedisClient(url)


def test_what_a_url_leaves_out_is_as_usual():
    address = Address.from_url("rediss://")
    assert (address.host, address.port, address.greeting) == ("localhost", 6379, ())
    assert address.tls.get().verify_mode is ssl.CERT_REQUIRED
    assert Address.from_url("redis://me@h").greeting == (("AUTH", "me", ""),)


@pytest.fixture
def certificate():
    """A certificate and its key for localhost, signed by itself, good until 2126 and for nothing but this."""
    return TLS / "cert.pem", TLS / "key.pem"


async def test_it_speaks_tls_to_whom_it_trusts(certificate, redis_server):
    await redis_server.wait_until_ready()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)

    async def relay(reader, writer):
        from_redis, to_redis = await asyncio.open_unix_connection(redis_server.socket)
        one_way = asyncio.create_task(copy(from_redis, writer))
        await copy(reader, to_redis)
        to_redis.close()
        await one_way
        writer.close()

    listening = socket.create_server(("localhost", 0))
    server = await asyncio.start_server(relay, sock=listening, ssl=context)
    url = f"rediss://localhost:{listening.getsockname()[1]}/0"
    trusting = RedisClient(f"{url}?ssl_ca_certs={certificate[0]}")
    answers = await asyncio.gather(*(trusting.command("ECHO", number) for number in range(50)))
    assert answers == [str(number) for number in range(50)]
    await trusting.close()
    strict = RedisClient(url)
    with pytest.raises(CountersUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        await strict.command("PING")
    await strict.close()
    server.close()
    await server.wait_closed()
    await asyncio.sleep(0.05)


async def copy(reader, writer):
    try:
        while piece := await reader.read(65_536):
            writer.write(piece)
    except (ConnectionError, ssl.SSLError):
        pass
