"""One admitted call's life: a hold, then one end with a rank.

A higher rank that comes later posts the difference; the same or a lower one changes nothing.
"""

from dataclasses import dataclass
from enum import StrEnum


class End(StrEnum):
    """How an operation ended, as ledger rows name it."""

    EXPIRED = "EXPIRED"
    ESTIMATED = "ESTIMATED"
    RELEASED = "RELEASED"
    CONFIRMED = "CONFIRMED"
    CORRECTED = "CORRECTED"


# RELEASED is a proof that the call cost nothing, so it ranks with the provider's own word.
RANK: dict[End, int] = {End.EXPIRED: 1, End.ESTIMATED: 2, End.RELEASED: 3, End.CONFIRMED: 3, End.CORRECTED: 4}

# A hold nobody renews is a lease that runs out.
LEASE_MS = 90_000
RENEW_EVERY_MS = 30_000

# An ended operation is remembered this long in Redis; older replays are decided by Postgres' unique index.
ENDED_KEPT_MS = 15 * 60_000


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationFacts:
    """What is known of a call at admission and goes into its ledger rows unchanged: also whose spend it is.

    ``tags`` are the ids of the call's tags and of all their ancestors at that moment. An empty ``session_id`` or
    ``end_user`` was not told. ``session_name`` and ``session_path`` are what the call calls its session and where it
    is in it: for people, so nothing counts by them. ``model`` is what the call asks for, as it was sent;
    ``priced_model`` the model whose price it is charged by, which is one for all spellings of a model. Empty, as in
    what was recorded before it was known: ``model`` itself.
    """

    operation_id: str
    tenant_id: str
    key_id: str
    held_at_ms: int
    api: str
    provider_id: str
    model: str
    price_version: str
    stream: bool
    tags: tuple[str, ...] = ()
    session_id: str = ""
    end_user: str = ""
    session_name: str = ""
    session_path: str = ""
    priced_model: str = ""
