"""A fake OpenAI: the real wire format, JSON and SSE, so that `make run` answers without a provider key.

Usage is counted by a rule, so that a cost can be checked by hand: a prompt has 3 tokens, plus for each message (item,
input) 4 and one for every 4 bytes of text; an answer has one token a word, cut at the request's output bound.
Embeddings of token ids have as many tokens as were sent. No prompt has more tokens than BudgetGuard's bound for it.

Tests steer it through the request: a last message (or input) that reads ``fake:{...}`` is JSON with any of

    prompt_tokens, completion_tokens, cached_tokens   usage to report; completion_tokens also sets the answer's length
    delay_ms, chunk_delay_ms     wait before the answer, and before each chunk of a stream
    chunk_tokens                 how many tokens come in each chunk of a stream
    status                       answer with this error, in OpenAI's error object
    reset                        close the connection before the answer's headers
    cut_after_chunks             close the connection in the middle of a stream (of a JSON body: for any number)
    no_usage                     report none
    service_tier                 the tier to report
    echo                         answer with the received headers and body, as JSON text

    python -m budgetguard.cli.fake_provider --port 8080
"""

import argparse
import asyncio
import base64
import json
import struct
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from typing import Any

import orjson
import uvloop
from aiohttp import web

from budgetguard.adapters.serving import stop_on_signals

BODY_BYTES_MAX = 64 * 2**20
_DIRECTIVE = "fake:"
_TEXT = "Hello from the fake provider: every token of this answer is counted and every nano of it is in the ledger."
_WORDS = _TEXT.split()
_DIMENSIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """What a test asks for; see the module's docstring."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    delay_ms: int = 0
    chunk_delay_ms: int = 0
    chunk_tokens: int = 1
    status: int | None = None
    reset: bool = False
    cut_after_chunks: int | None = None
    no_usage: bool = False
    service_tier: str = "default"
    echo: bool = False


_DIRECTIVES = {field.name for field in fields(Directive)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """One answer to be: its words (a token each) and the usage to report."""

    words: list[str]
    prompt_tokens: int
    directive: Directive
    cut_short: bool

    @property
    def completion_tokens(self) -> int:
        return len(self.words)


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def _directive(texts: list[str]) -> Directive:
    last = texts[-1] if texts else ""
    if not last.startswith(_DIRECTIVE):
        return Directive()
    asked = json.loads(last.removeprefix(_DIRECTIVE))
    return Directive(**{name: value for name, value in asked.items() if name in _DIRECTIVES})


def _answer(request: web.Request, body: bytes, texts: list[str], output_tokens_max: int | None) -> _Answer:
    directive = _directive(texts)
    words = _WORDS
    if directive.completion_tokens is not None:
        words = [_WORDS[index % len(_WORDS)] for index in range(directive.completion_tokens)]
    if directive.echo:
        received = {"headers": dict(request.headers), "path": request.path, "body": body.decode()}
        words = [json.dumps(received)]
    kept = words if output_tokens_max is None else words[:output_tokens_max]
    prompt_tokens = directive.prompt_tokens
    if prompt_tokens is None:
        prompt_tokens = 3 + sum(4 + (len(text.encode()) + 3) // 4 for text in texts)
    return _Answer(words=kept, prompt_tokens=prompt_tokens, directive=directive, cut_short=len(kept) < len(words))


def _error(status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None) -> web.Response:
    error = {"message": message, "type": kind, "param": None, "code": code}
    return web.Response(status=status, body=orjson.dumps({"error": error}), content_type="application/json")


class FakeProvider:
    """The server. ``calls`` counts the paid requests it has seen, ``left`` the streams whose client did not stay."""

    def __init__(self) -> None:
        self.calls = 0
        self.left = 0
        self.app = web.Application(client_max_size=BODY_BYTES_MAX)
        self.app.router.add_post("/v1/chat/completions", self._chat)
        self.app.router.add_post("/v1/responses", self._responses)
        self.app.router.add_post("/v1/embeddings", self._embeddings)
        self.app.router.add_get("/fake/stats", self._stats)

    async def _stats(self, _: web.Request) -> web.Response:
        return web.json_response({"calls": self.calls, "left": self.left})

    async def _read(self, request: web.Request) -> tuple[bytes, dict[str, Any]] | web.Response:
        self.calls += 1
        body = await request.read()
        try:
            asked = orjson.loads(body)
        except orjson.JSONDecodeError:
            return _error(400, "We could not parse the JSON body of your request.")
        if not isinstance(asked, dict) or not isinstance(asked.get("model"), str):
            return _error(400, "you must provide a model parameter")
        return body, asked

    async def _before(self, request: web.Request, directive: Directive) -> web.Response | None:
        """Do what a directive asks for before the answer."""
        if directive.delay_ms:
            await asyncio.sleep(directive.delay_ms / 1000)
        if directive.reset:
            _cut(request)
            return web.Response()
        if directive.status is not None:
            kind = "rate_limit_error" if directive.status == 429 else "server_error"
            return _error(directive.status, "The fake provider was asked to fail.", kind=kind)
        return None

    async def _send(self, request: web.Request, directive: Directive, body: dict[str, Any]) -> web.StreamResponse:
        text = orjson.dumps(body)
        if directive.cut_after_chunks is None:
            return web.Response(body=text, content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "application/json"})
        response.content_length = len(text)
        await response.prepare(request)
        await response.write(text[: len(text) // 2])
        _cut(request)
        return response

    async def _stream(
        self, request: web.Request, directive: Directive, events: AsyncIterator[bytes]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        sent = 0
        try:
            async for event in events:
                if sent == directive.cut_after_chunks:
                    _cut(request)
                    return response
                await response.write(event)
                sent += 1
        except ConnectionResetError:  # the client left
            self.left += 1
            return response
        await response.write_eof()
        return response

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        read = await self._read(request)
        if isinstance(read, web.Response):
            return read
        body, asked = read
        messages = asked.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            return _error(400, "Invalid type for 'messages': expected an array of objects.")
        texts = [_text_of(message.get("content")) for message in messages]
        answer = _answer(request, body, texts, asked.get("max_completion_tokens") or asked.get("max_tokens"))
        failed = await self._before(request, answer.directive)
        if failed is not None:
            return failed
        if asked.get("stream"):
            return await self._stream(request, answer.directive, _chat_events(asked, answer))
        choices = asked.get("n") or 1
        return await self._send(request, answer.directive, _chat_completion(asked, answer, choices))

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        read = await self._read(request)
        if isinstance(read, web.Response):
            return read
        body, asked = read
        given = asked.get("input")
        items = [{"content": given}] if isinstance(given, str) else given or []
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            return _error(400, "Invalid type for 'input': expected one of a string or array of input items.")
        texts = [_text_of(item.get("content")) for item in items]
        answer = _answer(request, body, texts, asked.get("max_output_tokens"))
        failed = await self._before(request, answer.directive)
        if failed is not None:
            return failed
        if asked.get("stream"):
            return await self._stream(request, answer.directive, _response_events(asked, answer))
        return await self._send(request, answer.directive, _response(asked, answer, status="completed"))

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        read = await self._read(request)
        if isinstance(read, web.Response):
            return read
        body, asked = read
        given = asked.get("input")
        if not isinstance(given, str | list) or not given:
            return _error(400, "'input' must be a string, an array of strings or of token ids, and not empty.")
        inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        answer = _answer(request, body, [item for item in inputs if isinstance(item, str)], None)
        token_ids = [len(item) for item in inputs if isinstance(item, list)]
        if token_ids:
            answer = replace(answer, prompt_tokens=sum(token_ids))
        failed = await self._before(request, answer.directive)
        if failed is not None:
            return failed
        vector = [1 / (index + 2) for index in range(_DIMENSIONS)]
        embedding: Any = vector
        if asked.get("encoding_format") == "base64":
            embedding = base64.b64encode(struct.pack(f"<{_DIMENSIONS}f", *vector)).decode()
        data = [{"object": "embedding", "index": index, "embedding": embedding} for index in range(len(inputs))]
        usage = {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens}
        body_sent = {"object": "list", "data": data, "model": asked["model"], "usage": usage}
        if answer.directive.no_usage:
            del body_sent["usage"]
        return await self._send(request, answer.directive, body_sent)


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _id(prefix: str) -> str:
    return f"{prefix}-{time.time_ns():x}"


def _chat_usage(answer: _Answer, choices: int) -> dict[str, Any]:
    output = answer.completion_tokens * choices
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": output,
        "total_tokens": answer.prompt_tokens + output,
        "prompt_tokens_details": {"cached_tokens": answer.directive.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _chat_completion(asked: dict[str, Any], answer: _Answer, choices: int) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": " ".join(answer.words),
        "refusal": None,
        "annotations": [],
    }
    reason = "length" if answer.cut_short else "stop"
    completion = {
        "id": _id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked["model"],
        "choices": [
            {"index": index, "message": message, "logprobs": None, "finish_reason": reason} for index in range(choices)
        ],
        "usage": _chat_usage(answer, choices),
        "service_tier": answer.directive.service_tier,
        "system_fingerprint": "fp_fake",
    }
    if answer.directive.no_usage:
        del completion["usage"]
    return completion


async def _texts(answer: _Answer) -> AsyncIterator[str]:
    """Yield an answer's text piece by piece, as slowly as it was asked for."""
    size = answer.directive.chunk_tokens
    for start in range(0, len(answer.words), size):
        if answer.directive.chunk_delay_ms:
            await asyncio.sleep(answer.directive.chunk_delay_ms / 1000)
        text = " ".join(answer.words[start : start + size])
        yield text if start == 0 else f" {text}"


async def _chat_events(asked: dict[str, Any], answer: _Answer) -> AsyncIterator[bytes]:
    """Yield a chat completion's chunks; with include_usage each other chunk has ``"usage":null``, as the real ones."""
    choices = asked.get("n") or 1
    options = asked.get("stream_options") or {}
    with_usage = bool(options.get("include_usage")) and not answer.directive.no_usage
    head = {
        "id": _id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": asked["model"],
        "service_tier": answer.directive.service_tier,
        "system_fingerprint": "fp_fake",
    }
    tail = {"usage": None} if options.get("include_usage") else {}

    def chunk(index: int, delta: dict[str, Any], reason: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _data({**head, "choices": [choice], **tail})

    for index in range(choices):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None}, None)
    async for text in _texts(answer):
        for index in range(choices):
            yield chunk(index, {"content": text}, None)
    for index in range(choices):
        yield chunk(index, {}, "length" if answer.cut_short else "stop")
    if with_usage:
        yield _data({**head, "choices": [], "usage": _chat_usage(answer, choices)})
    yield b"data: [DONE]\n\n"


def _response(asked: dict[str, Any], answer: _Answer, *, status: str) -> dict[str, Any]:
    ended = status != "in_progress"
    text = " ".join(answer.words)
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    message = {"type": "message", "id": "msg_fake", "status": "completed", "role": "assistant", "content": [part]}
    usage = {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.directive.cached_tokens},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if ended and answer.cut_short else status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if ended and answer.cut_short else None,
        "instructions": asked.get("instructions"),
        "max_output_tokens": asked.get("max_output_tokens"),
        "model": asked["model"],
        "output": [message] if ended else [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": answer.directive.service_tier,
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": usage if ended and not answer.directive.no_usage else None,
        "metadata": {},
    }


async def _response_events(asked: dict[str, Any], answer: _Answer) -> AsyncIterator[bytes]:
    """Yield the Responses API's events in their order."""
    sequence = 0

    def event(kind: str, **members: Any) -> bytes:
        nonlocal sequence
        text = orjson.dumps({"type": kind, "sequence_number": sequence, **members})
        sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + text + b"\n\n"

    opening = _response(asked, answer, status="in_progress")
    yield event("response.created", response=opening)
    yield event("response.in_progress", response=opening)
    item = {"id": "msg_fake", "type": "message", "status": "in_progress", "role": "assistant", "content": []}
    yield event("response.output_item.added", output_index=0, item=item)
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    where = {"item_id": "msg_fake", "output_index": 0, "content_index": 0}
    yield event("response.content_part.added", **where, part=part)
    async for delta in _texts(answer):
        yield event("response.output_text.delta", **where, delta=delta, logprobs=[])
    text = " ".join(answer.words)
    yield event("response.output_text.done", **where, text=text, logprobs=[])
    yield event("response.content_part.done", **where, part={**part, "text": text})
    closing = _response(asked, answer, status="completed")
    yield event("response.output_item.done", output_index=0, item=closing["output"][0])
    yield event(f"response.{closing['status']}", response=closing)


def _data(chunk: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


async def serve(*, port: int, host: str = "127.0.0.1") -> web.AppRunner:
    """Start on a port and return the runner; its ``cleanup`` stops it."""
    runner = web.AppRunner(FakeProvider().app, access_log=None, handle_signals=True, shutdown_timeout=10)
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=4096).start()
    return runner


async def _run(port: int) -> None:
    stopping = stop_on_signals()
    runner = await serve(port=port)
    await stopping.wait()
    await runner.cleanup()


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="A fake OpenAI on the loopback interface.")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    try:
        uvloop.run(_run(arguments.port))
    except OSError as error:
        sys.stderr.write(f"fake provider: cannot listen on port {arguments.port}: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
