"""`budgetguard up` as a person at a terminal meets it."""

import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from budgetguard.cli.local.home import Home
from budgetguard.cli.local.parts import free_port
from tests.e2e.curl import run_curl
from tests.plugins.stack import METRICS_PORT

START_SECONDS = 90
STOP_SECONDS = 60
LAST_LINE = "Ctrl-C stops everything."
PARTS = {"postgres", "redis", "control_plane", "fake_provider", "envoy", "ext_authz", "ext_proc"}

pytestmark = pytest.mark.timeout(240)


class Up:
    """One run of the command."""

    def __init__(self, home: Path, *, prefix: tuple[str, ...] = (), **variables: str) -> None:
        self.port = int(variables.get("PORT", 0)) or free_port()
        environment = {"PATH": os.environ["PATH"], "HOME": str(home.parent), "BUDGETGUARD_HOME": str(home)}
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-P", "-m", "budgetguard.cli", "up"],
            env={**environment, **variables, "PORT": str(self.port), "METRICS_PORT": METRICS_PORT},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=home.parent,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_up(self) -> "Up":
        deadline = time.monotonic() + START_SECONDS
        while LAST_LINE not in self.lines:
            assert self._process.poll() is None, self.output + self._process.stderr.read()
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)
        return self

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        code = self._process.wait(STOP_SECONDS)
        self._reader.join()
        return code

    def complaint(self) -> str:
        """Wait for it to give up, and return what it says to the person."""
        code = self._process.wait(START_SECONDS)
        self._reader.join()
        said = self._process.stderr.read()
        assert code == 1, said
        return said

    def end(self) -> None:
        if self._process.poll() is None:
            self.send(signal.SIGTERM)
            self.send(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
                self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        self._process.stderr.close()

    @property
    def pids(self) -> dict[str, int]:
        """Read the table of what runs where."""
        rows = (re.fullmatch(r"  (\w+) +(\d+)  \S.*", line) for line in self.lines)
        return {row[1]: int(row[2]) for row in rows if row}

    @property
    def metrics(self) -> dict[str, str]:
        """Read where metrics are, out of the same table."""
        rows = (re.fullmatch(r"  (\w+) .*  (http://127\.0\.0\.1:\d+/metrics)", line) for line in self.lines)
        return {row[1]: row[2] for row in rows if row}

    @property
    def curl(self) -> list[str]:
        """Return the pasted command's words."""
        start = self.output.index("curl ")
        return shlex.split(self.output[start : self.output.index("\n\n", start)].replace("\\\n", " "))

    def paste_curl(self) -> httpx.Response:
        """Do what the command would do."""
        return run_curl(self.curl)

    def admin_key(self, home: Path) -> str:
        return (home / "admin-key").read_text().strip()


@contextmanager
def up(home: Path, **options):
    run = Up(home, **options)
    try:
        yield run
    finally:
        run.end()


@pytest.fixture
def home():
    """A data folder that PostgreSQL's user can reach when we are root, with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="bg-up-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder / "data"
    shutil.rmtree(Home(folder / "data").run_dir(), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def ledger(run: Up, home: Path, *, at_least: int) -> list[dict]:
    deadline = time.monotonic() + 20
    while True:
        answer = httpx.get(
            f"http://127.0.0.1:{run.port}/admin/tenant/demo/usage/ledger", headers={"x-admin-key": run.admin_key(home)}
        )
        assert answer.status_code == 200, answer.text
        rows = answer.json().get("rows", [])
        if len(rows) >= at_least:
            return rows
        assert time.monotonic() < deadline, rows
        time.sleep(0.1)


def test_first_run_shows_a_curl_that_works_and_the_next_run_remembers(home):
    with up(home) as first:
        first.wait_up()
        assert set(first.pids) == PARTS
        assert all(psutil.pid_exists(pid) for pid in first.pids.values())
        key = first.admin_key(home)
        assert f"{key} (shown this once" in first.output
        assert set(first.metrics) == {"ext_authz", "ext_proc"}
        for name in ("admin-key", "demo-key"):
            assert stat.S_IMODE((home / name).stat().st_mode) == 0o600
        answer = first.paste_curl()
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]
        (row,) = ledger(first, home, at_least=1)
        assert (
            'budgetguard_admission_decisions_total{reason="ADMITTED"} 1.0' in httpx.get(first.metrics["ext_authz"]).text
        )
        assert 'budgetguard_settlements_total{end="CONFIRMED"} 1.0' in httpx.get(first.metrics["ext_proc"]).text
        assert row["operationId"] == answer.headers["x-budgetguard-operation-id"]
        first.send(signal.SIGTERM)
        assert first.wait() == 0
        assert first.lines[-1] == "stopped"
        assert [pid for pid in first.pids.values() if psutil.pid_exists(pid)] == []
    with up(home) as second:
        second.wait_up()
        assert key not in second.output
        assert str(home / "admin-key") in second.output
        assert second.curl[3:] == first.curl[3:]
        assert second.paste_curl().status_code == 200
        rows = ledger(second, home, at_least=2)
        assert row["operationId"] in {one["operationId"] for one in rows}


def test_a_stop_lets_the_call_under_way_end_and_books_it(home):
    with up(home) as run:
        run.wait_up()
        headers = {"authorization": f"Bearer {(home / 'demo-key').read_text().strip()}"}
        slow = {"role": "user", "content": 'fake:{"delay_ms": 2000, "completion_tokens": 3}'}
        answers = []

        def call() -> None:
            body = {"model": "gpt-4o-mini", "max_tokens": 8, "messages": [slow]}
            url = f"http://127.0.0.1:{run.port}/v1/chat/completions"
            answers.append(httpx.post(url, json=body, headers=headers, timeout=30))

        caller = threading.Thread(target=call)
        caller.start()
        time.sleep(0.7)
        run.send(signal.SIGINT)
        caller.join()
        assert answers[0].status_code == 200
        assert run.wait() == 0
        assert any(line.startswith("waiting for 1 call under way") for line in run.lines)
    with up(home) as again:
        again.wait_up()
        (row,) = ledger(again, home, at_least=1)
        assert row["end"] == "CONFIRMED"
        assert row["operationId"] == answers[0].headers["x-budgetguard-operation-id"]


def test_a_part_that_is_killed_comes_back_and_calls_go_on(home):
    with up(home) as run:
        run.wait_up()
        os.kill(run.pids["ext_proc"], signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not any(line.startswith("ext_proc is back") for line in run.lines):
            assert time.monotonic() < deadline, run.output
            time.sleep(0.05)
        assert "ext_proc ended (killed by SIGKILL); starting it again in 0.2 s" in run.lines
        assert run.paste_curl().status_code == 200


def test_a_killed_run_leaves_nothing_and_the_next_one_starts(home):
    with up(home) as run:
        run.wait_up()
        assert run.paste_curl().status_code == 200
        run.send(signal.SIGKILL)
        run.wait()
        deadline = time.monotonic() + 30
        while left := [name for name, pid in run.pids.items() if psutil.pid_exists(pid)]:
            assert time.monotonic() < deadline, f"{left} outlived their supervisor"
            time.sleep(0.05)
    with up(home) as again:
        again.wait_up()
        assert again.paste_curl().status_code == 200
        assert len(ledger(again, home, at_least=2)) == 2


def test_a_second_run_on_the_same_data_says_so(home):
    with up(home) as first:
        first.wait_up()
        with up(home) as second:
            assert second.complaint() == (
                f"budgetguard: budgetguard already runs on {home} (pid {first.pid}): stop it, or set BUDGETGUARD_HOME\n"
            )
        assert first.paste_curl().status_code == 200


def one_sentence(said: str) -> str:
    """Insist on a single line for the person, without a traceback."""
    assert said.count("\n") == 1, said
    assert said.startswith("budgetguard: ")
    assert "Traceback" not in said
    return said


def test_a_port_in_use(home):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with up(home, PORT=str(port)) as run:
            said = one_sentence(run.complaint())
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in said
    assert not home.exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DATABASE_URL": "mysql://x"}, "DATABASE_URL: expected a URL that starts with postgresql://"),
        ({"DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/x"}, "the database cannot be brought up to date"),
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, "REDIS_URL: Redis does not answer"),
        ({"REDIS_URL": "http://127.0.0.1"}, "REDIS_URL: expected a URL that starts with redis://"),
        ({"LISTEN_ADDRESS": "203.0.113.7"}, "cannot listen on 203.0.113.7:"),
        (
            {"BUDGETGUARD_EXT_AUTHZ_PROCESSES": "0"},
            "BUDGETGUARD_EXT_AUTHZ_PROCESSES: expected a whole number from 1 to 64",
        ),
        ({"ADMIN_API_KEY": "short"}, "ADMIN_API_KEY: expected a secret of at least 8 bytes"),
    ],
)
def test_a_setting_that_cannot_be(home, variables, expected):
    with up(home, **variables) as run:
        said = one_sentence(run.complaint())
    assert expected in said
    assert "secret@" not in said


def test_a_port_that_is_no_port(home):
    environment = {"PATH": os.environ["PATH"], "BUDGETGUARD_HOME": str(home), "PORT": "many"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "budgetguard.cli", "up"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "PORT: expected a whole number" in one_sentence(done.stderr)


def test_a_data_folder_that_is_a_file(home):
    home.write_text("")
    with up(home) as run:
        assert f"cannot use the data folder {home}" in one_sentence(run.complaint())
    home.unlink()


@pytest.mark.parametrize("name", ["redis", "logs", "edge", "spool"])
def test_a_file_where_a_folder_belongs(home, name):
    home.mkdir()
    (home / name).write_text("")
    with up(home) as run:
        assert f"cannot use the data folder {home}: {name}: File exists" in one_sentence(run.complaint())


def test_a_database_folder_that_is_none(home):
    (home / "postgres").mkdir(parents=True)
    (home / "postgres" / "notes.txt").write_text("mine")
    with up(home) as run:
        assert "is not a PostgreSQL data folder" in one_sentence(run.complaint())
    assert (home / "postgres" / "notes.txt").read_text() == "mine"


def test_a_broken_redis_file(home):
    (home / "redis").mkdir(parents=True)
    (home / "redis" / "appendonly.aof").write_text("this is no append-only file\n")
    with up(home) as run:
        said = one_sentence(run.complaint())
    assert "redis did not start" in said
    assert "append only file" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="this is a normal user already")
def test_it_runs_as_a_normal_user(home):
    user = pwd.getpwnam("nobody")
    # Root's Python and checkout may be in a private folder: reading there is the one thing this user may do beyond its
    # own rights.
    reads = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    prefix = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", *reads, "--")
    home.mkdir()
    os.chown(home, user.pw_uid, user.pw_gid)
    with up(home, prefix=prefix) as run:
        run.wait_up()
        assert {psutil.Process(pid).uids().real for pid in run.pids.values()} == {user.pw_uid}
        assert run.paste_curl().status_code == 200
        run.send(signal.SIGINT)
        assert run.wait() == 0


def test_help_names_what_can_be_set():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "budgetguard.cli", "up", "--help"], capture_output=True, text=True, check=True
    )
    for name in (
        "PORT",
        "METRICS_PORT",
        "DATABASE_URL",
        "REDIS_URL",
        "ADMIN_API_KEY",
        "OPENAI_API_KEY",
        "BUDGETGUARD_HOME",
    ):
        assert name in done.stdout
