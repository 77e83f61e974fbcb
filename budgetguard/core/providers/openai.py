"""OpenAI's API, which many providers speak: chat completions, responses, embeddings."""

from typing import Any

import orjson

from budgetguard.core.providers import fields
from budgetguard.core.providers.api import InvalidRequestError, RequestFacts, ResponseReader
from budgetguard.core.providers.json_text import members, parse_object, set_member
from budgetguard.core.providers.openai_bounds import (
    MESSAGE_TOKENS,
    choices_max,
    has_audio,
    input_bound,
    prediction_tokens_max,
)
from budgetguard.core.providers.openai_errors import error_object
from budgetguard.core.providers.openai_readers import (
    JsonReader,
    StreamReader,
    last_chat_event,
    last_response_event,
    of_chat_chunk,
    of_response_event,
)
from budgetguard.core.providers.openai_tools import hosted_tools
from budgetguard.core.providers.openai_usage import text_bytes
from budgetguard.core.reasons import Deny

KIND = "openai"

CHOICES_MAX = 128
# Tiers that are billed at the default rates, or at rates that the price data knows; others could cost anything.
_SERVICE_TIERS = frozenset({"auto", "default", "flex", "priority", "fast"})
# Models that think before they write refuse max_tokens.
_THINKING = ("o1", "o3", "o4", "gpt-5", "gpt-6")
_OUTPUT_FIELDS = ("max_completion_tokens", "max_tokens")


class _OpenAiApi:
    """What all routes share."""

    name: str
    path: str
    provider_kind = KIND

    def error_body(self, deny: Deny) -> bytes:
        """Spell a refusal as OpenAI's error object, with the facts that explain it."""
        return orjson.dumps({"error": error_object(deny)})


class ChatCompletions(_OpenAiApi):
    """POST /v1/chat/completions."""

    name = "openai.chat"
    path = "/v1/chat/completions"

    def parse_request(self, body: bytes) -> RequestFacts:
        """Read what is metered; see ``ProviderApi``."""
        request = parse_object(body)
        model = fields.model(request)
        if not isinstance(request.get("messages"), list) or not request["messages"]:
            raise fields.wrong("messages", "an array of at least one message", request.get("messages"))
        choices = choices_max(request, most=CHOICES_MAX)
        stream = fields.flag(request, "stream")
        output_field, output_tokens = _chat_bound(request)
        usage_requested = _usage_requested(request)
        fields.text(request, "reasoning_effort")
        tools = hosted_tools(request, model=model)
        bound = input_bound(request, name="messages")
        return RequestFacts(
            model=model,
            stream=stream,
            input_tokens_bound=None if tools.present else bound.tokens,
            output_tokens_max=output_tokens,
            output_field=output_field,
            choices=choices,
            has_output=True,
            usage_requested=usage_requested,
            wants_usage_injection=stream and not usage_requested,
            service_tier=_service_tier(request),
            audio="audio" in fields.array(request, "modalities") or _has_audio(request, body),
            hosted_tools=tools.present,
            input_tokens_beyond_window=bound.beyond_window + choices * tools.input_tokens,
            output_tokens_extra=prediction_tokens_max(request),
            web_searches=choices * tools.web_searches,
            web_search_nanos=tools.web_search_nanos,
            tool_fee_nanos=choices * tools.fee_nanos,
            always_searches=tools.always_searches,
            # The tokens of a prediction that does not come true are billed as output.
            hidden_output=tools.present or request.get("prediction") is not None,
        )

    def rewrite_request(self, body: bytes, *, output_tokens: int | None, inject_usage: bool) -> bytes:
        """Write an output bound and ask for a stream's usage; see ``ProviderApi``."""
        if output_tokens is not None:
            body = set_member(body, _chat_bound(parse_object(body))[0], str(output_tokens).encode())
        if inject_usage:
            body = _with_usage(body)
        return body

    def reader(
        self, *, stream: bool, content_length: int | None, inject_usage: bool, whole_events: bool = False
    ) -> ResponseReader:
        """Make a reader for one answer."""
        if stream:
            return StreamReader(
                of_chat_chunk, hides_usage=inject_usage, whole_events=whole_events, last_event=last_chat_event
            )
        return JsonReader(content_length=content_length)


class Responses(_OpenAiApi):
    """POST /v1/responses."""

    name = "openai.responses"
    path = "/v1/responses"

    def parse_request(self, body: bytes) -> RequestFacts:
        """Read what is metered; see ``ProviderApi``."""
        request = parse_object(body)
        model = fields.model(request)
        if fields.flag(request, "background"):
            raise InvalidRequestError(
                "background: expected false; the answer of a background response does not come with this call, so it "
                "cannot be metered",
                param="background",
            )
        given = request.get("input")
        if given is not None and not isinstance(given, str | list):
            raise fields.wrong("input", "a string or an array of items", given)
        stored = _stored(request)
        if given is None and not stored:
            raise fields.wrong("input", "a string or an array of items", given)
        fields.text(request, "truncation")
        reasoning = fields.named(request.get("reasoning"), "reasoning", dict, "an object") or {}
        fields.named(reasoning.get("effort"), "reasoning.effort", str, "a string")
        tools = hosted_tools(request, model=model)
        bound = input_bound(request, name="input")
        return RequestFacts(
            model=model,
            stream=fields.flag(request, "stream"),
            input_tokens_bound=None if tools.present or stored else bound.tokens,
            output_tokens_max=fields.count(request, "max_output_tokens"),
            output_field="max_output_tokens",
            choices=1,
            has_output=True,
            usage_requested=True,
            wants_usage_injection=False,
            service_tier=_service_tier(request),
            audio=_has_audio(request, body),
            hosted_tools=tools.present,
            input_tokens_beyond_window=bound.beyond_window + tools.input_tokens,
            web_searches=tools.web_searches,
            web_search_nanos=tools.web_search_nanos,
            tool_fee_nanos=tools.fee_nanos,
            always_searches=tools.always_searches,
            # A stored prompt brings tools of its own.
            hidden_output=tools.present or request.get("prompt") is not None,
        )

    def rewrite_request(self, body: bytes, *, output_tokens: int | None, inject_usage: bool) -> bytes:
        """Write an output bound; a stream of this API always ends with its usage."""
        del inject_usage
        return body if output_tokens is None else set_member(body, "max_output_tokens", str(output_tokens).encode())

    def reader(
        self, *, stream: bool, content_length: int | None, inject_usage: bool, whole_events: bool = False
    ) -> ResponseReader:
        """Make a reader for one answer."""
        del inject_usage
        if stream:
            return StreamReader(
                of_response_event, hides_usage=False, whole_events=whole_events, last_event=last_response_event
            )
        return JsonReader(content_length=content_length)


class Embeddings(_OpenAiApi):
    """POST /v1/embeddings."""

    name = "openai.embeddings"
    path = "/v1/embeddings"

    def parse_request(self, body: bytes) -> RequestFacts:
        """Read what is metered; see ``ProviderApi``."""
        request = parse_object(body)
        return RequestFacts(
            model=fields.model(request),
            stream=False,
            input_tokens_bound=_embedding_tokens(request.get("input")),
            output_tokens_max=None,
            output_field=None,
            choices=1,
            has_output=False,
            usage_requested=True,
            wants_usage_injection=False,
            service_tier="default",
            audio=False,
            hosted_tools=False,
        )

    def rewrite_request(self, body: bytes, *, output_tokens: int | None, inject_usage: bool) -> bytes:
        """Change nothing: there is no output to bound and no stream."""
        del output_tokens, inject_usage
        return body

    def reader(
        self, *, stream: bool, content_length: int | None, inject_usage: bool, whole_events: bool = False
    ) -> ResponseReader:
        """Make a reader for one answer."""
        del stream, inject_usage, whole_events
        return JsonReader(content_length=content_length)


def _chat_bound(request: dict[str, Any]) -> tuple[str, int | None]:
    """Return the field that the output bound stands in, or would have to, and the bound."""
    named = [field for field in _OUTPUT_FIELDS if request.get(field) is not None]
    if len(named) > 1:
        raise InvalidRequestError(
            "max_tokens: expected either max_tokens or max_completion_tokens, got both", param="max_tokens"
        )
    if named:
        return named[0], fields.count(request, named[0])
    thinking = str(request.get("model")).lower().removeprefix("ft:").startswith(_THINKING)
    return ("max_completion_tokens" if thinking else "max_tokens"), None


def _usage_requested(request: dict[str, Any]) -> bool:
    options = request.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise fields.wrong("stream_options", "an object", options)
    return fields.flag(options, "include_usage")


def _with_usage(body: bytes) -> bytes:
    for member in members(body):
        if member.key == "stream_options" and body[member.value_start : member.value_start + 1] == b"{":
            return set_member(body, "include_usage", b"true", start=member.value_start)
    return set_member(body, "stream_options", b'{"include_usage":true}')


def _service_tier(request: dict[str, Any]) -> str:
    tier = fields.text(request, "service_tier") or "auto"
    if tier not in _SERVICE_TIERS:
        raise fields.wrong("service_tier", "one of " + ", ".join(sorted(_SERVICE_TIERS)), tier)
    return tier


def _stored(request: dict[str, Any]) -> bool:
    """Say whether the model reads what the provider keeps: an earlier response, a conversation, a prompt."""
    conversation = request.get("conversation")
    if isinstance(conversation, dict):
        conversation = fields.named(conversation.get("id"), "conversation.id", str, "a string") or ""
    fields.named(conversation, "conversation", str, "a string or an object with an id")
    prompt = fields.named(request.get("prompt"), "prompt", dict, "an object")
    earlier = fields.text(request, "previous_response_id")
    return any(value is not None for value in (conversation, prompt, earlier))


def _has_audio(request: dict[str, Any], body: bytes) -> bool:
    # Without the word (which an escape can hide) there is nothing to look for.
    return (b"audio" in body or b"\\u" in body) and has_audio(request)


def _embedding_tokens(given: Any) -> int:
    """Bound an embedding's input: a string, token ids, or an array of either."""
    if isinstance(given, str):
        return text_bytes(given) + MESSAGE_TOKENS
    if isinstance(given, list) and given:
        if all(type(item) is int for item in given):
            return len(given)
        if all(isinstance(item, str) for item in given):
            return sum(text_bytes(item) + MESSAGE_TOKENS for item in given)
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in given):
            return sum(len(item) for item in given)
    raise fields.wrong("input", "a string, an array of strings, an array of token ids, or an array of those", given)
