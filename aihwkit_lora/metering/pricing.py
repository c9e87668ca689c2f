"""Counts become joules and seconds here, and nowhere else: a price list and a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Protocol

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.metering.events import EVENTS, Side
from aihwkit_lora.metering.interval import Interval


class Status(StrEnum):
    """Where a number comes from."""

    CITED = "cited"
    LIBRARY = "library"
    DERIVED = "derived"
    ASSUMED = "assumed"


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number with unit, source and range.

    Args:
        value: In SI units.
        unit: For example ``"J"``, ``"s"``, ``"V"``.
        source: Paper, library with version, or the arithmetic that led to it.
        status: Whether it was cited, printed by a library, derived or assumed.
        low: Low end; ``value`` if None.
        high: High end; ``value`` if None.
        follows: In a price list, the event whose price this one copies: while the two have the same
            range, they vary together in the range of a ratio.
    Raises:
        ConfigurationError: No source is given, or the ends are not in order.

    Example:
        >>> pulse = Quantity(value=2e-12, unit="J", source="V²·G·t", status=Status.DERIVED)
        >>> (pulse.interval * 3).value
        6e-12
    """

    value: float
    unit: str
    source: str
    status: Status
    low: float | None = None
    high: float | None = None
    follows: str | None = None

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ConfigurationError(
                f"quantity of {self.value} {self.unit}: expected a source, got none. Say where "
                "the number comes from."
            )
        _ = self.interval

    @property
    def interval(self) -> Interval:
        """Value and range."""
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        return Interval(self.value, low, high)


@dataclass(frozen=True, kw_only=True)
class PriceList:
    """What one count of each event costs on one chip.

    An event that is listed nowhere is *unpriced*: reports name it, and it is never taken for free.

    Args:
        energy: Joules per count, by event.
        latency: Seconds per count, by event, for events that pass one after another.
        energy_free: Events that cost no energy of their own because another event pays for them.
        latency_free: Events that take no time of their own because they overlap with another.
    Raises:
        UnknownNameError: An entry is not a registered event.
        ConfigurationError: An entry has another unit, or is priced and free at once.
    """

    energy: Mapping[str, Quantity]
    latency: Mapping[str, Quantity]
    energy_free: frozenset[str] = field(default_factory=frozenset)
    latency_free: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        _check(self.energy, self.energy_free, "J", "energy")
        _check(self.latency, self.latency_free, "s", "latency")
        object.__setattr__(self, "energy", MappingProxyType(dict(self.energy)))
        object.__setattr__(self, "latency", MappingProxyType(dict(self.latency)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Python can neither copy nor send a read-only mapping.
        plain = (dict(self.energy), dict(self.latency), self.energy_free, self.latency_free)
        return _price_list, plain


def _price_list(*parts: Any) -> PriceList:
    energy, latency, energy_free, latency_free = parts
    return PriceList(
        energy=energy, latency=latency, energy_free=energy_free, latency_free=latency_free
    )


def _check(prices: Mapping[str, Quantity], free: frozenset[str], unit: str, what: str) -> None:
    for event in (*prices, *free):
        EVENTS.get(event)
    for event, quantity in prices.items():
        if quantity.unit != unit:
            raise ConfigurationError(
                f"{what} price of '{event}': expected the unit {unit}, got {quantity.unit}."
            )
    if both := sorted(free & prices.keys()):
        raise ConfigurationError(
            f"{what} prices: expected events to be priced or free, got both for "
            f"{', '.join(both)}. Remove one."
        )


class Priced(Protocol):
    """Anything with a price list, such as a chip."""

    @property
    def name(self) -> str:
        """Name for reports."""

    @property
    def prices(self) -> PriceList:
        """Cost of one count of each event."""


@dataclass(frozen=True, kw_only=True)
class EnergyReport:
    """Energy and time of some counts on one chip.

    Args:
        chip: Name of the chip.
        energy_by_event: Joules by event; only events that happened and cost energy.
        latency_by_event: Seconds by event; only events that happened and take time of their own.
        unpriced_energy: Events that happened and whose energy nobody has given.
        unpriced_latency: Events that happened and whose time nobody has given.
        level: How sure the counts are.
    """

    chip: str
    energy_by_event: Mapping[str, Interval]
    latency_by_event: Mapping[str, Interval]
    unpriced_energy: tuple[str, ...]
    unpriced_latency: tuple[str, ...]
    level: Level

    @property
    def energy_j(self) -> Interval:
        """All priced energy, in joules."""
        return Interval.sum(self.energy_by_event.values())

    @property
    def latency_s(self) -> Interval:
        """All priced time, in seconds, if nothing overlaps across layers."""
        return Interval.sum(self.latency_by_event.values())

    def energy_on(self, side: Side) -> Interval:
        """Energy of the events on one side of the chip, in joules.

        Args:
            side: Part of the chip.
        """
        return Interval.sum(
            energy
            for event, energy in self.energy_by_event.items()
            if EVENTS.get(event).side == side
        )


def price(counts: Counts, chip: Priced) -> EnergyReport:
    """Turn counts into energy and time on a chip. Nothing is stored; price again for another.

    Args:
        counts: What happened.
        chip: Where.
    Returns:
        Joules and seconds by event, with their ranges, and what could not be priced.

    Example:
        >>> import aihwkit_lora as al
        >>> report = al.price(al.Counts({"set_pulses": 2}), al.chips.get("rm-180nm"))
        >>> round(report.energy_j.value * 1e12)
        306
    """
    prices = chip.prices
    # In the order of their names: sums of floats depend on it, and a run that was resumed has met
    # its events in another order than one that was not.
    happened = sorted(counts)
    return EnergyReport(
        chip=chip.name,
        energy_by_event=_bill(happened, counts, prices.energy),
        latency_by_event=_bill(happened, counts, prices.latency),
        unpriced_energy=_missing(happened, prices.energy, prices.energy_free),
        unpriced_latency=_missing(happened, prices.latency, prices.latency_free),
        level=counts.level,
    )


def best_values(counts: Counts, prices: Mapping[str, Quantity]) -> dict[str, float]:
    """What :func:`price` says without ranges, for those who ask in every training step.

    Args:
        counts: What happened.
        prices: Energy or latency of one count of each event.
    Returns:
        Best known values by event, in the order of their names; events without a price are left
        out.

    Example:
        >>> import aihwkit_lora as al
        >>> counts, chip = al.Counts({"set_pulses": 2}), al.chips.get("rm-180nm")
        >>> best_values(counts, chip.prices.energy)["set_pulses"] == (
        ...     price(counts, chip).energy_by_event["set_pulses"].value
        ... )
        True
    """
    return {
        event: prices[event].value * counts[event] for event in sorted(counts) if event in prices
    }


def unpriced_events(counts: Counts, chip: Priced) -> tuple[str, ...]:
    """Events that happened and lack a price, for energy or for time.

    Args:
        counts: What happened.
        chip: Whose prices to use.

    Example:
        >>> import aihwkit_lora as al
        >>> unpriced_events(al.Counts({"set_pulses": 2}), al.chips.get("rm-180nm"))
        ()
    """
    happened, prices = sorted(counts), chip.prices
    without = _missing(happened, prices.energy, prices.energy_free)
    return tuple(
        dict.fromkeys((*without, *_missing(happened, prices.latency, prices.latency_free)))
    )


def _bill(
    happened: list[str], counts: Counts, prices: Mapping[str, Quantity]
) -> dict[str, Interval]:
    bill = {event: prices[event].interval * counts[event] for event in happened if event in prices}
    return {event: cost for event, cost in bill.items() if cost.high > 0.0}


def _missing(
    happened: list[str], prices: Mapping[str, Quantity], free: frozenset[str]
) -> tuple[str, ...]:
    return tuple(event for event in happened if event not in prices and event not in free)
