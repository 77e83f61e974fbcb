import pytest

from control_plane.jobs.turns import FAILURES_MAX, Turns


class Work:
    """Turns by a clock that stands still until it is moved, and what was done in them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: list[str] = []
        self.turns = Turns[str](job="job", what="letter", clock=lambda: self.now)

    def run(self, letters: str, *, failing: str = "") -> str:
        """A pass; returns what it has tried."""
        tried = ""
        self.turns.begin()
        for letter in self.turns.due(letters):
            tried += letter
            with self.turns.apart(letter):
                if letter in failing:
                    raise KeyError(letter)
                self.done.append(letter)
        return tried


@pytest.fixture
def work():
    return Work()


def test_a_failure_ends_no_more_than_its_own_turn(work):
    assert work.run("cab", failing="a") == "abc"
    assert work.done == ["b", "c"]


def test_what_failed_is_the_last_and_waits_the_longer_the_more_often_it_failed(work):
    work.run("abc", failing="a")
    assert work.run("abc") == "bc"
    work.now = 0.5
    assert work.run("abc", failing="a") == "bca"
    work.now = 1.0
    assert work.run("abc") == "bc"
    work.now = 1.5
    assert work.run("abc") == "bca"
    assert work.run("abc") == "abc"


def test_so_many_failures_in_a_row_are_nobody_s_own(work):
    assert FAILURES_MAX == 3
    with pytest.raises(KeyError, match="d"):
        work.run("abcdef", failing="bcdef")
    assert work.done == ["a"]
    # Whoever had no turn comes before them.
    work.now = 10.0
    assert work.run("abcdef", failing="cd") == "aefbcd"


def test_failures_with_a_success_between_or_of_another_pass_are_not_in_a_row(work):
    assert work.run("abcde", failing="abde") == "abcde"
    work.now = 10.0
    assert work.run("ab", failing="ab") == "ab"
    work.now = 20.0
    assert work.run("ab", failing="ab") == "ab"


def test_the_stack_is_told_once(work, caplog):
    for _ in range(2):
        work.run("a", failing="a")
        work.now += 10
    first, second = caplog.records
    assert (first.levelname, bool(first.exc_info)) == ("ERROR", True)
    assert (second.levelname, bool(second.exc_info)) == ("WARNING", False)
    assert "job=job letter=a failures=2" in second.getMessage()
