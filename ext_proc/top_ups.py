"""Keeps the hold of one stream ahead of what it writes, or says why the stream must end."""

import asyncio
import logging
from dataclasses import replace
from typing import Protocol

from budgetguard.adapters.redis.client import CountersUnavailableError
from budgetguard.core.budget import NotReady
from budgetguard.core.closing import Closing, budget_exhausted, counters_unavailable
from budgetguard.core.extension import Extended, Extension, ExtensionRefused, NoHold
from budgetguard.core.handoff import Handoff
from budgetguard.core.reasons import Reason
from budgetguard.core.slices import Allowance, StreamSlices

logger = logging.getLogger(__name__)

# A top-up that was asked for ahead of need, and not given, is asked for again after this.
ASK_AHEAD_AGAIN_SECONDS = 1.0
# How long a piece that its hold may not pay for waits for Redis: a restart, or a moment of silence.
WAIT_SECONDS = 2.0
RETRY_SECONDS = 0.1

Answer = Extended | ExtensionRefused | NoHold | NotReady | CountersUnavailableError


class Extending(Protocol):
    """What is needed of the budget counters. Raises ``CountersUnavailableError``."""

    async def extend(self, extension: Extension) -> Extended | ExtensionRefused | NoHold | NotReady:
        """Raise a hold, or say why not; asked again, nothing changes."""


class TopUps:
    """Feed it the count of the stream's output with ``cover``, before the output passes."""

    def __init__(self, handoff: Handoff, slices: StreamSlices, counters: Extending) -> None:
        self._handoff = handoff
        self._counters = counters
        self._allowance = Allowance(
            slices=slices, output_tokens=handoff.output_tokens_bound, hold_nanos=handoff.hold_nanos
        )
        self._ask_ahead_at = 0.0
        # What the ledger row has to tell of an overrun.
        self.remark = ""

    @property
    def handoff(self) -> Handoff:
        """The call, with what is held for it now."""
        allowance = self._allowance
        return replace(self._handoff, hold_nanos=allowance.hold_nanos, output_tokens_bound=allowance.output_tokens)

    async def cover(self, counted: int, *, cost_nanos: int | None = None) -> Closing | None:
        """Hold more when the hold runs out; say why the stream must end when what is counted is not paid for.

        ``cost_nanos``: the provider has told what the whole answer costs, so that alone must be paid for.
        """
        if cost_nanos is not None:
            return await self._cover_now(counted, cost_nanos) if cost_nanos > self._allowance.hold_nanos else None
        if not self._allowance.is_running_out(counted):
            return None
        if self._allowance.is_outgrown_by(counted):
            return await self._cover_now(counted, None)
        now = asyncio.get_running_loop().time()
        if now >= self._ask_ahead_at and not isinstance(
            await self._extend(self._allowance.topped_up(counted)), Extended
        ):
            self._ask_ahead_at = now + ASK_AHEAD_AGAIN_SECONDS
        return None

    async def cover_whole(self) -> None:
        """Hold all that the answer can cost, whatever the limits say: it comes whole, billed before it is seen."""
        whole = self._allowance.whole()
        if whole != self._allowance:
            await self._extend(whole, force=True)
            self._allowance = whole

    async def _cover_now(self, counted: int, cost_nanos: int | None) -> Closing | None:
        grown = self._allowance.topped_up(counted)
        if cost_nanos is not None:
            grown = replace(grown, hold_nanos=cost_nanos)
        answer = await self._insist(grown)
        if isinstance(answer, ExtensionRefused) and cost_nanos is None:
            little = self._allowance.topped_up_within(answer.room_nanos, counted)
            if little is not None:
                answer = await self._insist(little)
        if isinstance(answer, Extended):
            return None
        closing = self._closing(answer)
        if not self._allowance.slices.overrun:
            logger.info("%s of %s", closing.detail, self._handoff.facts.operation_id)
            return closing
        await self._run_on(grown, answer)
        return None

    async def _run_on(self, grown: Allowance, answer: Answer) -> None:
        """Go beyond what fits, as the tenant wants it: held if that is possible, and charged in any case."""
        if isinstance(answer, ExtensionRefused):
            await self._extend(grown, force=True)
            self.remark = f"overrun: budget {answer.limit.budget_id} is exhausted"
        else:
            self.remark = self.remark or "overrun: no top-up"
        logger.warning("%s, %s runs on", self.remark, self._handoff.facts.operation_id)
        self._allowance = grown

    async def _insist(self, wanted: Allowance) -> Answer:
        """Ask, again and again while Redis cannot say, as long as a piece may wait: what runs on anyway does not."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (0.0 if wanted.slices.overrun else WAIT_SECONDS)
        while True:
            answer = await self._extend(wanted)
            can_say = not isinstance(answer, NotReady | CountersUnavailableError)
            if can_say or loop.time() + RETRY_SECONDS >= deadline:
                return answer
            await asyncio.sleep(RETRY_SECONDS)

    async def _extend(self, wanted: Allowance, *, force: bool = False) -> Answer:
        facts = self._handoff.facts
        extension = Extension(
            tenant_id=facts.tenant_id,
            operation_id=facts.operation_id,
            counters=self._handoff.counters,
            hold_nanos=wanted.hold_nanos,
            hold_tokens=self._handoff.input_tokens_bound + wanted.output_tokens * wanted.slices.choices,
            force=force,
        )
        try:
            answer = await self._counters.extend(extension)
        except CountersUnavailableError as error:
            return error
        if isinstance(answer, Extended):
            self._allowance = wanted
        return answer

    def _closing(self, answer: Answer) -> Closing:
        if isinstance(answer, ExtensionRefused):
            return budget_exhausted(answer, hold_nanos=self._allowance.hold_nanos)
        return counters_unavailable(
            Reason.COUNTERS_UNAVAILABLE if isinstance(answer, CountersUnavailableError) else Reason.COUNTERS_NOT_READY
        )
