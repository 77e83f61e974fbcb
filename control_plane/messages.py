"""Between the messages of proto/ and the values of core: no decision is made here."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from budgetguard.core import entities
from budgetguard.core.limits import carried_nanos, limit_nanos, topped_up_nanos
from budgetguard.core.money import format_usd
from budgetguard.core.operation import End, OperationFacts
from budgetguard.core.pricing import PriceOverride
from budgetguard.core.snapshot import KeyStatus, Mode, Status, SubjectKind, WindowKind
from budgetguard.core.usage import Usage
from budgetguard.core.window import Window
from budgetguard.v1 import (
    api_key_pb2,
    budget_event_pb2,
    budget_pb2,
    price_pb2,
    provider_pb2,
    rate_limit_pb2,
    session_pb2,
    tag_pb2,
    tenant_pb2,
    top_up_pb2,
    usage_pb2,
)

PERIODS = {
    WindowKind.DAY: budget_pb2.Budget.DAILY,
    WindowKind.WEEK: budget_pb2.Budget.WEEKLY,
    WindowKind.MONTH: budget_pb2.Budget.MONTHLY,
    WindowKind.QUARTER: budget_pb2.Budget.QUARTERLY,
    WindowKind.YEAR: budget_pb2.Budget.YEARLY,
    WindowKind.ROLLING: budget_pb2.Budget.ROLLING,
    WindowKind.FIXED: budget_pb2.Budget.CUSTOM,
    WindowKind.LIFETIME: budget_pb2.Budget.LIFETIME,
}
WINDOWS = {period: window for window, period in PERIODS.items()}
MODES = {
    Mode.ENFORCE: budget_pb2.Budget.ENFORCE,
    Mode.OBSERVE: budget_pb2.Budget.OBSERVE,
}
EACHES = {
    SubjectKind.API_KEY: budget_pb2.Budget.EACH_API_KEY,
    SubjectKind.TAG: budget_pb2.Budget.EACH_TAG,
    SubjectKind.SESSION: budget_pb2.Budget.EACH_SESSION,
    SubjectKind.END_USER: budget_pb2.Budget.EACH_END_USER,
    SubjectKind.MODEL: budget_pb2.Budget.EACH_MODEL,
    SubjectKind.PROVIDER: budget_pb2.Budget.EACH_PROVIDER,
}
EACHES_BACK = {message: kind for kind, message in EACHES.items()}
MODES_BACK = {message: mode for mode, message in MODES.items()}
TENANT_STATUSES = {
    Status.ACTIVE: tenant_pb2.Tenant.ACTIVE,
    Status.SUSPENDED: tenant_pb2.Tenant.SUSPENDED,
    Status.DELETED: tenant_pb2.Tenant.DELETED,
}
TENANT_STATUSES_BACK = {message: status for status, message in TENANT_STATUSES.items()}
KEY_STATUSES = {
    KeyStatus.ACTIVE: api_key_pb2.ApiKey.ACTIVE,
    KeyStatus.REVOKED: api_key_pb2.ApiKey.REVOKED,
}
TAG_STATUSES = {
    entities.TagStatus.ACTIVE: tag_pb2.Tag.ACTIVE,
    entities.TagStatus.INACTIVE: tag_pb2.Tag.INACTIVE,
}
TAG_STATUSES_BACK = {message: status for status, message in TAG_STATUSES.items()}
SESSION_STATUSES = {
    entities.SessionStatus.ACTIVE: session_pb2.Session.ACTIVE,
    entities.SessionStatus.INACTIVE: session_pb2.Session.INACTIVE,
}
ENDS = {
    End.EXPIRED: usage_pb2.LedgerRow.EXPIRED,
    End.ESTIMATED: usage_pb2.LedgerRow.ESTIMATED,
    End.RELEASED: usage_pb2.LedgerRow.RELEASED,
    End.CONFIRMED: usage_pb2.LedgerRow.CONFIRMED,
    End.CORRECTED: usage_pb2.LedgerRow.CORRECTED,
}
ENDS_BACK = {message: end for end, message in ENDS.items()}
GROUPS = {
    usage_pb2.SumUsageRequest.GROUP_BY_UNSPECIFIED: entities.UsageGroup.DAY,
    usage_pb2.SumUsageRequest.DAY: entities.UsageGroup.DAY,
    usage_pb2.SumUsageRequest.MODEL: entities.UsageGroup.MODEL,
    usage_pb2.SumUsageRequest.API_KEY: entities.UsageGroup.API_KEY,
    usage_pb2.SumUsageRequest.TAG: entities.UsageGroup.TAG,
    usage_pb2.SumUsageRequest.SESSION: entities.UsageGroup.SESSION,
    usage_pb2.SumUsageRequest.END_USER: entities.UsageGroup.END_USER,
    usage_pb2.SumUsageRequest.PROVIDER: entities.UsageGroup.PROVIDER,
}


def timestamp(milliseconds: int) -> Timestamp:
    """Spell Unix milliseconds as a Timestamp."""
    seconds, rest = divmod(milliseconds, 1000)
    return Timestamp(seconds=seconds, nanos=rest * 10**6)


def duration_of(milliseconds_: int) -> Duration:
    """Spell milliseconds as a Duration."""
    seconds, rest = divmod(milliseconds_, 1000)
    return Duration(seconds=seconds, nanos=rest * 10**6)


def instant_text(milliseconds_: int | None) -> str:
    """Spell Unix milliseconds in RFC 3339; empty for ``None``."""
    return "" if milliseconds_ is None else timestamp(milliseconds_).ToJsonString()


def tenant_message(tenant: entities.Tenant) -> tenant_pb2.Tenant:
    """Spell a tenant."""
    return tenant_pb2.Tenant(
        tenant_id=tenant.tenant_id,
        name=tenant.name,
        status=TENANT_STATUSES[tenant.status],
        rate_limit_per_min=tenant.requests_per_minute,
        output_tokens_max=tenant.output_tokens_max,
        clamp=tenant.clamp,
        etag=str(tenant.version),
        create_time=timestamp(tenant.created_at_ms),
        update_time=timestamp(tenant.updated_at_ms),
        tokens_per_min=tenant.tokens_per_minute,
        concurrent_calls=tenant.concurrent_calls,
        unbounded_share=tenant.unbounded_share,
        stream_slice_tokens=tenant.stream_slice_tokens,
        overrun=tenant.overrun,
        required_tags=tenant.required_tags,
    )


def rate_limit_message(tenant: entities.Tenant) -> rate_limit_pb2.RateLimit:
    """Spell a tenant's rate limit."""
    return rate_limit_pb2.RateLimit(
        tenant_id=tenant.tenant_id, rate_limit_per_min=tenant.requests_per_minute, etag=str(tenant.version)
    )


def api_key_message(api_key: entities.ApiKey) -> api_key_pb2.ApiKey:
    """Spell an API key; its secret is not known here."""
    return api_key_pb2.ApiKey(
        id=api_key.key_id,
        tenant_id=api_key.tenant_id,
        name=api_key.name,
        status=KEY_STATUSES[api_key.status],
        rate_limit_per_min=api_key.requests_per_minute,
        expire_time=None if api_key.expires_at_ms is None else timestamp(api_key.expires_at_ms),
        create_time=timestamp(api_key.created_at_ms),
        revoke_time=None if api_key.revoked_at_ms is None else timestamp(api_key.revoked_at_ms),
        etag=str(api_key.version),
        tokens_per_min=api_key.tokens_per_minute,
        concurrent_calls=api_key.concurrent_calls,
        tags=api_key.tags,
    )


def tag_message(tag: entities.Tag) -> tag_pb2.Tag:
    """Spell a tag."""
    return tag_pb2.Tag(
        tenant_id=tag.tenant_id,
        tag_id=tag.tag_id,
        name=tag.name,
        parent_id=tag.parent_id,
        path=tag.path,
        status=TAG_STATUSES[tag.status],
        etag=str(tag.version),
        create_time=timestamp(tag.created_at_ms),
        update_time=timestamp(tag.updated_at_ms),
    )


def session_message(session: entities.Session) -> session_pb2.Session:
    """Spell a session."""
    first, last = session.first_call_at_ms, session.last_call_at_ms
    return session_pb2.Session(
        tenant_id=session.tenant_id,
        session_id=session.session_id,
        name=session.name,
        path=session.path,
        status=SESSION_STATUSES[session.status],
        first_call_time=None if first is None else timestamp(first),
        last_call_time=None if last is None else timestamp(last),
        calls=session.calls,
        spent_usd=format_usd(session.spent_nanos),
    )


def budget_message(
    budget: entities.Budget,
    *,
    window: Window | None = None,
    counted: tuple[int, int] | None = None,
    ready: bool = True,
    now_ms: int = 0,
) -> budget_pb2.Budget:
    """Spell a budget; with its open window when (spent, held) are known, as of ``now_ms``.

    ``ready``: whether the counters are signed off.
    """
    state = budget_pb2.Budget.SEEDING if budget.seeding else budget_pb2.Budget.ACTIVE
    message = budget_pb2.Budget(
        id=budget.budget_id,
        tenant_id=budget.tenant_id,
        period=PERIODS[budget.window],
        amount_usd=format_usd(budget.limit_nanos),
        mode=MODES[budget.mode],
        start_date=instant_text(budget.starts_at_ms),
        end_date=instant_text(budget.ends_at_ms),
        etag=str(budget.version),
        create_time=timestamp(budget.created_at_ms),
        update_time=timestamp(budget.updated_at_ms),
        each=EACHES[budget.subject_kind] if budget.each else budget_pb2.Budget.EACH_UNSPECIFIED,
        subjects_max=budget.subjects_max if budget.each else 0,
        time_zone=budget.zone,
        anchor_day=budget.anchor_day,
        anchor_month=budget.anchor_month,
        rolling_period=None if budget.rolling_ms is None else duration_of(budget.rolling_ms),
        rollover_cap_usd="" if budget.rollover_cap_nanos is None else format_usd(budget.rollover_cap_nanos),
        threshold_bps=budget.threshold_bps,
        state=state if ready else budget_pb2.Budget.REBUILDING,
    )
    if budget.subject:
        setattr(message, entities.SUBJECT_FIELDS[budget.subject_kind], budget.subject)
    if window is not None and counted is not None:
        spec = budget.spec()
        spent, held = counted
        limit = limit_nanos(spec, window, now_ms)
        message.window.CopyFrom(
            budget_pb2.BudgetWindow(
                start_time=timestamp(window.starts_at_ms),
                reset_time=None if window.resets_at_ms is None else timestamp(window.resets_at_ms),
                spent_usd=format_usd(spent),
                held_usd=format_usd(held),
                remaining_usd=format_usd(max(0, limit - spent - held)),
                effective_limit_usd=format_usd(limit),
                carried_usd=format_usd(carried_nanos(spec, window)),
                topped_up_usd=format_usd(topped_up_nanos(spec, now_ms)),
            )
        )
    return message


def top_up_message(top_up: entities.BudgetTopUp) -> top_up_pb2.TopUp:
    """Spell a top-up."""
    return top_up_pb2.TopUp(
        id=top_up.top_up_id,
        budget_id=top_up.budget_id,
        tenant_id=top_up.tenant_id,
        amount_usd=format_usd(top_up.amount_nanos),
        start_time=timestamp(top_up.starts_at_ms),
        expire_time=None if top_up.expires_at_ms is None else timestamp(top_up.expires_at_ms),
        reason=top_up.reason,
        create_time=timestamp(top_up.created_at_ms),
        remove_time=None if top_up.removed_at_ms is None else timestamp(top_up.removed_at_ms),
    )


def budget_event_message(event: entities.BudgetEvent) -> budget_event_pb2.BudgetEvent:
    """Spell what has happened to a budget."""
    resets_at_ms = event.window_resets_at_ms
    return budget_event_pb2.BudgetEvent(
        id=str(event.event_id),
        tenant_id=event.tenant_id,
        budget_id=event.budget_id,
        subject=event.subject,
        threshold_bps=event.threshold_bps,
        spent_usd=format_usd(event.spent_nanos),
        limit_usd=format_usd(event.limit_nanos),
        mode=MODES[event.mode],
        window_start_time=timestamp(event.window_starts_at_ms),
        window_reset_time=None if resets_at_ms is None else timestamp(resets_at_ms),
        create_time=timestamp(event.happened_at_ms),
    )


def provider_message(provider: entities.Provider) -> provider_pb2.Provider:
    """Spell a provider."""
    return provider_pb2.Provider(
        provider_id=provider.provider_id,
        kind=provider.kind,
        base_url=provider.base_url,
        api_key_env=provider.api_key_env,
        enabled=provider.enabled,
        etag=str(provider.version),
    )


def price_message(price: PriceOverride) -> price_pb2.Price:
    """Spell a price."""
    return price_pb2.Price(
        id=price.price_id,
        provider_id=price.provider_id,
        model=price.model,
        usd={unit: f"{usd:f}" for unit, usd in price.usd.items()},
        start_date=instant_text(price.starts_at_ms),
        end_date=instant_text(price.ends_at_ms),
    )


def units_message(usage: Usage) -> usage_pb2.UnitCounts:
    """Spell counts; what was not reported stays absent."""
    return usage_pb2.UnitCounts(**usage.reported())


def hold_message(facts: OperationFacts, hold_nanos: int) -> usage_pb2.Hold:
    """Spell a call under way."""
    return usage_pb2.Hold(
        operation_id=facts.operation_id,
        api_key_id=facts.key_id,
        api=facts.api,
        provider_id=facts.provider_id,
        model=facts.model,
        stream=facts.stream,
        hold_usd=format_usd(hold_nanos),
        hold_time=timestamp(facts.held_at_ms),
        tags=facts.tags,
        session_id=facts.session_id,
        end_user=facts.end_user,
    )


def ledger_message(row: entities.LedgerRow) -> usage_pb2.LedgerRow:
    """Spell a ledger row."""
    return usage_pb2.LedgerRow(
        operation_id=row.operation_id,
        sequence=row.sequence,
        tenant_id=row.tenant_id,
        api_key_id=row.key_id,
        api=row.api,
        provider_id=row.provider_id,
        model=row.model,
        stream=row.stream,
        end=ENDS[row.end],
        delta_usd=format_usd(row.delta_nanos),
        amount_usd=format_usd(row.amount_nanos),
        hold_usd=format_usd(row.hold_nanos),
        units=None if row.usage is None else units_message(row.usage),
        price_version=row.price_version,
        rate_tier=row.rate_tier,
        http_status=row.status,
        detail=row.detail,
        hold_time=timestamp(row.held_at_ms),
        end_time=timestamp(row.ended_at_ms),
        record_time=timestamp(row.recorded_at_ms),
        tags=row.tags,
        session_id=row.session_id,
        end_user=row.end_user,
        priced_model=row.priced_model,
    )


def sum_message(usage_sum: entities.UsageSum) -> usage_pb2.UsageSum:
    """Spell a sum."""
    return usage_pb2.UsageSum(
        group=usage_sum.group,
        operations=usage_sum.operations,
        cost_usd=format_usd(usage_sum.cost_nanos),
        units=units_message(usage_sum.usage),
    )
