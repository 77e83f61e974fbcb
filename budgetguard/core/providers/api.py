"""What a provider's API has to offer the data plane: bytes in, facts out."""

from dataclasses import dataclass
from typing import Protocol

from budgetguard.core.reasons import Deny
from budgetguard.core.usage import Usage


class InvalidRequestError(ValueError):
    """The body is not what the API takes. The message is safe to show; ``param`` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What is metered of a request.

    ``input_tokens_bound`` is a true upper bound of the input, ``None`` when it reads more than was sent (a stored
    conversation, a file by id, hosted tools). ``output_tokens_max`` is the bound that the request names for one choice,
    in ``output_field``. ``usage_requested``: the caller itself asked for a stream's usage; ``wants_usage_injection``:
    it has to be asked for on its behalf. ``hidden_output``: output is billed that no stream shows, whatever the model.

    On top of those come ``input_tokens_beyond_window``, billed but no part of the context window, and
    ``output_tokens_extra``, billed for each choice whatever its bound is; then what tools cost that run at the
    provider: ``web_searches``, documented at ``web_search_nanos`` each, and ``tool_fee_nanos`` for all others.
    ``always_searches``: one of the searches is certain, though its usage may not tell.
    """

    model: str
    stream: bool
    input_tokens_bound: int | None
    output_tokens_max: int | None
    output_field: str | None
    choices: int
    has_output: bool
    usage_requested: bool
    wants_usage_injection: bool
    service_tier: str
    audio: bool
    hosted_tools: bool
    input_tokens_beyond_window: int = 0
    output_tokens_extra: int = 0
    web_searches: int = 0
    web_search_nanos: int = 0
    tool_fee_nanos: int = 0
    always_searches: bool = False
    hidden_output: bool = False


class ResponseReader(Protocol):
    """Reads one answer as it passes, sans I/O. Never fails on what it does not understand."""

    usage: Usage | None
    # The end of the answer is in what was fed last: settle before those bytes go on.
    complete: bool
    # No less than the output so far, in tokens: what an answer is charged whose usage never comes, and topped up by.
    output_tokens_seen: int
    service_tier: str | None
    model: str | None
    # An error object or event was seen.
    error: bool

    def feed(self, data: bytes, *, end: bool) -> bytes:
        """Take the next bytes and return those to pass on: the same, unless something is kept from the caller."""

    def closing(self, deny: Deny) -> bytes:
        """Spell the last event of a stream that we end, with the reason; behind whole events only."""


class ProviderApi(Protocol):
    """One route of a provider: its wire format."""

    name: str
    path: str
    provider_kind: str

    def parse_request(self, body: bytes) -> RequestFacts:
        """Read what is metered.

        Raises:
            InvalidRequestError: the body cannot be metered.
        """

    def rewrite_request(self, body: bytes, *, output_tokens: int | None, inject_usage: bool) -> bytes:
        """Write an output bound and ask for a stream's usage; every other byte stays. ``body`` was parsed before."""

    def reader(
        self, *, stream: bool, content_length: int | None, inject_usage: bool, whole_events: bool = False
    ) -> ResponseReader:
        """Make a reader for one answer. ``content_length`` is in bytes, ``None`` when it is not told.

        ``whole_events``: a stream passes on by whole events, so that it can be ended behind any of them.
        """

    def error_body(self, deny: Deny) -> bytes:
        """Spell a refusal as this API spells its errors."""
