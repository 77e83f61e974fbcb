"""What a call can cost at the most, decided before it is let through: the hold that ``reserve.lua`` is asked for."""

from dataclasses import dataclass

from budgetguard.core.budget import UNBOUNDED_TOKENS
from budgetguard.core.money import CALL_NANOS_MAX, ceil_div, format_usd
from budgetguard.core.pricing import DEFAULT_TIER, FEMTOS_PER_NANO, SERVICE_TIERS, RateCard
from budgetguard.core.providers.api import RequestFacts
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.slices import StreamSlices
from budgetguard.core.snapshot import TenantSnapshot

# The smallest output bound that a call is clamped to: providers take none below it. One that names less keeps its own.
OUTPUT_TOKENS_MIN = 16

# The input of a call that reads more than was sent (a stored conversation, a file by id) on a model of unknown size.
CONTEXT_WINDOW_UNKNOWN = 1_050_000

# genai-prices rounds context windows (1,000,000 for a window of 1,047,576): a bound must not be rounded down.
_CONTEXT_WINDOW_SLACK_PERCENT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldPlan:
    """The range of holds that a call can be let through with.

    ``hold_nanos`` is the whole hold: ``input_nanos``, with all else that does not depend on the output bound (fees of
    tools), plus ``output_tokens`` (all choices) at ``output_femtos`` each. ``output_tokens`` counts one choice's bound;
    ``output_femtos`` is the price of one such token of every choice. When that does not fit, the bound may be lowered
    down to ``output_tokens_min`` (equal to ``output_tokens`` when it may not). ``eighth``: the request named no bound
    of its own, so it takes its tenant's share of what is left. With ``slices`` the output bound is only what is held at
    first: the stream tops up, and no bound is written into it. ``search_nanos`` is what the search costs that the call
    makes for certain, if it does.
    """

    input_tokens_bound: int
    input_nanos: int
    output_tokens: int
    output_tokens_min: int
    output_femtos: int
    hold_nanos: int
    eighth: bool
    service_tier: str
    search_nanos: int = 0
    slices: StreamSlices | None = None


def plan_hold(
    request: RequestFacts,
    *,
    tenant: TenantSnapshot,
    rate_card: RateCard,
    context_window: int | None,
    output_tokens_largest: int | None,
    shows_all_it_writes: bool = False,
) -> HoldPlan | Deny:
    """Bound a call's cost.

    ``context_window`` and ``output_tokens_largest`` are the model's own bounds in tokens, ``None`` where unknown;
    ``shows_all_it_writes`` says that its output can be counted as it is streamed.
    """
    tier = request.service_tier if request.service_tier in SERVICE_TIERS else DEFAULT_TIER
    if tier != DEFAULT_TIER and not rate_card.has_tier(tier):
        return Deny(
            Reason.REQUEST_INVALID,
            f"No price is known for service_tier {tier!r} of this model, so it cannot be metered.",
            param="service_tier",
        )
    input_tokens = _input_tokens_bound(request, context_window) + request.input_tokens_beyond_window
    output_femtos = (
        request.choices * rate_card.output_femtos_max(input_tokens, tier=tier, audio=request.audio)
        if request.has_output
        else 0
    )
    search_nanos = max(request.web_search_nanos, rate_card.web_search_nanos_max(tier=tier))
    input_nanos = (
        rate_card.input_nanos_max(input_tokens, tier=tier, audio=request.audio)
        + ceil_div(request.output_tokens_extra * output_femtos, FEMTOS_PER_NANO)
        + request.web_searches * search_nanos
        + request.tool_fee_nanos
    )
    slices = None
    if shows_all_it_writes and output_tokens_largest is not None:
        slices = _slices(request, tenant, output_tokens_largest, output_femtos=output_femtos, input_nanos=input_nanos)
    wanted, smallest = _output_tokens(request, tenant, output_tokens_largest, slices)
    hold_nanos = input_nanos + ceil_div(wanted * output_femtos, FEMTOS_PER_NANO)
    if hold_nanos > CALL_NANOS_MAX:
        return Deny(
            Reason.REQUEST_INVALID,
            f"This call could cost ${format_usd(hold_nanos)}; one call can be held for "
            f"${format_usd(CALL_NANOS_MAX)} at the most. Lower its output bound.",
            param=request.output_field,
        )
    return HoldPlan(
        input_tokens_bound=input_tokens,
        input_nanos=input_nanos,
        output_tokens=wanted,
        output_tokens_min=smallest,
        output_femtos=output_femtos,
        hold_nanos=hold_nanos,
        eighth=request.has_output and request.output_tokens_max is None and slices is None,
        service_tier=tier,
        search_nanos=search_nanos if request.always_searches else 0,
        slices=slices,
    )


def _input_tokens_bound(request: RequestFacts, context_window: int | None) -> int:
    window = ceil_div((context_window or CONTEXT_WINDOW_UNKNOWN) * (100 + _CONTEXT_WINDOW_SLACK_PERCENT), 100)
    if request.input_tokens_bound is None:
        return window
    if context_window is None:
        return request.input_tokens_bound
    # Embeddings take a batch whose sum may exceed the window of one input; nothing caps it but what was sent.
    return min(request.input_tokens_bound, window) if request.has_output else request.input_tokens_bound


def _slices(
    request: RequestFacts, tenant: TenantSnapshot, largest: int, *, output_femtos: int, input_nanos: int
) -> StreamSlices | None:
    """Decide whether a call holds its output in slices: a stream that names no bound and can be counted."""
    if not request.stream or not request.has_output or request.output_tokens_max is not None:
        return None
    # Audio is written in tokens that are many bytes each: counted by its bytes, no budget would do.
    if request.hidden_output or request.audio or not tenant.stream_slice_tokens:
        return None
    if input_nanos + ceil_div(largest * output_femtos, FEMTOS_PER_NANO) > CALL_NANOS_MAX:
        return None
    return StreamSlices(
        slice_tokens=tenant.stream_slice_tokens,
        choices=request.choices,
        output_femtos=output_femtos,
        output_tokens_largest=largest,
        overrun=tenant.overrun,
    )


def _output_tokens(
    request: RequestFacts, tenant: TenantSnapshot, largest: int | None, slices: StreamSlices | None
) -> tuple[int, int]:
    """Return the output bound to ask for and the smallest that will do."""
    if not request.has_output:
        return 0, 0
    if request.output_tokens_max is not None:
        wanted = request.output_tokens_max
        return wanted, min(wanted, OUTPUT_TOKENS_MIN) if tenant.clamp else wanted
    default = tenant.output_tokens_max if slices is None else slices.slice_tokens
    wanted = default if largest is None else min(largest, default)
    # There is no bound of the caller's to break; but a tenant that is refused rather than cut short is not cut to 16.
    return wanted, min(wanted, OUTPUT_TOKENS_MIN if tenant.clamp else UNBOUNDED_TOKENS)
