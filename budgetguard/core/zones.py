"""Time zones, of the locked tzdata package alone.

A window must begin at the same instant in every process on every machine. The host's own zone files, which ``zoneinfo``
prefers, may be older or newer, and have names that mean something else on each host (``localtime``, ``posixrules``).
"""

from functools import cache
from importlib.resources import files
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

ZONE_EXPECTED = "an IANA time zone, such as Europe/Berlin"

# What a host has before anybody has set its zone: listed, but no place's.
_NO_PLACE_S = frozenset({"Factory"})


@cache
def zone_names() -> frozenset[str]:
    """List the zones that there are."""
    return frozenset(files("tzdata").joinpath("zones").read_text().split()) - _NO_PLACE_S


@cache
def zone_of(name: str) -> ZoneInfo:
    """Return a zone; only those that there are stay in memory.

    Raises:
        ZoneInfoNotFoundError: there is none of this name.
    """
    if name not in zone_names():
        msg = f"no time zone {name[:80]!r}"
        raise ZoneInfoNotFoundError(msg)
    with files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)
