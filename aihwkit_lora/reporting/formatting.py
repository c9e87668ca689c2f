"""Numbers for people: three significant digits, SI prefixes, and a dash for what is unknown."""

from __future__ import annotations

import math

from aihwkit_lora.metering.interval import Interval

MISSING = "–"
_PREFIXES = {-15: "f", -12: "p", -9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T"}


def format_si(value: float, unit: str) -> str:
    """Write a quantity with three significant digits and an SI prefix.

    Args:
        value: In ``unit``, without prefix.
        unit: For example ``"J"``.
    Returns:
        Number, space, prefix and unit.

    Example:
        >>> format_si(2.375e-9, "J"), format_si(0.9999, "s"), format_si(0.0, "J")
        ('2.38 nJ', '1.00 s', '0 J')
    """
    exponent = _prefix_exponent(value)
    return f"{format_number(value / 10.0**exponent)} {_PREFIXES[exponent]}{unit}"


def format_interval(interval: Interval, unit: str) -> str:
    """Write a value and its range under one SI prefix; without the range if there is none.

    Args:
        interval: In ``unit``, without prefix.
        unit: For example ``"J"``.

    Example:
        >>> format_interval(Interval(2.375e-9, 0.6e-9, 3e-9), "J")
        '2.38 nJ [0.600, 3.00]'
        >>> format_interval(Interval(2e-6, 2e-6, 2e-6), "s")
        '2.00 µs'
    """
    return f"{format_si(interval.value, unit)} {format_range(interval)}".rstrip()


def format_range(interval: Interval) -> str:
    """Write the ends of a range in the SI prefix that its value is written in.

    Args:
        interval: In a unit without prefix.
    Returns:
        Both ends in brackets; nothing if they are equal.

    Example:
        >>> format_range(Interval(2.375e-9, 0.6e-9, 3e-9))
        '[0.600, 3.00]'
    """
    if interval.low == interval.high:
        return ""
    scale = 10.0 ** _prefix_exponent(interval.value)
    return f"[{format_number(interval.low / scale)}, {format_number(interval.high / scale)}]"


def format_number(number: float) -> str:
    """Write a number with three significant digits, never with an exponent.

    Args:
        number: Any number.

    Example:
        >>> format_number(48731.0), format_number(13.349), format_number(0.0321)
        ('48,700', '13.3', '0.0321')
    """
    if number == 0.0 or not math.isfinite(number):
        return f"{number:g}"
    digits = 2 - _magnitude(number)
    return f"{round(number, digits):,.{max(0, digits)}f}"


def format_fraction(fraction: float | None) -> str:
    """Write an accuracy in percent; a dash if there is none.

    Args:
        fraction: Between 0 and 1, or None.

    Example:
        >>> format_fraction(0.9731), format_fraction(None)
        ('97.3 %', '–')
    """
    return MISSING if fraction is None else f"{100.0 * fraction:.1f} %"


def _magnitude(number: float) -> int:
    # By way of a string, because 9.996 has the magnitude of 10.0, as which it is printed.
    return int(f"{number:.2e}".partition("e")[2])


def _prefix_exponent(value: float) -> int:
    if value == 0.0 or not math.isfinite(value):
        return 0
    return min(max(_magnitude(value) // 3 * 3, min(_PREFIXES)), max(_PREFIXES))
