"""How many tokens OpenAI bills for an image at the most, by model, detail and size.

Source: the guide "Images and vision" (developers.openai.com/api/docs/guides/images-vision), sections "Model sizing
behavior" and "Calculating costs", as of November 2026. Where what is billed was seen to differ from the guide
(community.openai.com/t/1377015: ``low`` changes nothing for the small models; t/1281361: an image that is scaled down
is billed for the whole budget), the dearer of the two is the rule here.
"""

from dataclasses import dataclass

from budgetguard.core.money import ceil_div
from budgetguard.core.providers.image_size import Size, base64_of_data_url, pixels

LOW, HIGH = "low", "high"

_TILE = 512
_TILES_SQUARE = 2048
_TILES_SHORT_SIDE = 768
# 2048 by 768: what an image is at the most after both steps.
_TILES_MAX = 8

_PATCH = 32
_LOW_PATCHES = (512 // _PATCH) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """``base`` tokens, and ``tile`` for each 512 px square of the image as it is scaled down."""

    base: int
    tile: int

    def tokens_max(self, size: Size | None, *, detail: str | None) -> int:
        """Bound an image; ``size`` is ``None`` when it is not known."""
        if detail == LOW:
            return self.base
        return self.base + self.tile * (_TILES_MAX if size is None else _tiles(*size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """Squares of 32 px, times ``percent``.

    ``high`` and ``original`` are (most patches, most pixels a side) of an image as it is scaled down. ``low_patches``
    bounds an image of low detail, ``None`` where that detail changes nothing. An image without a detail may be taken as
    either of the other two.
    """

    percent: int
    high: tuple[int, int]
    original: tuple[int, int] | None = None
    low_patches: int | None = None

    def tokens_max(self, size: Size | None, *, detail: str | None) -> int:
        """Bound an image; ``size`` is ``None`` when it is not known."""
        if detail == LOW and self.low_patches is not None:
            patches = self.low_patches  # a small image may be enlarged to it
        else:
            exact = detail in (LOW, HIGH) or self.original is None
            patches_max, side_max = self.high if exact else self.original or self.high
            patches = patches_max if size is None else min(patches_max, _patches(*size, side_max=side_max))
        return ceil_div(patches * self.percent, 100)


def _tiles(width: int, height: int) -> int:
    """Count tiles exactly: into a square of 2048 px, then down to a short side of 768 px; nothing is enlarged.

    Sides are fractions ``side * numerator / denominator``. Rounded to whole pixels, up or
    down, they take no more tiles.
    """
    long_side, short_side = max(width, height), min(width, height)
    numerator, denominator = (_TILES_SQUARE, long_side) if long_side > _TILES_SQUARE else (1, 1)
    if short_side * numerator > _TILES_SHORT_SIDE * denominator:
        numerator, denominator = _TILES_SHORT_SIDE, short_side
    return _covering(long_side, numerator, denominator, _TILE) * _covering(short_side, numerator, denominator, _TILE)


def _patches(width: int, height: int, *, side_max: int) -> int:
    long_side = max(width, height)
    numerator, denominator = (side_max, long_side) if long_side > side_max else (1, 1)
    return _covering(width, numerator, denominator, _PATCH) * _covering(height, numerator, denominator, _PATCH)


def _covering(side: int, numerator: int, denominator: int, square: int) -> int:
    return ceil_div(side * numerator, denominator * square)


_OLD_PATCHES = (1_536, 2_048)
_HIGH_5_4, _ORIGINAL_5_4 = (2_500, 2_048), (10_000, 6_000)
# An original is not scaled down: more than 30,000 patches are refused by the provider.
_HIGH_5_6, _ORIGINAL_5_6 = (2_500, 65_535), (30_000, 65_535)

_GPT_4O = Tiles(base=85, tile=170)
_GPT_4O_MINI = Tiles(base=2_833, tile=5_667)
_GPT_5 = Tiles(base=70, tile=140)
_O_SERIES = Tiles(base=75, tile=150)
_COMPUTER_USE = Tiles(base=65, tile=129)
_MINI = Patches(percent=162, high=_OLD_PATCHES)
_NANO = Patches(percent=246, high=_OLD_PATCHES)
_O4_MINI = Patches(percent=172, high=_OLD_PATCHES)
_GPT_5_2 = Patches(percent=120, high=_OLD_PATCHES)
_GPT_5_4 = Patches(percent=120, high=_HIGH_5_4, original=_ORIGINAL_5_4, low_patches=_LOW_PATCHES)
_GPT_5_4_MINI = Patches(percent=162, high=_HIGH_5_4, original=_ORIGINAL_5_4)
_GPT_5_4_NANO = Patches(percent=246, high=_HIGH_5_4, original=_ORIGINAL_5_4)
_GPT_5_6 = Patches(percent=120, high=_HIGH_5_6, original=_ORIGINAL_5_6, low_patches=_LOW_PATCHES)

Rule = Tiles | Patches

# By the longest prefix of the model's name, which a space ends. Several rules: the guide does not say which holds, so
# the dearest does.
_RULES: dict[str, tuple[Rule, ...]] = {
    "chatgpt-4o": (_GPT_4O,),
    "codex-mini": (_O4_MINI,),
    "computer-use": (_COMPUTER_USE,),
    "gpt-4": (_GPT_4O,),
    "gpt-4.1-mini": (_MINI, _GPT_4O),
    "gpt-4.1-nano": (_NANO, _GPT_4O),
    "gpt-4o-mini": (_GPT_4O_MINI,),
    "gpt-5": (_GPT_5, _GPT_5_2),  # gpt-5-pro, gpt-5-codex, gpt-5.1
    "gpt-5 ": (_GPT_5,),
    "gpt-5-2": (_GPT_5,),  # gpt-5-2025-08-07
    "gpt-5-chat": (_GPT_5,),
    "gpt-5-codex-mini": (_MINI,),
    "gpt-5-mini": (_MINI,),
    "gpt-5-nano": (_NANO,),
    "gpt-5.1-codex-mini": (_MINI,),
    "gpt-5.2": (_GPT_5_2,),
    "gpt-5.3": (_GPT_5_4,),
    "gpt-5.3-codex": (_GPT_5_2,),
    "gpt-5.4": (_GPT_5_4,),
    "gpt-5.4-mini": (_GPT_5_4_MINI,),
    "gpt-5.4-nano": (_GPT_5_4_NANO,),
    "gpt-5.5": (_GPT_5_4,),
    "gpt-5.6": (_GPT_5_6,),
    "gpt-5.7": (_GPT_5_6,),
    "gpt-5.8": (_GPT_5_6,),
    "gpt-5.9": (_GPT_5_6,),
    "gpt-6": (_GPT_5_6,),
    "o1": (_O_SERIES,),
    "o3": (_O_SERIES,),
    "o4-mini": (_O4_MINI,),
}
# Of any other model nothing is known but that it is no dearer than all of these.
_UNKNOWN: tuple[Rule, ...] = (_GPT_4O_MINI, Patches(percent=246, high=_HIGH_5_6, original=_ORIGINAL_5_6))


def billed_beyond_window(model: str) -> bool:
    """Whether images are billed for more tokens than they take of the context window.

    gpt-4o-mini's are, so that an image costs as much as gpt-4o's; of an unknown model it may be so.
    """
    return _GPT_4O_MINI in _rules(model)


def image_tokens_max(model: str, *, url: str | None, detail: str | None) -> int:
    """Bound an image by its URL (its size is told only by a base64 data URL) and its detail."""
    encoded = None if url is None else base64_of_data_url(url)
    return encoded_image_tokens_max(model, encoded=encoded, detail=detail)


def encoded_image_tokens_max(model: str, *, encoded: str | None, detail: str | None) -> int:
    """Bound an image by its base64 text, ``None`` when it was not sent, and its detail."""
    size = None if encoded is None else pixels(encoded)
    return max(rule.tokens_max(size, detail=detail) for rule in _rules(model))


def _rules(model: str) -> tuple[Rule, ...]:
    name = model.lower().removeprefix("ft:").removeprefix("openai/") + " "
    prefixes = [prefix for prefix in _RULES if name.startswith(prefix)]
    return _RULES[max(prefixes, key=len)] if prefixes else _UNKNOWN
