"""The data folder of one machine's stack: its lock, its secrets, and the short folder for sockets that goes with it."""

import fcntl
import os
import secrets
import stat
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import IO

_ADMIN_KEY_BYTES = 32


class HomeError(Exception):
    """The data folder cannot be used; the message is one sentence for the person at the terminal."""


class Home:
    """Everything of one stack below one folder. Opening takes the lock; the lock ends with the process or ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Make the folder and take it for this process.

        Raises:
            HomeError: it cannot be made or written, or another process has it.
        """
        # Root's database runs as another user, who must be able to pass through.
        mode = 0o711 if os.geteuid() == 0 else 0o700
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=mode)
            lock = (self.path / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise HomeError(f"cannot use the data folder {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            pid = lock.read().strip()
            lock.close()
            raise HomeError(
                f"budgetguard already runs on {self.path} (pid {pid or 'unknown'}): stop it, or set BUDGETGUARD_HOME"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        for folder in (self.logs, self.redis_data, self.edge, self.spool):
            try:
                folder.mkdir(exist_ok=True, mode=0o700)
            except OSError as error:
                self.close()
                raise HomeError(f"cannot use the data folder {self.path}: {folder.name}: {error.strerror}") from error

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    @property
    def logs(self) -> Path:
        """One log a part."""
        return self.path / "logs"

    @property
    def postgres_data(self) -> Path:
        """PostgreSQL's data."""
        return self.path / "postgres"

    @property
    def redis_data(self) -> Path:
        """Redis' append-only file."""
        return self.path / "redis"

    @property
    def edge(self) -> Path:
        """Envoy's rendered configuration and the clusters that the control plane writes."""
        return self.path / "edge"

    @property
    def spool(self) -> Path:
        """Settles that Redis could not take."""
        return self.path / "spool"

    @property
    def pids(self) -> Path:
        """The parts of the last run."""
        return self.path / "parts.json"

    def run_dir(self) -> Path:
        """Make the folder for sockets: short, since the kernel takes 107 bytes, and nobody else's.

        Raises:
            HomeError: somebody else has a folder of that name.
        """
        mark = sha256(os.fsencode(self.path)).hexdigest()[:12]
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        base = Path(runtime) if runtime and os.access(runtime, os.W_OK) and len(runtime) < 40 else _shared_folder()
        folder = base / f"budgetguard-{os.geteuid()}-{mark}"
        mode = 0o711 if os.geteuid() == 0 else 0o700
        try:
            folder.mkdir(mode=mode, exist_ok=True)
            status = folder.lstat()
        except OSError as error:
            raise HomeError(f"cannot make {folder} for sockets: {error.strerror}") from error
        if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
            raise HomeError(f"{folder}, where our sockets belong, is somebody else's: remove it")
        folder.chmod(mode)
        return folder

    def admin_key(self) -> tuple[str, bool]:
        """Return the administrator's key, and whether it was made just now."""
        key = self.read_secret("admin-key")
        if key is not None:
            return key, False
        key = secrets.token_urlsafe(_ADMIN_KEY_BYTES)
        self.write_secret("admin-key", key)
        return key, True

    def read_secret(self, name: str) -> str | None:
        """Read what ``write_secret`` wrote."""
        try:
            return (self.path / name).read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None

    def write_secret(self, name: str, text: str) -> None:
        """Keep a secret that only this user may read; the file appears whole or not at all."""
        unfinished = self.path / f".{name}.unfinished"
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        unfinished.replace(self.path / name)


def _shared_folder() -> Path:
    """Find the machine's folder for short-lived files; a long TMPDIR (macOS) is no place for sockets."""
    folder = Path(tempfile.gettempdir())
    return folder if len(str(folder)) < 40 else Path("/tmp")  # noqa: S108 - our folder in it is checked for its owner
