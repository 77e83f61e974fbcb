"""Envoy's external processing messages: what is read of them, and the answers, serialised once where nothing varies."""

from collections.abc import Mapping
from dataclasses import dataclass

from envoy.config.core.v3.base_pb2 import HeaderValue, HeaderValueOption
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    BodyMutation,
    BodyResponse,
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    ImmediateResponse,
    ProcessingRequest,
    ProcessingResponse,
    StreamedBodyResponse,
    TrailersResponse,
)
from envoy.type.v3.http_status_pb2 import HttpStatus

from budgetguard.core.handoff import METADATA_NAMESPACE

# Envoy files the attributes it sends under its filter's name.
_ATTRIBUTES = "envoy.filters.http.ext_proc"
_CODE_DETAILS = "response.code_details"


def _serialised(answer: ProcessingResponse) -> bytes:
    written: bytes = answer.SerializeToString()
    return written


def _mode(
    *, request_body: "ProcessingMode.BodySendMode", response_body: "ProcessingMode.BodySendMode"
) -> ProcessingMode:
    """Name every phase: an override replaces the configured mode as a whole."""
    return ProcessingMode(
        request_header_mode=ProcessingMode.SEND,
        request_body_mode=request_body,
        request_trailer_mode=ProcessingMode.SKIP,
        response_header_mode=ProcessingMode.SKIP if response_body == ProcessingMode.NONE else ProcessingMode.SEND,
        response_body_mode=response_body,
        response_trailer_mode=ProcessingMode.SKIP,
    )


# "Go on, unchanged", for each phase.
PASS: Mapping[str, bytes] = {
    "request_headers": _serialised(ProcessingResponse(request_headers=HeadersResponse())),
    "request_body": _serialised(ProcessingResponse(request_body=BodyResponse())),
    "request_trailers": _serialised(ProcessingResponse(request_trailers=TrailersResponse())),
    "response_headers": _serialised(ProcessingResponse(response_headers=HeadersResponse())),
    "response_body": _serialised(ProcessingResponse(response_body=BodyResponse())),
    "response_trailers": _serialised(ProcessingResponse(response_trailers=TrailersResponse())),
}
PASS_RESPONSE_BODY = PASS["response_body"]

# Hold the request until its body was seen, whole.
ASK_FOR_BODY = _serialised(
    ProcessingResponse(
        request_headers=HeadersResponse(),
        mode_override=_mode(request_body=ProcessingMode.BUFFERED, response_body=ProcessingMode.STREAMED),
    )
)
# There is nothing to meter, so nothing more needs to be sent here.
_NOTHING_MORE = _mode(request_body=ProcessingMode.NONE, response_body=ProcessingMode.NONE)
SKIP_CALL = _serialised(ProcessingResponse(request_headers=HeadersResponse(), mode_override=_NOTHING_MORE))
SKIP_RESPONSE_BODY = _serialised(ProcessingResponse(response_headers=HeadersResponse(), mode_override=_NOTHING_MORE))
# A short body in one message with its end, where streaming it takes two and more.
ASK_FOR_WHOLE_RESPONSE_BODY = _serialised(
    ProcessingResponse(
        response_headers=HeadersResponse(),
        mode_override=_mode(request_body=ProcessingMode.NONE, response_body=ProcessingMode.BUFFERED),
    )
)
# The body may get shorter on its way: what was told of its length no longer holds.
PASS_WITHOUT_LENGTH = _serialised(
    ProcessingResponse(
        response_headers=HeadersResponse(
            response=CommonResponse(header_mutation=HeaderMutation(remove_headers=["content-length"]))
        )
    )
)
# From here on no byte passes by itself: the client gets what we send, to the end that we say. It is the only mode in
# which a response can be ended before its provider ends it; Envoy then cuts the provider off.
TAKE_OVER_RESPONSE_BODY = _serialised(
    ProcessingResponse(
        response_headers=HeadersResponse(
            response=CommonResponse(header_mutation=HeaderMutation(remove_headers=["content-length"]))
        ),
        mode_override=ProcessingMode(
            request_header_mode=ProcessingMode.SEND,
            request_body_mode=ProcessingMode.NONE,
            request_trailer_mode=ProcessingMode.SKIP,
            response_header_mode=ProcessingMode.SEND,
            response_body_mode=ProcessingMode.FULL_DUPLEX_STREAMED,
            # Envoy asks for it in this mode.
            response_trailer_mode=ProcessingMode.SEND,
        ),
    )
)
_CLEARED_RESPONSE_BODY = _serialised(
    ProcessingResponse(response_body=BodyResponse(response=CommonResponse(body_mutation=BodyMutation(clear_body=True))))
)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What is read of a response's headers. ``content_length`` is ``None`` when it is not told, or not a number."""

    status: int
    content_type: str
    content_length: int | None
    content_encoding: str
    code_details: str


def handoff_values(request: ProcessingRequest) -> dict[str, str] | None:
    """Return what ext_authz handed over; ``None`` when it admitted nothing here (a refusal, a free route)."""
    by_namespace = request.metadata_context.filter_metadata
    if METADATA_NAMESPACE not in by_namespace:
        return None
    fields = by_namespace[METADATA_NAMESPACE].fields
    if "operation_id" not in fields:
        return None
    return {name: value.string_value for name, value in fields.items()}


def response_head(request: ProcessingRequest) -> ResponseHead:
    """Read a response's headers and Envoy's word on where they come from."""
    status = content_type = content_length = content_encoding = ""
    for header in request.response_headers.headers.headers:
        name = header.key
        if name == ":status":
            status = _value(header)
        elif name == "content-type":
            content_type = _value(header)
        elif name == "content-length":
            content_length = _value(header)
        elif name == "content-encoding":
            content_encoding = _value(header)
    attributes = request.attributes
    details = ""
    if _ATTRIBUTES in attributes:
        fields = attributes[_ATTRIBUTES].fields
        details = fields[_CODE_DETAILS].string_value if _CODE_DETAILS in fields else ""
    return ResponseHead(
        status=int(status) if status.isdecimal() else 0,
        content_type=content_type.lower(),
        content_length=int(content_length) if content_length.isdecimal() else None,
        content_encoding=content_encoding.lower(),
        code_details=details,
    )


def _value(header: HeaderValue) -> str:
    # Envoy fills raw_value; value is for those that build messages by hand.
    raw: bytes = header.raw_value
    text: str = raw.decode("latin-1") if raw else header.value
    return text


def replaced_request_body(body: bytes) -> bytes:
    """Put another body in the request. Envoy does not correct the length by itself."""
    return _serialised(
        ProcessingResponse(
            request_body=BodyResponse(
                response=CommonResponse(
                    header_mutation=HeaderMutation(set_headers=[_header("content-length", str(len(body)))]),
                    body_mutation=BodyMutation(body=body),
                )
            )
        )
    )


def replaced_response_body(body: bytes) -> bytes:
    """Pass other bytes on than those that came."""
    if not body:
        return _CLEARED_RESPONSE_BODY
    return _serialised(
        ProcessingResponse(response_body=BodyResponse(response=CommonResponse(body_mutation=BodyMutation(body=body))))
    )


def streamed_response_body(body: bytes, *, end: bool) -> bytes:
    """Send the client these bytes of a response that was taken over; with ``end`` they are its last."""
    return _serialised(
        ProcessingResponse(
            response_body=BodyResponse(
                response=CommonResponse(
                    body_mutation=BodyMutation(streamed_response=StreamedBodyResponse(body=body, end_of_stream=end))
                )
            )
        )
    )


def refusal(*, status: int, body: bytes, detail: str) -> bytes:
    """Answer the client here. ``detail`` goes into Envoy's access log, not to the client."""
    return _serialised(
        ProcessingResponse(
            immediate_response=ImmediateResponse(
                status=HttpStatus(code=status),
                headers=HeaderMutation(set_headers=[_header("content-type", "application/json")]),
                body=body,
                details=detail,
            )
        )
    )


def _header(name: str, value: str) -> HeaderValueOption:
    return HeaderValueOption(
        header=HeaderValue(key=name, raw_value=value.encode()),
        append_action=HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )
