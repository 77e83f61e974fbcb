from base64 import urlsafe_b64encode

import pytest

from budgetguard.adapters.postgres.paging import make_page, page_limit, read_token, write_token
from budgetguard.core.entities import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX
from budgetguard.core.errors import InvalidError


def test_a_token_tells_its_position_to_its_own_listing_only():
    token = write_token("ledger", [5, "op"])
    assert read_token(token, "ledger", [int, str]) == [5, "op"]
    assert read_token("", "ledger", [int, str]) is None
    for listing, types in (("tenants", [int, str]), ("ledger", [str, str]), ("ledger", [int])):
        with pytest.raises(InvalidError):
            read_token(token, listing, types)


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "!!!!",
        "é",
        "A" * 3000,
        urlsafe_b64encode(b"{}").decode(),
        urlsafe_b64encode(b"[1").decode(),
        urlsafe_b64encode(b"\xff\xfe").decode(),
        urlsafe_b64encode(b'["x", true]').decode(),
        " ",
        "a\x00",
    ],
)
def test_what_is_no_token_is_refused(token):
    with pytest.raises(InvalidError):
        read_token(token, "ledger", [int])


def test_a_boolean_is_no_number():
    assert write_token("x", [1]) != write_token("x", [True])
    with pytest.raises(InvalidError):
        read_token(write_token("x", [True]), "x", [int])


def test_a_page_size_is_bounded():
    assert page_limit(0) == PAGE_SIZE_DEFAULT
    assert page_limit(10**9) == PAGE_SIZE_MAX
    with pytest.raises(InvalidError):
        page_limit(-1)


def test_a_page_names_the_next_one_only_when_there_is_one():
    def position(item: int):
        return [item]

    assert make_page([1, 2], limit=2, listing="x", position=position).next_page_token == ""
    page = make_page([1, 2, 3], limit=2, listing="x", position=position)
    assert page.items == (1, 2)
    assert read_token(page.next_page_token, "x", [int]) == [2]
