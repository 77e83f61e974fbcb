"""The size of an image from its header, for headers written here byte by byte after each format's specification."""

import base64
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.providers.image_size import base64_of_data_url, pixels


def png(width, height, tail=b"\0" * 20):
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBBI", width, height, 8, 2, 0, 0, 0, 0) + tail


def jpeg(width, height, *, before=b"", frame=0xC0):
    return b"\xff\xd8" + before + bytes((0xFF, frame)) + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\0" * 9


def segment(marker, data):
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def gif(width, height, *, first=None, before=b"", palette=0):
    left, top, inner_width, inner_height = first or (0, 0, width, height)
    flags = 0x80 | palette if palette else 0
    colours = b"\0" * (3 * 2 ** (palette + 1)) if palette else b""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, flags, 0, 0) + colours
    return screen + before + b"," + struct.pack("<HHHHB", left, top, inner_width, inner_height, 0) + b"\2\0;"


def webp(kind, data):
    return b"RIFF\0\0\0\0WEBP" + kind + struct.pack("<I", len(data)) + data + b"\0" * 20


def vp8(width, height):
    return webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width | 0x4000, height))


def vp8l(width, height):
    return webp(b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14))


def vp8x(width, height):
    return webp(b"VP8X", b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"))


def size(data):
    return pixels(base64.b64encode(data).decode())


SIDES = st.integers(1, 0x3FFF)


@given(st.sampled_from([png, jpeg, gif, vp8, vp8l, vp8x]), SIDES, SIDES)
def test_every_format_tells_its_size(image, width, height):
    assert size(image(width, height)) == (width, height)


@given(st.sampled_from([png, jpeg, gif, vp8, vp8l, vp8x]), st.integers(0, 200))
def test_a_header_that_is_cut_off_tells_either_the_size_or_nothing(image, kept):
    assert size(image(640, 480)[:kept]) in ((640, 480), None)


@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8", b"GIF89a", b"RIFF\0\0\0\0WEBP", png(1, 1)[:8]]))
def test_anything_is_read_without_a_fault(data, magic):
    found = size(magic + data)
    assert found is None or min(found) > 0


def test_a_jpeg_s_metadata_is_passed_over():
    notes = segment(0xE1, b"Exif\0\0" + jpeg(9, 9) + bytes(range(256)) * 100)
    profile = segment(0xE2, b"\xff\xc0" * 30_000)
    fill = b"\xff\xff" + b"\xff\x01"
    for frame in (0xC0, 0xC1, 0xC2, 0xC9, 0xCF):
        assert size(jpeg(4000, 3000, before=notes + profile + fill[:1] + fill[2:], frame=frame)) == (4000, 3000)


@pytest.mark.parametrize(
    "data",
    [
        png(0, 5),
        png(5, 5).replace(b"IHDR", b"CgBI"),
        jpeg(5, 0),  # the height comes later
        jpeg(5, 5, before=segment(0xDA, b"picture")),
        jpeg(5, 5, before=b"\xff\xe0\0\0"),
        jpeg(5, 5, before=b"\xff\xd0" * 2_000),
        jpeg(5, 5, before=b"junk"),
        jpeg(5, 5, before=segment(0xE1, b"\0" * 60_000) * 8),  # further on than is read
        gif(5, 5).replace(b"GIF89a", b"GIF88a"),
        gif(5, 5).replace(b",", b";"),
        gif(5, 5, before=b"!\xfe\x01x\0" * 2_000),
        gif(5, 5, before=b"!\xfe" + b"\x01x" * 2_000 + b"\0"),
        webp(b"ALPH", b"\0" * 20),
        vp8(5, 5).replace(b"\x9d\x01\x2a", b"\0\0\0"),
        vp8l(5, 5).replace(b"\x2f", b"\x2e"),
        b"BM" + b"\0" * 60,
        b"",
    ],
)
def test_what_cannot_be_told_is_not_guessed(data):
    assert size(data) is None


def test_a_gif_is_as_large_as_its_first_picture_reaches():
    """Decoders enlarge the screen for a picture that lies beyond it."""
    comment = b"!\xfe\x03abc\x02de\0"
    assert size(gif(1, 1, first=(10, 20, 3000, 2000), before=comment, palette=7)) == (3010, 2020)


def test_text_that_is_no_base64_tells_nothing():
    text = base64.b64encode(png(640, 480)).decode()
    for wrong in (text[:8] + "\n" + text[8:], text[:8] + "*" + text[9:], "é" + text, text[:8] + "=" + text[9:]):
        assert pixels(wrong) is None


def test_a_data_url_is_taken_apart():
    assert base64_of_data_url("data:image/png;base64,AAAA") == "AAAA"
    assert base64_of_data_url("DATA:image/png;charset=x;BASE64,AAAA,") == "AAAA,"
    assert base64_of_data_url("data:image/png;base64,") == ""
    for url in ("https://x/y.png", "data:image/png,AAAA", "data:image/png;base64", "https://x/;base64,AAAA", ""):
        assert base64_of_data_url(url) is None


def test_a_large_image_is_not_read_further_than_its_header():
    noise = random.Random(0).randbytes(1000) * 5000
    assert size(png(640, 480, tail=noise)) == (640, 480)
    assert size(jpeg(640, 480) + noise) == (640, 480)
