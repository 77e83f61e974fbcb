"""One call as ext_proc sees it: Envoy's messages in, answers out, one settlement at its end. Knows no transport."""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from envoy.service.ext_proc.v3.external_processor_pb2 import HttpBody, HttpHeaders, ProcessingRequest

from budgetguard.core.budget import Settlement
from budgetguard.core.handoff import Handoff
from budgetguard.core.metering import Origin, Seen, conclude, origin_of
from budgetguard.core.operation import End
from budgetguard.core.providers import DEFAULT_API, ProviderApi, ResponseReader, api_named
from budgetguard.core.reasons import Deny, Reason
from ext_proc import messages
from ext_proc.top_ups import Extending, TopUps

logger = logging.getLogger(__name__)

# How long the last piece of an answer waits for its settlement, so that a caller's next call finds its money freed.
SETTLE_WAIT_SECONDS = 0.05
# From here on a JSON body is read (about 10 ms a MiB) in a thread, so that other calls go on.
INLINE_BYTES_MAX = 256 * 1024
# A body known to be as short as this is taken whole: Envoy can hold it, and nobody reads half of a JSON answer.
WHOLE_BYTES_MAX = 64 * 1024

_EVENT_STREAM = "text/event-stream"
_IN_REQUEST = frozenset({"request_headers", "request_body", "request_trailers"})


class Settling(Protocol):
    """Takes a settlement and brings it to its end, whatever becomes of the call."""

    def submit(self, settlement: Settlement) -> asyncio.Task[None]:
        """Begin to settle; the task ends when that is safe."""


class Renewing(Protocol):
    """Keeps the holds of open calls alive."""

    def add(self, handoff: Handoff) -> None:
        """Keep this hold alive."""

    def remove(self, handoff: Handoff) -> None:
        """Let it go."""


class Exchange:
    """Feed it each message of one call's stream with ``answer``, and ``close`` it when the stream is over.

    Whatever goes wrong in here, the client gets its answer and the call is settled, exactly once.
    """

    __slots__ = (
        "_api",
        "_bytes_seen",
        "_closed",
        "_code_details",
        "_content_length",
        "_counters",
        "_forwarded",
        "_handoff",
        "_leases",
        "_now_ms",
        "_passing",
        "_reader",
        "_reading",
        "_settler",
        "_settling",
        "_status",
        "_streamed",
        "_top_ups",
    )

    def __init__(self, *, settler: Settling, leases: Renewing, counters: Extending, now_ms: Callable[[], int]) -> None:
        self._settler = settler
        self._leases = leases
        self._counters = counters
        self._now_ms = now_ms
        self._handoff: Handoff | None = None
        self._api: ProviderApi = DEFAULT_API
        self._forwarded = False
        self._status = 0
        self._code_details = ""
        self._streamed = False
        self._content_length: int | None = None
        self._bytes_seen = 0
        self._reader: ResponseReader | None = None
        # A piece of the answer that is being read in a thread.
        self._reading: asyncio.Future[bytes] | None = None
        # Nothing more is to be learned: everything passes.
        self._passing = False
        self._settling: asyncio.Task[None] | None = None
        # Of a stream that holds its output in slices: its response is taken over, so that it can be ended here.
        self._top_ups: TopUps | None = None
        # Why it was.
        self._closed = ""

    async def answer(self, request: ProcessingRequest) -> bytes | None:
        """Answer one message: a serialised ``ProcessingResponse``; ``None`` to a message that asks nothing."""
        phase = request.WhichOneof("request")
        try:
            if phase == "response_body":
                return await self._response_body(request.response_body)
            if phase == "request_headers":
                return self._request_headers(request)
            if phase == "request_body":
                return await self._request_body(request.request_body)
            if phase == "response_headers":
                return await self._response_headers(request)
            if phase == "response_trailers":
                await self._body_ended()
        except Exception:
            logger.exception("metering failed in %s of %s", phase, self._operation_id())
            if phase == "response_body" and self._top_ups is not None:
                return self._cut(request.response_body.body)
            return self._give_up(phase)
        return messages.PASS.get(phase)

    def answer_was_lost(self) -> None:
        """The last answer reached nobody: Envoy had dropped the stream. A request that waited for it never went on."""
        if self._reader is None and not self._status:
            self._forwarded = False

    def close(self) -> None:
        """The stream is over. Starts to settle what is not settled yet, and does not wait."""
        if self._reading is not None and not self._reading.done():
            # A thread is still reading what may be the usage.
            self._reading.add_done_callback(lambda _: self._settle_safely())
        else:
            self._settle_safely()

    # --- the request

    def _request_headers(self, request: ProcessingRequest) -> bytes:
        values = messages.handoff_values(request)
        if values is None:
            self._passing = True
            return messages.SKIP_CALL
        self._admit(Handoff.from_metadata(values))
        if not self._must_rewrite():
            self._forwarded = True
            return messages.PASS["request_headers"]
        if request.request_headers.end_of_stream:
            raise ValueError("a request without a body cannot be rewritten")
        return messages.ASK_FOR_BODY

    def _admit(self, handoff: Handoff) -> None:
        # First of all: from here on the call will be settled.
        self._handoff = handoff
        self._leases.add(handoff)
        api = api_named(handoff.facts.api)
        if api is None:
            raise ValueError(f"unknown API {handoff.facts.api!r}")
        self._api = api

    def _must_rewrite(self) -> bool:
        return self._handoff is not None and self._handoff.rewrites_request

    async def _request_body(self, message: HttpBody) -> bytes:
        handoff = self._handoff
        if handoff is None or not handoff.rewrites_request:
            return messages.PASS["request_body"]
        body: bytes = message.body

        def rewrite() -> bytes:
            return self._api.rewrite_request(
                body, output_tokens=handoff.clamped_output_tokens, inject_usage=handoff.inject_usage
            )

        rewritten = await asyncio.to_thread(rewrite) if len(body) > INLINE_BYTES_MAX else rewrite()
        self._forwarded = True
        return messages.replaced_request_body(rewritten)

    # --- the response

    async def _response_headers(self, request: ProcessingRequest) -> bytes:
        if self._handoff is None:
            # A refusal of ext_authz, or a call that nobody admitted.
            self._passing = True
            return messages.SKIP_RESPONSE_BODY
        head = messages.response_head(request)
        self._status, self._code_details = head.status, head.code_details
        readable = head.content_encoding in ("", "identity")
        if self._handoff.slices is not None and not readable and head.status < 400:
            return await self._refuse_uncountable(head.content_encoding)
        if origin_of(head.code_details) is not Origin.PROVIDER or not readable:
            # Nothing that the body says could change the end.
            self._passing = True
            await self._settle_now()
            return messages.SKIP_RESPONSE_BODY
        self._content_length = head.content_length
        self._streamed = head.content_type.startswith(_EVENT_STREAM)
        hides_usage = self._handoff.inject_usage and self._streamed
        self._reader = self._api.reader(
            stream=self._streamed,
            content_length=head.content_length,
            inject_usage=hides_usage,
            whole_events=self._handoff.slices is not None,
        )
        headers: HttpHeaders = request.response_headers
        if self._handoff.slices is not None and not self._streamed and head.status < 400:
            # Asked for as a stream, it comes in one piece: nothing could be counted before all of it is billed.
            top_ups = TopUps(self._handoff, self._handoff.slices, self._counters)
            await top_ups.cover_whole()
            self._handoff = top_ups.handoff
        if headers.end_of_stream:
            await self._body_ended()
        elif self._streamed and self._handoff.slices is not None:
            self._top_ups = TopUps(self._handoff, self._handoff.slices, self._counters)
            return messages.TAKE_OVER_RESPONSE_BODY
        if hides_usage and head.content_length is not None:
            return messages.PASS_WITHOUT_LENGTH
        if not self._streamed and 0 < (head.content_length or 0) <= WHOLE_BYTES_MAX and not headers.end_of_stream:
            return messages.ASK_FOR_WHOLE_RESPONSE_BODY
        return messages.PASS["response_headers"]

    async def _refuse_uncountable(self, encoding: str) -> bytes:
        """A stream without a bound that cannot be counted would cost whatever it likes: nobody gets it."""
        self._passing = True
        self._closed = f"stream closed: its answer is compressed ({encoding}), so it cannot be counted"
        logger.error("%s: %s", self._closed, self._operation_id())
        await self._settle_now()
        return self._refusal(Deny(Reason.INTERNAL, "The provider's answer is compressed, so it cannot be metered."))

    async def _response_body(self, message: HttpBody) -> bytes | None:
        reader = self._reader
        data: bytes = message.body
        end: bool = message.end_of_stream
        if self._closed:
            return None  # what the provider still said before it was cut off
        if self._passing or reader is None:
            return messages.PASS_RESPONSE_BODY if self._top_ups is None else self._pass_on(data, end=end)
        passed = await self._feed(reader, data, end=end)
        if self._top_ups is not None:
            return await self._top_up(self._top_ups, reader, passed, end=end)
        if reader.complete and self._settling is None:
            # What is kept from the caller must be kept to the end of the stream.
            self._passing = not (self._streamed and self._must_hide())
            await self._settle_now()
        return messages.PASS_RESPONSE_BODY if passed == data else messages.replaced_response_body(passed)

    async def _top_up(self, top_ups: TopUps, reader: ResponseReader, passed: bytes, *, end: bool) -> bytes | None:
        """Pass on what the hold pays for; end the stream when it does not, also when this piece has the usage."""
        if self._settling is not None:
            return self._pass_on(passed, end=end)
        cost_nanos = self._cost_nanos(top_ups.handoff) if reader.complete else None
        closing = await top_ups.cover(reader.output_tokens_seen, cost_nanos=cost_nanos)
        self._handoff = top_ups.handoff
        # A response that was taken over is read to its end: the reader may have half an event of it.
        if closing is not None:
            self._closed = closing.detail
        if closing is not None or reader.complete:
            await self._settle_now()
        if closing is not None:
            return messages.streamed_response_body(reader.closing(closing.deny), end=True)
        return self._pass_on(passed, end=end)

    def _cost_nanos(self, handoff: Handoff) -> int | None:
        """What a call that is over has cost, if the provider has told."""
        settlement = conclude(handoff, self._seen(handoff), ended_at_ms=self._now_ms())
        return settlement.amount_nanos if settlement.end is End.CONFIRMED else None

    def _pass_on(self, data: bytes, *, end: bool) -> bytes | None:
        """Send the client what of a response that was taken over is its own: nothing, of half an event."""
        return messages.streamed_response_body(data, end=end) if data or end else None

    def _cut(self, data: bytes) -> bytes:
        """After a fault of ours in a stream without a bound: nobody would count on, so it ends with this piece."""
        self._closed = "stream closed: metering failed"
        self._settle_safely()
        return messages.streamed_response_body(data, end=True)

    def _must_hide(self) -> bool:
        return self._handoff is not None and self._handoff.inject_usage

    async def _feed(self, reader: ResponseReader, data: bytes, *, end: bool) -> bytes:
        self._bytes_seen += len(data)
        whole = end or self._bytes_seen == self._content_length
        if self._streamed or not whole or self._bytes_seen <= INLINE_BYTES_MAX:
            return reader.feed(data, end=end)
        # Shielded: when the client leaves meanwhile, the usage is still found.
        loop = asyncio.get_running_loop()
        self._reading = loop.run_in_executor(None, lambda: reader.feed(data, end=end))
        return await asyncio.shield(self._reading)

    async def _body_ended(self) -> None:
        """The answer ended without a last piece of body to say so."""
        if self._reader is not None and not self._passing and self._settling is None:
            self._passing = True
            self._reader.feed(b"", end=True)
            await self._settle_now()

    # --- the end

    async def _settle_now(self) -> None:
        """Settle, and wait for it as long as an answer may wait."""
        self._settle()
        if self._settling is not None:
            await asyncio.wait((self._settling,), timeout=SETTLE_WAIT_SECONDS)

    def _settle(self) -> None:
        """Begin the call's one settlement."""
        handoff = self._handoff
        if handoff is None or self._settling is not None:
            return
        self._settling = self._settler.submit(conclude(handoff, self._seen(handoff), ended_at_ms=self._now_ms()))
        self._leases.remove(handoff)

    def _seen(self, handoff: Handoff) -> Seen:
        reader = self._reader
        if reader is None:
            # Before an answer a stream has cost its input; a refused or unreadable answer says nothing.
            counted = 0 if handoff.facts.stream and not self._status else None
            return Seen(
                forwarded=self._forwarded,
                status=self._status,
                code_details=self._code_details,
                output_tokens=counted,
            )
        return Seen(
            forwarded=self._forwarded,
            status=self._status,
            code_details=self._code_details,
            complete=reader.complete,
            usage=reader.usage,
            service_tier=reader.service_tier,
            output_tokens=reader.output_tokens_seen if self._streamed else None,
            error_object=reader.error,
            closed=self._closed,
            remark="" if self._top_ups is None else self._top_ups.remark,
        )

    def _give_up(self, phase: str | None) -> bytes | None:
        """After a fault of ours: settle with what is known, refuse what was not forwarded yet, pass the rest."""
        self._passing = True
        self._settle_safely()
        if phase in _IN_REQUEST and not self._forwarded:
            # Forwarded as it is it would not cost what was held, or not be metered at all.
            return self._refusal(Deny(Reason.INTERNAL))
        return messages.PASS.get(phase) if phase else None

    def _refusal(self, deny: Deny) -> bytes:
        return messages.refusal(
            status=deny.telling.http_status,
            body=self._api.error_body(deny),
            # The edge knows by this beginning that the body is finished.
            detail="ext_proc_immediate_metering_failed",
        )

    def _settle_safely(self) -> None:
        try:
            self._settle()
        except Exception:
            logger.exception("could not conclude %s: its hold will expire", self._operation_id())

    def _operation_id(self) -> str:
        return self._handoff.facts.operation_id if self._handoff else "a call without handoff"
