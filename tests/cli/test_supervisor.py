"""Parts as child processes: started, restarted, found again, ended. The parts are a few lines of Python."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from budgetguard.cli.local import process
from budgetguard.cli.local.process import Child, Part, cut_log, end_leftover, identity
from budgetguard.cli.local.supervisor import StartError, StoppedError, Supervisor

PATIENT = "import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0));"
WAIT = "\nwhile True: time.sleep(0.05)"


def part(folder: Path, name: str = "part", code: str = "", *, ready: str = "ready", **options) -> Part:
    """Return a part that touches a file when it is ready."""
    mark = folder / f"{name}.{ready}"
    code = code or f"{PATIENT} pathlib.Path({str(mark)!r}).write_text(str(__import__('os').getpid())){WAIT}"
    return Part(
        name=name,
        argv=(sys.executable, "-c", code),
        environment={"PATH": os.defpath, "PART": name},
        is_ready=lambda pid: mark.exists() and mark.read_text() == str(pid),
        where="nowhere",
        **options,
    )


@pytest.fixture
def said():
    return []


@pytest.fixture
def supervisor(tmp_path, said):
    supervisor = Supervisor(logs=tmp_path / "logs", record=tmp_path / "parts.json", say=said.append)
    yield supervisor
    for name in supervisor.names():
        supervisor.stop(name, 1)


def wait(supervisor: Supervisor, *names: str) -> None:
    supervisor.wait_ready(*names, on_ready=lambda _name, _seconds: None)


def tend_until(supervisor: Supervisor, condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        supervisor.tend()
        time.sleep(0.02)


def test_a_part_that_dies_is_started_again_and_said_so(supervisor, tmp_path, said):
    supervisor.start(part(tmp_path))
    wait(supervisor, "part")
    first = supervisor.pid("part")
    os.kill(first, signal.SIGKILL)
    tend_until(supervisor, lambda: supervisor.is_ready("part") and len(said) == 2)
    assert supervisor.pid("part") != first
    assert supervisor.restarts("part") == 1
    assert said == [
        "part ended (killed by SIGKILL); starting it again in 0.2 s",
        f"part is back (pid {supervisor.pid('part')})",
    ]


def test_the_pause_grows_while_a_part_keeps_dying(supervisor, tmp_path, said):
    supervisor.start(part(tmp_path))
    wait(supervisor, "part")
    for _ in range(3):
        os.kill(supervisor.pid("part"), signal.SIGKILL)
        tend_until(supervisor, lambda: supervisor.pid("part") is None)
        tend_until(supervisor, lambda: supervisor.is_ready("part"))
    pauses = [line.partition("again in ")[2] for line in said if "again in" in line]
    assert pauses == ["0.2 s", "0.4 s", "0.8 s"]


def test_a_part_that_cannot_start_says_why_in_its_own_words(supervisor, tmp_path):
    supervisor.start(part(tmp_path, code="import sys; print('noise', flush=True); sys.exit('part: no such thing')"))
    with pytest.raises(StartError, match=r"part did not start \(exit code 1\): part: no such thing"):
        wait(supervisor, "part")


def test_a_part_that_is_never_ready_is_given_up(supervisor, tmp_path):
    supervisor.start(part(tmp_path, code=f"{PATIENT} print('hm', flush=True){WAIT}", start_seconds=0.5))
    with pytest.raises(StartError, match="part was not ready within 0 s: hm"):
        wait(supervisor, "part")


def test_a_start_can_be_called_off(supervisor, tmp_path):
    supervisor.start(part(tmp_path, code=f"{PATIENT}{WAIT}"))
    with pytest.raises(StoppedError):
        supervisor.wait_ready("part", stopping=lambda: True, on_ready=lambda _name, _seconds: None)


def test_a_part_that_hangs_is_told_once_and_not_killed(supervisor, tmp_path, said, monkeypatch):
    monkeypatch.setattr("budgetguard.cli.local.supervisor.PROBE_SECONDS", 0.0)
    answering = [True]
    hanging = part(tmp_path)
    ready = hanging.is_ready
    hanging = Part(
        **{name: getattr(hanging, name) for name in Part.__slots__}
        | {"is_ready": lambda pid: answering[0] and ready(pid)}
    )
    supervisor.start(hanging)
    wait(supervisor, "part")
    pid = supervisor.pid("part")
    answering[0] = False
    for _ in range(6):
        supervisor.tend()
    assert [line for line in said if "does not answer" in line] == said
    assert len(said) == 1
    answering[0] = True
    supervisor.tend()
    assert said[1:] == ["part answers again"]
    assert supervisor.pid("part") == pid


def test_a_part_that_does_not_stop_is_killed(supervisor, tmp_path, said):
    stubborn = "import signal, time, pathlib, os; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    mark = tmp_path / "part.ready"
    supervisor.start(part(tmp_path, code=f"{stubborn} pathlib.Path({str(mark)!r}).write_text(str(os.getpid())){WAIT}"))
    wait(supervisor, "part")
    pid = supervisor.pid("part")
    supervisor.stop("part", 0.2)
    assert identity(pid) is None
    assert said == ["part did not stop in time and was killed"]


def test_a_paused_part_can_be_stopped(supervisor, tmp_path, said):
    supervisor.start(part(tmp_path))
    wait(supervisor, "part")
    supervisor.send("part", signal.SIGSTOP)
    supervisor.stop("part", 10)
    assert said == []


def test_a_stopped_part_stays_stopped(supervisor, tmp_path):
    supervisor.start(part(tmp_path))
    wait(supervisor, "part")
    supervisor.stop("part")
    supervisor.tend()
    assert supervisor.pid("part") is None
    assert json.loads((tmp_path / "parts.json").read_text()) == {}


def test_parts_end_with_a_supervisor_that_is_killed(tmp_path):
    part(tmp_path)
    code = f"""
import os, sys, pathlib, time
sys.path[:0] = {sys.path!r}
from budgetguard.cli.local.supervisor import Supervisor
from tests.cli import test_supervisor as t
folder = pathlib.Path({str(tmp_path)!r})
s = Supervisor(logs=folder / "logs", record=folder / "parts.json", say=print)
s.start(t.part(folder))
t.wait(s, "part")
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    ((pid, started),) = json.loads((tmp_path / "parts.json").read_text()).values()
    deadline = time.monotonic() + 10
    while identity(pid) == started:
        assert time.monotonic() < deadline, "the part outlived its supervisor"
        time.sleep(0.02)


def test_what_a_killed_run_left_is_ended_at_the_next_start(supervisor, tmp_path, said):
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        record = {"redis": (left.pid, identity(left.pid)), "envoy": (other.pid, identity(other.pid) - 100)}
        (tmp_path / "parts.json").write_text(json.dumps(record))
        supervisor.end_leftovers()
        assert identity(left.pid) is None
        assert other.poll() is None, "a process that only has the pid was killed"
        assert said == [f"ended redis (pid {left.pid}), which an earlier run had left"]
    finally:
        for sleeper in (left, other):
            sleeper.kill()
            sleeper.wait()


def test_a_pid_that_is_gone_is_no_leftover():
    done = subprocess.Popen([sys.executable, "-c", ""])
    started = identity(done.pid)
    done.wait()
    assert end_leftover(done.pid, started or 0.0, seconds=1) is False


def test_a_part_gets_only_what_it_is_given(supervisor, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_OTHERS", "x")
    out = tmp_path / "environment"
    code = f"import os, pathlib; pathlib.Path({str(out)!r}).write_text(' '.join(os.environ))"
    child = Child(part(tmp_path, code=code), tmp_path / "log")
    child.process.wait(10)
    assert {"PATH", "PART"} <= set(out.read_text().split())
    assert "SECRET_OF_OTHERS" not in out.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_part_can_run_as_another_user(tmp_path):
    child = Child(
        part(tmp_path, code="import os; print(os.getuid(), os.getgid(), os.getgroups())", user=(65534, 65534)),
        tmp_path / "log",
    )
    # The interpreter itself may be out of that user's reach: then its refusal to start shows the change of user.
    child.process.wait(10)
    assert child.last_words == "65534 65534 []" or "Permission denied" in child.last_words


def test_long_logs_are_cut_under_a_part_that_goes_on_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "LOG_BYTES_MAX", 100)
    log = tmp_path / "part.log"
    with log.open("ab") as writer:
        writer.write(b"a" * 101)
        writer.flush()
        cut_log(log)
        writer.write(b"b")
    assert log.read_bytes() == b"b"
    assert (tmp_path / "part.log.1").read_bytes() == b"a" * 101
    cut_log(log)
    assert log.read_bytes() == b"b"
