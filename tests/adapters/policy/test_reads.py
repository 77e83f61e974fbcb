"""Which members of input a decision can depend on: exactly where the plan is plain, never too few where it is not."""

import pytest

from budgetguard.adapters.rego.reads import fields_read
from tests.adapters.policy import alone as engine
from tests.adapters.policy.engines import CHECKOUT

DEFAULT = (CHECKOUT / "policies" / "default.rego").read_text()


@pytest.fixture
def reads(alone):
    def fields_of(rules, **modules):
        return alone(engine.fields_read, {"own.rego": f"package budgetguard\n\n{rules}\n", **modules})

    return fields_of


def test_the_shipped_policies_read_nothing(alone):
    assert alone(engine.fields_read, {"default.rego": DEFAULT}) == set()


def test_a_rule_in_another_file_adds_what_it_reads(reads):
    own = 'deny contains "x" if {\n  startswith(input.model, "gpt-4")\n  not "env/prod" in input.tags\n}'
    assert reads(own, **{"default.rego": DEFAULT}) == {"model", "tags"}


@pytest.mark.parametrize(
    ("rules", "fields"),
    [
        ('decision := 1 if input.model == "a"', {"model"}),
        ('decision := 1 if input["model"] == "a"', {"model"}),
        ('decision := 1 if input.tags[_] == "a"', {"tags"}),
        ('decision := 1 if input.tags[0] == "a"', {"tags"}),
        ("decision := 1 if { some i; input.tags[i] == input.model }", {"tags", "model"}),
        ('decision := 1 if { [_, "b"] = input.tags }', {"tags"}),
        ('decision := 1 if { every t in input.tags { t != "a" } } else := 2 if input.stream', {"tags", "stream"}),
        ('decision := 1 if not input.model == "a"', {"model"}),
        ("decision := count([t | some t in input.tags; t != input.route])", {"tags", "route"}),
        ("decision := {k: v | some k, v in input.tags}", {"tags"}),
        ('decision := 1 if good(input.model)\ngood(name) if name == "a"', {"model"}),
        ("decision := 1 if prod\nprod if team\nteam if input.tags[0]", {"tags"}),
        ("decision := d[input.route]\nd.a := input.model\nd.b := input.stream", {"route", "model", "stream"}),
        ("import input.model as m\nimport input as i\ndecision := 1 if m == i.route", {"model", "route"}),
        ("decision := y if { y := x with data.budgetguard.z as m; m := input.model }\nx := z\nz := 1", {"model"}),
        ("default decision := 1\ndecision := 2 if input.estimate_nanos > 0", {"estimate_nanos"}),
        ("decision := [0, input.route][0]", {"route"}),
        ("decision := input.user", {"user"}),
        ("decision := 1 if input.time", {"time"}),
    ],
)
def test_fields_are_found(reads, rules, fields):
    assert reads(rules) == fields


@pytest.mark.parametrize(
    ("rules", "fields"),
    [
        ("decision := data.lib[input.model]", {"model", "session_id"}),
        ("decision := data[input.model].rule", {"model", "session_id"}),
        ("decision := data.lib", {"session_id"}),
        ("decision := data.lib.plus(input.estimate_nanos)", {"estimate_nanos", "session_id"}),
        # The plan holds rules that are not asked as well: more than needed is never wrong.
        ("decision := 1", {"session_id"}),
    ],
)
def test_fields_are_found_across_packages(reads, rules, fields):
    library = "package lib\n\nplus(x) := x + count(rule)\n\nrule := input.session_id\n"
    assert reads(rules, **{"lib.rego": library}) == fields


@pytest.mark.parametrize(
    "rules",
    [
        'decision := 1 if { some k; input[k] == "a" }',
        'decision := 1 if { some k, v in input; v == "a" }',
        'decision := 1 if input[_] == "a"',
        'decision := 1 if { some f in ["model", "route"]; input[f] == "a" }',
        "decision := input[input.model]",
        "decision := input.tags[input]",
        'decision := 1 if { x := input; x.model == "a" }',
        'decision := 1 if { x = input; x.model == "a" }',
        'decision := 1 if input == {"model": "a"}',
        'decision := 1 if { {"model": m} := input; m == "a" }',
        'decision := 1 if [input][0].model == "a"',
        'decision := 1 if { walk(input, [p, v]); v == "a" }',
        'decision := object.get(input, "model", "")',
        "decision := object.keys(input)",
        "decision := count(input)",
        "decision := input",
        "decision := f(input)\nf(call) := call.model",
        "decision := f(1)\nf(x) := input[x]",
        "decision := y if { y := x with input as {} }\nx := input.model",
        "decision := y if { y := x with input.model as 1 }\nx := input.route",
        "decision := [v | v := input[_]]",
        "decision := 1 if not input",
        "decision := y if { y := x with data.budgetguard.z as input }\nx := z\nz := 1",
    ],
)
def test_input_as_a_whole_reads_everything(reads, rules):
    assert reads(rules) is None


@pytest.mark.parametrize(
    "rules",
    [
        "decision := time.now_ns()",
        "decision := y if { y := x with time.now_ns as 1 }\nx := time.now_ns()",
        'decision := rand.intn("a", 5)',
        'decision := uuid.rfc4122("a")',
        "decision := opa.runtime()",
        'decision := 1 if { print("seen"); input.model }',
        "decision := f(1)\nf(x) := x + time.now_ns()",
        "decision := [t | t := time.now_ns()]",
        "decision := 1 if not rand.intn(input.model, 2) == 1",
    ],
)
def test_what_follows_from_more_than_input_is_told(reads, rules):
    assert reads(rules) is None


def test_pure_builtins_are_names_of_the_engine(alone):
    assert alone(engine.names_unknown_to_the_engine) == []


def plan(*statements, params=(0, 1)):
    local = [{"type": "local", "value": 0}, {"type": "local", "value": 1}]
    call = {"type": "CallStmt", "stmt": {"func": "g0.data.budgetguard.decision", "args": local, "result": 2}}
    blocks = [{"stmts": [{"type": kind, "stmt": members} for kind, members in statements]}]
    rule = {"name": "g0.data.budgetguard.decision", "params": list(params), "return": 3, "blocks": blocks}
    return {
        "static": {"builtin_funcs": [], "strings": [{"value": "model"}]},
        "plans": {"plans": [{"blocks": [{"stmts": [call]}]}]},
        "funcs": {"funcs": [rule]},
    }


DOT = {"source": {"type": "local", "value": 0}, "key": {"type": "string_index", "value": 0}, "target": 4}


def test_a_plan_that_is_not_understood_reads_everything():
    assert fields_read(plan()) == set()
    assert fields_read(plan(("DotStmt", DOT))) == {"model"}
    assert fields_read(plan(("DotStmt", DOT), ("LookStmt", {"target": 4}))) is None
    assert fields_read(plan(("DotStmt", {**DOT, "target": 0}))) is None
    assert fields_read(plan(("ScanStmt", {"source": 0, "key": 4, "value": 5}))) is None
    assert fields_read(plan(("CallDynamicStmt", {"path": [], "args": [0, 1], "result": 4}))) is None
    assert fields_read(plan(("AssignVarStmt", {"source": {"type": "bool", "value": False}, "target": 0}))) is None
    assert fields_read(plan(params=(1, 0))) is None
    assert fields_read(plan(params=())) is None
