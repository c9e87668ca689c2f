"""The digital unit: how wide its numbers are, what its SRAM holds, how fast it multiplies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from aihwkit_lora.errors import ConfigurationError

FLOAT_BITS = 16
"""Width of whatever is not in fixed point."""

WIDTHS = range(2, 17)
"""Widths of a fixed-point number, in bits, sign included."""

_BITS_PER_KIB = 8 * 1024

Reuse = Literal["batch", "none"]


@dataclass(frozen=True, kw_only=True)
class DigitalUnit:
    """Multiply–accumulate units and an SRAM beside the arrays, which run the adapters.

    Args:
        bits: Width of weights and activations in fixed point, 2 to 16, sign included; None for
            16-bit floats.
        sram_kib: Memory for adapter weights, in KiB, above 0.
        macs_per_cycle: Multiply–accumulates in one clock cycle, at least 1; None if no latency is
            claimed.
        clock_hz: Clock, in hertz, above 0; None if no latency is claimed.
        reuse: Whether a weight is read from the SRAM once per call of its layer (``"batch"``) or
            again for every input vector (``"none"``).
    Raises:
        ConfigurationError: A field is out of its range, or one of ``macs_per_cycle`` and
            ``clock_hz`` is given without the other.

    Example:
        >>> unit = DigitalUnit(bits=8, sram_kib=2, macs_per_cycle=64, clock_hz=200e6)
        >>> unit.fits(2048), unit.fits(2049), unit.seconds(64_000)
        (True, False, 5e-06)
    """

    bits: int | None = 8
    sram_kib: float = 64.0
    macs_per_cycle: int | None = None
    clock_hz: float | None = None
    reuse: Reuse = "batch"

    def __post_init__(self) -> None:
        bits, rate, clock = self.bits, self.macs_per_cycle, self.clock_hz
        known = bits is None or (type(bits) is int and bits in WIDTHS)
        self._require("bits", "2 to 16, or None for floats", known)
        self._require("sram_kib", "above 0 and finite", 0 < self.sram_kib < math.inf)
        self._require("macs_per_cycle", "1 or more", rate is None or rate >= 1)
        self._require("clock_hz", "above 0 and finite", clock is None or 0 < clock < math.inf)
        self._require("reuse", "'batch' or 'none'", self.reuse in get_args(Reuse))
        if (rate is None) != (clock is None):
            raise ConfigurationError(
                "digital unit: expected macs_per_cycle and clock_hz together, got "
                f"{rate!r} and {clock!r}. Give both for a latency, or neither."
            )

    def _require(self, name: str, expected: str, satisfied: bool) -> None:
        if not satisfied:
            raise ConfigurationError(
                f"digital unit: expected {name} {expected}, got {getattr(self, name)!r}."
            )

    @property
    def stored_bits(self) -> int:
        """Bits that one weight, or one activation, takes in the SRAM."""
        return FLOAT_BITS if self.bits is None else self.bits

    @property
    def capacity_bits(self) -> int:
        """Bits that the SRAM holds."""
        return math.floor(self.sram_kib * _BITS_PER_KIB)

    def fits(self, weights: int) -> bool:
        """Tell whether the SRAM holds so many weights at once.

        Args:
            weights: A whole number of 0 or more.
        """
        return weights * self.stored_bits <= self.capacity_bits

    def seconds(self, macs: int) -> float:
        """Time that multiply–accumulates take when the unit is never idle.

        Args:
            macs: A whole number of 0 or more.
        Raises:
            ConfigurationError: The unit claims no latency.
        """
        if self.macs_per_cycle is None or self.clock_hz is None:
            raise ConfigurationError(
                "digital unit: expected macs_per_cycle and clock_hz, got None. Say how fast it is, "
                "for example DigitalUnit(macs_per_cycle=64, clock_hz=200e6)."
            )
        return macs / (self.macs_per_cycle * self.clock_hz)


def kib(bits: int) -> str:
    """Print a number of bits as KiB.

    Args:
        bits: A whole number of 0 or more.

    Example:
        >>> kib(12_288)
        '1.5 KiB'
    """
    return f"{bits / _BITS_PER_KIB:.4g} KiB"
