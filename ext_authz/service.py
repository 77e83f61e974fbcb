"""The gRPC face of ``Checker``: Envoy's Authorization service."""

from collections.abc import Mapping

from envoy.service.auth.v3.external_auth_pb2 import CheckRequest
from prometheus_client import Counter

from budgetguard.adapters.grpc_wire.call import Call, Unary
from budgetguard.core.reasons import Reason
from ext_authz.call import Admitted, decode, encode
from ext_authz.check import Checker

_DECIDED = Counter(
    "budgetguard_admission_decisions", "Calls that were decided: ADMITTED, or the reason of the refusal.", ("reason",)
)
# Every series is there from the start, so that its first rise is one.
_ADMITTED = _DECIDED.labels("ADMITTED")
_REFUSED = {reason: _DECIDED.labels(reason.value) for reason in Reason}

CHECK = "/envoy.service.auth.v3.Authorization/Check"


class AuthorizationService:
    """envoy.service.auth.v3.Authorization."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker

    def methods(self) -> Mapping[str, Unary]:
        """Return what a server serves."""
        return {CHECK: self.check}

    async def check(self, message: bytes, call: Call) -> bytes:
        """Decide one call. An unexpected fault ends the RPC with an error: Envoy then answers 503, never forwards."""
        answer = await self._checker.check(decode(CheckRequest.FromString(message)))
        (_ADMITTED if isinstance(answer, Admitted) else _REFUSED[answer.deny.reason]).inc()
        if isinstance(answer, Admitted):
            # Envoy may give up while the answer is on its way: then the call was not forwarded.
            call.unheard = lambda: self._checker.give_up(answer)
        serialised: bytes = encode(answer).SerializeToString()
        return serialised
