"""What a budget's window may spend in all, which parts of that are crossed, and what is left of it for the next window.

Pure integer nanos; who reads the counters, and when, is decided elsewhere.
"""

from collections.abc import Sequence

from budgetguard.core.money import COUNTER_NANOS_MAX
from budgetguard.core.snapshot import BudgetSpec
from budgetguard.core.window import Window

# A threshold is told in basis points: hundredths of a percent of the limit.
WHOLE_BPS = 10_000


def limit_nanos(spec: BudgetSpec, window: Window, now_ms: int) -> int:
    """Return what a window's counter may reach at this moment: the limit, what was carried into it, and top-ups."""
    return min(
        spec.limit_nanos + carried_nanos(spec, window) + topped_up_nanos(spec, now_ms),
        COUNTER_NANOS_MAX,
    )


def carried_nanos(spec: BudgetSpec, window: Window) -> int:
    """Return what the window before has left to this one; any other window got nothing."""
    return spec.carried_nanos if spec.carried_into_ms == window.starts_at_ms else 0


def topped_up_nanos(spec: BudgetSpec, now_ms: int) -> int:
    """Sum the top-ups that apply at this moment."""
    return sum(top_up.amount_nanos for top_up in spec.top_ups if top_up.applies(now_ms))


def unused_nanos(*, limit_nanos: int, spent_nanos: int, cap_nanos: int) -> int:
    """Return what a window that is over leaves to the next one: never more than the cap, never a debt."""
    return max(0, min(limit_nanos - spent_nanos, cap_nanos))


def crossed_bps(thresholds_bps: Sequence[int], *, limit_nanos: int, spent_nanos: int) -> tuple[int, ...]:
    """Return the thresholds that spent money has reached, lowest first; nothing spent has reached none."""
    if spent_nanos <= 0:
        return ()
    return tuple(bps for bps in thresholds_bps if spent_nanos * WHOLE_BPS >= limit_nanos * bps)
