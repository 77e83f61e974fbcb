"""What a provider says that one call used."""

from dataclasses import dataclass, fields
from typing import Any

from budgetguard.core.typed import object_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Counts of billed units, named as genai-prices names them.

    ``None`` means "not reported", which is not 0. Totals include their parts: ``input_tokens`` contains cached and
    audio input, ``output_tokens`` contains reasoning and audio output.
    """

    input_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    input_audio_tokens: int | None = None
    output_tokens: int | None = None
    output_reasoning_tokens: int | None = None
    output_audio_tokens: int | None = None
    web_searches: int | None = None

    def reported(self) -> dict[str, int]:
        """Return the reported counts by name, in field order."""
        return {name: value for name in USAGE_KINDS if (value := getattr(self, name)) is not None}

    @classmethod
    def from_reported(cls, counts: Any) -> "Usage":
        """Undo ``reported``, of JSON that may be damaged.

        Raises:
            ValueError: not counts by name.
        """
        for name, count in object_of(counts).items():
            if name not in USAGE_KINDS or type(count) is not int:
                raise ValueError(f"{name} is no count of usage")
        return cls(**counts)


USAGE_KINDS: tuple[str, ...] = tuple(field.name for field in fields(Usage))
