"""CPU cost of ext_proc's exchange alone: no gRPC, no Redis. `python -m bench.exchange`."""

import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path

import uvloop
from envoy.service.ext_proc.v3.external_processor_pb2 import HttpBody, ProcessingRequest

from budgetguard.core.budget import Settlement
from ext_proc.exchange import Exchange
from ext_proc.leases import Leases
from tests.services.ext_proc.support import FIXTURES, ModelCounters, request_headers, response_headers

ROUNDS = 2000


class Settled:
    """A settler that is done at once, as a task like the real one's."""

    def submit(self, settlement: Settlement) -> asyncio.Task[None]:
        return asyncio.create_task(self._settle(settlement))

    async def _settle(self, settlement: Settlement) -> None:
        pass


async def per_call_us(raw_messages: list[bytes]) -> float:
    counters = ModelCounters()
    leases = Leases(counters, now_ms=lambda: 0)
    settler = Settled()
    started = time.process_time()
    for _ in range(ROUNDS):
        exchange = Exchange(settler=settler, leases=leases, counters=counters, now_ms=lambda: 0)
        for raw in raw_messages:
            await exchange.answer(ProcessingRequest.FromString(raw))
        exchange.close()
    return (time.process_time() - started) / ROUNDS * 1e6


async def measure() -> None:
    handoff = ModelCounters().admit()
    length = str(len((FIXTURES / "chat.json").read_bytes()))
    other = {"date": "now", "openai-processing-ms": "300", "x-request-id": "r", "server": "cloudflare", "cf-ray": "1"}
    head = response_headers(content_type="application/json", content_length=length, **other)
    body = ProcessingRequest(response_body=HttpBody(body=(FIXTURES / "chat.json").read_bytes(), end_of_stream=True))
    json_call = [request_headers(handoff), head, body]
    emit("JSON call, us", await per_call_us([message.SerializeToString() for message in json_call]))

    for label, inject in (("passed on", False), ("filtered", True)):
        call = replace(handoff, facts=replace(handoff.facts, stream=True), inject_usage=inject)
        asked = ProcessingRequest(request_body=HttpBody(body=b'{"model":"m","stream":true,"messages":[]}'))
        opening = [request_headers(call), *[asked] * inject, response_headers(content_type="text/event-stream")]
        _, second, *_ = (FIXTURES / "chat_stream_with_usage.sse").read_bytes().split(b"\n\n")
        chunks = [ProcessingRequest(response_body=HttpBody(body=second + b"\n\n"))] * 100
        short = await per_call_us([message.SerializeToString() for message in opening])
        long = await per_call_us([message.SerializeToString() for message in opening + chunks[:50]])
        emit(f"stream's chunk, {label}, us", (long - short) / 50)


def emit(label: str, value: float) -> None:
    sys.stdout.write(f"{label:32} {value:8.1f}\n")


if __name__ == "__main__":
    assert Path("tests").is_dir(), "run it in the checkout"
    uvloop.run(measure())
