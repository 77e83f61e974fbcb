"""What a call is charged, given what was seen of it by the time it ended."""

from dataclasses import dataclass
from enum import Enum

from budgetguard.core.budget import Settlement
from budgetguard.core.events import DETAIL_CHARS_MAX
from budgetguard.core.handoff import Handoff
from budgetguard.core.money import CALL_NANOS_MAX, ceil_div, format_usd
from budgetguard.core.operation import End
from budgetguard.core.pricing import DEFAULT_TIER, FEMTOS_PER_NANO
from budgetguard.core.usage import Usage

# Gateways in front of a provider say this when it did not answer them in time: the model may have run, and be billed.
_GATEWAY_TIMEOUTS = frozenset({408, 504, 524})

# Envoy's response code details, up to their first brace, that prove that no provider saw the request.
_NEVER_FORWARDED = frozenset(
    {
        "cluster_not_found",
        "direct_response",
        "maintenance_mode",
        "no_healthy_upstream",
        "request_payload_too_large",
        "route_not_found",
    }
)
# Of a request that was reset before an answer: the reasons that no byte of it was sent, or that HTTP/2 (REFUSED_STREAM)
# guarantees not to have been looked at. Other resets (of an open connection) prove nothing.
_RESET = "upstream_reset_before_response_started"
_RESET_UNSENT = frozenset(
    {
        "connection_failure",
        "connection_timeout",
        "local_connection_failure",
        "local_refused_stream_reset",
        "overflow",
        "remote_connection_failure",
        "remote_refused_stream_reset",
    }
)


class Origin(Enum):
    """Who answered."""

    PROVIDER = "the provider"
    EDGE_BEFORE_FORWARDING = "the edge, which never forwarded the call"
    EDGE = "the edge, after the call may have been forwarded"


def origin_of(code_details: str) -> Origin:
    """Tell from Envoy's ``response.code_details`` who answered. An unknown text proves nothing."""
    name, _, rest = code_details.partition("{")
    if name == "via_upstream":
        return Origin.PROVIDER
    if name in _NEVER_FORWARDED:
        return Origin.EDGE_BEFORE_FORWARDING
    # {reason}, or {reason|what the transport said}
    reason = rest.partition("|")[0].rstrip("}")
    if name == _RESET and reason in _RESET_UNSENT:
        return Origin.EDGE_BEFORE_FORWARDING
    return Origin.EDGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was seen of an admitted call.

    ``forwarded`` is false only while it is certain that no byte went to the provider. ``status`` is the HTTP status
    that the client was told, 0 when none was; ``code_details`` Envoy's word on it. ``complete``: the answer came to its
    end, else the client left, or the provider or the edge broke off. ``usage`` is the last report (a running total
    while not complete). ``output_tokens`` counts, as an upper estimate, what went past; ``None`` where it could not be
    counted: no event stream, or not in a form that could be read. ``error_object``: the body was the API's own error.
    ``closed``: why the stream was ended here, if it was; ``remark``: what else its ledger row has to tell.
    """

    forwarded: bool
    status: int = 0
    code_details: str = ""
    complete: bool = False
    usage: Usage | None = None
    service_tier: str | None = None
    output_tokens: int | None = None
    error_object: bool = False
    closed: str = ""
    remark: str = ""


def conclude(handoff: Handoff, seen: Seen, *, ended_at_ms: int) -> Settlement:
    """End a call: CONFIRMED by the provider's usage, RELEASED by a proof that it cost nothing, else ESTIMATED."""
    tier = _tier(handoff, seen)
    search_nanos = 0 if seen.usage is not None and seen.usage.web_searches is not None else handoff.search_nanos
    reported_nanos = None
    if seen.usage is not None:
        reported_nanos = min(handoff.rate_card.cost_nanos(seen.usage, tier=tier) + search_nanos, CALL_NANOS_MAX)
    if reported_nanos is not None and seen.complete and _covers(seen.usage, handoff):
        end, amount_nanos, detail = End.CONFIRMED, reported_nanos, seen.closed
    elif reported_nanos is None and (proof := _proof_of_no_cost(seen)):
        end, amount_nanos, detail = End.RELEASED, 0, proof
    else:
        estimate_nanos = _estimate_nanos(handoff, seen)
        # A partial report may already be more than the estimate, even than the hold: the provider's word counts.
        end, amount_nanos, detail = End.ESTIMATED, max(estimate_nanos, reported_nanos or 0), _why_unknown(seen)
    searched = f"${format_usd(search_nanos)} of it for a web search" if search_nanos and amount_nanos else ""
    return Settlement(
        handoff=handoff,
        end=end,
        amount_nanos=amount_nanos,
        usage=seen.usage,
        ended_at_ms=ended_at_ms,
        status=seen.status,
        detail="; ".join(filter(None, (detail, searched, seen.remark)))[:DETAIL_CHARS_MAX],
        rate_tier=tier,
    )


def _tier(handoff: Handoff, seen: Seen) -> str:
    """Return the tier that the provider says it served, else the one that was asked for."""
    tier = handoff.service_tier if seen.service_tier is None else seen.service_tier
    return tier if handoff.rate_card.has_tier(tier) else DEFAULT_TIER


def _covers(usage: Usage | None, handoff: Handoff) -> bool:
    """Whether a report names each half of the call that money was held for."""
    if usage is None or usage.input_tokens is None:
        return False
    return usage.output_tokens is not None or handoff.output_tokens_bound == 0


def _proof_of_no_cost(seen: Seen) -> str | None:
    """Say what proves that nothing is billed; ``None`` without proof."""
    if not seen.forwarded:
        return "never forwarded"
    if seen.status == 0:
        return None
    origin = origin_of(seen.code_details)
    if origin is Origin.EDGE_BEFORE_FORWARDING:
        return f"never forwarded: {seen.code_details}"
    if origin is Origin.EDGE or seen.status < 400:
        return None
    if seen.status in _GATEWAY_TIMEOUTS and not seen.error_object:
        return None
    return f"the provider answered {seen.status}"


def _why_unknown(seen: Seen) -> str:
    if seen.status == 0:
        return "ended before an answer"
    if origin_of(seen.code_details) is not Origin.PROVIDER:
        return f"no answer of the provider: {seen.code_details}"
    if not seen.complete:
        return seen.closed or "cut off before its usage"
    return "no usage reported" if seen.usage is None else "usage reported in part"


def _estimate_nanos(handoff: Handoff, seen: Seen) -> int:
    """Estimate a forwarded call: a stream its input, the output counted so far and its search, else its whole hold.

    Never more than the hold, which is the most that the call can cost: the count is of bytes, not of tokens.
    """
    if seen.output_tokens is None:
        return handoff.hold_nanos
    card, tier, input_tokens = handoff.rate_card, handoff.service_tier, handoff.input_tokens_bound
    # The handoff does not say whether audio is in it. Its price is the dearer one; the hold knew, and caps it.
    input_nanos = card.input_nanos_max(input_tokens, tier=tier, audio=True)
    output_femtos = seen.output_tokens * card.output_femtos_max(input_tokens, tier=tier, audio=True)
    output_nanos = ceil_div(output_femtos, FEMTOS_PER_NANO)
    return min(input_nanos + output_nanos + handoff.search_nanos, handoff.hold_nanos)
