"""Time of a forward pass: arrays and digital unit side by side, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from aihwkit_lora.adapters.digital_unit import DigitalUnit
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.metering.pricing import Priced

_ADAPTER = re.compile(r"\.lora_[AB]\.[^.]+$")
_MACS = ("forward_macs", "forward_macs_int8", "forward_macs_int16")


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Time that one layer takes for all vectors that were counted.

    Args:
        layer: Full name.
        analog_s: Of its arrays, in seconds, with the range of the chip's price.
        digital_s: Of its adapters, or of the layer itself where it is digital, in seconds.
    """

    layer: str
    analog_s: Interval
    digital_s: float

    @property
    def bottleneck(self) -> Literal["analog", "digital"]:
        """Which of the two the layer waits for when both run at once."""
        return "digital" if self.digital_s > self.analog_s.value else "analog"

    @property
    def overlapped_s(self) -> Interval:
        """Seconds if array and adapters work at the same time."""
        ends = (self.analog_s.value, self.analog_s.low, self.analog_s.high)
        return Interval(*(max(end, self.digital_s) for end in ends))

    @property
    def sequential_s(self) -> Interval:
        """Seconds if the adapters wait for the array."""
        return self.analog_s + Interval(self.digital_s, self.digital_s, self.digital_s)


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """Times of all layers, which wait for each other.

    Args:
        chip: Name of the chip.
        layers: In the order of the counts; only layers that take time.
    """

    chip: str
    layers: tuple[LayerTime, ...]

    @property
    def overlapped_s(self) -> Interval:
        """Seconds if, in each layer, array and adapters work at the same time."""
        return Interval.sum(layer.overlapped_s for layer in self.layers)

    @property
    def sequential_s(self) -> Interval:
        """Seconds if, in each layer, the adapters wait for the array."""
        return Interval.sum(layer.sequential_s for layer in self.layers)


def pipeline(counts: Mapping[str, Counts], chip: Priced, unit: DigitalUnit) -> PipelineReport:
    """Set the time of each layer's arrays beside that of its adapters, in a forward pass.

    Loads of adapters, SRAM and backward passes take no time here.

    Args:
        counts: What was counted, by layer, as ``ledger.by_layer(phase)`` has it.
        chip: Gives the time that a layer's arrays take for one vector.
        unit: Gives multiply–accumulates per second.
    Returns:
        Seconds and bottleneck of each layer, and in total with and without overlap.
    Raises:
        ConfigurationError: The unit claims no latency, or the chip has none for an array cycle.

    Example:
        >>> import aihwkit_lora as al
        >>> counts = {
        ...     "head": al.Counts({"array_cycles": 10}),
        ...     "head.lora_A.default": al.Counts({"forward_macs_int8": 3_000}),
        ...     "head.lora_B.default": al.Counts({"forward_macs_int8": 1_000}),
        ... }
        >>> unit = DigitalUnit(macs_per_cycle=4, clock_hz=200e6)
        >>> report = pipeline(counts, al.chips.get("rm-180nm"), unit)
        >>> print(report.layers[0].bottleneck, report.layers[0].digital_s)
        analog 5e-06
        >>> print(round(report.sequential_s.value * 1e6, 3))
        15.0
    """
    cycle = chip.prices.latency.get("array_cycles")
    if cycle is None:
        raise ConfigurationError(
            f"chip '{chip.name}': expected a latency of 'array_cycles', got none. Add it to the "
            "chip's price list."
        )
    by_layer: dict[str, list[Counts]] = {}
    for name, part in counts.items():
        by_layer.setdefault(_ADAPTER.sub("", name), []).append(part)
    times = [
        LayerTime(
            layer=name,
            analog_s=cycle.interval * sum(part["array_cycles"] for part in parts),
            digital_s=unit.seconds(sum(part[event] for part in parts for event in _MACS)),
        )
        for name, parts in by_layer.items()
    ]
    return PipelineReport(
        chip=chip.name, layers=tuple(time for time in times if time.sequential_s.high > 0.0)
    )
