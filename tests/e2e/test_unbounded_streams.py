"""Streams that name no output bound: they run on slices of their budgets, and never past a limit."""

import asyncio
import json
from decimal import Decimal

import httpx
import openai
import pytest

from tests.e2e.admin import monthly

PATH = "/v1/chat/completions"
# Of gpt-4.1-mini, which can write 32,768 tokens: $0.40 and $1.60 a million.
MODEL, INPUT_NANOS, OUTPUT_NANOS = "gpt-4.1-mini", 400, 1600


def unbounded(**asked):
    return {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "fake:" + json.dumps(asked)}]}


def test_no_bound_is_written_into_the_request(stack, new_tenant):
    tenant = new_tenant(monthly("1"))
    answer = httpx.post(f"{stack.base_url}{PATH}", json=unbounded(echo=True), headers=tenant.headers)
    assert "x-budgetguard-clamped-max-tokens" not in answer.headers
    assert "max_tokens" not in answer.text
    # What a model thinks before it writes cannot be counted as it passes: it gets a bound, as any other call.
    answer = httpx.post(
        f"{stack.base_url}{PATH}", json=unbounded(echo=True) | {"model": "o3-mini"}, headers=tenant.headers
    )
    assert answer.headers["x-budgetguard-clamped-max-tokens"] == "4096"


@pytest.mark.parametrize("route", ["chat", "responses"])
def test_a_stream_of_twenty_thousand_tokens_is_charged_exactly(stack, new_tenant, route):
    tenant = new_tenant(monthly("1"))
    asked = {"prompt_tokens": 19, "completion_tokens": 20_000, "chunk_tokens": 25, "chunk_delay_ms": 1}
    body, path = unbounded(**asked), PATH
    if route == "responses":
        body, path = {"model": MODEL, "stream": True, "input": "fake:" + json.dumps(asked)}, "/v1/responses"
    held = set()
    text = ""
    with httpx.stream("POST", f"{stack.base_url}{path}", json=body, headers=tenant.headers, timeout=60) as answer:
        assert answer.status_code == 200
        first = Decimal(answer.headers["x-budgetguard-estimated-cost-usd"])
        for number, piece in enumerate(answer.iter_text()):
            text += piece
            if number % 50 == 0:
                held.add(tenant.budget()[1])
    assert "error" not in text.replace('"error":null', "")
    assert len(held) > 3
    assert max(held) > 3 * first
    cost = Decimal(19 * INPUT_NANOS + 20_000 * OUTPUT_NANOS) / 10**9
    (row,) = tenant.rows(at_least=1)
    assert (row["end"], Decimal(row["amountUsd"])) == ("CONFIRMED", cost)
    # The ledger shows what was held in the end, not at first.
    assert Decimal(row["holdUsd"]) > cost
    assert tenant.settled() == cost


def test_a_stream_whose_budget_runs_out_ends_with_what_the_client_got(stack, new_tenant):
    limit = Decimal("0.02")
    tenant = new_tenant(monthly(str(limit)))
    client = openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=tenant.key, max_retries=0)
    texts = []

    def read():
        body = unbounded(completion_tokens=100_000, chunk_tokens=10, chunk_delay_ms=1)
        for chunk in client.chat.completions.create(**body):
            texts.append(chunk.choices[0].delta.content or "")  # noqa: PERF401 - kept when the next one raises

    with pytest.raises(openai.APIError, match="exhausted, so this stream was ended") as raised:
        read()
    assert raised.value.code == "BUDGET_EXCEEDED"
    assert raised.value.body["budget_id"] == tenant.budgets[0]["id"]
    # $0.02 buy 12,500 tokens, and a token has at least a byte.
    assert 10_000 < len("".join(texts)) < 12_500
    (row,) = tenant.rows(at_least=1)
    assert row["end"] == "ESTIMATED"
    assert row["detail"] == f"stream closed: budget {tenant.budgets[0]['id']} is exhausted"
    assert limit * Decimal("0.9") < tenant.settled() <= limit
    assert tenant.ledger_sum(at_least=1) == tenant.settled()


async def test_fifty_streams_at_the_last_cent_never_pass_the_limit(stack, new_tenant):
    """Together they want ten times what there is; some end by themselves, some are ended, some never begin."""
    limit = Decimal("0.1")
    tenant = new_tenant(monthly(str(limit)))
    watching = True
    seen = []

    async def watch():
        while watching:
            spent, held = await asyncio.to_thread(tenant.budget)
            seen.append(spent + held)
            await asyncio.sleep(0.02)

    async with httpx.AsyncClient(base_url=stack.base_url, timeout=60, limits=httpx.Limits(max_connections=50)) as http:

        async def call(number):
            body = unbounded(completion_tokens=500 * (number % 10 + 1), chunk_tokens=20, chunk_delay_ms=5)
            answer = await http.post(PATH, json=body, headers=tenant.headers)
            if answer.status_code == 402:
                return "refused"
            assert answer.status_code == 200
            assert answer.text.endswith("data: [DONE]\n\n")
            return "ended" if '"code":"BUDGET_EXCEEDED"' in answer.text else "complete"

        watcher = asyncio.create_task(watch())
        outcomes = await asyncio.gather(*map(call, range(50)))
        watching = False
        await watcher
    assert max(seen) <= limit
    # Which of them come first is chance, and so is whether one is complete; not all could be.
    assert set(outcomes) - {"refused"}
    assert set(outcomes) - {"complete"}
    admitted = sum(outcome != "refused" for outcome in outcomes)
    rows = tenant.rows(at_least=admitted)
    ends = [row["end"] for row in rows]
    assert (ends.count("CONFIRMED"), ends.count("ESTIMATED")) == (outcomes.count("complete"), outcomes.count("ended"))
    assert tenant.settled() == sum(Decimal(row["deltaUsd"]) for row in rows) <= limit
