"""Image bounds against the providers' own formulas, spelled here as the guides spell them, and their worked examples.

Source, unless a test says otherwise: developers.openai.com/api/docs/guides/images-vision, "Calculating costs".
"""

import base64
import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from budgetguard.core.providers.openai_images import image_tokens_max
from tests.core.providers.test_image_size import png

SIDES = st.integers(1, 70_000)
SCALES = st.integers(1, 40)
DETAILS = st.sampled_from([None, "auto", "low", "high", "original", "something new"])
MODELS = st.sampled_from(
    [
        "gpt-4o",
        "gpt-4o-mini",
        "gpt-4.1",
        "gpt-4.1-mini",
        "gpt-4.1-nano",
        "gpt-5",
        "gpt-5-mini",
        "gpt-5.1",
        "gpt-5.2",
        "gpt-5.4",
        "gpt-5.4-nano",
        "gpt-5.6-sol",
        "o3",
        "o4-mini",
        "another",
    ]
)


def bound(model, width, height, detail=None):
    url = "data:image/png;base64," + base64.b64encode(png(width, height)).decode()
    return image_tokens_max(model, url=url, detail=detail)


def by_url(model, detail=None):
    return image_tokens_max(model, url="https://example.com/image.png", detail=detail)


def tiles(width, height, rounded):
    """Count 512 px squares as the guide says: into 2048 by 2048, then to a short side of 768."""
    scale = min(Fraction(1), Fraction(2048, max(width, height)))
    width, height = rounded(width * scale), rounded(height * scale)
    scale = min(Fraction(1), Fraction(768, max(min(width, height), 1)))
    width, height = rounded(width * scale), rounded(height * scale)
    return math.ceil(width / 512) * math.ceil(height / 512)


def patches(width, height, budget):
    """Count 32 px patches as the guide says: steps A, B and C."""
    count = math.ceil(width / 32) * math.ceil(height / 32)
    if count <= budget:
        return count
    shrink = math.sqrt(32**2 * budget / (width * height))
    fits = [math.floor(side * shrink / 32) / (side * shrink / 32) for side in (width, height)]
    shrink *= min(fits)
    resized = [max(1, int(side * shrink)) for side in (width, height)]
    return min(budget, math.ceil(resized[0] / 32) * math.ceil(resized[1] / 32))


def fitted(width, height, side_max):
    scale = min(1, side_max / max(width, height))
    return max(1, int(width * scale)), max(1, int(height * scale))


@given(SIDES, SIDES, st.sampled_from([math.floor, math.ceil, round]))
@example(2049, 513, round)
@example(2050, 513, math.floor)
def test_a_tiled_image_is_never_billed_more_than_its_bound_however_its_sides_are_rounded(width, height, rounded):
    for model, base, tile in (("gpt-4o", 85, 170), ("gpt-4o-mini", 2833, 5667), ("gpt-5", 70, 140), ("o3", 75, 150)):
        documented = base + tile * tiles(width, height, rounded)
        assert documented <= bound(model, width, height, "high") <= by_url(model, "high")
        assert bound(model, width, height, "low") == base


@given(SIDES, SIDES)
def test_an_image_in_patches_is_never_billed_more_than_its_bound(width, height):
    old, new = fitted(width, height, 2_048), fitted(width, height, 6_000)
    for model, detail, percent, documented in (
        ("gpt-4.1-mini", "high", 162, patches(*old, 1_536)),
        ("gpt-5-nano", "low", 246, patches(*old, 1_536)),
        ("o4-mini", None, 172, patches(*old, 1_536)),
        ("gpt-5.2", "high", 120, patches(*old, 1_536)),
        ("gpt-5.4", "high", 120, patches(*old, 2_500)),
        ("gpt-5.4", "original", 120, patches(*new, 10_000)),
        ("gpt-5.4-mini", None, 162, patches(*new, 10_000)),
        ("gpt-5.6-luna", "high", 120, patches(*fitted(width, height, 65_535), 2_500)),
        ("gpt-6-astra", None, 120, min(30_000, math.ceil(width / 32) * math.ceil(height / 32))),
    ):
        size_known = bound(model, width, height, detail)
        if max(width, height) <= 65_535:
            assert math.ceil(documented * percent / 100) <= size_known, (model, detail)
        assert size_known <= by_url(model, detail)


@given(MODELS, DETAILS, SIDES, SIDES, SCALES)
def test_a_larger_image_is_never_cheaper(model, detail, width, height, scale):
    larger = bound(model, width * scale, height * scale, detail)
    assert 0 < bound(model, width, height, detail) <= larger <= by_url(model, detail)


@given(MODELS, st.integers(512, 2048), st.integers(512, 2048))
def test_low_is_never_dearer_than_high_for_an_image_that_covers_it(model, width, height):
    assert bound(model, width, height, "low") <= bound(model, width, height, "high")


@given(MODELS, SIDES, SIDES)
def test_high_is_never_dearer_than_what_no_detail_may_mean(model, width, height):
    assert bound(model, width, height, "high") <= bound(model, width, height)


@given(MODELS, DETAILS, SIDES, SIDES)
def test_an_image_costs_the_same_on_its_side(model, detail, width, height):
    assert bound(model, width, height, detail) == bound(model, height, width, detail)


@pytest.mark.parametrize(
    ("model", "detail", "width", "height", "tokens"),
    [
        # The guide's: "A 1024 x 1024 square image in high detail costs 765 tokens", "2048 x 4096 ... 1105 tokens",
        # "A 4096 x 8192 image in low detail costs 85 tokens".
        ("gpt-4o", "high", 1024, 1024, 765),
        ("gpt-4o", "high", 2048, 4096, 1105),
        ("gpt-4o", "low", 4096, 8192, 85),
        # The guide's: 1024 x 1024 is 1,024 patches; times 1.62 for gpt-4.1-mini.
        ("gpt-5-mini", "high", 1024, 1024, 1659),
        # community.openai.com/t/1281361, as billed: 4000 x 1474 is 1,536 patches; 2049 x 513 eight tiles.
        ("gpt-5-mini", "high", 4000, 1474, 2489),
        ("gpt-4.1", "high", 2049, 513, 85 + 8 * 170),
        # community.openai.com/t/1262691, as billed, less 11 or 12 tokens of text: 128 x 64.
        ("o3", "high", 128, 64, 75 + 150),
        ("gpt-4o-mini", "high", 128, 64, 2833 + 5667),
        ("o4-mini", "low", 128, 64, 14),
        # gpt-5.6 and later: an image keeps its size without a detail, "original" or "auto".
        ("gpt-5.6-sol", None, 3200, 960, 3600),
        ("gpt-6.1-sol", "auto", 6400, 1440, 10_800),
        ("gpt-6-luna", "high", 8000, 8000, 3000),
        ("gpt-6-luna", "low", 8000, 8000, 308),
        # The gpt-5.4 family: 2,500 patches or 2,048 px; as an original 10,000 patches or 6,000 px.
        ("gpt-5.4", "high", 1600, 1600, 3000),
        ("gpt-5.4", None, 9000, 9000, 12_000),
        ("gpt-5.3-codex", None, 1600, 1600, 1844),
    ],
)
def test_documented_examples(model, detail, width, height, tokens):
    assert bound(model, width, height, detail) == tokens


@pytest.mark.parametrize(
    ("model", "detail", "tokens"),
    [
        ("gpt-4o", None, 85 + 8 * 170),
        ("ft:gpt-4o-mini-2024-07-18:acme::x", "high", 2833 + 8 * 5667),
        ("GPT-4.1-MINI", "low", 2489),
        ("openai/gpt-5", None, 70 + 8 * 140),
        ("gpt-5-2025-08-07", None, 70 + 8 * 140),
        ("gpt-5.1-codex", None, 1844),  # neither rule is documented for it
        ("gpt-5.6-terra", "high", 3000),
        ("gpt-5.6-terra", "original", 36_000),
        ("computer-use-preview", None, 65 + 8 * 129),
        ("another", None, 73_800),
        ("another", "low", 73_800 * 2_500 // 30_000),
    ],
)
def test_an_image_of_unknown_size_is_the_largest_of_its_detail(model, detail, tokens):
    assert by_url(model, detail) == tokens
    truncated = "data:image/png;base64," + base64.b64encode(png(10, 10)[:20]).decode()
    assert image_tokens_max(model, url=truncated, detail=detail) == tokens
    assert image_tokens_max(model, url=None, detail=detail) == tokens
