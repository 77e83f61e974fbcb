import asyncio
import json

import pytest

from budgetguard.core.providers import REGISTRY
from budgetguard.core.providers.api import InvalidRequestError
from ext_authz import large_bodies
from ext_authz.large_bodies import WAITING_MAX, LargeBodies, LargeBodiesError

CHAT = REGISTRY["/v1/chat/completions"]
EMBEDDINGS = REGISTRY["/v1/embeddings"]


def body(text: str = "x", **more) -> bytes:
    return json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], **more}).encode()


@pytest.fixture
async def bodies():
    bodies = LargeBodies()
    await bodies.start()
    yield bodies
    await bodies.close()


async def test_it_says_what_the_api_itself_would(bodies):
    large = body("x" * 9 * 2**20, max_tokens=7, stream=True)
    assert await bodies.parse(CHAT, large) == CHAT.parse_request(large)
    asked = json.dumps({"model": "text-embedding-3-small", "input": ["a", "b"]}).encode()
    assert await bodies.parse(EMBEDDINGS, asked) == EMBEDDINGS.parse_request(asked)
    with pytest.raises(InvalidRequestError, match="max_tokens") as refused:
        await bodies.parse(CHAT, body(max_tokens="7"))
    assert refused.value.param == "max_tokens"


async def test_each_gets_its_own_answer_also_beside_those_that_give_up(bodies):
    async def ask(number):
        return (await bodies.parse(CHAT, body(max_tokens=number))).output_tokens_max

    for start in range(1, 40, WAITING_MAX):
        numbers = range(start, start + WAITING_MAX)
        asking = [asyncio.create_task(ask(number)) for number in numbers]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for task in asking[::3]:
            task.cancel()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        for index, (number, answer) in enumerate(zip(numbers, answers, strict=True)):
            assert isinstance(answer, asyncio.CancelledError) if index % 3 == 0 else answer == number
        async with asyncio.timeout(10):
            while bodies._asking:  # noqa: ASYNC110 - what was begun is ended in the background
                await asyncio.sleep(0.001)


async def test_more_than_may_wait_are_refused_at_once(bodies):
    asking = [asyncio.create_task(bodies.parse(CHAT, body())) for _ in range(WAITING_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(LargeBodiesError, match="large bodies wait"):
        await bodies.parse(CHAT, body())
    await asyncio.gather(*asking)


async def test_a_process_that_was_killed_is_replaced(bodies):
    bodies._process.kill()
    await bodies._process.wait()
    with pytest.raises(LargeBodiesError):
        await bodies.parse(CHAT, body())
    assert (await bodies.parse(CHAT, body())).model == "gpt-4o-mini"


async def test_a_body_that_takes_too_long_costs_the_process_and_nobody_else(bodies, monkeypatch):
    monkeypatch.setattr(large_bodies, "READ_SECONDS_MAX", 0.001)
    with pytest.raises(LargeBodiesError):
        await bodies.parse(CHAT, body("x" * 9 * 2**20))
    monkeypatch.undo()
    assert (await bodies.parse(CHAT, body())).model == "gpt-4o-mini"
