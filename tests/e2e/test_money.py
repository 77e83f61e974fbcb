"""The last cent under load: never over the limit, never refused while money is left, nothing lost."""

import asyncio
import base64
import json
from collections import Counter
from decimal import Decimal

import httpx
import pytest

from tests.e2e.admin import monthly

PATH = "/v1/chat/completions"


def ask(**asked):
    return [{"role": "user", "content": "fake:" + json.dumps(asked)}]


def one_call_s_hold(new_tenant, body) -> Decimal:
    probe = new_tenant()
    answer = httpx.post(f"{probe.base_url}{PATH}", json=body, headers=probe.headers)
    assert answer.status_code == 200, answer.text
    return Decimal(answer.headers["x-budgetguard-estimated-cost-usd"])


def exact_body(new_tenant) -> tuple[dict, Decimal]:
    """Make a request whose cost is its hold: the fake bills the very bound."""
    padding = {"role": "system", "content": "x" * 100}  # to a bound of three digits, as the number that names it has
    body = {
        "model": "gpt-4o-mini",
        "max_tokens": 10,
        "messages": [padding, *ask(prompt_tokens=111, completion_tokens=10)],
    }
    held = one_call_s_hold(new_tenant, body)
    prompt_tokens = (int(held * 10**9) - 10 * 600) // 150
    assert 100 <= prompt_tokens <= 999
    body["messages"] = [padding, *ask(prompt_tokens=prompt_tokens, completion_tokens=10)]
    return body, held


async def test_a_budget_worth_fifty_calls_admits_fifty_of_a_thousand(stack, new_tenant):
    body, held = exact_body(new_tenant)
    tenant = new_tenant(monthly(str(50 * held)))
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=stack.base_url, limits=limits, timeout=60) as http:
        gate = asyncio.Semaphore(200)

        async def call() -> int:
            """As an SDK does it: what a busy machine did not decide in time (nothing was held) is asked again."""
            async with gate:
                for attempt in range(10):
                    status = (await http.post(PATH, json=body, headers=tenant.headers)).status_code
                    if status != 503:
                        break
                    await asyncio.sleep(0.1 * 2**attempt)
                return status

        statuses = Counter(await asyncio.gather(*(call() for _ in range(1000))))
    assert statuses == {200: 50, 402: 950}
    assert tenant.settled() == 50 * held
    assert tenant.ledger_sum(at_least=50) == 50 * held
    # What was not decided in time gave its hold back.
    assert {row["end"] for row in tenant.rows(at_least=50)} - {"RELEASED"} == {"CONFIRMED"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_sequential_caller_is_never_refused_while_money_is_left(stack, new_tenant, stream):
    """Each call holds far more than it costs, and the budget has room for one hold at a time."""
    calls = 40
    body = {
        "model": "gpt-4o-mini",
        "max_tokens": 1000,
        "stream": stream,
        "messages": ask(prompt_tokens=10, completion_tokens=2),
    }
    held = one_call_s_hold(new_tenant, body)
    cost = Decimal(10 * 150 + 2 * 600) / 10**9
    assert held > 100 * cost
    tenant = new_tenant(monthly(str(held + (calls - 1) * cost)))
    with httpx.Client(base_url=stack.base_url, timeout=20) as http:
        for number in range(calls):
            answer = http.post(PATH, json=body, headers=tenant.headers)
            assert answer.status_code == 200, f"call {number}: {answer.text}"
            assert "x-budgetguard-clamped-max-tokens" not in answer.headers
        last = http.post(PATH, json=body, headers=tenant.headers)
    assert last.status_code == 200, last.text
    assert int(last.headers["x-budgetguard-clamped-max-tokens"]) < 1000  # what is left pays for less than it asked
    assert tenant.settled() == (calls + 1) * cost


@pytest.mark.parametrize(
    ("path", "field", "asked"),
    [
        (PATH, "max_completion_tokens", {"max_completion_tokens": 128_000}),
        (PATH, "max_completion_tokens", {}),
        ("/v1/responses", "max_output_tokens", {"max_output_tokens": 128_000}),
        ("/v1/responses", "max_output_tokens", {}),
    ],
)
def test_a_cent_s_budget_clamps_a_model_that_can_write_128k_tokens(stack, new_tenant, path, field, asked):
    """gpt-5 writes for 10,000 nanos a token: a cent is less than 1,000 tokens of it."""
    tenant = new_tenant(monthly("0.01"))
    question = "fake:" + json.dumps({"echo": True})
    content = {"messages": [{"role": "user", "content": question}]} if path == PATH else {"input": question}
    answer = httpx.post(f"{stack.base_url}{path}", json={"model": "gpt-5", **content, **asked}, headers=tenant.headers)
    assert answer.status_code == 200, answer.text
    clamped = int(answer.headers["x-budgetguard-clamped-max-tokens"])
    assert 900 < clamped < 1000
    assert Decimal(answer.headers["x-budgetguard-estimated-cost-usd"]) <= Decimal("0.01")
    told = answer.json()
    echoed = told["choices"][0]["message"]["content"] if path == PATH else told["output"][0]["content"][0]["text"]
    assert json.loads(json.loads(echoed)["body"])[field] == clamped


def test_a_bound_is_clamped_to_sixteen_tokens_and_no_less(stack, new_tenant):
    body = {"model": "gpt-5", "max_completion_tokens": 16, "messages": ask(echo=True)}
    smallest = one_call_s_hold(new_tenant, body)
    body["max_completion_tokens"] = 5000
    for limit, status in ((smallest, 200), (smallest - Decimal("0.000000001"), 402)):
        tenant = new_tenant(monthly(str(limit)))
        answer = httpx.post(f"{stack.base_url}{PATH}", json=body, headers=tenant.headers)
        assert answer.status_code == status, answer.text
        if status == 200:
            assert answer.headers["x-budgetguard-clamped-max-tokens"] == "16"


def test_an_image_in_the_request_is_held_for_by_its_size_not_by_its_text(new_tenant):
    """1024 by 1024 pixels are 4 tiles for gpt-4o: 765 tokens at 2,500 nanos, however many bytes they weigh."""
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (1024).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    url = "data:image/png;base64," + base64.b64encode(header + b"\0" * 2**20).decode()
    image = {"type": "image_url", "image_url": {"url": url, "detail": "high"}}
    body = {"model": "gpt-4o", "max_tokens": 10, "messages": [{"role": "user", "content": [image]}]}
    with_image = one_call_s_hold(new_tenant, body)
    body["messages"] = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
    without = one_call_s_hold(new_tenant, body)
    assert abs(with_image - without - Decimal(765 * 2500) / 10**9) < Decimal("0.0001")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{}, {"web_search_options": {}}])
def test_the_search_of_a_search_model_is_held_for_and_charged_whether_or_not_it_is_asked_for(
    stack, new_tenant, options, stream
):
    """$25 for 1,000 searches, and $0.15 and $0.60 for a million tokens."""
    body = {
        "model": "gpt-4o-mini-search-preview",
        "max_tokens": 10,
        "stream": stream,
        "messages": ask(prompt_tokens=20, completion_tokens=10),
    }
    assert one_call_s_hold(new_tenant, {**body, **options}) > Decimal("0.025")
    tenant = new_tenant(monthly("1"))
    answer = httpx.post(f"{stack.base_url}{PATH}", json={**body, **options}, headers=tenant.headers)
    assert answer.status_code == 200, answer.text
    assert tenant.settled() == Decimal("0.025") + Decimal(20 * 150 + 10 * 600) / 10**9
    (row,) = tenant.rows(at_least=1)
    assert (row["end"], row["detail"]) == ("CONFIRMED", "$0.025 of it for a web search")


def test_a_wrong_type_is_refused_by_its_path_and_costs_nothing(stack, new_tenant):
    tenant = new_tenant(monthly("1"))
    image = {"type": "image_url", "image_url": {"url": "https://example.com/x.png", "detail": 3}}
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": ["look:", image]}]}
    answer = httpx.post(f"{stack.base_url}{PATH}", json=body, headers=tenant.headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "messages[0].content[1].image_url.detail"
    assert tenant.settled() == 0


def test_a_hundred_streams_that_are_left_end_once_each(stack, new_tenant):
    tenant = new_tenant(monthly("100"))
    body = {
        "model": "gpt-4o-mini",
        "max_tokens": 100,
        "stream": True,
        "messages": ask(chunk_delay_ms=50, completion_tokens=100),
    }

    async def leave_all() -> None:
        async with httpx.AsyncClient(
            base_url=stack.base_url, timeout=30, limits=httpx.Limits(max_connections=100)
        ) as http:

            async def leave() -> None:
                async with http.stream("POST", PATH, json=body, headers=tenant.headers) as answer:
                    assert answer.status_code == 200
                    async for _ in answer.aiter_bytes():
                        break

            await asyncio.gather(*(leave() for _ in range(100)))

    asyncio.run(leave_all())
    rows = tenant.rows(at_least=100)
    assert len(rows) == 100
    assert len({row["operationId"] for row in rows}) == 100
    assert {row["end"] for row in rows} == {"ESTIMATED"}
    assert tenant.settled() == tenant.ledger_sum(at_least=100)
