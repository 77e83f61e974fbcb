"""QuoteService."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from budgetguard.core.admission import HoldPlan
from budgetguard.core.asking import PricedModel, call_facts, clamped_to, model_unknown, plan_call, reserve_of
from budgetguard.core.budget import AppliedLimit, Reserve, Reserved, applied_budgets
from budgetguard.core.catalog import ProviderSpec
from budgetguard.core.errors import InvalidError
from budgetguard.core.limits import limit_nanos
from budgetguard.core.money import format_usd
from budgetguard.core.operation import OperationFacts
from budgetguard.core.pricing import PriceUnknownError
from budgetguard.core.providers import DEFAULT_API, REGISTRY, InvalidRequestError, ProviderApi, RequestFacts, find_api
from budgetguard.core.quoting import Remedy, Standing, remedy, verdict
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.refusals import COUNTERS_NOT_READY, deny_of
from budgetguard.core.snapshot import BudgetSpec, SubjectKind
from budgetguard.core.window import bounds
from budgetguard.v1 import quote_pb2, quote_pb2_grpc
from control_plane.callers import Caller, Callers, read_headers
from control_plane.errors import DeniedError
from control_plane.json_body import Members, parse_object
from control_plane.messages import MODES, PERIODS, timestamp

_MEMBERS = ("route", "request")


class Prices(Protocol):
    """Prices and providers; see ``PriceBook``."""

    def provider_for(self, kind: str) -> ProviderSpec | None: ...
    def priced(self, *, provider_id: str, model: str, now_ms: int) -> PricedModel: ...


class Standings(Protocol):
    """What the counters say; see ``StandingReader``. Raises ``CountersUnavailableError``."""

    async def read(self, request: Reserve) -> Standing: ...
    async def counted(self, tenant_id: str, names: Sequence[str]) -> list[tuple[int, int]] | None: ...


class QuoteService(quote_pb2_grpc.QuoteServiceServicer):
    """Tells callers what a call would be told. ``now_ms`` is the clock, in Unix milliseconds."""

    def __init__(
        self,
        *,
        callers: Callers,
        prices: Prices,
        standings: Standings,
        now_ms: Callable[[], int],
    ) -> None:
        self._callers = callers
        self._prices = prices
        self._standings = standings
        self._now_ms = now_ms

    async def Quote(self, request: quote_pb2.QuoteRequest, context: Any) -> quote_pb2.QuoteResponse:
        caller = await self._callers.find(read_headers(context.invocation_metadata() or ()))
        route, body = _asked(request)
        api = find_api("POST", route)
        if api is None:
            raise _denied(Deny(Reason.ROUTE_UNKNOWN))
        facts = _parse(api, body)
        asked, plan = self._reserve(caller, api, facts)
        standing = await self._standings.read(asked)
        if not standing.ready:
            raise DeniedError(COUNTERS_NOT_READY)
        answer = verdict(asked, standing)
        message = quote_pb2.QuoteResponse(
            cost_min_usd=format_usd(asked.input_nanos),
            cost_max_usd=format_usd(asked.hold_nanos),
            output_tokens=asked.output_tokens,
        )
        if isinstance(answer, Reserved):
            message.would_pass = True
            message.hold_usd = format_usd(answer.hold_nanos)
            message.output_tokens = answer.output_tokens
            clamped = clamped_to(facts, plan.slices, answer)
            if clamped is not None:
                message.clamped_max_tokens = clamped
            return message
        message.refusal.CopyFrom(_refusal(deny_of(answer)))
        message.remedy.CopyFrom(_remedy(remedy(asked, answer, standing)))
        return message

    async def ListOwnBudgets(
        self, request: quote_pb2.ListOwnBudgetsRequest, context: Any
    ) -> quote_pb2.ListOwnBudgetsResponse:
        caller = await self._callers.find(read_headers(context.invocation_metadata() or ()))
        now_ms = self._now_ms()
        provider = self._prices.provider_for(DEFAULT_API.provider_kind)
        told = caller.context
        facts = OperationFacts(
            operation_id="",
            tenant_id=caller.tenant.tenant_id,
            key_id=caller.key.key_id,
            held_at_ms=now_ms,
            api=DEFAULT_API.name,
            provider_id="" if provider is None else provider.provider_id,
            model=request.model,
            price_version="",
            stream=False,
            tags=told.tags,
            session_id=told.session_id,
            end_user=told.end_user,
            priced_model=self._priced_model(provider, request.model, now_ms),
        )
        limits = [
            limit
            for limit in applied_budgets(caller.tenant, facts, now_ms)
            # Without a model, or a provider, no template of them has a subject.
            if limit.subject or limit.scope is SubjectKind.TENANT
        ]
        counted = await self._standings.counted(facts.tenant_id, [limit.counter for limit in limits])
        if counted is None:
            raise DeniedError(COUNTERS_NOT_READY)
        specs = {spec.budget_id: spec for spec in caller.tenant.budgets}
        return quote_pb2.ListOwnBudgetsResponse(
            budgets=[
                _own_budget(specs[limit.budget_id], limit, row, now_ms)
                for limit, row in zip(limits, counted, strict=True)
            ]
        )

    def _priced_model(self, provider: ProviderSpec | None, model: str, now_ms: int) -> str:
        if provider is None:
            return ""
        try:
            return self._prices.priced(provider_id=provider.provider_id, model=model, now_ms=now_ms).model
        except PriceUnknownError:
            return ""

    def _reserve(self, caller: Caller, api: ProviderApi, request: RequestFacts) -> tuple[Reserve, HoldPlan]:
        provider = self._prices.provider_for(api.provider_kind)
        if provider is None:
            raise DeniedError(Deny(Reason.PROVIDER_UNAVAILABLE, f"No {api.provider_kind} provider is set up."))
        now_ms = self._now_ms()
        provider_id = provider.provider_id
        try:
            priced = self._prices.priced(provider_id=provider_id, model=request.model, now_ms=now_ms)
        except PriceUnknownError:
            raise _denied(model_unknown(request.model)) from None
        plan = plan_call(request, tenant=caller.tenant, provider_id=provider_id, priced=priced)
        if isinstance(plan, Deny):
            raise _denied(plan)
        facts = call_facts(
            request,
            operation_id="quote",
            key=caller.key,
            context=caller.context,
            api=api.name,
            provider_id=provider_id,
            priced=priced,
            now_ms=now_ms,
        )
        return reserve_of(request, plan, facts=facts, tenant=caller.tenant, key=caller.key), plan


def _asked(request: quote_pb2.QuoteRequest) -> tuple[str, bytes]:
    """Return the route and the body that are asked about, the body byte for byte.

    Raises:
        InvalidError: names the field that is wrong.
    """
    if not request.HasField("rest_body"):
        route, body = request.route, request.request
    else:
        route, body = _from_json(request.rest_body.data)
    if not route:
        raise InvalidError("route", f"expected one of {', '.join(REGISTRY)}")
    if not body:
        raise InvalidError("request", "expected the body of the call")
    return route, body


def _from_json(data: bytes) -> tuple[str, bytes]:
    members = parse_object(data)
    names = [name for name, _ in members]
    for name in names:
        if name not in _MEMBERS:
            raise InvalidError(name, f"unknown field; expected one of {', '.join(_MEMBERS)}")
        if names.count(name) > 1:
            raise InvalidError(name, "expected once, given twice")
    given = dict(members)
    route = given.get("route")
    if type(route) is not str:  # a number is a str of another type
        raise InvalidError("route", f"expected one of {', '.join(REGISTRY)}")
    if not isinstance(given.get("request"), Members):
        raise InvalidError("request", "expected the body of the call, a JSON object")
    return route, spelled_members(data.decode())["request"].encode()


def spelled_members(text: str) -> Mapping[str, str]:
    """Return each member of a JSON object as it is spelled: bounds count bytes. ``text`` was parsed before."""
    decoder = json.JSONDecoder()
    spelled: dict[str, str] = {}
    at = text.index("{") + 1
    while True:
        at = _past_space(text, at)
        if text[at] == "}":
            return spelled
        name, at = decoder.raw_decode(text, at)
        begin = _past_space(text, text.index(":", at) + 1)
        _, end = decoder.raw_decode(text, begin)
        spelled[name] = text[begin:end]
        at = _past_space(text, end)
        at += text[at] == ","


def _past_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _parse(api: ProviderApi, body: bytes) -> RequestFacts:
    try:
        return api.parse_request(body)
    except InvalidRequestError as invalid:
        raise _denied(Deny(Reason.REQUEST_INVALID, str(invalid), param=invalid.param)) from None


def _denied(deny: Deny) -> DeniedError:
    """Refuse what is asked about: its field is below ``request`` here."""
    return DeniedError(deny, field="request" if deny.param is None else f"request.{deny.param}")


def _refusal(deny: Deny) -> quote_pb2.QuoteRefusal:
    return quote_pb2.QuoteRefusal(
        reason=deny.reason.value,
        http_status=deny.telling.http_status,
        message=deny.message,
        facts={
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in deny.facts.items()
            if value is not None
        },
    )


def _remedy(found: Remedy) -> quote_pb2.QuoteRemedy:
    return quote_pb2.QuoteRemedy(
        max_tokens=found.output_tokens,
        not_before=None if found.not_before_ms is None else timestamp(found.not_before_ms),
        short_usd="" if found.short_nanos is None else format_usd(found.short_nanos),
    )


def _own_budget(spec: BudgetSpec, limit: AppliedLimit, counted: tuple[int, int], now_ms: int) -> quote_pb2.OwnBudget:
    spent, held = counted
    window = bounds(spec, now_ms)
    if window is None:
        raise AssertionError("a budget that applies has a window")
    # What it would refuse at; an observed one refuses nothing.
    limit_now = limit_nanos(spec, window, now_ms)
    return quote_pb2.OwnBudget(
        id=limit.budget_id,
        subject_kind=limit.scope.value,
        subject=limit.subject,
        period=PERIODS[spec.window],
        mode=MODES[spec.mode],
        limit_usd=format_usd(limit_now),
        spent_usd=format_usd(spent),
        held_usd=format_usd(held),
        remaining_usd=format_usd(max(0, limit_now - spent - held)),
        window_starts_at=timestamp(limit.starts_at_ms),
        resets_at=None if limit.resets_at_ms is None else timestamp(limit.resets_at_ms),
        enforced=limit.enforced,
    )
