"""Files: text as it is has a bound, what is packed has none (developers.openai.com/api/docs/guides/file-inputs)."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.providers.openai_files import file_tokens_max


def encoded(data, kind=None):
    text = base64.b64encode(data).decode()
    return text if kind is None else f"data:{kind};base64,{text}"


@given(
    st.text(min_size=1, max_size=200),
    st.sampled_from(["utf-8", "utf-16", "latin-1"]),
    st.sampled_from([None, "text/plain"]),
)
def test_a_text_file_is_bounded_by_the_bytes_that_it_has_in_utf_8(text, encoding, kind):
    data = text.encode(encoding, "replace")
    shown = data.decode(encoding)
    bound = file_tokens_max(encoded(data, kind), filename="notes.txt")
    assert bound is None or bound >= len(shown.encode())


def test_a_text_file_counts_with_its_name():
    assert file_tokens_max(encoded(b"x" * 3000), filename="a" * 500 + ".PY") == 2 * 3000 + 503 + 32


@pytest.mark.parametrize(
    ("file_data", "filename"),
    [
        (None, "a.txt"),
        (encoded(b"%PDF-1.7"), "a.pdf"),
        (encoded(b"junk %PDF-1.7"), "a.txt"),
        (encoded(b"PK\x03\x04 packed"), "a.txt"),
        (encoded(b"a,b,c"), "a.csv"),
        (encoded(b"a,b,c", "text/csv"), "a.txt"),
        (encoded(b"hello"), None),
        (encoded(b"hello"), "txt"),
        ("not base64", "a.txt"),
        ("", "a.txt"),
    ],
)
def test_what_can_be_longer_than_it_is_has_no_bound(file_data, filename):
    assert file_tokens_max(file_data, filename=filename) is None
