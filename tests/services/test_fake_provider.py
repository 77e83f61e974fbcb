"""The fake is only of use while the official SDK takes it for the real one."""

import asyncio
import json

import httpx
import openai
import pytest

from budgetguard.cli.fake_provider import serve
from budgetguard.cli.local.parts import free_port
from budgetguard.core.providers import REGISTRY


@pytest.fixture
async def base_url():
    port = free_port()
    runner = await serve(port=port)
    yield f"http://127.0.0.1:{port}"
    await runner.cleanup()


@pytest.fixture
async def client(base_url):
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="sk-fake", max_retries=0) as client:
        yield client


ASK = [{"role": "user", "content": "Say hello."}]


def directive(**asked):
    return [{"role": "user", "content": "fake:" + json.dumps(asked)}]


async def test_chat(client):
    answer = await client.chat.completions.create(model="gpt-4o-mini", messages=ASK, max_tokens=5, n=2)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage.prompt_tokens == 3 + 4 + 3
    assert answer.usage.completion_tokens == 10


async def test_chat_stream_with_usage(client):
    stream = await client.chat.completions.create(
        model="gpt-4o-mini", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(
        "".join(c.choices[0].delta.content or "" for c in chunks[:-1]).split()
    )


async def test_chat_stream_without_usage(client):
    stream = await client.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in [chunk async for chunk in stream])


async def test_responses(client):
    answer = await client.responses.create(model="gpt-4o-mini", input="Say hello.", max_output_tokens=16)
    assert answer.status == "incomplete"
    assert answer.usage.output_tokens == 16


async def test_responses_stream(client):
    stream = await client.responses.create(model="gpt-4o-mini", input="Say hello.", stream=True)
    events = [event async for event in stream]
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.usage.output_tokens == len(events[-1].response.output_text.split())


async def test_embeddings(client):
    answer = await client.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
    assert len(answer.data) == 2
    assert answer.data[0].embedding[0] == pytest.approx(0.5)
    plain = await client.embeddings.create(model="text-embedding-3-small", input="a", encoding_format="float")
    assert plain.usage.prompt_tokens == 3 + 4 + 1


async def test_the_synchronous_client(base_url):
    def ask():
        with openai.OpenAI(base_url=f"{base_url}/v1", api_key="sk-fake", max_retries=0) as client:
            chat = client.chat.completions.create(model="gpt-4o-mini", messages=ASK)
            chunks = list(client.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True))
            events = list(client.responses.create(model="gpt-4o-mini", input="Say hello.", stream=True))
            return chat, chunks, events, client.responses.create(model="gpt-4o-mini", input="Say hello.")

    chat, chunks, events, response = await asyncio.to_thread(ask)
    text = chat.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert response.output_text == text


@pytest.mark.parametrize(
    ("path", "members"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 3}]}),
        ("/v1/chat/completions", {"messages": [{"content": "a"}] * 50}),
        ("/v1/responses", {"input": ""}),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 50}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/embeddings", {"input": ["a", "b"]}),
        ("/v1/embeddings", {"input": [1, 2, 3]}),
        ("/v1/embeddings", {"input": [[1], [2, 3]]}),
    ],
)
async def test_no_prompt_has_more_tokens_than_its_bound(base_url, path, members):
    body = json.dumps({"model": "gpt-4o-mini", **members}).encode()
    async with httpx.AsyncClient(base_url=base_url) as plain:
        answer = await plain.post(path, content=body)
    usage = answer.json()["usage"]
    assert (
        0
        < usage.get("prompt_tokens", usage.get("input_tokens"))
        <= REGISTRY[path].parse_request(body).input_tokens_bound
    )


@pytest.mark.parametrize(
    ("path", "members"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"messages": ["hi"]}),
        ("/v1/responses", {"input": 5}),
        ("/v1/responses", {"input": ["hi"]}),
        ("/v1/embeddings", {"input": []}),
        ("/v1/embeddings", {}),
    ],
)
async def test_what_is_no_request_is_refused_in_openai_s_words(base_url, path, members):
    async with httpx.AsyncClient(base_url=base_url) as plain:
        answer = await plain.post(path, json={"model": "gpt-4o-mini", **members})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_errors_and_cuts(client, base_url):
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model="m", messages=directive(status=429))
    with pytest.raises(openai.APIConnectionError):
        await client.chat.completions.create(model="m", messages=directive(reset=True))
    with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
        async for _ in await client.chat.completions.create(
            model="m", messages=directive(cut_after_chunks=2), stream=True
        ):
            pass
    async with httpx.AsyncClient() as plain:
        assert (await plain.post(f"{base_url}/v1/responses", content=b"{")).status_code == 400
        assert (await plain.get(f"{base_url}/fake/stats")).json() == {"calls": 4, "left": 0}


async def test_a_client_that_leaves_does_not_hurt_the_server(client):
    stream = await client.chat.completions.create(model="m", messages=directive(chunk_delay_ms=5), stream=True)
    await anext(aiter(stream))
    await stream.close()
    await asyncio.sleep(0.05)
    answer = await client.chat.completions.create(model="m", messages=directive(echo=True))
    assert json.loads(answer.choices[0].message.content)["path"] == "/v1/chat/completions"
