"""The most output tokens that each model can write: a table of our own, since genai-prices knows context windows only.

Source: the providers' model pages. A model that is not listed takes the bound of its longest listed prefix.

And which models show all that they write. Those that think first are billed for what nobody sees, so their output
cannot be counted while it passes; of a model that is not listed nothing is known, so it is taken for one of them.
"""

import re

_OUTPUT_TOKENS_MAX: dict[str, dict[str, int]] = {
    "openai": {
        "chatgpt-4o-latest": 16_384,
        "codex-mini": 100_000,
        "computer-use-preview": 1_024,
        "gpt-3.5-turbo": 4_096,
        "gpt-4": 8_192,
        "gpt-4-turbo": 4_096,
        "gpt-4-0125-preview": 4_096,
        "gpt-4-1106": 4_096,
        "gpt-4.1": 32_768,
        "gpt-4.5": 16_384,
        "gpt-4o": 16_384,
        "gpt-4o-2024-05-13": 4_096,
        "gpt-5": 128_000,
        "gpt-5-chat": 16_384,
        "gpt-5-pro": 272_000,
        "gpt-5.1-chat": 16_384,
        "gpt-5.2-chat": 16_384,
        "gpt-6": 128_000,
        "gpt-audio": 16_384,
        "gpt-oss": 131_072,
        "o1": 100_000,
        "o1-mini": 65_536,
        "o1-preview": 32_768,
        "o3": 100_000,
        "o4": 100_000,
    },
}

# Whole names, but for what a date, "latest" or a fine-tune's name adds: "gpt-4o-search-preview" is another model.
_SHOWS_ALL_IT_WRITES: dict[str, re.Pattern[str]] = {
    "openai": re.compile(
        r"(ft:)?(gpt-3\.5-turbo|gpt-4|gpt-4-turbo|gpt-4\.1|gpt-4\.1-mini|gpt-4\.1-nano|gpt-4\.5-preview|gpt-4o|gpt-4o-mini"
        r"|chatgpt-4o|gpt-5-chat)(-latest|-preview|-16k|-\d{4}(-\d{2}-\d{2})?)*(:.*)?"
    ),
}


def output_tokens_largest(*, provider_id: str, model: str) -> int | None:
    """Return the largest output of a model, or ``None`` when nothing is known of it."""
    table = _OUTPUT_TOKENS_MAX.get(provider_id, {})
    name = model.lower().removeprefix("ft:")
    prefixes = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(prefixes, key=len)] if prefixes else None


def shows_all_it_writes(*, provider_id: str, model: str) -> bool:
    """Whether a stream of this model shows every token that it is billed for."""
    pattern = _SHOWS_ALL_IT_WRITES.get(provider_id)
    return pattern is not None and pattern.fullmatch(model.lower()) is not None
