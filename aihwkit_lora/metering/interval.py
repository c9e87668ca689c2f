"""A quantity that is known within a range: value, low end, high end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from aihwkit_lora.errors import ConfigurationError


@dataclass(frozen=True)
class Interval:
    """A non-negative value between a low and a high end, all in the same unit.

    Args:
        value: Best known value.
        low: Smallest plausible value, at most ``value``.
        high: Largest plausible value, at least ``value``.
    Raises:
        ConfigurationError: The ends are not in order, or the low end is below 0.

    Example:
        >>> pulse, read = Interval(2.0, 1.0, 4.0), Interval(1.0, 1.0, 1.0)
        >>> pulse + read
        Interval(value=3.0, low=2.0, high=5.0)
        >>> (pulse * 3).high, (pulse / read).low
        (12.0, 1.0)
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.value <= self.high:
            raise ConfigurationError(
                f"interval: expected 0 <= low <= value <= high, got low {self.low}, value "
                f"{self.value}, high {self.high}."
            )

    @classmethod
    def sum(cls, parts: Iterable[Interval]) -> Interval:
        """Add up intervals end by end: all low, or all high, at once.

        Args:
            parts: Intervals in one unit.
        """
        known = list(parts)
        return cls(
            sum(part.value for part in known),
            sum(part.low for part in known),
            sum(part.high for part in known),
        )

    def __add__(self, other: Interval) -> Interval:
        return Interval.sum((self, other))

    def __mul__(self, factor: float) -> Interval:
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def __truediv__(self, other: Interval) -> Interval:
        if other.low <= 0.0:
            raise ConfigurationError(
                f"interval: expected a denominator above 0, got one from {other.low}."
            )
        return Interval(self.value / other.value, self.low / other.high, self.high / other.low)

    def to_dict(self) -> dict[str, float]:
        """The three numbers by name, for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}
