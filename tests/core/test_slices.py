from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.slices import TOP_UP_TOKENS_MIN, Allowance, StreamSlices

# $0.60 a million tokens.
SLICES = StreamSlices(
    slice_tokens=4096, choices=1, output_femtos=600_000_000, output_tokens_largest=16_384, overrun=False
)
FIRST = Allowance(slices=SLICES, output_tokens=4096, hold_nanos=15_000 + 4096 * 600)


def test_a_stream_asks_when_half_a_slice_is_left():
    assert not FIRST.is_running_out(2048)
    assert FIRST.is_running_out(2049)
    assert not FIRST.is_outgrown_by(4096)
    assert FIRST.is_outgrown_by(4097)


def test_a_top_up_is_a_slice_more_up_to_what_the_model_can_write():
    second = FIRST.topped_up(2049)
    assert (second.output_tokens, second.hold_nanos) == (8192, 15_000 + 8192 * 600)
    # A piece that is larger than a slice.
    far = FIRST.topped_up(9000)
    assert far.output_tokens == 9000 + 4096
    whole = far.topped_up(13_000)
    assert (whole.output_tokens, whole.hold_nanos) == (16_384, 15_000 + 16_384 * 600)
    assert whole.is_whole
    assert not whole.is_outgrown_by(10**6)
    assert not whole.is_running_out(10**6)
    assert whole.topped_up(10**6) == whole


def test_the_whole_of_what_a_model_can_write():
    whole = FIRST.whole()
    assert (whole.output_tokens, whole.hold_nanos) == (16_384, 15_000 + 16_384 * 600)
    assert whole.is_whole
    assert whole.whole() == whole


def test_choices_share_what_is_held_and_each_costs():
    three = replace(FIRST, slices=replace(SLICES, choices=3, output_femtos=3 * 600_000_000), hold_nanos=0)
    assert not three.is_outgrown_by(3 * 4096)
    assert three.is_outgrown_by(3 * 4096 + 1)
    assert three.is_running_out(3 * 2048 + 1)
    assert three.topped_up(0).hold_nanos == 4096 * 3 * 600
    assert three.topped_up(3 * 5000 - 2).output_tokens == 5000 + 4096


def test_what_little_is_left_is_taken_unless_it_is_too_little():
    assert FIRST.topped_up_within(1000 * 600, 4097).output_tokens == 5096
    assert FIRST.topped_up_within(1000 * 600 - 1, 4097).output_tokens == 5095
    assert FIRST.topped_up_within((TOP_UP_TOKENS_MIN + 1) * 600, 4097).output_tokens == 4097 + TOP_UP_TOKENS_MIN
    assert FIRST.topped_up_within((TOP_UP_TOKENS_MIN + 1) * 600 - 1, 4097) is None
    assert FIRST.topped_up_within(-1, 4097) is None
    # The rest of what the model can write is enough, however little it is.
    nearly = replace(FIRST, output_tokens=16_380)
    assert nearly.topped_up_within(4 * 600, 16_381).is_whole
    assert nearly.topped_up_within(3 * 600, 16_381) is None


def test_output_that_costs_nothing_always_fits():
    free = replace(FIRST, slices=replace(SLICES, output_femtos=0))
    assert free.topped_up_within(0, 4097).hold_nanos == FIRST.hold_nanos


@given(
    slice_tokens=st.integers(1, 5000),
    choices=st.integers(1, 8),
    femtos=st.integers(0, 10**10),
    largest=st.integers(1, 20_000),
    pieces=st.lists(st.integers(0, 9000), max_size=20),
)
def test_a_stream_that_always_gets_what_it_asks_for_is_never_outgrown(slice_tokens, choices, femtos, largest, pieces):
    slices = StreamSlices(
        slice_tokens=slice_tokens, choices=choices, output_femtos=femtos, output_tokens_largest=largest, overrun=False
    )
    allowance = Allowance(slices=slices, output_tokens=min(slice_tokens, largest), hold_nanos=0)
    counted = 0
    for piece in pieces:
        counted += piece
        if allowance.is_running_out(counted):
            grown = allowance.topped_up(counted)
            assert allowance.output_tokens < grown.output_tokens <= largest
            assert grown.hold_nanos >= allowance.hold_nanos
            allowance = grown
        assert allowance.is_whole or counted <= allowance.output_tokens * choices


@pytest.mark.parametrize("room_nanos", [0, 1, 10**5, 10**6, 10**9])
def test_a_partial_top_up_never_costs_more_than_its_room(room_nanos):
    grown = FIRST.topped_up_within(room_nanos, 4096)
    assert grown is None or grown.hold_nanos - FIRST.hold_nanos <= room_nanos
