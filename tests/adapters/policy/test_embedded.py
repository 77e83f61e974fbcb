"""What only the embedded engine has: policies refused at load, and processes that are replaced."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest
import uvloop

from budgetguard.adapters.policy import embedded, open_policy
from budgetguard.adapters.policy.embedded import EmbeddedPolicy, read_modules
from budgetguard.core.policy import PolicyFault, PolicyLoadError, PolicyUnavailableError
from tests.adapters.policy.engines import CONTRACT, call, until_decides


async def evaluate(modules, document):
    """In a process of its own, as in production: the engine's library aborts after some broken policies."""
    engine = await embedded._Engine.start(modules, 5.0)
    try:
        return (await engine.ask(document))["result"]
    finally:
        await engine.stop()


async def until_running(policy, processes):
    async with asyncio.timeout(20):
        while len(policy._engines) < processes:  # noqa: ASYNC110  (nothing in the product has to wait for this)
            await asyncio.sleep(0.01)


HEAD = "package budgetguard\n\n"
ALLOW = HEAD + 'default decision := {"allow": true, "reason": ""}\n'


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (HEAD + 'decision := {"allow": \n', "own.rego:3: this is unclosed"),
        (HEAD + 'deny containz "x" if true\n', "own.rego:3: Invalid rule head"),
        (HEAD + "default decision := 1\n", "the policies do not compile together"),
        ("hello\n", "own.rego: expected a package declaration first"),
        ("", "own.rego: expected a package declaration first"),
        (HEAD + 'decision := 1 if http.send({"url": "http://x", "method": "get"})\n', "no http.send:"),
        (HEAD + 'decision := 1 if net . cidr_contains("10.0.0.0/8", "10.0.0.1")\n', "no net.cidr_contains:"),
        (
            HEAD + 'decision := 1 if f("x")\n\nf(x) if net.lookup_ip_addr(x)\n\ndecision := 2 if http.send({})\n',
            "no http.send, net.lookup_ip_addr:",
        ),
        (HEAD + "decision := 1 if no_such_function(1)\n", "no no_such_function:"),
        ("package budgetguard\nimport data.other as o\ndecision := 1 if o.missing(1)\n", "no data.other.missing:"),
        (HEAD + 'decision := 1 if modle == "x"\n', "own.rego:3: a variable is used that nothing defines"),
        (HEAD + "decision := 1 if not limits.acme\n", "own.rego:3: a variable is used that nothing defines"),
        (HEAD + 'decision := 1 if { {"model": "x"} = input }\n', "input or data is compared with ="),
        (HEAD + "decision := x if { input.a == x }\n", "own.rego:3: a variable is used that nothing defines"),
        (HEAD + 'decision := 1 if input.model == "caf\\u00e9"\n', 'write "café" instead of "caf\\u00e9"'),
        (HEAD + 'decision := {"allow": false, "reason": sprintf("%d", [input.n])}\n', "use %v"),
    ],
)
async def test_what_the_engine_lacks_or_gets_wrong_is_refused_by_name(source, told):
    with pytest.raises(PolicyLoadError) as caught:
        await evaluate({"default.rego": ALLOW, "own.rego": source}, {})
    assert told in str(caught.value)


async def test_names_in_comments_and_strings_are_no_calls():
    source = HEAD + '# http.send({}) and "\\u00e9\ndecision := {"allow": false, "reason": `http.send(1)`} if input.a\n'
    assert await evaluate({"own.rego": source}, {"a": True}) == {"allow": False, "reason": "http.send(1)"}


@pytest.mark.parametrize(
    ("rule", "document", "value"),
    [
        ('decision := d if { some i, t in input.tags; t == "z"; d := i }', {"tags": ["a", "z"]}, 1),
        ('decision := {k: v | some k, v in {"a": 1}; v > 0}', {}, {"a": 1}),
        ('decision := [x | x := input.tags[_]; startswith(x, "z")]', {"tags": ["a", "z"]}, ["z"]),
        ("import rego.v1\ndecision := 1 if { every t in input.tags { t != 5 } }", {"tags": ["a"]}, 1),
        ("decision := 1 if { input.a } else := 2 if { input.b } else := 3", {"b": True}, 2),
        ('decision := x if { [x, _] := split("a/b", "/") }', {}, "a"),
        ('decision := x if { {"a": x} := input.o }', {"o": {"a": 3}}, 3),
        ("decision := y if { y := given with input.x as 4 }\ngiven := input.x", {"x": 1}, 4),
        ("decision := p if { p := [q | walk(input.o, [q, v]); v == 3] }", {"o": {"a": 3}}, [["a"]]),
        ("decision := x if { x = input.a; x == input.b }", {"a": 1, "b": 1}, 1),
        ('decision := "w" if { some t in input.tags; not bad(t) }\nbad(t) if t == "a"', {"tags": ["a", "z"]}, "w"),
        ('f(1) := "one"\nf(2) := "two"\ndecision := f(input.n)', {"n": 2}, "two"),
        ('decision := limits[input.t]\nlimits := {"acme": 5}', {"t": "acme"}, 5),
        ("decision := x if { input.tags[i] == 7; x := i }", {"tags": [6, 7]}, 1),
        ("decision := data.lib.double(input.n)", {"n": 4}, 8),
    ],
)
async def test_good_policies_are_not_refused(rule, document, value):
    modules = {"own.rego": f"package budgetguard\n{rule}\n", "lib.rego": "package lib\ndouble(x) := x * 2\n"}
    assert await evaluate(modules, document) == value


def test_reads_policies_below_the_folder_without_their_tests(tmp_path):
    (tmp_path / "team").mkdir()
    (tmp_path / "default.rego").write_text(ALLOW)
    (tmp_path / "default_test.rego").write_text("package broken {")
    (tmp_path / "team" / "own.rego").write_text(HEAD)
    (tmp_path / "README.md").write_text("words")
    assert read_modules(tmp_path) == {"default.rego": ALLOW, "team/own.rego": HEAD}


def test_a_folder_that_cannot_be_used_is_told(tmp_path):
    with pytest.raises(PolicyLoadError, match=r"no policy folder .*/nowhere"):
        read_modules(tmp_path / "nowhere")
    with pytest.raises(PolicyLoadError, match=r"no \*\.rego in"):
        read_modules(tmp_path)
    (tmp_path / "default.rego").write_bytes(b"package budgetguard # \xff\n")
    with pytest.raises(PolicyLoadError, match=r"default\.rego: .*utf-8"):
        read_modules(tmp_path)
    (tmp_path / "default.rego").write_text("#" * (embedded.MODULE_BYTES_MAX + 1))
    with pytest.raises(PolicyLoadError, match=r"default\.rego: larger than"):
        read_modules(tmp_path)
    (tmp_path / "default.rego").unlink()
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(PolicyLoadError, match=r"data\.json: the embedded engine loads no data files"):
        read_modules(tmp_path)


async def test_broken_policies_stop_the_start_with_one_sentence(tmp_path):
    (tmp_path / "default.rego").write_text("package budgetguard\n\ndecision := {\n")
    with pytest.raises(PolicyLoadError) as caught:
        await open_policy(opa_url=None, policy_dir=tmp_path)
    assert str(caught.value) == "default.rego:3: this is unclosed"


async def test_a_policy_cannot_read_the_programs_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    source = 'decision := {"allow": false, "reason": json.marshal(opa.runtime().env)}\n'
    (tmp_path / "default.rego").write_text(HEAD + source)
    policy = await EmbeddedPolicy.open(tmp_path, deadline_seconds=5.0)
    try:
        reason = (await policy.decide(call("m"))).reason
    finally:
        await policy.close()
    assert "PATH" in reason
    assert "sk-secret" not in reason


async def test_policies_changed_on_disk_do_not_reach_a_replaced_process(tmp_path):
    (tmp_path / "default.rego").write_text(ALLOW)
    policy = await EmbeddedPolicy.open(tmp_path, processes=1, deadline_seconds=5.0)
    try:
        (tmp_path / "default.rego").write_text("broken")
        (engine,) = policy._engines
        os.kill(engine._process.pid, signal.SIGKILL)
        await engine.ended()
        assert (await until_decides(policy)).allow
    finally:
        await policy.close()


async def test_a_process_that_hangs_is_killed_and_replaced():
    policy = await EmbeddedPolicy.open(CONTRACT, processes=1)
    try:
        (hanging,) = policy._engines
        with pytest.raises(PolicyUnavailableError):
            await policy.decide(call("slow"))
        async with asyncio.timeout(20):
            await hanging.ended()
        assert hanging._process.returncode == -signal.SIGKILL
        assert (await until_decides(policy)).allow
        assert hanging not in policy._engines
    finally:
        await policy.close()


# A parent that looks at its engine's alarm: before the policies are there, after they are compiled, after an answer.
WATCHED = """
import json, signal, socket, threading
from budgetguard.adapters.rego import process

def seconds_left():
    return signal.getitimer(signal.ITIMER_REAL)[0]

def parent(connection):
    with connection, connection.makefile("rwb") as lines:
        while not seconds_left():
            pass
        print("armed")
        for document in ({"own.rego": "package budgetguard\\ndecision := input.a\\n"}, {"a": 1}):
            lines.write(json.dumps(document).encode() + b"\\n")
            lines.flush()
            print(lines.readline().decode().strip(), seconds_left())

ours, theirs = socket.socketpair()
threading.Thread(target=parent, args=(ours,)).start()
process.main(theirs)
"""


def test_a_process_that_waits_for_a_question_has_no_alarm_that_could_end_it():
    run = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines() == ["armed", '{"fields_read":["a"]} 0.0', '{"result":1} 0.0'], run.stderr


async def test_calls_behind_a_hanging_one_are_decided_by_the_other_process():
    policy = await EmbeddedPolicy.open(CONTRACT, processes=2, deadline_seconds=2.0)
    try:
        await until_running(policy, 2)
        slow = asyncio.create_task(policy.decide(call("slow")))
        await asyncio.sleep(0)
        assert (await policy.decide(call("allow"))).allow
        assert not slow.done()
        with pytest.raises(PolicyUnavailableError):
            await slow
    finally:
        await policy.close()


async def test_more_calls_than_can_wait_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(embedded, "WAITING_MAX", 2)
    policy = await EmbeddedPolicy.open(CONTRACT, processes=1, deadline_seconds=5.0)
    try:
        answers = await asyncio.gather(*(policy.decide(call("allow")) for _ in range(3)), return_exceptions=True)
    finally:
        await policy.close()
    assert [getattr(answer, "fault", None) for answer in answers] == [None, None, PolicyFault.BUSY]


async def test_a_caller_that_gave_up_does_not_shift_the_answers():
    policy = await EmbeddedPolicy.open(CONTRACT, processes=1, deadline_seconds=5.0)
    try:
        asked = [asyncio.create_task(policy.decide(call("echo session", session_id=str(n)))) for n in range(10)]
        await asyncio.sleep(0)
        asked[3].cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
    finally:
        await policy.close()
    assert [answer.reason for n, answer in enumerate(answers) if n != 3] == [str(n) for n in range(10) if n != 3]


async def test_close_leaves_no_process():
    policy = await EmbeddedPolicy.open(CONTRACT)
    await until_decides(policy)
    pids = [engine._process.pid for engine in policy._engines]
    await policy.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(PolicyUnavailableError):
        await policy.health()


def test_the_programs_event_loop_runs_it_too():
    async def decide_lose_and_decide_again():
        policy = await EmbeddedPolicy.open(CONTRACT, processes=1)
        try:
            (hanging,) = policy._engines
            with pytest.raises(PolicyUnavailableError) as caught:
                await policy.decide(call("slow"))
            await hanging.ended()
            return caught.value.fault, await until_decides(policy)
        finally:
            await policy.close()

    fault, decision = uvloop.run(decide_lose_and_decide_again())
    assert fault is PolicyFault.SLOW
    assert decision.allow
