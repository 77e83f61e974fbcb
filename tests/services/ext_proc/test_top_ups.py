"""Streams that name no output bound: they top up as they go on, and end when nothing is left to top up from."""

import asyncio
import json
from dataclasses import replace

import pytest
from envoy.service.ext_proc.v3.external_processor_pb2 import HttpBody, ProcessingRequest

from budgetguard.core import slices as slices_module
from budgetguard.core.operation import End
from budgetguard.core.slices import StreamSlices
from ext_proc import top_ups as top_ups_module
from tests.services.ext_proc.support import FIXTURE_NANOS, FIXTURES, HOLD_NANOS, INPUT_BOUND, OUTPUT_BOUND, eventually

INPUT_NANOS = INPUT_BOUND * 150
# A hold of 50 tokens at first, 50 more at a time, up to 400.
SLICES = StreamSlices(
    slice_tokens=OUTPUT_BOUND, choices=1, output_femtos=600_000_000, output_tokens_largest=400, overrun=False
)
SLICE_NANOS = OUTPUT_BOUND * 600
WHOLE_NANOS = INPUT_NANOS + 400 * 600
DONE = b"data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(top_ups_module, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(top_ups_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(slices_module, "TOP_UP_TOKENS_MIN", 10)


def chunk(text):
    return b'data: {"choices":[{"index":0,"delta":{"content":"' + text.encode() + b'"}}]}\n\n'


def usage(output_tokens):
    reported = json.dumps({"prompt_tokens": 19, "completion_tokens": output_tokens})
    return b'data: {"choices":[],"usage":' + reported.encode() + b"}\n\n"


async def begin(stream, counters, *, overrun=False, limit_nanos=10**12, **changes):
    counters.limit_nanos = limit_nanos
    handoff = counters.admit(stream=True, slices=replace(SLICES, overrun=overrun), **changes)
    await stream.request_headers(handoff)
    await stream.response_headers(content_type="text/event-stream")
    assert stream.taken_over
    return handoff


async def settled(settler):
    while settler._deliveries:
        await asyncio.wait(settler._deliveries)


async def write(stream, *, tokens, size=5):
    """Let the provider write as many bytes of text, in pieces; return what of it reached the client."""
    before = len(stream.to_client)
    for _ in range(tokens // size):
        await stream.response_body(chunk("~" * size))
    return stream.to_client[before:].count(b"~")


async def test_a_long_stream_tops_up_ahead_of_what_it_writes_and_is_charged_its_usage(stream, counters):
    await begin(stream, counters)
    held = set()
    for number in range(60):
        await stream.response_body(chunk("hello"))
        counted = (number + 1) * 5
        held.add(counters.counter.held)
        # Half a slice at least is held of what the provider may be writing meanwhile.
        assert counters.counter.held >= INPUT_NANOS + (counted + OUTPUT_BOUND // 2) * 600
    assert held == {HOLD_NANOS + number * SLICE_NANOS for number in range(7)}
    assert counters.extends == 6
    await stream.response_body(usage(80))
    assert (counters.counter.spent, counters.counter.held) == (19 * 150 + 80 * 600, 0)
    await stream.response_body(DONE, end=True)
    stream.exchange.close()
    assert stream.to_client == chunk("hello") * 60 + usage(80) + DONE
    assert stream.ended
    assert counters.ends == [(End.CONFIRMED, 19 * 150 + 80 * 600)]


@pytest.mark.parametrize("size", [1, 7, 100_000])
async def test_what_passes_is_what_would_have_been(stream, counters, size):
    text = (FIXTURES / "chat_stream_with_usage.sse").read_bytes()
    await begin(stream, counters, inject_usage=False)
    for start in range(0, len(text), size):
        await stream.response_body(text[start : start + size])
    await stream.response_body(b"", end=True)
    assert stream.to_client == text
    assert stream.ended


async def test_a_usage_that_was_not_asked_for_is_kept_back(stream, counters):
    handoff = counters.admit(stream=True, slices=SLICES, inject_usage=True)
    await stream.request_headers(handoff)
    await stream.request_body(b'{"model":"gpt-4o-mini","stream":true,"messages":[]}')
    answer = await stream.response_headers(content_type="text/event-stream", content_length="7")
    assert list(answer.response_headers.response.header_mutation.remove_headers) == ["content-length"]
    await stream.response_body((FIXTURES / "chat_stream_with_usage.sse").read_bytes(), end=True)
    assert stream.to_client == (FIXTURES / "chat_stream.sse").read_bytes()


async def test_more_than_the_model_can_write_is_never_held(stream, counters):
    await begin(stream, counters)
    assert await write(stream, tokens=1000) == 1000
    assert counters.counter.held == WHOLE_NANOS
    assert counters.extends == 7
    await stream.response_body(usage(250) + DONE, end=True)
    assert counters.ends == [(End.CONFIRMED, 19 * 150 + 250 * 600)]


async def test_a_stream_whose_top_up_does_not_fit_ends_with_an_event_that_names_the_budget(stream, counters):
    limit_nanos = HOLD_NANOS + SLICE_NANOS
    await begin(stream, counters, limit_nanos=limit_nanos)
    assert await write(stream, tokens=200) == 2 * OUTPUT_BOUND
    assert stream.ended
    error, done = stream.to_client.split(b"\n\n")[-3:-1]
    assert done + b"\n\n" == DONE
    told = json.loads(error.removeprefix(b"data: "))["error"]
    assert (told["code"], told["type"], told["budget_id"]) == ("BUDGET_EXCEEDED", "insufficient_quota", "all")
    assert (told["limit_usd"], told["held_usd"]) == ("0.000075", "0.000075")
    (event,) = counters.shard.events
    assert (event.end, event.amount_nanos, event.hold_nanos) == (End.ESTIMATED, limit_nanos, limit_nanos)
    assert event.detail == "stream closed: budget all is exhausted"
    assert (counters.counter.spent, counters.counter.held) == (limit_nanos, 0)
    stream.exchange.close()
    assert len(counters.ends) == 1


async def test_what_comes_in_one_piece_with_its_usage_must_be_paid_for_as_well(stream, counters):
    """A fast provider: more than the hold, its usage and its end, all at once. It is billed, but not passed on."""
    await begin(stream, counters, limit_nanos=HOLD_NANOS)
    await stream.response_body(chunk("~" * 300) + usage(200) + DONE, end=True)
    assert stream.ended
    assert b"~" not in stream.to_client
    assert b"BUDGET_EXCEEDED" in stream.to_client
    (event,) = counters.shard.events
    assert (event.end, event.amount_nanos) == (End.CONFIRMED, 19 * 150 + 200 * 600)
    assert event.detail == "stream closed: budget all is exhausted"
    assert counters.counter.held == 0


async def test_the_usage_says_what_such_a_piece_costs_not_the_count_of_its_bytes(stream, counters):
    """Three hundred bytes were eighty tokens, and for just those there is room."""
    cost_nanos = 19 * 150 + 80 * 600
    assert cost_nanos > HOLD_NANOS
    await begin(stream, counters, limit_nanos=cost_nanos)
    await stream.response_body(chunk("~" * 300) + usage(80) + DONE, end=True)
    assert stream.to_client.count(b"~") == 300
    assert (counters.extends, counters.ends) == (1, [(End.CONFIRMED, cost_nanos)])


async def test_what_its_hold_pays_for_passes_with_its_usage_without_another_trip(stream, counters):
    await begin(stream, counters)
    await stream.response_body(chunk("~" * 300) + usage(20) + DONE, end=True)
    assert stream.to_client.count(b"~") == 300
    assert (counters.extends, counters.ends) == (0, [(End.CONFIRMED, 19 * 150 + 20 * 600)])


async def test_an_event_that_is_cut_behind_the_usage_reaches_the_client_whole(stream, counters):
    await begin(stream, counters)
    for piece in (chunk("~") + usage(20) + DONE[:8], DONE[8:]):
        await stream.response_body(piece)
    await stream.response_body(b"", end=True)
    assert stream.to_client.endswith(usage(20) + DONE)
    assert counters.ends == [(End.CONFIRMED, 19 * 150 + 20 * 600)]


async def test_such_a_piece_runs_on_where_the_tenant_wants_it(stream, counters):
    await begin(stream, counters, overrun=True, limit_nanos=HOLD_NANOS)
    await stream.response_body(chunk("~" * 300) + usage(200) + DONE, end=True)
    assert stream.to_client.count(b"~") == 300
    (event,) = counters.shard.events
    assert (event.end, event.amount_nanos) == (End.CONFIRMED, 19 * 150 + 200 * 600)
    assert event.detail == "overrun: budget all is exhausted"


async def test_the_last_little_that_is_left_is_written_too(stream, counters):
    await begin(stream, counters, limit_nanos=HOLD_NANOS + 20 * 600)
    assert await write(stream, tokens=200) == OUTPUT_BOUND + 20
    assert counters.counter.spent == HOLD_NANOS + 20 * 600


async def test_a_budget_that_gets_room_meanwhile_lets_the_stream_go_on(stream, counters):
    await begin(stream, counters, limit_nanos=2 * HOLD_NANOS)
    counters.counter.held += HOLD_NANOS
    # Asked for ahead of time and refused: nothing has happened yet.
    assert await write(stream, tokens=45) == 45
    assert counters.extends == 1
    counters.counter.held -= HOLD_NANOS
    assert await write(stream, tokens=45) == 45
    assert not stream.ended


async def test_a_response_ends_as_its_api_ends(stream, counters):
    await begin(stream, counters, api="openai.responses", limit_nanos=HOLD_NANOS)
    opened = {"type": "response.created", "sequence_number": 0, "response": {"id": "r", "status": "in_progress"}}
    await stream.response_body(b"event: response.created\ndata: " + json.dumps(opened).encode() + b"\n\n")
    delta = {"type": "response.output_text.delta", "sequence_number": 1, "delta": "x" * 60}
    await stream.response_body(b"data: " + json.dumps(delta).encode() + b"\n\n")
    kind, data = stream.to_client.split(b"\n\n")[-2].split(b"\n")
    assert kind == b"event: response.failed"
    failed = json.loads(data.removeprefix(b"data: "))
    assert (failed["response"]["status"], failed["response"]["error"]["budget_id"]) == ("failed", "all")
    assert stream.ended


async def test_what_the_provider_says_after_the_end_is_not_passed(stream, counters):
    await begin(stream, counters, limit_nanos=HOLD_NANOS)
    await stream.response_body(chunk("~" * 60))
    assert stream.ended
    for piece in (chunk("more"), usage(7), b""):
        message = ProcessingRequest(response_body=HttpBody(body=piece))
        assert await stream.exchange.answer(message) is None
    stream.exchange.close()
    assert counters.ends == [(End.ESTIMATED, HOLD_NANOS)]


# --- tenants that let a stream run on


async def test_a_tenant_may_let_it_run_on_and_sees_that_it_did(stream, counters):
    await begin(stream, counters, overrun=True, limit_nanos=HOLD_NANOS)
    assert await write(stream, tokens=200) == 200
    # What is over the limit is held too, so that no other call is let in on it.
    assert counters.counter.held >= INPUT_NANOS + 200 * 600
    await stream.response_body(usage(190) + DONE, end=True)
    (event,) = counters.shard.events
    assert (event.end, event.amount_nanos) == (End.CONFIRMED, 19 * 150 + 190 * 600)
    assert event.detail == "overrun: budget all is exhausted"
    assert counters.counter.held == 0


async def test_a_stream_that_ran_on_and_was_cut_is_charged_what_was_counted(stream, counters, settler):
    await begin(stream, counters, overrun=True, limit_nanos=HOLD_NANOS)
    await write(stream, tokens=200)
    stream.exchange.close()
    await settled(settler)
    (event,) = counters.shard.events
    assert (event.end, event.amount_nanos) == (End.ESTIMATED, INPUT_NANOS + 200 * 600)
    assert event.detail == "cut off before its usage; overrun: budget all is exhausted"


async def test_it_runs_on_too_while_redis_is_away(stream, counters):
    await begin(stream, counters, overrun=True)
    counters.silent = True
    assert await write(stream, tokens=100) == 100
    counters.silent = False
    stream.exchange.close()
    await eventually(lambda: counters.ends)
    (event,) = counters.shard.events
    assert (event.end, event.amount_nanos) == (End.ESTIMATED, INPUT_NANOS + 100 * 600)
    assert event.detail == "cut off before its usage; overrun: no top-up"


# --- when counters fail


async def test_a_short_silence_of_redis_is_waited_for(stream, counters):
    await begin(stream, counters)
    counters.silent = True
    assert await write(stream, tokens=OUTPUT_BOUND) == OUTPUT_BOUND
    waiting = asyncio.create_task(stream.response_body(chunk("hello")))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    counters.silent = False
    assert await waiting == chunk("hello")
    assert counters.counter.held == INPUT_NANOS + (55 + OUTPUT_BOUND) * 600


@pytest.mark.parametrize("state", ["silent", "not ready", "no hold"])
async def test_a_stream_that_nothing_can_be_held_for_ends(stream, counters, state):
    handoff = await begin(stream, counters)
    if state == "silent":
        counters.silent = True
    elif state == "not ready":
        counters.run_id_now = "another"
    else:
        del counters.shard.operations[("acme", handoff.facts.operation_id)]
    assert await write(stream, tokens=100) == OUTPUT_BOUND
    assert stream.ended
    code = "COUNTERS_UNAVAILABLE" if state == "silent" else "COUNTERS_NOT_READY"
    assert f'"code":"{code}"'.encode() in stream.to_client
    counters.silent, counters.run_id_now = False, counters.shard.epoch
    await eventually(lambda: counters.ends)
    assert counters.ends == [(End.ESTIMATED, HOLD_NANOS)]


async def test_a_client_that_leaves_while_a_piece_waits_frees_everything(stream, counters, settler):
    await begin(stream, counters)
    await write(stream, tokens=20)
    counters.gate.clear()
    waiting = asyncio.create_task(stream.response_body(chunk("~" * 40)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait((waiting,))
    stream.exchange.close()
    counters.gate.set()
    await settled(settler)
    assert counters.ends == [(End.ESTIMATED, HOLD_NANOS)]
    assert counters.counter.held == 0


async def test_a_fault_of_ours_ends_what_nobody_would_count(stream, counters, settler, monkeypatch):
    await begin(stream, counters)
    await write(stream, tokens=20)

    def broken(*_arguments, **_options):
        raise RuntimeError("broken")

    monkeypatch.setattr(stream.exchange._reader, "feed", broken)
    assert await stream.response_body(chunk("last")) == chunk("last")
    assert stream.ended
    await settled(settler)
    assert counters.ends == [(End.ESTIMATED, INPUT_NANOS + 20 * 600)]


# --- answers that are no stream


async def test_a_json_answer_to_a_stream_request_is_read_as_json(stream, counters):
    body = (FIXTURES / "chat.json").read_bytes()
    await stream.request_headers(counters.admit(stream=True, slices=SLICES))
    await stream.response_headers(content_type="application/json", content_length=str(len(body)))
    assert not stream.taken_over
    assert await stream.response_body(body) == body
    assert [end for end, _ in counters.ends] == [End.CONFIRMED]


async def test_an_error_of_the_provider_passes(stream, counters):
    await stream.request_headers(counters.admit(stream=True, slices=SLICES))
    await stream.response_headers(500, content_type="application/json")
    assert await stream.response_body(b'{"error":{"message":"no"}}', end=True) == b'{"error":{"message":"no"}}'
    assert counters.ends == [(End.RELEASED, 0)]


async def test_a_compressed_stream_cannot_be_counted_and_reaches_nobody(stream, counters):
    await stream.request_headers(counters.admit(stream=True, slices=SLICES))
    answer = await stream.response_headers(content_type="text/event-stream", content_encoding="gzip")
    assert answer.immediate_response.status.code == 500
    assert counters.ends == [(End.ESTIMATED, HOLD_NANOS)]


async def test_trailers_end_a_stream_too(stream, counters):
    await begin(stream, counters)
    await stream.response_body(chunk("hello"))
    await stream.response_trailers()
    assert counters.ends == [(End.ESTIMATED, INPUT_NANOS + 5 * 600)]


async def begin_whole(stream, counters, **changes):
    """Ask for a stream, and get one JSON object."""
    await stream.request_headers(counters.admit(stream=True, slices=SLICES))
    await stream.response_headers(content_type="application/json", **changes)
    assert not stream.taken_over


async def test_an_answer_that_is_no_stream_is_held_whole_until_its_usage_is_known(stream, counters):
    counters.limit_nanos = HOLD_NANOS
    await begin_whole(stream, counters)
    assert (counters.counter.held, counters.extends) == (WHOLE_NANOS, 1)
    await stream.response_body((FIXTURES / "chat.json").read_bytes(), end=True)
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]
    assert (counters.counter.spent, counters.counter.held) == (FIXTURE_NANOS, 0)


@pytest.mark.parametrize("silent", [False, True])
async def test_without_usage_it_has_cost_all_that_the_model_can_write(stream, counters, settler, silent):
    counters.silent = silent
    await begin_whole(stream, counters)
    counters.silent = False
    await stream.response_body(b'{"choices":[]}', end=True)
    await settled(settler)
    assert counters.ends == [(End.ESTIMATED, WHOLE_NANOS)]
    assert (counters.counter.spent, counters.counter.held) == (WHOLE_NANOS, 0)


async def test_an_error_is_no_answer_to_hold_for(stream, counters):
    await begin_whole(stream, counters, status=500)
    assert (counters.counter.held, counters.extends) == (HOLD_NANOS, 0)
