"""The width and height of an image, read from the header of its base64 text: nothing is decompressed.

Every reader takes the size that decoders take, or says that it does not know: a header that tells less than the image
shows would make a bound that is none.
"""

import binascii
import struct
from collections.abc import Callable
from typing import TypeAlias

Size: TypeAlias = tuple[int, int]

# Enough for the headers of PNG and WebP; a GIF's palette and a JPEG's metadata may stand before the size.
_HEAD_CHARS = 64
# A JPEG carries its profile, thumbnail and camera's notes in segments of up to 64 KiB each.
_LONG_HEAD_CHARS = 512 * 1024
_SEGMENTS_MAX = 1_000

_PNG = b"\x89PNG\r\n\x1a\n"
# Markers of a JPEG frame, which tells the size: SOF0 to SOF15 without those that mean something else.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})
# The picture's end and its data: a frame comes before them.
_JPEG_PICTURE = frozenset({0xD9, 0xDA})


def base64_of_data_url(url: str) -> str | None:
    """Return what a base64 data URL carries, ``None`` when it is another URL."""
    head, comma, data = url[:256].partition(",")
    if not comma or head[:5].lower() != "data:" or not head.lower().endswith(";base64"):
        return None
    return url[len(head) + 1 :] if data else ""


def pixels(encoded: str) -> Size | None:
    """Return (width, height) of a base64 encoded PNG, JPEG, GIF or WebP, ``None`` when they cannot be told."""
    head = decoded_head(encoded, _HEAD_CHARS)
    for magic, read, chars in _READERS:
        if head.startswith(magic):
            size = read(head if chars == _HEAD_CHARS else decoded_head(encoded, chars))
            return size if size is not None and min(size) > 0 else None
    return None


def decoded_head(encoded: str, chars: int) -> bytes:
    """Decode the first characters (a multiple of 4), strictly: a lenient decoder would see other bytes after a slip."""
    head = encoded[:chars]
    try:
        return binascii.a2b_base64(head.encode("ascii"), strict_mode=True)
    except ValueError:  # not ASCII, not base64, or cut off
        return b""


def _png(data: bytes) -> Size | None:
    if data[12:16] != b"IHDR" or len(data) < 24:
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _gif(data: bytes) -> Size | None:
    """Read the screen's size, or the first picture's end when it lies beyond: decoders enlarge the screen for it."""
    if len(data) < 13 or data[:6] not in (b"GIF87a", b"GIF89a"):
        return None
    width, height, packed = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (packed & 7) + 1 if packed & 0x80 else 0)
    for _ in range(_SEGMENTS_MAX):
        if data[at : at + 1] != b"!":
            break
        at = _after_blocks(data, at + 2)
    if data[at : at + 1] != b"," or len(data) < at + 9:
        return None
    left, top, inner_width, inner_height = struct.unpack_from("<HHHH", data, at + 1)
    return max(width, left + inner_width), max(height, top + inner_height)


def _after_blocks(data: bytes, at: int) -> int:
    for _ in range(_SEGMENTS_MAX):
        if at >= len(data) or data[at] == 0:
            break
        at += 1 + data[at]
    return at + 1


def _jpeg(data: bytes) -> Size | None:
    at = 2
    for _ in range(_SEGMENTS_MAX):
        if len(data) < at + 9 or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        elif marker in _JPEG_ALONE:
            at += 2
        else:
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            if length < 2 or marker in _JPEG_PICTURE:
                return None
            at += 2 + length
    return None


def _webp(data: bytes) -> Size | None:
    if data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and data[20] == 0x2F:
        packed = int.from_bytes(data[21:25], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


_READERS: tuple[tuple[bytes, Callable[[bytes], Size | None], int], ...] = (
    (_PNG, _png, _HEAD_CHARS),
    (b"\xff\xd8", _jpeg, _LONG_HEAD_CHARS),
    (b"GIF8", _gif, _LONG_HEAD_CHARS),
    (b"RIFF", _webp, _HEAD_CHARS),
)
