"""Ratios with names, and with ranges that respect that one price list stands on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.metering.pricing import Priced, Quantity, price
from aihwkit_lora.reporting.records import Ratio

_Ends = Mapping[str, tuple[Fraction, Fraction]]


def price_ratio(numerator: Counts, denominator: Counts, prices: Mapping[str, Quantity]) -> Interval:
    """Divide the cost of some counts by the cost of others, under the same prices.

    The range is over all prices within their ranges, each event's price the same above and below
    the line: what costs the same on both sides does not blur the ratio. Events whose prices are one
    object, such as conversions forwards and backwards by the same ADC, vary together. The ratio
    Σ n·p / Σ d·p rises with the price p of an event if and only if n/d of that event is above the
    ratio. So at its largest, the events with n/d above some threshold are at their high price and
    the rest at their low price, at its smallest the other way round, and it is enough to try every
    threshold. Computed in rational numbers and rounded once.

    Args:
        numerator: What is above the line.
        denominator: What is below the line.
        prices: Cost of one count of each event; events without a price are left out.
    Returns:
        The ratio at the best known prices, and its smallest and largest value.
    Raises:
        ConfigurationError: The denominator costs nothing, or nothing at its lowest prices, so
            that no largest ratio exists.

    Example:
        >>> from aihwkit_lora.metering import Status
        >>> pulse = Quantity(
        ...     value=2.0, low=1.0, high=4.0, unit="J", source="example", status=Status.ASSUMED
        ... )
        >>> thirty, ten = Counts({"set_pulses": 30}), Counts({"set_pulses": 10})
        >>> price_ratio(thirty, ten, {"set_pulses": pulse})
        Interval(value=3.0, low=3.0, high=3.0)
    """
    above, below = _by_price(numerator, prices), _by_price(denominator, prices)
    events = [event for event in prices if above[event] or below[event]]
    ends = {event: _ends(prices[event].interval) for event in events}
    best = {event: Fraction(prices[event].value) for event in events}
    if _cost(below, {event: low for event, (low, _) in ends.items()}) == 0:
        raise ConfigurationError(
            "ratio: expected a denominator that costs something at its lowest prices, got 0 from "
            f"the counts {dict(denominator)}. Choose another denominator, or price its events."
        )
    ratios = [
        _cost(above, corner) / _cost(below, corner)
        for corner in (best, *_corners(above, below, ends))
    ]
    return Interval(float(ratios[0]), float(min(ratios)), float(max(ratios)))


def energy_ratio(
    name: str,
    numerator: Counts,
    denominator: Counts,
    chip: Priced,
    *,
    above: str,
    below: str,
    includes: str,
) -> Ratio:
    """Name a ratio of two energies on one chip.

    Args:
        name: Of the ratio.
        numerator: What is above the line.
        denominator: What is below the line.
        chip: Whose energy prices to take.
        above: What the numerator is, in words.
        below: What the denominator is, in words.
        includes: What is counted on both sides, in words. Events that happened and that the chip
            has no price for are named behind it.
    Returns:
        The ratio with its range over the chip's prices.
    Raises:
        ConfigurationError: The denominator costs nothing.

    Example:
        >>> from aihwkit_lora import chips
        >>> ratio = energy_ratio(
        ...     "write energy",
        ...     Counts({"set_pulses": 40}),
        ...     Counts({"set_pulses": 10}),
        ...     chips.get("rm-180nm"),
        ...     above="all weights rewritten",
        ...     below="one layer rewritten",
        ...     includes="pulses",
        ... )
        >>> ratio.value, ratio.numerator
        (4.0, 'all weights rewritten')
    """
    interval = price_ratio(numerator, denominator, chip.prices.energy)
    unpriced = price(numerator + denominator, chip).unpriced_energy
    if unpriced:
        includes += f"; without {', '.join(sorted(unpriced))}: no price"
    return Ratio(
        name=name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        numerator=above,
        denominator=below,
        includes=includes,
    )


def _by_price(counts: Counts, prices: Mapping[str, Quantity]) -> Counts:
    """Add up events that share one price, such as conversions forwards and backwards by one ADC."""
    first = {id(prices[event]): event for event in reversed(list(prices))}
    priced = (event for event in counts if event in prices)
    return Counts.sum(Counts({first[id(prices[event])]: counts[event]}) for event in priced)


def _ends(interval: Interval) -> tuple[Fraction, Fraction]:
    return Fraction(interval.low), Fraction(interval.high)


def _cost(counts: Counts, prices: Mapping[str, Fraction]) -> Fraction:
    return sum((counts[event] * one for event, one in prices.items()), Fraction(0))


def _corners(
    numerator: Counts, denominator: Counts, ends: _Ends
) -> Iterator[Mapping[str, Fraction]]:
    def rank(event: str) -> tuple[bool, Fraction]:
        below = denominator[event]
        return (False, Fraction(numerator[event], below)) if below else (True, Fraction(0))

    ranked = sorted(ends, key=rank)
    for threshold in range(len(ranked) + 1):
        rest = ranked[:threshold]
        yield {event: low if event in rest else high for event, (low, high) in ends.items()}
        yield {event: high if event in rest else low for event, (low, high) in ends.items()}
