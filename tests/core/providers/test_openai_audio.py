"""Sound: 1 token for each 100 ms (developers.openai.com/api/docs/guides/realtime-costs)."""

import base64
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.providers.openai_audio import audio_tokens_max


def wav(seconds, *, samples=24_000, channels=1, bits=16, kind=1, told=None, subkind=None):
    rate = samples * channels * math.ceil(bits / 8)
    form = struct.pack("<HHIIHH", kind, channels, samples, rate if told is None else told, rate // samples, bits)
    if subkind is not None:
        form += struct.pack("<HHIH", 22, bits, 0, subkind) + b"\0" * 14
    sound = b"\0" * math.ceil(seconds * rate)
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(sound)) + sound
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def tokens(data):
    return audio_tokens_max(base64.b64encode(data).decode())


@given(
    st.fractions(0, 4, max_denominator=100),
    st.sampled_from([8_000, 16_000, 24_000, 48_000]),
    st.integers(1, 2),
    st.sampled_from([(1, 8), (1, 16), (1, 24), (3, 32), (6, 8), (7, 8)]),
)
def test_a_wav_file_is_bounded_by_its_length(seconds, samples, channels, linear):
    kind, bits = linear
    counted = tokens(wav(seconds, samples=samples, channels=channels, bits=bits, kind=kind))
    assert math.ceil(seconds * 10) <= counted <= seconds * 10 + 12


def test_an_extensible_wav_file_is_read_by_what_it_extends():
    assert 50 <= tokens(wav(5, kind=0xFFFE, subkind=1)) <= 62
    assert tokens(wav(5, kind=0xFFFE, subkind=0x55)) > 5 * 24_000 * 2 // 12


@pytest.mark.parametrize(("told", "longer"), [(10**9, 1), (24_000, 2), (0, 400)])
def test_the_slower_of_two_rates_counts(told, longer):
    assert tokens(wav(2, told=told)) >= 20 * longer


@pytest.mark.parametrize(
    "data",
    [
        wav(2, kind=2),  # compressed: its length does not follow from its size
        wav(2)[:40],
        wav(2).replace(b"fmt ", b"JUNK"),
        b"OggS" + b"\0" * 2_000,
        b"\xff\xf1" + b"\0" * 2_000,  # AAC has no layer
        b"\xff\xfb\x00" + b"\0" * 2_000,  # a free bit rate
        b"ID3\4\0\0\0\0\1\0" + b"\0" * 2_000,
        b"ID3",
        b"",
    ],
)
def test_what_is_not_known_is_bounded_by_its_bytes(data):
    assert tokens(data) >= len(data) * 10 / 120


@given(st.integers(0, 100), st.sampled_from([8, 16, 32, 320]))
def test_an_mp3_is_bounded_by_the_thriftiest_bit_rate(tenths, kilobits):
    tag = b"ID3\4\0\0\0\0\0\x05hello"
    for head in (b"\xff\xf3\x14", tag + b"\xff\xfb\x90"):
        sound = head + b"\0" * (kilobits * 125 * tenths // 10)
        assert tenths <= tokens(sound) <= len(sound) // 100 + 12


def test_text_that_is_no_base64_is_bounded_by_its_length():
    assert audio_tokens_max("data:audio/wav;base64," + "é" * 1_600) >= 100
