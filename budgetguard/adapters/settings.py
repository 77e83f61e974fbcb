"""Reads a program's settings out of its environment, once; a wrong value is one clear sentence."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

# Linux' sockaddr_un holds 108 bytes with the closing zero.
UNIX_PATH_BYTES_MAX = 107
_HOST_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")


class SettingsError(ValueError):
    """A setting is missing or malformed. The message says ``NAME: expected ..., got ...`` and shows no secret."""


class Environment:
    """Typed access to environment variables. An empty value counts as unset, as docker-compose passes it."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def _raw(self, name: str) -> str | None:
        return self._variables.get(name, "").strip() or None

    def _value(self, name: str, default: str | None, expected: str) -> str:
        value = self._raw(name) or default
        if value is None:
            raise SettingsError(f"{name}: expected {expected}, got nothing")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text; required when there is no default."""
        return self._value(name, default, "a value")

    def optional(self, name: str) -> str | None:
        """Return a text, or ``None`` when it is not set."""
        return self._raw(name)

    def secret(self, name: str, *, bytes_min: int = 1) -> str:
        """Return a required secret; it is never part of a message."""
        value = self._value(name, None, "a secret")
        if len(value.encode()) < bytes_min:
            raise SettingsError(f"{name}: expected a secret of at least {bytes_min} bytes, got {len(value.encode())}")
        if not value.isascii() or not value.isprintable():
            raise SettingsError(f"{name}: expected printable ASCII, as a header can carry it")
        return value

    def url(self, name: str, default: str | None = None, *, schemes: Sequence[str]) -> str:
        """Return a URL of one of ``schemes``. It may hold a password, so messages show its scheme only."""
        expected = "a URL that starts with " + " or ".join(f"{scheme}://" for scheme in schemes)
        value = self._value(name, default, expected)
        try:
            parts = urlsplit(value)
            _ = parts.port
        except ValueError:
            raise SettingsError(f"{name}: expected {expected}, got a malformed URL") from None
        if parts.scheme not in schemes:
            shown = f"{parts.scheme}://..." if "://" in value else "no URL"
            raise SettingsError(f"{name}: expected {expected}, got {shown}")
        if not parts.netloc and not parts.path and not parts.query:
            raise SettingsError(f"{name}: expected {expected}, got one without a host")
        return value

    def integer(self, name: str, default: int | None = None, *, minimum: int, maximum: int) -> int:
        """Return a whole number within its bounds."""
        expected = f"a whole number from {minimum} to {maximum}"
        value = self._value(name, None if default is None else str(default), expected)
        if not re.fullmatch(r"-?[0-9]{1,18}", value) or not minimum <= int(value) <= maximum:
            raise SettingsError(f"{name}: expected {expected}, got {value[:40]!r}")
        return int(value)

    def choice(self, name: str, values: Sequence[str], default: str | None = None) -> str:
        """Return one of ``values``."""
        expected = " or ".join(values)
        value = self._value(name, default, expected)
        if value not in values:
            raise SettingsError(f"{name}: expected {expected}, got {value[:40]!r}")
        return value

    def address(self, name: str, default: str | None = None) -> str:
        """Return an address to listen on: ``unix:/path.sock`` or ``host:port``, as gRPC spells them."""
        expected = "unix:/path.sock or host:port"
        value = self._value(name, default, expected)
        if value.startswith("unix:"):
            path = value.removeprefix("unix:")
            if not path.startswith("/") or path.startswith("//"):
                raise SettingsError(f"{name}: expected {expected} with an absolute path, got {value[:120]!r}")
            if len(path.encode()) > UNIX_PATH_BYTES_MAX:
                raise SettingsError(
                    f"{name}: expected a socket path of at most {UNIX_PATH_BYTES_MAX} bytes, got {path!r}"
                )
            return value
        return _host_port(name, value, expected)

    def host_port(self, name: str) -> str | None:
        """Return a ``host:port`` to listen on, or ``None`` when it is not set."""
        value = self._raw(name)
        return None if value is None else _host_port(name, value, "host:port")

    def path(self, name: str, default: Path | None = None) -> Path:
        """Return a file or folder path; it need not exist."""
        return Path(self._value(name, None if default is None else str(default), "a path")).expanduser()


def _host_port(name: str, value: str, expected: str) -> str:
    match = _HOST_PORT.fullmatch(value)
    if match is None or not 0 < int(match["port"]) <= 65_535:
        raise SettingsError(f"{name}: expected {expected}, got {value[:120]!r}")
    return value
