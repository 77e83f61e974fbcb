"""gRPC around the exchange: one stream a call, messages in, messages out."""

from collections.abc import Callable, Mapping

from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest

from budgetguard.adapters.grpc_wire.call import Bidirectional, Call
from ext_proc.exchange import Exchange

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


class ExternalProcessor:
    """Envoy's external processing service."""

    def __init__(self, open_exchange: Callable[[], Exchange]) -> None:
        self._open_exchange = open_exchange

    def methods(self) -> Mapping[str, Bidirectional]:
        """Return what a server serves."""
        return {PROCESS: self.process}

    async def process(self, call: Call) -> None:
        """Serve one call's stream, to its end or until Envoy drops it."""
        exchange = self._open_exchange()
        try:
            while (message := await call.read()) is not None:
                answer = await exchange.answer(ProcessingRequest.FromString(message))
                if answer is not None and not call.write(answer):
                    exchange.answer_was_lost()
        finally:
            # Also when cancelled: what ends the call runs on by itself.
            exchange.close()
