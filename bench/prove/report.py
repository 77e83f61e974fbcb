"""The table, a line as soon as a row is known."""

from collections.abc import Callable

from bench.prove.cell import Result
from budgetguard.core.money import format_usd

_NAMES = (14, 9, 15)


def head(say: Callable[[str], None], *names: str) -> None:
    named = "".join(f"{name:<{width}}" for name, width in zip(names, _NAMES, strict=False))
    say(
        f"{named:<38}{'calls':>6}{'admitted':>9}{'refused':>8}{'other':>6}{'overspend':>10}{'false ref.':>11}"
        f"{'used %':>8}{'leaked':>7}{'ledger-ctr':>11}{'unmetered':>10}{'EXPIRED':>8}{'s':>6}"
    )


def line(say: Callable[[str], None], result: Result) -> None:
    """Print a row; overspend and ledger minus counters are in nano-dollars."""
    named = "".join(f"{name:<{width}}" for name, width in zip(result.name, _NAMES, strict=False))
    statuses = result.statuses
    other = sum(statuses.values()) - statuses[200] - statuses[402]
    say(
        f"{named:<38}{sum(statuses.values()):>6}{statuses[200]:>9}{statuses[402]:>8}{other:>6}{result.over_nanos:>10}"
        f"{result.false_refusals:>11}{result.used:>8.2f}{result.leaked:>7}{result.difference_nanos:>11}"
        f"{result.unmetered:>10}{result.expired:>8}{result.seconds:>6.1f}"
    )
    if result.over_allowed_nanos or result.unmetered_allowed:
        say(
            f"  with Redis' data went ${format_usd(result.over_allowed_nanos)} of holds and undrained usage: the most "
            f"that may be overspent; {result.unmetered_allowed} answered calls were among it"
        )
    for said in result.faults:
        say(f"  FAILED {' / '.join(result.name)}: {said}")
