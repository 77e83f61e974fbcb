"""Logs of all three programs: one JSON object a line on stderr, with the program's name, and never a secret."""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

# What must not reach a log even when it is part of an exception's text: our keys (their id may), the providers' keys,
# bearer tokens, and passwords inside URLs.
_SECRETS = (
    (re.compile(r"(bg_[a-z0-9-]{1,63}_[a-z0-9]{16}_)[A-Za-z0-9_-]{43}"), r"\1..."),
    (re.compile(r"\b(sk-|AIza)[A-Za-z0-9_-]{8,}"), r"\1..."),
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}"), r"\1..."),
    (re.compile(r"(://[^/\s:@]*:)[^/\s@]+@"), r"\1...@"),
)
_STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
# One line of a log; a provider's page of HTML in an exception is cut.
_TEXT_CHARS_MAX = 8_000


def without_secrets(text: str) -> str:
    """Blank every secret that can be recognised."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class JsonLines(logging.Formatter):
    """One JSON object a record; what a caller gives as ``extra`` become members of their own."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        """Spell one record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "program": self._program,
            "logger": record.name,
            "message": without_secrets(record.getMessage())[:_TEXT_CHARS_MAX],
        }
        for name, value in record.__dict__.items():
            if name not in _STANDARD_FIELDS:
                line[name] = value if isinstance(value, bool | int | float | None) else without_secrets(str(value))
        if record.exc_info:
            line["exception"] = without_secrets(self.formatException(record.exc_info))[-_TEXT_CHARS_MAX:]
        # Not orjson: it refuses lone surrogates and large integers, and a log line must always come out.
        return json.dumps(line)


def configure_logging(program: str, *, level: int = logging.INFO) -> None:
    """Send every log record of this process to stderr. Called once, by ``__main__``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(program))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.captureWarnings(capture=True)
