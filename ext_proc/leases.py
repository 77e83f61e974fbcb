"""Renews the holds of calls that are still open: a hold is a lease."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from budgetguard.core.handoff import Handoff
from budgetguard.core.operation import RENEW_EVERY_MS

logger = logging.getLogger(__name__)

SWEEP_EVERY_SECONDS = 1.0
# Redis takes some 30 us for one; more at a time would only queue for connections that settles need.
AT_A_TIME = 16


class Renewing(Protocol):
    """What is needed of the budget counters. Raises ``CountersUnavailableError``."""

    async def renew(self, *, tenant_id: str, operation_id: str, now_ms: int) -> bool:
        """Prolong a hold's lease; false when there is no such hold."""


@dataclass(slots=True)
class _Lease:
    tenant_id: str
    due_at_ms: int


class Leases:
    """The open calls, by operation id. One sweep for all of them costs a short call next to nothing."""

    def __init__(
        self, counters: Renewing, *, now_ms: Callable[[], int], sweep_every_seconds: float = SWEEP_EVERY_SECONDS
    ) -> None:
        self._counters = counters
        self._now_ms = now_ms
        self._sweep_every_seconds = sweep_every_seconds
        self._open: dict[str, _Lease] = {}
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to renew."""
        self._sweeping = asyncio.create_task(self._sweep_for_ever())

    async def close(self) -> None:
        """Stop renewing; what is open then expires."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)

    def add(self, handoff: Handoff) -> None:
        """Renew this call's hold from now on."""
        facts = handoff.facts
        self._open[facts.operation_id] = _Lease(facts.tenant_id, self._now_ms() + RENEW_EVERY_MS)

    def remove(self, handoff: Handoff) -> None:
        """The call has ended."""
        self._open.pop(handoff.facts.operation_id, None)

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_every_seconds)
            await self.sweep()

    async def sweep(self) -> None:
        """Renew what is due. What Redis does not take stays due: the lease is three times as long."""
        now_ms = self._now_ms()
        due = [operation_id for operation_id, lease in self._open.items() if lease.due_at_ms <= now_ms]
        for start in range(0, len(due), AT_A_TIME):
            batch = due[start : start + AT_A_TIME]
            results = await asyncio.gather(*map(self._renew, batch), return_exceptions=True)
            failures = [result for result in results if isinstance(result, BaseException)]
            if failures:
                logger.warning("%d holds could not be renewed for now: %s", len(due) - start, failures[0])
                return

    async def _renew(self, operation_id: str) -> None:
        lease = self._open.get(operation_id)
        if lease is None:
            return
        now_ms = self._now_ms()
        alive = await self._counters.renew(tenant_id=lease.tenant_id, operation_id=operation_id, now_ms=now_ms)
        if alive:
            lease.due_at_ms = now_ms + RENEW_EVERY_MS
        elif self._open.pop(operation_id, None):
            # Its settle will charge all the same, and by rank replace what expiry assumed.
            logger.warning("the hold of %s is gone while its call is open", operation_id)
