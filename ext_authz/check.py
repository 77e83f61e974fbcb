"""The decision before a call: who, what, how dear at most, may it; then one reservation. Knows no transport."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from budgetguard.adapters.prices import PriceBook
from budgetguard.adapters.redis.client import CountersUnavailableError, NotRunError
from budgetguard.core.admission import HoldPlan
from budgetguard.core.asking import call_facts, clamped_to, model_unknown, plan_call, reserve_of
from budgetguard.core.budget import NotReady, Refusal, Reserve, Reserved, ReserveRefused
from budgetguard.core.catalog import ProviderSpec
from budgetguard.core.context import CallContext, Contexts
from budgetguard.core.handoff import Handoff
from budgetguard.core.identity import Credentials, authenticate, read_credentials
from budgetguard.core.moments import rfc3339
from budgetguard.core.money import format_usd
from budgetguard.core.operation import OperationFacts
from budgetguard.core.policy import Policy, PolicyInput, PolicyUnavailableError
from budgetguard.core.pricing import PriceUnknownError
from budgetguard.core.providers import DEFAULT_API, ProviderApi, find_api
from budgetguard.core.providers.api import InvalidRequestError, RequestFacts
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.refusals import COUNTERS_NOT_READY, deny_of
from budgetguard.core.snapshot import CallerRecords, KeySnapshot, TenantSnapshot
from ext_authz.attempts import Seen
from ext_authz.call import Admitted, IncomingCall, Refused, refuse
from ext_authz.failures import Failure, Failures
from ext_authz.large_bodies import LargeBodiesError
from ext_authz.records import Records

# What takes longer is answered (and undone) by us, before Envoy gives up: it waits for 2 s.
CHECK_SECONDS = 0.25
# More, for a large body: on a busy machine 10 MiB take most of it to arrive and to be read.
LARGE_BODY_SECONDS = 1.5

# A stale record is loaded again and the call decided anew; records that change faster than that are refused.
STALE_RETRIES = 2

# A body of 10 MiB takes up to half a second: above this size it is read in another process.
LARGE_BODY_BYTES = 256 * 1024

logger = logging.getLogger(__name__)


class Counters(Protocol):
    """The transition that admission uses; raises ``CountersUnavailableError``, ``NotRunError`` if nothing is held."""

    async def reserve(self, request: Reserve) -> Reserved | ReserveRefused:
        """Hold a call's money, or say why not."""


class Releases(Protocol):
    """Frees holds of calls that are not forwarded."""

    def submit(self, handoff: Handoff, *, detail: str) -> None:
        """Begin to free a hold that may exist; neither waits nor fails."""


class BodyReader(Protocol):
    """Reads a body that would keep the loop for too long; see ``LargeBodies``."""

    async def parse(self, api: ProviderApi, body: bytes) -> RequestFacts:
        """Read what is metered of it; raises ``InvalidRequestError`` and ``LargeBodiesError``."""


class Refusals(Protocol):
    """Takes note of refused calls; see ``RefusalLog``."""

    def record(self, deny: Deny, *, call: IncomingCall, api: str, seen: Seen) -> None:
        """Record a refusal, if its key was authenticated; neither waits nor fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Caller:
    tenant: TenantSnapshot
    key: KeySnapshot
    context: CallContext


@dataclass(frozen=True, slots=True, kw_only=True)
class _Route:
    api: ProviderApi
    provider: ProviderSpec
    authorization: str | None


class Checker:
    """Decides calls. ``now_ms`` is the clock, in Unix milliseconds; ``is_metered`` says whether ext_proc is there."""

    def __init__(
        self,
        *,
        counters: Counters,
        releases: Releases,
        records: Records,
        prices: PriceBook,
        policy: Policy,
        provider_key: Callable[[str], str | None],
        now_ms: Callable[[], int],
        failures: Failures,
        large_bodies: BodyReader,
        refusals: Refusals,
        is_metered: Callable[[], bool] = lambda: True,
    ) -> None:
        self._counters = counters
        self._releases = releases
        self._records = records
        self._prices = prices
        self._policy = policy
        self._provider_key = provider_key
        self._now_ms = now_ms
        self._failures = failures
        self._large_bodies = large_bodies
        self._refusals = refusals
        self._is_metered = is_metered
        self._contexts = Contexts()

    async def check(self, call: IncomingCall) -> Admitted | Refused:
        """Admit or refuse one call. When the caller gives up on the answer (cancels), a hold is freed again."""
        api = find_api(call.method, call.path)
        if api is None:
            return refuse(Deny(Reason.ROUTE_UNKNOWN), call=call, api=DEFAULT_API)
        if not call.operation_id:
            logger.error("no x-request-id: the edge must make one a call, and send raw headers")
            return refuse(Deny(Reason.INTERNAL), call=call, api=api)
        seen = Seen()
        seconds = CHECK_SECONDS + (LARGE_BODY_SECONDS if len(call.body) > LARGE_BODY_BYTES else 0.0)
        try:
            async with asyncio.timeout(seconds):
                answer = await self._decide(call, api, seen)
        except CountersUnavailableError as error:
            if not isinstance(error, NotRunError):
                self._undo(seen.reserving, detail="counters unavailable")
            answer = self._failed(Failure.COUNTERS, call, str(error))
        except TimeoutError:
            self._undo(seen.reserving, detail="check deadline")
            answer = self._failed(Failure.DEADLINE, call, f"no decision within {seconds} s")
        except asyncio.CancelledError:
            self._undo(seen.reserving, detail="check given up")
            raise
        if isinstance(answer, Deny):
            self._refusals.record(answer, call=call, api=api.name, seen=seen)
            return refuse(answer, call=call, api=api)
        return answer

    def give_up(self, admitted: Admitted) -> None:
        """Free an admitted call's hold: nobody waited for the answer, so it was never forwarded."""
        self._undo([admitted.handoff], detail="check given up")

    async def _decide(self, call: IncomingCall, api: ProviderApi, seen: Seen) -> Admitted | Deny:
        credentials = read_credentials(call.headers)
        if isinstance(credentials, Deny):
            return credentials
        caller = await self._authenticate(call, credentials, seen)
        if isinstance(caller, Deny):
            return caller
        request = await self._parse(call, api)
        if isinstance(request, Deny):
            return request
        seen.model = request.model
        route = self._route(call, api, credentials)
        if isinstance(route, Deny):
            return route
        seen.provider_id = route.provider.provider_id
        if not self._is_metered():
            return self._failed(Failure.METER, call, "ext_proc does not run")
        for _ in range(STALE_RETRIES + 1):
            answer = await self._reserve(call, caller, request, route, seen.reserving)
            if not isinstance(answer, ReserveRefused):
                return answer
            seen.reserving.clear()
            if answer.kind is not Refusal.STALE:
                return deny_of(answer)
            caller = await self._authenticate_for_sure(call, credentials, seen)
            if isinstance(caller, Deny):
                return caller
        return self._failed(Failure.RECORDS, call, f"records of {credentials.key.tenant_id} kept changing")

    async def _authenticate(self, call: IncomingCall, credentials: Credentials, seen: Seen) -> _Caller | Deny:
        """Find who calls, and for whom. A refusal needs more than a cached record, or that Redis has none."""
        presented = credentials.key
        found = await self._records.find(tenant_id=presented.tenant_id, key_id=presented.key_id)
        caller = self._caller(call, credentials, found, seen)
        return await self._authenticate_for_sure(call, credentials, seen) if isinstance(caller, Deny) else caller

    async def _authenticate_for_sure(self, call: IncomingCall, credentials: Credentials, seen: Seen) -> _Caller | Deny:
        presented = credentials.key
        found = await self._records.find_for_sure(tenant_id=presented.tenant_id, key_id=presented.key_id)
        return COUNTERS_NOT_READY if isinstance(found, NotReady) else self._caller(call, credentials, found, seen)

    def _caller(self, call: IncomingCall, credentials: Credentials, found: CallerRecords, seen: Seen) -> _Caller | Deny:
        tenant, key = found.tenant, found.key
        deny = authenticate(credentials, tenant=tenant, key=key, now_ms=self._now_ms())
        # Whoever knows the secret is known, also when the key is of no use any more.
        seen.key = None if deny and deny.reason is Reason.API_KEY_UNKNOWN else key
        if deny is not None:
            return deny
        if tenant is None or key is None:
            raise AssertionError("authenticate admits known ones only")
        context = self._contexts.read(
            call.headers, tenant=tenant, key=key, not_utf8=call.not_utf8, repeated=call.repeated
        )
        if isinstance(context, Deny):
            seen.context = None
            return context
        seen.context = context
        return _Caller(tenant=tenant, key=key, context=context)

    async def _parse(self, call: IncomingCall, api: ProviderApi) -> RequestFacts | Deny:
        if call.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            return Deny(Reason.BODY_ENCODED)
        try:
            if len(call.body) <= LARGE_BODY_BYTES:
                return api.parse_request(call.body)
            return await self._large_bodies.parse(api, call.body)
        except InvalidRequestError as invalid:
            return Deny(Reason.REQUEST_INVALID, str(invalid), param=invalid.param)
        except LargeBodiesError as error:
            return self._failed(Failure.LARGE_BODIES, call, str(error))

    def _route(self, call: IncomingCall, api: ProviderApi, credentials: Credentials) -> _Route | Deny:
        provider = self._prices.provider_for(api.provider_kind)
        if provider is None:
            why = f"No {api.provider_kind} provider is set up."
            return self._failed(Failure.CATALOG, call, why, told=why)
        authorization = credentials.upstream_authorization
        if authorization is None and provider.api_key_env:
            provider_key = self._provider_key(provider.api_key_env)
            if provider_key is None:
                told = f"No key is set up for provider {provider.provider_id!r}."
                return self._failed(Failure.PROVIDER_KEY, call, f"{provider.api_key_env} is not set", told=told)
            authorization = f"Bearer {provider_key}"
        return _Route(api=api, provider=provider, authorization=authorization)

    async def _reserve(
        self, call: IncomingCall, caller: _Caller, request: RequestFacts, route: _Route, reserving: list[Handoff]
    ) -> Admitted | ReserveRefused | Deny:
        now_ms = self._now_ms()
        provider_id = route.provider.provider_id
        try:
            priced = self._prices.priced(provider_id=provider_id, model=request.model, now_ms=now_ms)
        except PriceUnknownError:
            return model_unknown(request.model)
        plan = plan_call(request, tenant=caller.tenant, provider_id=provider_id, priced=priced)
        if isinstance(plan, Deny):
            return plan
        facts = call_facts(
            request,
            operation_id=call.operation_id,
            key=caller.key,
            context=caller.context,
            api=route.api.name,
            provider_id=provider_id,
            priced=priced,
            now_ms=now_ms,
        )
        denied = await self._ask_policy(call, facts, plan)
        if denied is not None:
            return denied
        handoff = Handoff(
            facts=facts,
            counters=(),
            hold_nanos=plan.hold_nanos,
            input_tokens_bound=plan.input_tokens_bound,
            output_tokens_bound=plan.output_tokens,
            rate_card=priced.rate_card,
            service_tier=plan.service_tier,
            inject_usage=request.wants_usage_injection,
            slices=plan.slices,
            search_nanos=plan.search_nanos,
        )
        # From here on the hold may exist, whatever we hear of it.
        reserving.append(handoff)
        answer = await self._counters.reserve(
            reserve_of(request, plan, facts=facts, tenant=caller.tenant, key=caller.key)
        )
        return answer if isinstance(answer, ReserveRefused) else _admitted(answer, handoff, request, route)

    async def _ask_policy(self, call: IncomingCall, facts: OperationFacts, plan: HoldPlan) -> Deny | None:
        question = PolicyInput(
            tenant_id=facts.tenant_id,
            key_id=facts.key_id,
            route=facts.api,
            model=facts.model,
            priced_model=facts.priced_model,
            stream=facts.stream,
            estimate_usd=format_usd(plan.hold_nanos),
            estimate_nanos=plan.hold_nanos,
            output_tokens_bound=plan.output_tokens,
            tags=facts.tags,
            session_id=facts.session_id,
            time=rfc3339(facts.held_at_ms),
        )
        try:
            decision = await self._policy.decide(question)
        except PolicyUnavailableError as error:
            return self._failures.met(Failure.POLICY, operation_id=call.operation_id, why=str(error))
        return None if decision.allow else Deny(Reason.POLICY_DENIED, decision.reason)

    def _failed(self, failure: Failure, call: IncomingCall, why: str, *, told: str = "") -> Deny:
        """Refuse a call that cannot go on without what failed, whatever the table says of skipping."""
        denied = self._failures.met(failure, operation_id=call.operation_id, why=why, told=told)
        return denied or Deny(Reason.INTERNAL)

    def _undo(self, reserving: list[Handoff], *, detail: str) -> None:
        for handoff in reserving:
            self._releases.submit(handoff, detail=detail)


def _admitted(reserved: Reserved, asked: Handoff, request: RequestFacts, route: _Route) -> Admitted:
    return Admitted(
        handoff=replace(
            asked,
            counters=reserved.counters,
            hold_nanos=reserved.hold_nanos,
            output_tokens_bound=reserved.output_tokens,
            clamped_output_tokens=clamped_to(request, asked.slices, reserved),
        ),
        reserved=reserved,
        cluster=route.provider.cluster,
        path=route.api.path,
        authorization=route.authorization,
    )
