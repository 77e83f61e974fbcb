"""Moments as people and APIs read them."""

from datetime import UTC, datetime

# What is configured lies in the years 1970 to 9999: at the ends of what a datetime holds, arithmetic overflows and
# Postgres reads infinity. The first day of 1970 begins a day before it does in UTC, somewhere.
EARLIEST_MS = -86_400_000
LATEST_MS = 253_402_300_799_999


def rfc3339(moment_ms: int) -> str:
    """Spell a moment in UTC, to the second where it has no fraction: ``2026-12-01T00:00:00Z``."""
    moment = datetime.fromtimestamp(moment_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds" if moment_ms % 1000 else "seconds").replace("+00:00", "Z")
