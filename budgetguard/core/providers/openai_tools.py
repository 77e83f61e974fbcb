"""What tools that run at the provider can add to a call: input that nobody sent, and fees by the call.

Source: developers.openai.com/api/docs/pricing, "Built-in tools", as of November 2026.
"""

import re
from dataclasses import dataclass
from typing import Any

from budgetguard.core.money import NANOS_PER_USD
from budgetguard.core.providers import fields

# Tools that run where the caller can see them; any other runs at the provider and feeds the model what nobody sent.
_OWN_TOOLS = frozenset({"function", "custom"})

# A request may name max_tool_calls. Without it nothing bounds the calls; a hold then pays for this many, and what a
# model calls beyond is charged when it is reported.
TOOL_CALLS_UNNAMED = 10

# "When using Chat Completions, the model always retrieves information from the web before responding to your query"
# (guides/tools-web-search): these models do, whether or not the request has web_search_options. No usage tells of it.
_SEARCH_MODEL = re.compile(r".*-search-(preview|api)(-.*)?")
_REASONING_SEARCH_MODEL = "gpt-5-search-api"

# "$2.50 / 1k calls", "$10.00 / 1k calls"; the legacy preview costs $25 with models that do not reason.
_FILE_SEARCH_NANOS = NANOS_PER_USD * 25 // 10_000
_WEB_SEARCH_NANOS = NANOS_PER_USD // 100
_WEB_SEARCH_PREVIEW_NANOS = NANOS_PER_USD // 40
# A container of 20 minutes by its memory; without a size it has 1 GB.
_CONTAINER_NANOS = {
    None: NANOS_PER_USD * 3 // 100,
    "1g": NANOS_PER_USD * 3 // 100,
    "4g": NANOS_PER_USD * 12 // 100,
    "16g": NANOS_PER_USD * 48 // 100,
    "64g": NANOS_PER_USD * 192 // 100,
}
_CONTAINER_NANOS_MAX = max(_CONTAINER_NANOS.values())
_CONTAINERS = frozenset({"code_interpreter", "shell"})

# "For gpt-4o-mini and gpt-4.1-mini ... search content tokens are billed as a fixed block of 8,000 input tokens per
# call", whatever of it the model was shown.
_SEARCH_BLOCK_TOKENS = 8_000
_SEARCH_BLOCK_MODELS = ("gpt-4o-mini", "gpt-4.1-mini")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedTools:
    """The tools of a request that run at the provider: how often at the most, and what that costs.

    Of the ``web_searches`` each costs ``web_search_nanos``, and all else ``fee_nanos`` together. ``always_searches``:
    one search is certain, and the answer does not tell of it. ``input_tokens`` is billed beyond what the context window
    holds.
    """

    present: bool = False
    web_searches: int = 0
    web_search_nanos: int = 0
    fee_nanos: int = 0
    always_searches: bool = False
    input_tokens: int = 0


def hosted_tools(request: dict[str, Any], *, model: str) -> HostedTools:
    """Read the tools of a request.

    Raises:
        InvalidRequestError: a tool is no object, or its type no string.
    """
    calls = fields.count(request, "max_tool_calls", minimum=0)
    calls = TOOL_CALLS_UNNAMED if calls is None else calls
    present, searches, search_nanos, fee_nanos, file_searches = False, 0, 0, 0, 0
    for index, tool in enumerate(fields.array(request, "tools")):
        at = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise fields.wrong(at, "an object", tool)
        kind = fields.named(tool.get("type"), f"{at}.type", str, "a string") or ""
        present = present or kind not in _OWN_TOOLS
        if kind in _CONTAINERS:
            fee_nanos += _container_nanos(tool, at)
        elif kind == "file_search":
            file_searches = calls
        elif kind.startswith("web_search"):
            searches, search_nanos = calls, max(search_nanos, _web_search_nanos(kind))
    name = model.lower().removeprefix("ft:")
    options = fields.named(request.get("web_search_options"), "web_search_options", dict, "an object")
    always_searches = options is not None or _SEARCH_MODEL.fullmatch(name) is not None
    if always_searches:
        # The search models of chat completions search once for each answer.
        own_nanos = _WEB_SEARCH_NANOS if name.startswith(_REASONING_SEARCH_MODEL) else _WEB_SEARCH_PREVIEW_NANOS
        present, searches, search_nanos = True, searches + 1, max(search_nanos, own_nanos)
    has_block = name.startswith(_SEARCH_BLOCK_MODELS)
    return HostedTools(
        present=present,
        web_searches=searches,
        web_search_nanos=search_nanos,
        fee_nanos=fee_nanos + file_searches * _FILE_SEARCH_NANOS,
        always_searches=always_searches,
        input_tokens=searches * _SEARCH_BLOCK_TOKENS if has_block else 0,
    )


def _web_search_nanos(kind: str) -> int:
    return _WEB_SEARCH_PREVIEW_NANOS if kind.startswith("web_search_preview") else _WEB_SEARCH_NANOS


def _container_nanos(tool: dict[str, Any], at: str) -> int:
    container = tool.get("container")
    if container is None or isinstance(container, str):  # one that runs already: by its id
        return _CONTAINER_NANOS_MAX
    fields.named(container, f"{at}.container", dict, "an object or a string")
    memory = fields.named(container.get("memory_limit"), f"{at}.container.memory_limit", str, "a string")
    return _CONTAINER_NANOS.get(memory, _CONTAINER_NANOS_MAX)
