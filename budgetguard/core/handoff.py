"""What ext_authz hands ext_proc about an admitted call, as Envoy dynamic metadata: every value a string.

The settle must be able to charge from this record alone, when Redis has forgotten the hold.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import orjson

from budgetguard.core.operation import OperationFacts
from budgetguard.core.pricing import RateCard
from budgetguard.core.slices import StreamSlices
from budgetguard.core.typed import object_of, texts_of, typed

# ext_authz' dynamic metadata always lands under its filter's name.
METADATA_NAMESPACE = "envoy.filters.http.ext_authz"

# Calls of one model carry the same card: decoded once, kept once. Bounded, as prices may change all day.
_rate_card = lru_cache(maxsize=512)(RateCard.from_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """One admitted call.

    ``counters`` are the names (not Redis keys) of the budget counters that the hold is in; renew, settle, release and
    expire touch those and no others. ``input_tokens_bound``/``output_tokens_bound`` are what the hold paid for;
    ``input_nanos`` is the input's part of it. ``clamped_output_tokens`` is set when that bound must be written into the
    request; ``inject_usage`` when the stream's usage must be asked for and kept from the client. ``slices``: the hold
    pays for the stream's beginning only, and must be topped up. ``search_nanos`` is what the web search costs that the
    call makes for certain: charged when its usage does not count searches.
    """

    facts: OperationFacts
    counters: tuple[str, ...]
    hold_nanos: int
    input_tokens_bound: int
    output_tokens_bound: int
    rate_card: RateCard
    service_tier: str
    clamped_output_tokens: int | None = None
    inject_usage: bool = False
    slices: StreamSlices | None = None
    search_nanos: int = 0

    @property
    def tokens_bound(self) -> int:
        """The tokens, input and output, that the hold paid for."""
        return self.input_tokens_bound + self.output_tokens_bound

    @property
    def rewrites_request(self) -> bool:
        """Whether ext_proc must ask for the request body and change it."""
        return self.inject_usage or self.clamped_output_tokens is not None

    def to_metadata(self) -> dict[str, str]:
        """Encode as flat strings: those that the access log shows by themselves, the rest as one.

        Envoy sends the record to ext_proc with every message, and each field of it costs all three of us time.
        """
        facts = self.facts
        call = {
            "held_at_ms": facts.held_at_ms,
            "api": facts.api,
            "provider_id": facts.provider_id,
            "stream": facts.stream,
            "tags": facts.tags,
            "session_id": facts.session_id,
            "end_user": facts.end_user,
            "session_name": facts.session_name,
            "session_path": facts.session_path,
            "priced_model": facts.priced_model,
            "counters": self.counters,
            "hold_nanos": self.hold_nanos,
            "input_tokens_bound": self.input_tokens_bound,
            "output_tokens_bound": self.output_tokens_bound,
            "rate_card": self.rate_card.to_json(),
            "service_tier": self.service_tier,
            "clamped_output_tokens": self.clamped_output_tokens,
            "inject_usage": self.inject_usage,
            "slices": None if self.slices is None else asdict(self.slices),
            "search_nanos": self.search_nanos,
        }
        return {
            "operation_id": facts.operation_id,
            "tenant_id": facts.tenant_id,
            "key_id": facts.key_id,
            "model": facts.model,
            "call": orjson.dumps(call).decode(),
        }

    @classmethod
    def from_metadata(cls, values: Mapping[str, str]) -> "Handoff":
        """Decode what ``to_metadata`` wrote.

        Raises:
            ValueError: a field is missing or malformed.
        """
        try:
            call = object_of(orjson.loads(typed(values, "call", str)))
            rate_card = _rate_card(typed(call, "rate_card", str))
            clamped = call["clamped_output_tokens"]
            return cls(
                facts=OperationFacts(
                    operation_id=typed(values, "operation_id", str),
                    tenant_id=typed(values, "tenant_id", str),
                    key_id=typed(values, "key_id", str),
                    held_at_ms=typed(call, "held_at_ms", int),
                    api=typed(call, "api", str),
                    provider_id=typed(call, "provider_id", str),
                    model=typed(values, "model", str),
                    price_version=rate_card.version,
                    stream=typed(call, "stream", bool),
                    tags=texts_of(call, "tags"),
                    session_id=typed(call, "session_id", str),
                    end_user=typed(call, "end_user", str),
                    session_name=typed(call, "session_name", str),
                    session_path=typed(call, "session_path", str),
                    # A call that was admitted before this was told goes on.
                    priced_model=typed(call, "priced_model", str) if "priced_model" in call else "",
                ),
                counters=texts_of(call, "counters"),
                hold_nanos=typed(call, "hold_nanos", int),
                input_tokens_bound=typed(call, "input_tokens_bound", int),
                output_tokens_bound=typed(call, "output_tokens_bound", int),
                rate_card=rate_card,
                service_tier=typed(call, "service_tier", str),
                clamped_output_tokens=None if clamped is None else typed(call, "clamped_output_tokens", int),
                inject_usage=typed(call, "inject_usage", bool),
                slices=None if call["slices"] is None else _slices(typed(call, "slices", dict)),
                search_nanos=typed(call, "search_nanos", int) if "search_nanos" in call else 0,
            )
        except KeyError as error:
            msg = f"handoff lacks {error.args[0]!r}"
            raise ValueError(msg) from error


def _slices(slices: dict[str, Any]) -> StreamSlices:
    try:
        return StreamSlices(
            slice_tokens=typed(slices, "slice_tokens", int),
            choices=typed(slices, "choices", int),
            output_femtos=typed(slices, "output_femtos", int),
            output_tokens_largest=typed(slices, "output_tokens_largest", int),
            overrun=typed(slices, "overrun", bool),
        )
    except KeyError as error:
        msg = f"handoff: slices lack {error.args[0]!r}"
        raise ValueError(msg) from error
