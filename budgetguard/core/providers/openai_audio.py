"""How many tokens sound comes to at the most, from what is sent of it.

Source: "Audio tokens in user messages are 1 token per 100 ms of audio"
(developers.openai.com/api/docs/guides/realtime-costs), which also says that counts vary a little by special tokens.
"""

import struct

from budgetguard.core.money import ceil_div
from budgetguard.core.providers.image_size import decoded_head

TOKENS_A_SECOND = 10
# Special tokens around the sound.
_FRAME_TOKENS = 8

_HEAD_CHARS = 4_096
# PCM, floats, A-law, mu-law: their length follows from their size. Others are compressed.
_WAV_LINEAR = frozenset({1, 3, 6, 7})
_WAV_EXTENSIBLE = 0xFFFE

# The thriftiest frame of an MP3 has 8 kbit a second (ISO/IEC 13818-3): 1,000 bytes.
_MP3_BYTES_A_SECOND = 1_000
# Of anything else: fewer than the thriftiest codecs in use need for speech.
_OTHER_BYTES_A_SECOND = 120


def audio_tokens_max(encoded: str) -> int:
    """Bound the tokens of base64 encoded sound, whatever format it is said to have."""
    size_bytes = ceil_div(len(encoded) * 3, 4)
    head = decoded_head(encoded, _HEAD_CHARS)
    bytes_a_second = _wav_bytes_a_second(head)
    if bytes_a_second is None:
        bytes_a_second = _MP3_BYTES_A_SECOND if _is_mp3(head) else _OTHER_BYTES_A_SECOND
    return ceil_div(size_bytes * TOKENS_A_SECOND, bytes_a_second) + _FRAME_TOKENS


def _wav_bytes_a_second(head: bytes) -> int | None:
    """Read the rate of a WAV file; ``None`` when it is none, or one whose length does not follow from its size."""
    if head[:4] != b"RIFF" or head[8:16] != b"WAVEfmt " or len(head) < 46:
        return None
    kind, channels, samples, told, _, bits = struct.unpack_from("<HHIIHH", head, 20)
    if kind == _WAV_EXTENSIBLE:
        kind = int.from_bytes(head[44:46], "little")
    if kind not in _WAV_LINEAR:
        return None
    # The header says it twice; the slower one makes the longer sound.
    return min(told, samples * channels * ceil_div(bits, 8)) or None


def _is_mp3(head: bytes) -> bool:
    at = 0
    if head[:3] == b"ID3" and len(head) >= 10:
        at = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    frame = head[at : at + 3]
    if len(frame) < 3 or frame[0] != 0xFF or frame[1] & 0xE0 != 0xE0:
        return False
    layer, bit_rate = frame[1] >> 1 & 3, frame[2] >> 4
    return layer != 0 and bit_rate not in (0, 15)
