"""The routes that reach a provider. A new provider is one module and one line here."""

from budgetguard.core.providers.api import (
    InvalidRequestError,
    ProviderApi,
    RequestFacts,
    ResponseReader,
)
from budgetguard.core.providers.openai import ChatCompletions, Embeddings, Responses

__all__ = [
    "DEFAULT_API",
    "REGISTRY",
    "InvalidRequestError",
    "ProviderApi",
    "RequestFacts",
    "ResponseReader",
    "api_named",
    "find_api",
]

_APIS: tuple[ProviderApi, ...] = (ChatCompletions(), Responses(), Embeddings())

REGISTRY: dict[str, ProviderApi] = {api.path: api for api in _APIS}
_BY_NAME: dict[str, ProviderApi] = {api.name: api for api in _APIS}

# Whose error object an unknown route is answered with.
DEFAULT_API: ProviderApi = _APIS[0]


def find_api(method: str, path: str) -> ProviderApi | None:
    """Find the API of a route. ``path`` is normalised already and may have a query."""
    return REGISTRY.get(path.partition("?")[0]) if method == "POST" else None


def api_named(name: str) -> ProviderApi | None:
    """Find an API by the name that a handoff carries."""
    return _BY_NAME.get(name)
