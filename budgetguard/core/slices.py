"""Streams without an output bound: they hold a slice of output at a time and top up before they outgrow it."""

from dataclasses import dataclass, replace

from budgetguard.core.money import ceil_div
from budgetguard.core.pricing import FEMTOS_PER_NANO

# A smaller top-up than this many tokens a choice is not worth a trip: it would be outgrown within a second or two.
TOP_UP_TOKENS_MIN = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSlices:
    """How one stream tops up.

    ``slice_tokens`` and ``output_tokens_largest`` (the model's own bound) are of one choice, of which there are
    ``choices``; ``output_femtos`` is the price of one token of each of them. ``overrun``: what does not fit is held all
    the same, and the stream runs on.
    """

    slice_tokens: int
    choices: int
    output_femtos: int
    output_tokens_largest: int
    overrun: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a stream's hold pays for: ``output_tokens`` of each choice.

    ``counted`` is, here and below, an upper bound of the output of all choices together: the provider's tokenizer is
    not ours, but no token is shorter than a byte. So a hold runs some four times ahead of what a text will cost, up to
    the model's own bound, beyond which there is nothing to hold for.
    """

    slices: StreamSlices
    output_tokens: int
    hold_nanos: int

    @property
    def is_whole(self) -> bool:
        """Whether it pays for all that the model can write."""
        return self.output_tokens >= self.slices.output_tokens_largest

    def is_outgrown_by(self, counted: int) -> bool:
        """Whether the hold may not pay for this."""
        return not self.is_whole and counted > self.output_tokens * self.slices.choices

    def is_running_out(self, counted: int) -> bool:
        """Whether less than half a slice is left: what the provider is writing meanwhile should be held already."""
        return self.is_outgrown_by(counted + self.slices.slice_tokens * self.slices.choices // 2)

    def topped_up(self, counted: int) -> "Allowance":
        """Return the next larger one: a slice beyond what this one pays for, or beyond what is counted already."""
        reached = max(self.output_tokens, ceil_div(counted, self.slices.choices))
        return self._with(reached + self.slices.slice_tokens)

    def whole(self) -> "Allowance":
        """Return one that pays for all that the model can write."""
        return self._with(self.slices.output_tokens_largest)

    def topped_up_within(self, room_nanos: int, counted: int) -> "Allowance | None":
        """Return as large a one as ``room_nanos`` more pay for; ``None`` when that is too little to go on with."""
        femtos = self.slices.output_femtos
        if not femtos:
            return self.topped_up(counted)
        grown = self._with(self.output_tokens + max(room_nanos, 0) * FEMTOS_PER_NANO // femtos)
        reached = max(self.output_tokens, ceil_div(counted, self.slices.choices))
        return grown if grown.is_whole or grown.output_tokens >= reached + TOP_UP_TOKENS_MIN else None

    def _with(self, output_tokens: int) -> "Allowance":
        tokens = min(output_tokens, max(self.slices.output_tokens_largest, self.output_tokens))
        more_nanos = ceil_div((tokens - self.output_tokens) * self.slices.output_femtos, FEMTOS_PER_NANO)
        return replace(self, output_tokens=tokens, hold_nanos=self.hold_nanos + more_nanos)
