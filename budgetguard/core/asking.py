"""What the counters are asked for a call: shared by who admits calls and by who only quotes them."""

from dataclasses import dataclass

from budgetguard.core.admission import HoldPlan, plan_hold
from budgetguard.core.budget import Reserve, Reserved
from budgetguard.core.context import CallContext
from budgetguard.core.model_limits import shows_all_it_writes
from budgetguard.core.operation import OperationFacts
from budgetguard.core.pricing import RateCard
from budgetguard.core.providers.api import RequestFacts
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.slices import StreamSlices
from budgetguard.core.snapshot import KeySnapshot, TenantSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedModel:
    """What admission needs to know of a model; bounds are ``None`` where unknown.

    ``model`` is the one whose price it is: the shipped record's id, or the model of a price row of our own.
    """

    model: str
    rate_card: RateCard
    context_window: int | None
    output_tokens_largest: int | None


def model_unknown(model: str) -> Deny:
    """Refuse a call whose model has no price."""
    detail = f"No price is known for model {model!r}, so it cannot be metered."
    return Deny(Reason.MODEL_UNKNOWN, detail, param="model")


def plan_call(
    request: RequestFacts, *, tenant: TenantSnapshot, provider_id: str, priced: PricedModel
) -> HoldPlan | Deny:
    """Bound the cost of a call to this provider."""
    return plan_hold(
        request,
        tenant=tenant,
        rate_card=priced.rate_card,
        context_window=priced.context_window,
        output_tokens_largest=priced.output_tokens_largest,
        shows_all_it_writes=shows_all_it_writes(provider_id=provider_id, model=request.model),
    )


def call_facts(
    request: RequestFacts,
    *,
    operation_id: str,
    key: KeySnapshot,
    context: CallContext,
    api: str,
    provider_id: str,
    priced: PricedModel,
    now_ms: int,
) -> OperationFacts:
    """Say what a call is, as its hold and its ledger rows keep it."""
    return OperationFacts(
        operation_id=operation_id,
        tenant_id=key.tenant_id,
        key_id=key.key_id,
        held_at_ms=now_ms,
        api=api,
        provider_id=provider_id,
        model=request.model,
        price_version=priced.rate_card.version,
        stream=request.stream,
        tags=context.tags,
        session_id=context.session_id,
        end_user=context.end_user,
        session_name=context.session_name,
        session_path=context.session_path,
        priced_model=priced.model,
    )


def reserve_of(
    request: RequestFacts, plan: HoldPlan, *, facts: OperationFacts, tenant: TenantSnapshot, key: KeySnapshot
) -> Reserve:
    """Ask for the hold of a call at the moment that its facts name."""
    return Reserve(
        facts=facts,
        tenant=tenant,
        key=key,
        now_ms=facts.held_at_ms,
        input_nanos=plan.input_nanos,
        output_femtos=plan.output_femtos,
        output_tokens=plan.output_tokens,
        output_tokens_min=plan.output_tokens_min,
        input_tokens=plan.input_tokens_bound,
        choices=request.choices if request.has_output else 0,
        eighth=plan.eighth,
    )


def clamped_to(request: RequestFacts, slices: StreamSlices | None, reserved: Reserved) -> int | None:
    """Return the output bound that is written into the request; ``None``: it goes on as it came."""
    # A stream that tops up gets no bound: it is ended when there is nothing left to top up from.
    clamped = request.has_output and slices is None and reserved.output_tokens != request.output_tokens_max
    return reserved.output_tokens if clamped else None
