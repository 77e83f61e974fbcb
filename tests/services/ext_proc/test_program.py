"""The program itself: its settings, its drain, and what a kill leaves behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from envoy.service.ext_proc.v3.external_processor_pb2 import HttpBody, ProcessingRequest, ProcessingResponse
from prometheus_client.parser import text_string_to_metric_families

from budgetguard.adapters.redis.client import RedisClient
from budgetguard.cli.local.parts import free_port
from budgetguard.core.operation import End
from ext_proc.service import PROCESS
from ext_proc.settings import Settings
from tests.plugins.redis_server import sign_off_all
from tests.services.ext_proc.support import (
    FIXTURE_NANOS,
    FIXTURES,
    HOLD_NANOS,
    admit_in_redis,
    counter_in_redis,
    events_in_redis,
    eventually,
    request_headers,
    response_headers,
)

JSON = (FIXTURES / "chat.json").read_bytes()


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="bg-proc-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
async def redis(own_redis_server):
    await own_redis_server.wait_until_ready()
    client = RedisClient(own_redis_server.url)
    await sign_off_all(client)
    yield client
    await client.close()


@contextmanager
def running(folder, redis_url, *, stderr=None, **more):
    variables = {
        "EXT_PROC_ADDRESS": f"unix:{folder}/proc.sock",
        "REDIS_URL": redis_url,
        "SPOOL_DIR": str(folder / "spool"),
        **more,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "ext_proc"], env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=stderr
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def play(channel, handoff, *, whole=True):
    """Send one call's messages; the stream stays open."""
    process = channel.stream_stream(
        PROCESS,
        request_serializer=ProcessingRequest.SerializeToString,
        response_deserializer=ProcessingResponse.FromString,
    )
    stream = process(wait_for_ready=True)
    messages = [request_headers(handoff), response_headers(content_type="application/json")]
    body = ProcessingRequest(response_body=HttpBody(body=JSON, end_of_stream=True))
    for message in messages + [body] * whole:
        await stream.write(message)
        assert (await stream.read()).WhichOneof("response") == message.WhichOneof("request")
    return stream


def spooled(folder):
    return list((folder / "spool").glob("settlements-*"))


@pytest.mark.parametrize("trouble", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hanging"])
async def test_a_kill_while_redis_is_away_loses_no_settlement(folder, own_redis_server, redis, trouble):
    handoff = await admit_in_redis(redis)
    with running(folder, own_redis_server.url) as process:
        async with grpc.aio.insecure_channel(f"unix:{folder}/proc.sock") as channel:
            await play(channel, await admit_in_redis(redis, "op-warm"))
            await own_redis_server.wait_until_written()
            own_redis_server.send(trouble)
            # The answer passes all the same.
            await play(channel, handoff)
            await eventually(lambda: spooled(folder))
        process.kill()
        process.wait()
    if trouble is signal.SIGKILL:
        own_redis_server.stop()
        own_redis_server.start()
        await own_redis_server.wait_until_ready()
        await sign_off_all(redis)
        assert await counter_in_redis(redis, handoff) == (FIXTURE_NANOS, HOLD_NANOS)
    else:
        # What was sent before it hung may have been done; it counts once all the same.
        own_redis_server.send(signal.SIGCONT)
    with running(folder, own_redis_server.url):
        await eventually(lambda: not spooled(folder))
        ends = [(event.facts.operation_id, event.end, event.amount_nanos) for event in await events_in_redis(redis)]
        assert ends == [(name, End.CONFIRMED, FIXTURE_NANOS) for name in ("op-warm", "op-1")]
        assert await counter_in_redis(redis, handoff) == (2 * FIXTURE_NANOS, 0)


async def scraped(address):
    """Read what Prometheus would: samples without labels by their name."""
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"http://{address}/metrics")
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


async def test_prometheus_sees_what_waits_in_the_spool(folder, own_redis_server, redis):
    handoff = await admit_in_redis(redis)
    address = f"127.0.0.1:{free_port()}"
    with running(folder, own_redis_server.url, EXT_PROC_METRICS_ADDRESS=address):
        async with grpc.aio.insecure_channel(f"unix:{folder}/proc.sock") as channel:
            await play(channel, await admit_in_redis(redis, "op-warm"))
            before = await scraped(address)
            own_redis_server.send(signal.SIGSTOP)
            await play(channel, handoff)
            await eventually(lambda: spooled(folder))
            during = await scraped(address)
            own_redis_server.send(signal.SIGCONT)
            await eventually(lambda: not spooled(folder))
            async with asyncio.timeout(10):
                while (after := await scraped(address))["budgetguard_settlements_delivered_total"] < 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
    names = ("budgetguard_spool_settlements", "budgetguard_settlements_spooled_total", "budgetguard_redis_answers")
    assert [before[name] for name in names] == [0, 0, 1]
    assert [during[name] for name in names] == [1, 1, 0]
    assert during["budgetguard_spool_oldest_age_seconds"] > 0
    assert [after[name] for name in names] == [0, 1, 1]
    assert after["process_resident_memory_bytes"] > 0


async def test_an_address_for_metrics_that_is_taken_is_an_alarm_and_calls_are_metered(folder, own_redis_server, redis):
    handoff = await admit_in_redis(redis)
    with socket.create_server(("127.0.0.1", 0)) as taken, (folder / "log").open("wb") as log:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with running(folder, own_redis_server.url, EXT_PROC_METRICS_ADDRESS=address, stderr=log):
            async with grpc.aio.insecure_channel(f"unix:{folder}/proc.sock") as channel:
                await play(channel, handoff)
                assert await counter_in_redis(redis, handoff) == (FIXTURE_NANOS, 0)
    assert f"alarm=metrics_not_served address={address}" in (folder / "log").read_text()


@pytest.mark.parametrize("loss", ["killed", "flushed"])
async def test_a_redis_that_lost_its_end_gets_the_settlement_again(folder, own_redis_server, redis, loss):
    handoff = await admit_in_redis(redis)
    with running(folder, own_redis_server.url):
        async with grpc.aio.insecure_channel(f"unix:{folder}/proc.sock") as channel:
            await play(channel, handoff)
        assert len(await events_in_redis(redis)) == 1
        # The watch has seen the data that will be lost.
        await asyncio.sleep(1.5)
        if loss == "flushed":
            await redis.command("FLUSHALL")
        else:
            own_redis_server.kill()
            for path in own_redis_server.folder.rglob("*appendonly*"):
                path.unlink()
            own_redis_server.start()
            await own_redis_server.wait_until_ready()
        assert await events_in_redis(redis) == []
        # The control plane has looked at the ledger, found nothing to rebuild, and signs off.
        await sign_off_all(redis)
        for _ in range(400):
            if await events_in_redis(redis):
                break
            await asyncio.sleep(0.05)
    (event,) = await events_in_redis(redis)
    assert (event.end, event.amount_nanos, event.forgotten) == (End.CONFIRMED, FIXTURE_NANOS, True)
    assert await counter_in_redis(redis, handoff) == (FIXTURE_NANOS, 0)


async def test_sigterm_drains_and_settles_what_is_left(folder, own_redis_server, redis):
    handoff = await admit_in_redis(redis)
    with running(folder, own_redis_server.url) as process:
        async with grpc.aio.insecure_channel(f"unix:{folder}/proc.sock") as channel:
            stream = await play(channel, handoff, whole=False)
            process.send_signal(signal.SIGTERM)
            # The call that was open ends as if nothing had happened.
            await stream.write(ProcessingRequest(response_body=HttpBody(body=JSON, end_of_stream=True)))
            assert (await stream.read()).HasField("response_body")
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
        await eventually(lambda: process.poll() is not None)
    assert process.returncode == 0
    assert await counter_in_redis(redis, handoff) == (FIXTURE_NANOS, 0)
    assert not spooled(folder)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"EXT_PROC_ADDRESS": "nowhere"}, "EXT_PROC_ADDRESS: expected"),
        ({"REDIS_URL": "http://localhost"}, "REDIS_URL: expected"),
        ({"EXT_PROC_METRICS_ADDRESS": "unix:/tmp/metrics.sock"}, "EXT_PROC_METRICS_ADDRESS: expected host:port"),
        ({"SPOOL_DIR": "/dev/null/spool"}, "cannot be used"),
    ],
)
def test_a_wrong_setting_is_one_sentence(variables, sentence, tmp_path):
    environment = os.environ | {"SPOOL_DIR": str(tmp_path), "EXT_PROC_ADDRESS": f"unix:{tmp_path}/s"} | variables
    done = subprocess.run([sys.executable, "-m", "ext_proc"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_settings_have_defaults():
    settings = Settings.from_environment({})
    assert settings.address == "127.0.0.1:9102"
    assert settings.redis_url == "redis://127.0.0.1:6379/0"
    assert settings.metrics_address is None
