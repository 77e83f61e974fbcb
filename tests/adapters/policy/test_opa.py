"""What only the sidecar has: an address, HTTP, and a server that misbehaves."""

import asyncio
import json

import pytest

from budgetguard.adapters.policy import open_policy
from budgetguard.adapters.policy.opa import OpaPolicy
from budgetguard.core.policy import PolicyFault, PolicyLoadError, PolicyUnavailableError
from tests.adapters.policy.engines import CONTRACT, call


class Server:
    """Answers each request of a connection with the next of ``answers``; ``None`` closes instead."""

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                self.requests.append((head, json.loads(await reader.readexactly(int(length.split(b":")[1])))))
                answer = self.answers.pop(0)
                if answer is None:
                    break
                writer.write(answer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


def answer(body, status="200 OK"):
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


ALLOW = answer('{"result": {"allow": true, "reason": ""}}')


async def decide(server, **settings):
    policy = OpaPolicy(server.url, **{"deadline_seconds": 5.0, **settings})
    try:
        return await policy.decide(call("m"))
    finally:
        await policy.close()


async def test_asks_the_data_api_for_the_decision():
    async with Server(ALLOW) as server:
        assert (await decide(server)).allow
    ((head, body),) = server.requests
    assert head.startswith(b"POST /v1/data/budgetguard/decision HTTP/1.1\r\n")
    assert body == {"input": call("m").to_input()}


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (answer('{"code": "internal_error"}', "500 Internal Server Error"), PolicyFault.FAILED),
        (answer("", "404 Not Found"), PolicyFault.FAILED),
        (answer("", "302 Found\r\nLocation: http://127.0.0.1:1/"), PolicyFault.FAILED),
        (answer("<html>"), PolicyFault.WRONG_TYPED),
        (answer("[]"), PolicyFault.WRONG_TYPED),
        (answer('{"result": "yes"}'), PolicyFault.WRONG_TYPED),
        (answer('{"result": {"allow": true, "reason": "' + "x" * 70_000 + '"}}'), PolicyFault.WRONG_TYPED),
        (answer("{}"), PolicyFault.UNDEFINED),
        (b"what?\r\n\r\n", PolicyFault.DOWN),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", PolicyFault.SLOW),
    ],
)
async def test_what_is_no_decision_is_a_fault(given, fault):
    async with Server(given) as server:
        with pytest.raises(PolicyUnavailableError) as caught:
            await decide(server, deadline_seconds=0.5)
    assert caught.value.fault is fault


async def test_a_kept_connection_that_died_is_replaced_once():
    async with Server(ALLOW, None, ALLOW) as server:
        policy = OpaPolicy(server.url, deadline_seconds=5.0)
        try:
            assert (await policy.decide(call("first"))).allow
            assert (await policy.decide(call("second"))).allow
        finally:
            await policy.close()
    assert [body["input"]["model"] for _, body in server.requests] == ["first", "second", "second"]


async def test_a_server_that_only_closes_is_down():
    async with Server(None, None, None) as server:
        with pytest.raises(PolicyUnavailableError) as caught:
            await decide(server)
    assert caught.value.fault is PolicyFault.DOWN
    assert len(server.requests) == 2


async def test_nobody_there_is_down(tmp_path):
    policy = await open_policy(opa_url=f"unix:{tmp_path}/no.sock", policy_dir=CONTRACT)
    try:
        for asking in (policy.decide(call("m")), policy.health()):
            with pytest.raises(PolicyUnavailableError) as caught:
                await asking
            assert caught.value.fault is PolicyFault.DOWN
    finally:
        await policy.close()


@pytest.mark.parametrize("url", ["", "opa:8181", "ftp://opa", "unix:relative.sock", "http://", "http://opa:port"])
async def test_a_wrong_address_is_told(url):
    with pytest.raises(PolicyLoadError, match="OPA_URL: expected http://host:port"):
        await open_policy(opa_url=url, policy_dir=CONTRACT)


async def test_both_spellings_of_a_socket_are_taken():
    for url in ("unix:/run/opa.sock", "unix:///run/opa.sock"):
        await OpaPolicy(url).close()
