"""Exact money: an amount is an ``int`` of nano-USD (1 USD = 10**9 nanos), never a float."""

import re
from decimal import ROUND_CEILING, Context, Decimal, Inexact, InvalidOperation

NANOS_PER_USD = 10**9

# Lua numbers are doubles; up to here one call's amount is exact in a script ($9,007,199.25).
CALL_NANOS_MAX = 2**53 - 1

# Counters and limits are signed 64-bit in Redis and Postgres ($9.2 billion).
COUNTER_NANOS_MAX = 2**63 - 1

_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")

# Wide enough for any amount below; Inexact raises, so a digit is never dropped in silence.
_EXACT = Context(prec=60, traps=[InvalidOperation, Inexact])


def parse_usd(amount: str | float | Decimal) -> int:
    """Parse US dollars into nanos, exactly.

    A float is read by its shortest decimal spelling (``25.5`` is ``"25.5"``), as a JSON number is meant.

    Raises:
        ValueError: not a finite number, finer than a nano, negative, or over ``COUNTER_NANOS_MAX``.
    """
    if isinstance(amount, bool):
        msg = "expected US dollars as a number or a decimal string, got a boolean"
        raise ValueError(msg)
    try:
        # A fresh context a call: decimal contexts carry flags and are not shared between threads.
        value = Decimal(_spelled(amount))
        nanos = _EXACT.copy().multiply(value, Decimal(NANOS_PER_USD))
    except (InvalidOperation, Inexact, ValueError):
        msg = f"expected US dollars as a decimal number, got {str(amount)[:40]!r}"
        raise ValueError(msg) from None
    if nanos != nanos.to_integral_value():
        msg = f"expected at most 9 decimal places (a nano-dollar), got {str(amount)[:40]!r}"
        raise ValueError(msg)
    if nanos < 0:
        msg = f"expected an amount of 0 or more, got {str(amount)[:40]!r}"
        raise ValueError(msg)
    if nanos > COUNTER_NANOS_MAX:
        msg = f"expected at most {format_usd(COUNTER_NANOS_MAX)} US dollars, got {str(amount)[:40]!r}"
        raise ValueError(msg)
    return int(nanos)


def _spelled(amount: str | float | Decimal) -> str:
    """Return a decimal spelling, without what ``Decimal`` reads beyond it: underscores, other scripts' digits."""
    text = str(amount).strip()
    if _DECIMAL.fullmatch(text) is None:
        raise InvalidOperation
    return text


def format_usd(amount_nanos: int) -> str:
    """Spell nanos as an exact decimal string of dollars, without trailing zeros: ``25500000000 -> "25.5"``."""
    sign = "-" if amount_nanos < 0 else ""
    dollars, nanos = divmod(abs(amount_nanos), NANOS_PER_USD)
    if nanos == 0:
        return f"{sign}{dollars}"
    return f"{sign}{dollars}.{nanos:09d}".rstrip("0")


def ceil_div(dividend: int, divisor: int) -> int:
    """Divide non-negative integers, rounded up: the one rounding that money goes through."""
    return -(-dividend // divisor)


def femtos_per_unit(price_usd: Decimal, *, per_units: int) -> int:
    """Convert a price (USD for ``per_units`` units) into femto-USD a unit, rounded up to a whole femto.

    A femto (10**-15 USD) keeps every published token price exact ($0.0001 per million tokens is 100,000 femtos);
    what is finer still rounds up, so a cost is never understated.
    """
    femtos = price_usd * Decimal(10**15) / Decimal(per_units)
    return int(femtos.to_integral_value(rounding=ROUND_CEILING))
