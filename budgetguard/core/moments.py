"""Moments as people and APIs read them."""

from datetime import UTC, datetime


def rfc3339(moment_ms: int) -> str:
    """Spell a moment in UTC, to the second where it has no fraction: ``2026-12-01T00:00:00Z``."""
    moment = datetime.fromtimestamp(moment_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds" if moment_ms % 1000 else "seconds").replace("+00:00", "Z")
