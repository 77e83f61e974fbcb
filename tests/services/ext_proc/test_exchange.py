"""Every ending of a call, message by message: what it is charged, once, and what its client gets."""

import asyncio
import json
import threading

import pytest
from envoy.service.ext_proc.v3.external_processor_pb2 import HttpTrailers, ProcessingRequest

from budgetguard.core import providers
from budgetguard.core.operation import End
from ext_proc import exchange as exchange_module
from tests.services.ext_proc.support import (
    FIXTURE_NANOS,
    FIXTURES,
    HOLD_NANOS,
    INPUT_BOUND,
    eventually,
    request_headers,
)

JSON = (FIXTURES / "chat.json").read_bytes()
SSE = (FIXTURES / "chat_stream.sse").read_bytes()
SSE_WITH_USAGE = (FIXTURES / "chat_stream_with_usage.sse").read_bytes()
INPUT_NANOS = INPUT_BOUND * 150
REFUSED_CONNECTION = "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_111}"


async def settled(settler):
    """Wait for what a closed stream set off."""
    while settler._deliveries:
        await asyncio.wait(settler._deliveries)


def pieces_of(body, size):
    return [body[start : start + size] for start in range(0, len(body), size)]


# --- answers


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("told", [True, False], ids=["with length", "chunked"])
async def test_a_json_answer_is_settled_before_its_last_piece_passes(stream, counters, settler, size, told):
    await stream.request_headers(counters.admit())
    length = {"content_length": str(len(JSON))} if told else {}
    await stream.response_headers(content_type="application/json", **length)
    pieces = pieces_of(JSON, size)
    for piece in pieces[:-1]:
        assert await stream.response_body(piece) == piece
    assert counters.counter.held == HOLD_NANOS
    assert await stream.response_body(pieces[-1], end=not told) == pieces[-1]
    assert (counters.counter.spent, counters.counter.held) == (FIXTURE_NANOS, 0)
    if told:
        await stream.response_body(b"", end=True)
    stream.exchange.close()
    stream.exchange.close()
    await settled(settler)
    assert counters.settles == 1
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


@pytest.mark.parametrize("size", [1, 3, 7, 11, 64, 100, 1013, 100_000])
async def test_a_stream_whose_usage_was_not_asked_for_is_what_it_would_have_been(stream, counters, size):
    await stream.request_headers(counters.admit(stream=True, inject_usage=True))
    await stream.request_body(b'{"model":"gpt-4o-mini","stream":true,"messages":[]}')
    await stream.response_headers(content_type="text/event-stream; charset=utf-8")
    done_at = len(SSE) - len(b"data: [DONE]\n\n")
    for piece in pieces_of(SSE_WITH_USAGE, size):
        await stream.response_body(piece)
        if len(stream.to_client) > done_at:
            assert counters.counter.spent == FIXTURE_NANOS
    await stream.response_body(b"", end=True)
    stream.exchange.close()
    assert stream.to_client == SSE
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


@pytest.mark.parametrize("size", [1, 100, 100_000])
async def test_a_stream_whose_usage_was_asked_for_passes_unchanged(stream, counters, size):
    await stream.request_headers(counters.admit(stream=True))
    await stream.response_headers(content_type="text/event-stream")
    for piece in pieces_of(SSE_WITH_USAGE, size):
        assert await stream.response_body(piece) == piece
    await stream.response_body(b"", end=True)
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


async def test_a_stream_of_the_responses_api_is_settled_with_its_last_event(stream, counters):
    await stream.request_headers(counters.admit(stream=True, api="openai.responses"))
    await stream.response_headers(content_type="text/event-stream")
    await stream.response_body((FIXTURES / "response_stream.sse").read_bytes())
    assert counters.ends == [(End.CONFIRMED, 37 * 150 + 11 * 600)]


async def test_embeddings(stream, counters):
    body = (FIXTURES / "embeddings.json").read_bytes()
    tokens = json.loads(body)["usage"]["prompt_tokens"]
    await stream.request_headers(counters.admit(api="openai.embeddings", output_tokens_bound=0))
    await stream.response_headers(content_type="application/json", content_length=str(len(body)))
    await stream.response_body(body)
    assert counters.ends == [(End.CONFIRMED, tokens * 150)]


async def test_a_filtered_stream_loses_its_length(stream, counters):
    await stream.request_headers(counters.admit(stream=True, inject_usage=True))
    await stream.request_body(b'{"model":"gpt-4o-mini","stream":true,"messages":[]}')
    answer = await stream.response_headers(content_type="text/event-stream", content_length=str(len(SSE_WITH_USAGE)))
    assert list(answer.response_headers.response.header_mutation.remove_headers) == ["content-length"]


async def test_a_json_answer_to_a_stream_request_is_read_as_json(stream, counters):
    await stream.request_headers(counters.admit(stream=True, inject_usage=True))
    await stream.request_body(b'{"model":"gpt-4o-mini","stream":true,"messages":[]}')
    await stream.response_headers(content_type="application/json", content_length=str(len(JSON)))
    assert await stream.response_body(JSON) == JSON
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


async def test_a_large_json_answer_is_read_in_a_thread(stream, counters, monkeypatch):
    threads = []
    read = json.loads(JSON)
    read["choices"][0]["message"]["content"] = "x" * exchange_module.INLINE_BYTES_MAX
    body = json.dumps(read).encode()
    make_reader = providers.api_named("openai.chat").reader

    def spying(**options):
        reader = make_reader(**options)
        feed = reader.feed
        reader.feed = lambda data, *, end: (threads.append(threading.current_thread()), feed(data, end=end))[1]
        return reader

    monkeypatch.setattr(providers.api_named("openai.chat"), "reader", spying, raising=False)
    await stream.request_headers(counters.admit())
    await stream.response_headers(content_type="application/json", content_length=str(len(body)))
    for piece in pieces_of(body, 100_000):
        assert await stream.response_body(piece) == piece
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [True, True, False]


async def test_a_client_that_leaves_while_a_large_answer_is_read(stream, counters, settler, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()
    make_reader = providers.api_named("openai.chat").reader

    def slow(**options):
        reader = make_reader(**options)
        feed = reader.feed

        def wait_and_feed(data, *, end):
            reading.set()
            go_on.wait(10)
            return feed(data, end=end)

        reader.feed = wait_and_feed
        return reader

    monkeypatch.setattr(providers.api_named("openai.chat"), "reader", slow, raising=False)
    body = JSON + b" " * exchange_module.INLINE_BYTES_MAX
    await stream.request_headers(counters.admit())
    await stream.response_headers(content_type="application/json", content_length=str(len(body)))
    last = asyncio.create_task(stream.response_body(body))
    await asyncio.to_thread(reading.wait, 10)
    last.cancel()
    await asyncio.wait((last,))
    stream.exchange.close()
    assert counters.ends == []
    go_on.set()
    await eventually(lambda: counters.ends)
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


# --- endings without usage


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_before_the_call_is_forwarded(stream, counters, settler, is_stream):
    await stream.request_headers(counters.admit(stream=is_stream, clamped_output_tokens=7))
    stream.exchange.close()
    await settled(settler)
    assert counters.ends == [(End.RELEASED, 0)]
    assert (counters.counter.spent, counters.counter.held) == (0, 0)


@pytest.mark.parametrize(("is_stream", "nanos"), [(False, HOLD_NANOS), (True, INPUT_NANOS)])
async def test_a_client_that_leaves_before_the_answer(stream, counters, settler, is_stream, nanos):
    await stream.request_headers(counters.admit(stream=is_stream))
    stream.exchange.close()
    await settled(settler)
    assert counters.ends == [(End.ESTIMATED, nanos)]
    assert (counters.counter.spent, counters.counter.held) == (nanos, 0)


async def test_a_json_answer_that_is_cut(stream, counters, settler):
    await stream.request_headers(counters.admit())
    await stream.response_headers(content_type="application/json", content_length=str(len(JSON)))
    await stream.response_body(JSON[:-1])
    stream.exchange.close()
    await settled(settler)
    assert counters.ends == [(End.ESTIMATED, HOLD_NANOS)]


async def test_a_stream_that_is_cut_costs_its_input_and_what_was_written(stream, counters, settler):
    await stream.request_headers(counters.admit(stream=True))
    await stream.response_headers(content_type="text/event-stream")
    await stream.response_body(b'data: {"choices":[{"index":0,"delta":{"content":"Hello"}}]}\n\n')
    stream.exchange.close()
    await settled(settler)
    # The count is of bytes, so never too low.
    assert counters.ends == [(End.ESTIMATED, INPUT_NANOS + len("Hello") * 600)]


async def test_a_stream_that_ends_without_usage(stream, counters):
    await stream.request_headers(counters.admit(stream=True))
    await stream.response_headers(content_type="text/event-stream")
    await stream.response_body(b"data: [DONE]\n\n", end=True)
    assert counters.ends == [(End.ESTIMATED, INPUT_NANOS)]


async def test_a_client_that_leaves_after_the_usage_changes_nothing(stream, counters, settler):
    await stream.request_headers(counters.admit(stream=True))
    await stream.response_headers(content_type="text/event-stream")
    await stream.response_body(SSE_WITH_USAGE.removesuffix(b"data: [DONE]\n\n"))
    stream.exchange.close()
    await settled(settler)
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


@pytest.mark.parametrize("body", [b"{}", b"<html>", b'{"usage":{"prompt_tokens":"7"}}', b"\xff\x00", b""])
async def test_an_answer_that_says_nothing_of_usage(stream, counters, body):
    await stream.request_headers(counters.admit())
    await stream.response_headers(content_type="application/json")
    assert await stream.response_body(body, end=True) == body
    assert counters.ends == [(End.ESTIMATED, HOLD_NANOS)]


async def test_an_answer_without_a_body(stream, counters):
    await stream.request_headers(counters.admit())
    await stream.response_headers(204, end=True)
    assert counters.ends == [(End.ESTIMATED, HOLD_NANOS)]


async def test_a_compressed_answer_cannot_be_read(stream, counters):
    await stream.request_headers(counters.admit(stream=True))
    answer = await stream.response_headers(content_type="text/event-stream", content_encoding="gzip")
    assert answer.HasField("mode_override")
    assert counters.ends == [(End.ESTIMATED, HOLD_NANOS)]
    assert await stream.response_body(b"\x1f\x8b") == b"\x1f\x8b"


@pytest.mark.parametrize("status", [400, 429, 500, 503])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_error_of_the_provider_costs_nothing(stream, counters, status, is_stream):
    body = b'{"error":{"message":"no","type":"server_error","param":null,"code":null}}'
    await stream.request_headers(counters.admit(stream=is_stream))
    await stream.response_headers(status, content_type="application/json")
    assert counters.counter.held == HOLD_NANOS
    assert await stream.response_body(body, end=True) == body
    assert counters.ends == [(End.RELEASED, 0)]
    assert counters.counter.held == 0


async def test_an_error_that_was_billed(stream, counters):
    body = b'{"error":{"message":"no"},"usage":{"prompt_tokens":19,"completion_tokens":10}}'
    await stream.request_headers(counters.admit())
    await stream.response_headers(500, content_type="application/json")
    await stream.response_body(body, end=True)
    assert counters.ends == [(End.CONFIRMED, 19 * 150 + 10 * 600)]


async def test_an_error_that_is_cut(stream, counters, settler):
    await stream.request_headers(counters.admit())
    await stream.response_headers(500, content_type="application/json")
    await stream.response_body(b'{"error":')
    stream.exchange.close()
    await settled(settler)
    assert counters.ends == [(End.RELEASED, 0)]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_answer_of_the_edge_to_a_call_it_could_not_forward(stream, counters, is_stream):
    await stream.request_headers(counters.admit(stream=is_stream))
    answer = await stream.response_headers(503, details=REFUSED_CONNECTION, content_type="application/json")
    assert answer.HasField("mode_override")
    assert counters.ends == [(End.RELEASED, 0)]
    assert await stream.response_body(b"{}", end=True) == b"{}"
    stream.exchange.close()
    assert len(counters.ends) == 1


@pytest.mark.parametrize(
    "details", ["response_timeout", "upstream_reset_before_response_started{connection_termination}", None]
)
async def test_an_answer_of_the_edge_to_a_call_that_may_have_been_forwarded(stream, counters, details):
    await stream.request_headers(counters.admit())
    await stream.response_headers(504, details=details)
    assert counters.ends == [(End.ESTIMATED, HOLD_NANOS)]


async def test_trailers_end_an_answer_too(stream, counters):
    await stream.request_headers(counters.admit())
    await stream.response_headers(content_type="application/json")
    await stream.response_body(JSON)
    assert counters.ends == []
    await stream.response_trailers()
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


async def test_trailers_after_the_end_change_nothing(stream, counters):
    await stream.request_headers(counters.admit())
    await stream.response_headers(content_type="application/json", content_length=str(len(JSON)))
    await stream.response_body(JSON)
    await stream.response_trailers()
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


# --- requests


async def test_a_request_is_rewritten_where_it_must_be(stream, counters):
    body = b'{"model": "gpt-4o-mini", "max_tokens": 5000, "stream": true, "messages": []}'
    answer = await stream.request_headers(counters.admit(stream=True, clamped_output_tokens=7, inject_usage=True))
    mode = answer.mode_override
    assert mode.request_body_mode == mode.BUFFERED
    # An override replaces the whole mode: the response must still come.
    assert (mode.response_header_mode, mode.response_body_mode) == (mode.SEND, mode.STREAMED)
    answer = await stream.request_body(body)
    change = answer.request_body.response
    sent = change.body_mutation.body
    assert json.loads(sent) == json.loads(body) | {"max_tokens": 7, "stream_options": {"include_usage": True}}
    (length,) = change.header_mutation.set_headers
    assert (length.header.key, length.header.raw_value) == ("content-length", str(len(sent)).encode())
    assert length.append_action == length.OVERWRITE_IF_EXISTS_OR_ADD


async def test_a_large_request_is_rewritten(stream, counters):
    body = json.dumps({"max_tokens": 5000, "messages": ["x" * exchange_module.INLINE_BYTES_MAX]}).encode()
    await stream.request_headers(counters.admit(clamped_output_tokens=7))
    answer = await stream.request_body(body)
    assert answer.request_body.response.body_mutation.body == body.replace(b"5000", b"7")


async def test_a_request_that_need_not_change_keeps_its_body_to_itself(stream, counters):
    answer = await stream.request_headers(counters.admit())
    assert not answer.HasField("mode_override")


async def test_a_request_that_cannot_be_rewritten_is_refused_and_costs_nothing(stream, counters, settler, caplog):
    await stream.request_headers(counters.admit(clamped_output_tokens=7))
    answer = await stream.request_body(b"not JSON")
    assert answer.immediate_response.status.code == 500
    error = json.loads(answer.immediate_response.body)["error"]
    assert error["code"] == "INTERNAL"
    await settled(settler)
    assert counters.ends == [(End.RELEASED, 0)]
    assert "op-1" in caplog.text


async def test_a_request_without_the_body_that_must_change_is_refused(stream, counters, settler):
    answer = await stream.request_headers(counters.admit(clamped_output_tokens=7), end=True)
    assert answer.immediate_response.status.code == 500
    await settled(settler)
    assert counters.ends == [(End.RELEASED, 0)]


async def test_an_api_that_is_not_known_is_refused(stream, counters, settler):
    answer = await stream.request_headers(counters.admit(api="other.chat"))
    assert answer.immediate_response.status.code == 500
    await settled(settler)
    assert counters.ends == [(End.RELEASED, 0)]


async def test_a_damaged_handoff_is_refused(stream, counters):
    handoff = counters.admit()
    message = request_headers(handoff)
    del message.metadata_context.filter_metadata["envoy.filters.http.ext_authz"].fields["call"]
    answer = await stream.say(message)
    assert answer.immediate_response.status.code == 500
    stream.exchange.close()
    # The hold stays, and expires: nothing is known to settle.
    assert counters.ends == []


# --- calls that were not admitted


async def test_a_call_without_handoff_passes(stream, counters):
    answer = await stream.request_headers(None)
    mode = answer.mode_override
    assert (mode.response_header_mode, mode.response_body_mode) == (mode.SKIP, mode.NONE)
    assert (await stream.response_headers(200)).HasField("response_headers")
    assert await stream.response_body(JSON, end=True) == JSON
    stream.exchange.close()
    assert counters.ends == []


async def test_a_refusal_of_ext_authz_passes(stream, counters):
    answer = await stream.response_headers(402, details="ext_authz_denied")
    mode = answer.mode_override
    assert mode.response_body_mode == mode.NONE
    assert await stream.response_body(b"{}", end=True) == b"{}"
    await stream.response_trailers()
    stream.exchange.close()
    assert counters.ends == []


async def test_other_messages_pass(stream, counters):
    await stream.request_headers(counters.admit())
    assert (await stream.request_body(b"{}")).request_body.ByteSize() == 0
    await stream.say(ProcessingRequest(request_trailers=HttpTrailers()))
    assert await stream.exchange.answer(ProcessingRequest()) is None


# --- faults


async def test_a_reader_that_fails_breaks_no_answer(stream, counters, settler, monkeypatch):
    class Broken:
        usage = service_tier = model = None
        complete = error = False
        output_tokens_seen = 0

        def feed(self, data, *, end):
            raise RuntimeError("broken")

    monkeypatch.setattr(providers.api_named("openai.chat"), "reader", lambda **_: Broken(), raising=False)
    await stream.request_headers(counters.admit())
    await stream.response_headers(content_type="application/json")
    for piece in pieces_of(JSON, 100):
        assert await stream.response_body(piece) == piece
    await settled(settler)
    assert counters.ends == [(End.ESTIMATED, HOLD_NANOS)]


async def test_a_piece_waits_for_its_settlement(stream, counters, monkeypatch):
    monkeypatch.setattr(exchange_module, "SETTLE_WAIT_SECONDS", 10)
    await stream.request_headers(counters.admit())
    await stream.response_headers(content_type="application/json", content_length=str(len(JSON)))
    counters.gate.clear()
    last = asyncio.create_task(stream.response_body(JSON))
    done, _ = await asyncio.wait((last,), timeout=0.01)
    assert not done
    counters.gate.set()
    await last
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


async def test_a_piece_passes_while_redis_hangs_and_the_settlement_follows(stream, counters, settler):
    await stream.request_headers(counters.admit())
    await stream.response_headers(content_type="application/json", content_length=str(len(JSON)))
    counters.gate.clear()
    assert await stream.response_body(JSON) == JSON
    assert counters.ends == []
    stream.exchange.close()
    counters.gate.set()
    await settled(settler)
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


async def test_a_cancelled_message_does_not_cancel_its_settlement(stream, counters, settler):
    await stream.request_headers(counters.admit())
    await stream.response_headers(content_type="application/json", content_length=str(len(JSON)))
    counters.gate.clear()
    last = asyncio.create_task(stream.response_body(JSON))
    await asyncio.sleep(0)
    last.cancel()
    await asyncio.wait((last,))
    stream.exchange.close()
    counters.gate.set()
    await settled(settler)
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]


async def test_a_caller_whose_budget_fits_one_call_is_never_refused(open_stream, counters):
    counters.limit_nanos = HOLD_NANOS + 19 * FIXTURE_NANOS
    for number in range(20):
        stream = open_stream()
        # admit() asserts that it is admitted: were a hold still open, the budget would not do for another.
        await stream.request_headers(counters.admit(f"op-{number}"))
        await stream.response_headers(content_type="application/json", content_length=str(len(JSON)))
        await stream.response_body(JSON)
    assert counters.counter.spent == 20 * FIXTURE_NANOS


async def test_an_open_call_is_renewed_until_it_ends(stream, counters, leases):
    handoff = counters.admit()
    await stream.request_headers(handoff)
    lease = ("acme", handoff.facts.operation_id)
    for _ in range(20):  # ten minutes of silence
        counters.now_ms += 30_000
        await leases.sweep()
        assert counters.shard.leases[lease] == counters.now_ms + 90_000
    await stream.response_headers(content_type="application/json", content_length=str(len(JSON)))
    await stream.response_body(JSON)
    assert leases._open == {}
    assert counters.ends == [(End.CONFIRMED, FIXTURE_NANOS)]
