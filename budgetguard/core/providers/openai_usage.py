"""Usage as OpenAI reports it, in whole answers and in streams."""

from collections.abc import Mapping
from typing import Any

from budgetguard.core.usage import Usage

# Counts above this are no counts: one call cannot have so many tokens.
COUNT_MAX = 2**53


def read_usage(reported: Any, tools_reported: Any = None) -> Usage | None:
    """Read a ``usage`` object of chat completions, responses or embeddings; ``None`` when it says nothing usable.

    ``tools_reported`` is a response's ``tool_usage``, which counts the searches that are billed on top of tokens.
    Unknown and malformed parts are left out; without a readable total nothing was reported.
    """
    if not isinstance(reported, Mapping):
        return None
    input_tokens = _count(reported, "prompt_tokens", "input_tokens")
    output_tokens = _count(reported, "completion_tokens", "output_tokens")
    if input_tokens is None and output_tokens is None:
        return None
    input_parts = _parts(reported, "prompt_tokens_details", "input_tokens_details")
    output_parts = _parts(reported, "completion_tokens_details", "output_tokens_details")
    return Usage(
        input_tokens=input_tokens,
        cache_read_tokens=_count(input_parts, "cached_tokens"),
        cache_write_tokens=_count(input_parts, "cache_write_tokens"),
        input_audio_tokens=_count(input_parts, "audio_tokens"),
        output_tokens=output_tokens,
        output_reasoning_tokens=_count(output_parts, "reasoning_tokens"),
        output_audio_tokens=_count(output_parts, "audio_tokens"),
        web_searches=_count(_parts(tools_reported, "web_search"), "num_requests"),
    )


def _parts(reported: Any, *names: str) -> Mapping[str, Any]:
    for name in names if isinstance(reported, Mapping) else ():
        parts = reported.get(name)
        if isinstance(parts, Mapping):
            return parts
    return {}


def _count(reported: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = reported.get(name)
        if type(value) is int and 0 <= value <= COUNT_MAX:
            return value
    return None


def text_bytes(value: Any) -> int:
    """Count the UTF-8 bytes of every string in a JSON value, keys not counted."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, list):
        return sum(text_bytes(item) for item in value)
    if isinstance(value, dict):
        return sum(text_bytes(item) for item in value.values())
    return 0
