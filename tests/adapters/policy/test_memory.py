"""Remembered decisions are fresh ones: never another, never too many, and none where a decision depends on more."""

import asyncio
import dataclasses
import os
import signal

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetguard.adapters.policy import memory
from budgetguard.adapters.policy.embedded import EmbeddedPolicy
from budgetguard.adapters.policy.memory import DecisionMemory
from budgetguard.core.policy import PolicyDecision, PolicyFault, PolicyInput, PolicyUnavailableError
from tests.adapters.policy import alone as engine
from tests.adapters.policy.engines import CHECKOUT, call, until_decides

ALLOW = PolicyDecision(allow=True)
DEFAULT = (CHECKOUT / "policies" / "default.rego").read_text()
BY_MODEL = 'decision := {"allow": input.model == "a", "reason": input.model}'


def remembers(remembered, question):
    return remembered.recall(remembered.key(question)) is not None


def remembering(*names):
    return DecisionMemory(frozenset(names))


def test_only_the_fields_that_are_read_tell_calls_apart():
    remembered = remembering("model", "tags")
    remembered.remember(remembered.key(call("a", tags=("x", "y"))), ALLOW)
    assert remembers(remembered, call("a", tags=("x", "y"), session_id="s", stream=True, time="2027-01-01T00:00:00Z"))
    assert not remembers(remembered, call("b", tags=("x", "y")))
    assert not remembers(remembered, call("a", tags=("y", "x")))
    assert not remembers(remembered, call("a", tags=("x,y",)))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("stream", [True, 1, 1.0, "true", "1"]),
        ("estimate_nanos", [0, False, 0.0, 2**53, 2**53 + 1, float(2**53)]),
        ("tags", [(), ("",), ("", ""), ('","',), (1,), (True,), (1.0,), ("1",), (("1",),)]),
        ("session_id", ["", "\0", "é", "e\u0301", '"', "\\u00e9"]),
    ],
)
def test_values_of_another_type_or_spelling_are_other_values(field, values):
    remembered = remembering(field)
    assert len({remembered.key(call("m", **{field: value})) for value in values}) == len(values)


def test_every_field_but_the_time_can_be_a_key_and_is_what_the_engine_is_given():
    names = {field.name for field in dataclasses.fields(PolicyInput)}
    assert names == call("m").to_input().keys()
    for name in names - {"time"}:
        assert remembering(name).key(call("m")) is not None
        # The key is taken from the question: that is what input holds.
        value = getattr(call("m", tags=("x",)), name)
        assert call("m", tags=("x",)).to_input()[name] == (list(value) if name == "tags" else value)


@pytest.mark.parametrize("fields_read", [None, frozenset({"time"}), frozenset({"model", "time"}), frozenset({"user"})])
def test_what_cannot_be_a_key_is_not_remembered(fields_read):
    remembered = DecisionMemory(fields_read)
    assert remembered.key(call("m")) is None
    remembered.remember(remembered.key(call("m")), ALLOW)
    assert not remembers(remembered, call("m"))


def test_the_longest_unused_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(memory, "REMEMBERED_MAX", 2)
    remembered = remembering("model")
    for model in ("a", "b"):
        remembered.remember(remembered.key(call(model)), ALLOW)
    assert remembers(remembered, call("a"))
    remembered.remember(remembered.key(call("c")), ALLOW)
    assert [model for model in "abc" if remembers(remembered, call(model))] == ["a", "c"]


def test_a_key_that_is_too_long_is_not_kept():
    remembered = remembering("session_id")
    assert remembered.key(call("m", session_id="x" * (memory.KEY_BYTES_MAX - 4))) is not None
    assert remembered.key(call("m", session_id="x" * (memory.KEY_BYTES_MAX - 3))) is None


class Answers:
    """Stands where a process stands, with the answers that one gave."""

    _waiting = ()

    def __init__(self, answers):
        self.answers, self.asked = answers, 0

    async def ask(self, document):
        self.asked += 1
        return self.answers[orjson.dumps(document)]


def answering(fields_read, answers):
    policy = EmbeddedPolicy({})
    policy._engines.add(Answers(answers))
    policy._memory = DecisionMemory(fields_read)
    return policy


async def answer(asking):
    try:
        return await asking
    except PolicyUnavailableError as error:
        return error.fault


async def compare(alone, modules, questions):
    """Put questions in turn to a policy that remembers and to one that does not; return how many were asked again."""
    documents = [orjson.dumps(question.to_input()) for question in questions]
    fields_read, answers = alone(engine.answer_all, modules, documents)
    known = dict(zip(documents, answers, strict=True))
    # Nothing but its input moves the engine.
    assert [known[document] for document in documents] == answers
    remembering_policy, fresh_policy = answering(fields_read, known), answering(None, known)
    for question in questions:
        fresh = await answer(fresh_policy.decide(question))
        assert await answer(remembering_policy.decide(question)) == fresh, modules
    (counted,) = remembering_policy._engines
    return counted.asked


async def test_faults_are_asked_again(alone):
    rule = 'decision := {"allow": input.model, "reason": ""} if input.model != "undefined"'
    questions = [call("undefined"), call("m")] * 3
    assert await compare(alone, {"own.rego": f"package budgetguard\n\n{rule}\n"}, questions) == 6


async def test_decisions_are_not_asked_again(alone):
    questions = [call("a"), call("b"), call("a", stream=True)] * 3
    assert await compare(alone, {"own.rego": f"package budgetguard\n\n{BY_MODEL}\n"}, questions) == 2


# Conditions that read input in every way that the plan spells differently; {F} and {L} are filled in.
CONDITIONS = [
    "input.{F} == {L}",
    'input["{F}"] != {L}',
    "not input.{F} == {L}",
    "input.{F} == input.{G}",
    "input.tags[_] == {L}",
    "input.tags[0] == {L}",
    "{L} in input.tags",
    "input.{F} in {{{L}, {M}}}",
    "every t in input.tags {{ t != {L} }}",
    "not {L} in input.tags",
    "count(input.tags) > 1",
    "count([t | some t in input.tags; t != input.{F}]) == 1",
    "count({{t | t := input.tags[_]}}) == count(input.tags)",
    "some k; input[k] == {L}",
    "some k, v in input; v == {L}; k != {L}",
    "x := input; x.{F} == {L}",
    "x = input.{F}; x == {L}",
    "f := {L}; input[f]",
    "helper(input.{F})",
    "whole(input)",
    "inner({L})",
    "aliased == {L}",
    "aliased == {L} with input as {{}}",
    "aliased != {L} with input.{G} as {M}",
    "x := input.{G}; aliased == {L} with data.budgetguard.aliased as x",
    "walk(input, [_, v]); v == {L}",
    'object.get(input, "{F}", "") == {L}',
    "object.keys(input)[_] == {L}",
    "count(input) > 3",
    "data.lib.by_route[input.{F}] == {L}",
    "data.lib[input.{F}]",
    "data[input.{F}].flag",
    "data.lib.flag",
    "input.estimate_nanos > 0",
    "[{L}, _] = input.tags",
    '{{"model": m}} := {{"model": input.{F}}}; m == {L}',
    "startswith(input.model, input.{F})",
    "input.tags[count(input.tags) - 1] == input.{F}",
    "input.user == {L}",
    "not input.user",
]
# What conditions refer to, by the word that does; added only for them, as the plan holds, and so reads, all rules.
REFERRED = {
    "helper": 'helper(x) if x == "a"\n\nhelper(x) if { x == "b"; input.stream }',
    "whole": 'whole(x) if x.route == "a"',
    "inner": "inner(x) if input.tenant_id == x",
    "aliased": "aliased := input.{F}",
}
LIBRARY = {
    "by_route": 'by_route := {"a": input.model, "b": "a"}',
    "flag": "flag if input.stream",
    "lib[": 'a := input.session_id == "a"\n\nb if input.stream',
}
WORDS = st.sampled_from(["a", "b", "c"])
NAMES = st.sampled_from(["tenant_id", "route", "model", "session_id", "stream"])
LITERALS = st.sampled_from(['"a"', '"b"', "true", "1", '"model"'])
QUESTIONS = st.builds(
    PolicyInput,
    tenant_id=WORDS,
    key_id=st.just("k"),
    route=WORDS,
    model=WORDS,
    stream=st.booleans(),
    estimate_usd=st.just("0"),
    estimate_nanos=st.integers(0, 1),
    output_tokens_bound=st.just(1),
    time=st.sampled_from(["2026-01-31T12:00:00Z", "2026-01-31T12:00:01Z"]),
    tags=st.lists(WORDS, max_size=2).map(tuple),
    session_id=WORDS,
)


def package(name, rules):
    return "\n\n".join([f"package {name}", *rules]) + "\n"


def denying(reasons, *, field):
    """Policies of a file for each package; each condition is a rule of its own, so that its variables stay in it."""
    rules = []
    for number, (reason, conditions) in enumerate(reasons):
        names = [f"met_{number}_{which}" for which in range(len(conditions))]
        rules += [f"{name} if {{ {condition} }}" for name, condition in zip(names, conditions, strict=True)]
        rules.append(f"deny contains {reason} if {{ {'; '.join(names)} }}")
    text = "\n".join(rules)
    rules += [rule.replace("{F}", field) for word, rule in REFERRED.items() if word in text]
    library = [rule for word, rule in LIBRARY.items() if word in text]
    return {
        "default.rego": DEFAULT,
        "own.rego": package("budgetguard", rules),
        "lib.rego": package("lib", [*library, "nothing := 0"]),
    }


@st.composite
def policies(draw):
    """Up to three reasons to deny, each with a few conditions, beside the shipped policies."""

    def filled(template):
        names, literals = draw(st.tuples(NAMES, NAMES)), draw(st.tuples(LITERALS, LITERALS))
        return template.format(F=names[0], G=names[1], L=literals[0], M=literals[1])

    reasons = []
    for number in range(draw(st.integers(1, 3))):
        conditions = draw(st.lists(st.sampled_from(CONDITIONS), min_size=1, max_size=2, unique=True))
        reason = draw(st.sampled_from([f'"reason {number}"', "input.model", "input.session_id"]))
        reasons.append((reason, [filled(template) for template in conditions]))
    return denying(reasons, field=draw(NAMES))


@settings(max_examples=200, deadline=None)
@given(policies(), st.lists(QUESTIONS, min_size=2, max_size=30))
def test_remembered_answers_are_fresh_answers(alone, modules, questions):
    asyncio.run(compare(alone, modules, [*questions, *questions]))


@pytest.mark.parametrize("template", CONDITIONS)
async def test_each_condition_is_remembered_exactly(alone, template):
    """Put to calls that differ from one another in one field or two."""
    base = {"tenant_id": "b", "key_id": "k", "route": "b", "session_id": "b", "tags": ("b", "b")}
    changes = [{}, {"tenant_id": "a"}, {"route": "a"}, {"session_id": "a"}, {"tags": ("a", "b")}, {"stream": True}]
    questions = [call(model, **{**base, **change}) for model in ("b", "a") for change in changes]
    condition = template.format(F="model", G="route", L='"a"', M='"b"')
    await compare(alone, denying([('"x"', [condition])], field="model"), questions)


@pytest.fixture
async def opened(tmp_path):
    """Opens policies in one process."""
    policies = []

    async def open_with(rules):
        (tmp_path / "own.rego").write_text(f"package budgetguard\n\n{rules}\n")
        policies.append(await EmbeddedPolicy.open(tmp_path, processes=1, deadline_seconds=5.0))
        return policies[-1]

    yield open_with
    for policy in policies:
        await policy.close()


async def answered(policy):
    (engine,) = policy._engines
    return engine._answered


async def test_a_process_is_asked_once_for_the_same_decision(opened):
    policy = await opened(BY_MODEL)
    for _ in range(3):
        assert await policy.decide(call("a")) == PolicyDecision(allow=True, reason="a")
        assert await policy.decide(call("b", session_id="s")) == PolicyDecision(allow=False, reason="b")
    assert await answered(policy) == 2


async def test_a_clock_is_asked_each_time(opened):
    policy = await opened('decision := {"allow": true, "reason": format_int(time.now_ns(), 10)}')
    assert (await policy.decide(call("a"))).reason != (await policy.decide(call("a"))).reason


async def test_what_is_remembered_is_answered_while_no_process_runs_and_nothing_else_is(opened):
    policy = await opened(BY_MODEL)
    await policy.decide(call("a"))
    (engine,) = policy._engines
    os.kill(engine._process.pid, signal.SIGKILL)
    await engine.ended()
    assert (await policy.decide(call("a"))).allow
    assert await answer(policy.decide(call("b"))) is PolicyFault.DOWN
    assert await answer(policy.health()) is PolicyFault.DOWN


async def test_nothing_is_remembered_after_close(opened):
    policy = await opened(BY_MODEL)
    await policy.decide(call("a"))
    await policy.close()
    assert await answer(policy.decide(call("a"))) is PolicyFault.DOWN


async def test_a_call_that_hangs_is_killed_beside_what_is_remembered(tmp_path):
    steps = "count([1 | some i in numbers.range(1, 3000); some j in numbers.range(1, 3000); i * j < 0]) == 0"
    (tmp_path / "own.rego").write_text(
        "package budgetguard\n\n"
        'decision := {"allow": true, "reason": ""} if input.model == "allow"\n\n'
        f'decision := {{"allow": false, "reason": ""}} if {{ input.model == "slow"; {steps} }}\n'
    )
    policy = await EmbeddedPolicy.open(tmp_path, processes=1)
    try:
        await until_decides(policy)
        (engine,) = policy._engines
        asking = asyncio.create_task(answer(policy.decide(call("slow"))))
        await asyncio.sleep(0)
        assert (await policy.decide(call("allow"))).allow
        assert not asking.done()
        assert await asking is PolicyFault.SLOW
        await engine.ended()
        assert engine._process.returncode == -signal.SIGKILL
    finally:
        await policy.close()
