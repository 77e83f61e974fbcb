"""One contract, every engine: the same policies, inputs and answers."""

import asyncio

import pytest

from budgetguard.core.policy import PolicyDecision, PolicyFault, PolicyUnavailableError
from tests.adapters.policy.engines import CHECKOUT, call, until_decides

# Room for a busy machine where the deadline is not what is shown.
PATIENT = {"deadline_seconds": 5.0}


async def test_allows(engine):
    policy = await engine.open(**PATIENT)
    assert await policy.decide(call("allow")) == PolicyDecision(allow=True)
    await policy.health()


async def test_denies_with_the_reason(engine):
    policy = await engine.open(**PATIENT)
    assert await policy.decide(call("deny")) == PolicyDecision(allow=False, reason="not today")


async def test_ignores_further_members(engine):
    policy = await engine.open(**PATIENT)
    assert await policy.decide(call("more members")) == PolicyDecision(allow=True)


async def test_the_shipped_policies_allow(engine):
    policy = await engine.open(CHECKOUT / "policies", **PATIENT)
    assert await policy.decide(call("gpt-4o-mini")) == PolicyDecision(allow=True)


async def test_a_file_of_ones_own_adds_reasons_to_deny(engine, tmp_path):
    (tmp_path / "default.rego").write_text((CHECKOUT / "policies" / "default.rego").read_text())
    (tmp_path / "own.rego").write_text(
        "package budgetguard\n\n"
        'deny contains "b: streams" if input.stream\n\n'
        'deny contains "a: tags" if input.tags == []\n'
    )
    policy = await engine.open(tmp_path, **PATIENT)
    assert await policy.decide(call("m", stream=True)) == PolicyDecision(allow=False, reason="a: tags; b: streams")
    assert await policy.decide(call("m", stream=True, tags=("x",))) == PolicyDecision(allow=False, reason="b: streams")
    assert await policy.decide(call("m", tags=("x",))) == PolicyDecision(allow=True)


async def test_input_has_the_documented_members(engine):
    policy = await engine.open(**PATIENT)
    assert (await policy.decide(call("members"))).reason == (
        "estimate_nanos estimate_usd key_id model output_tokens_bound priced_model route session_id stream tags "
        "tenant_id time"
    )


@pytest.mark.parametrize(
    "text",
    ["plain", "żółć 😀 \u2028", 'a"b\\c', "line\nfeed\ttab", "nul\0inside", "\\u0041", "\x7f\x01", "{}", '"', "\\"],
)
async def test_strings_come_back_as_they_went(engine, text):
    policy = await engine.open(**PATIENT)
    assert (await policy.decide(call("echo session", session_id=text))).reason == text
    assert (await policy.decide(call("echo tag", tags=(text,)))).reason == text


async def test_strings_compare_with_literals(engine):
    policy = await engine.open(**PATIENT)
    assert (await policy.decide(call("compare unicode", session_id='żółć 😀 a"b\\c\nd'))).allow
    assert not (await policy.decide(call("compare unicode", session_id='żółć 😀 a"b\\c\ne'))).allow
    assert (await policy.decide(call("tags", tags=("team/a", "env/prod")))).allow
    assert not (await policy.decide(call("tags", tags=("team/a", "env/prod2")))).allow


@pytest.mark.parametrize("nanos", [0, 2**31, 2**53 - 1, 2**53 + 1, 2**63 - 1])
async def test_integers_are_exact(engine, nanos):
    policy = await engine.open(**PATIENT)
    assert (await policy.decide(call("echo nanos", estimate_nanos=nanos))).reason == str(nanos)


async def test_amounts_compare_exactly(engine):
    policy = await engine.open(**PATIENT)
    assert not (await policy.decide(call("compare nanos", estimate_nanos=2**53))).allow
    assert (await policy.decide(call("compare nanos", estimate_nanos=2**53 + 1))).allow
    assert (await policy.decide(call("compare usd", estimate_usd="25.499999999"))).allow
    assert not (await policy.decide(call("compare usd", estimate_usd="25.5"))).allow


@pytest.mark.parametrize("moment", ["2026-01-31T12:00:00Z", "2026-01-31T12:00:00.250Z"])
async def test_time_can_be_read(engine, moment):
    policy = await engine.open(**PATIENT)
    assert (await policy.decide(call("weekday", time=moment))).reason == "Saturday"


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ("no rule for this", PolicyFault.UNDEFINED),
        ("allow is a string", PolicyFault.WRONG_TYPED),
        ("allow is a number", PolicyFault.WRONG_TYPED),
        ("allow is null", PolicyFault.WRONG_TYPED),
        ("reason is a number", PolicyFault.WRONG_TYPED),
        ("no reason", PolicyFault.WRONG_TYPED),
        ("no allow", PolicyFault.WRONG_TYPED),
        ("a boolean", PolicyFault.WRONG_TYPED),
        ("an array", PolicyFault.WRONG_TYPED),
        ("conflict", PolicyFault.FAILED),
    ],
)
async def test_what_is_no_decision_is_a_fault_and_the_next_call_is_decided(engine, model, fault):
    policy = await engine.open(**PATIENT)
    with pytest.raises(PolicyUnavailableError) as caught:
        await policy.decide(call(model))
    assert caught.value.fault is fault
    assert (await policy.decide(call("allow"))).allow


async def test_concurrent_calls_get_their_own_answers(engine):
    policy = await engine.open(**PATIENT)
    sessions = [f"session {number}" for number in range(200)]
    decisions = await asyncio.gather(*(policy.decide(call("echo session", session_id=session)) for session in sessions))
    assert [decision.reason for decision in decisions] == sessions


async def test_a_slow_policy_is_given_up_while_other_work_goes_on(engine):
    policy = await engine.open()
    await until_decides(policy)
    asking = asyncio.create_task(policy.decide(call("slow")))
    steps = 0
    while not asking.done():
        await asyncio.sleep(0.001)
        steps += 1
    with pytest.raises(PolicyUnavailableError) as caught:
        await asking
    assert caught.value.fault is PolicyFault.SLOW
    # One step would mean that the policy held the loop.
    assert steps > 1
    assert (await until_decides(policy)).allow


async def test_a_killed_engine_is_down_and_decides_again_when_it_is_back(engine):
    policy = await engine.open(**PATIENT)
    assert (await policy.decide(call("allow"))).allow
    asking = asyncio.create_task(policy.decide(call("slow")))
    await asyncio.sleep(0.05)
    engine.kill()
    with pytest.raises(PolicyUnavailableError) as caught:
        await asking
    assert caught.value.fault is PolicyFault.DOWN
    engine.start_again()
    assert (await until_decides(policy)).allow
    await policy.health()


async def test_decisions_fail_after_close(engine):
    policy = await engine.open(**PATIENT)
    await policy.close()
    with pytest.raises(PolicyUnavailableError) as caught:
        await policy.decide(call("allow"))
    assert caught.value.fault is PolicyFault.DOWN
