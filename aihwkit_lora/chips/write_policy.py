"""How a chip writes its cells: the device, the closed loop's settings, and when it gives up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from aihwkit.simulator.configs.devices import PulsedDevice

from aihwkit_lora.errors import ConfigurationError

Together = Literal["cell", "row", "array"]
"""Which cells a pulse slot reaches at once: one, those on one word line, or all of an array."""


@dataclass(frozen=True, kw_only=True)
class WritePolicy:
    """Settings of the write-verify loop of one chip.

    Weights, tolerances and noises are in cell-state units: aihwkit's normalised conductance, in
    which a device's nominal range is -1 to 1.

    Attributes:
        device: Makes aihwkit's description of the device, for example the class
            ``ReRamArrayOMPresetDevice`` itself.
        tolerance: Largest accepted distance of a verified cell from its target; above 0.
        max_pulses: Pulses a cell may take before it counts as failed; 0 or more.
        verify_averages: Reads averaged in one verification; 1 or more.
        verify_discarded: Reads that each verification makes first and does not use.
        verify_noise: Standard deviation of a single verify read.
        ramp_increment: Growth of the step with each further pulse of the same polarity: the k-th
            repetition acts ``1 + k * ramp_increment`` times as strongly. 0 for identical pulses.
        ramp_limit: Largest such factor, where the driver's voltage ends; 1 or more.
        abrupt_reset: Whether one RESET pulse erases a cell, as in phase-change memory.
        start: Where the first programming of a chip begins: every cell freshly ``"reset"``, or
            ``"as is"``.
        together: Which cells a pulse slot reaches at once; for latency.
    Raises:
        ConfigurationError: A value is outside its range.

    Example:
        >>> from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
        >>> WritePolicy(device=ReRamArrayOMPresetDevice, tolerance=0.05).reads_per_verify
        1
    """

    device: Callable[[], PulsedDevice]
    tolerance: float
    max_pulses: int = 200
    verify_averages: int = 1
    verify_discarded: int = 0
    verify_noise: float = 0.0
    ramp_increment: float = 0.0
    ramp_limit: float = math.inf
    abrupt_reset: bool = False
    start: Literal["reset", "as is"] = "reset"
    together: Together = "cell"

    def __post_init__(self) -> None:
        self._require("tolerance", "above 0", 0.0 < self.tolerance < math.inf)
        self._require("max_pulses", "0 or more", self.max_pulses >= 0)
        self._require("verify_averages", "1 or more", self.verify_averages >= 1)
        self._require("verify_discarded", "0 or more", self.verify_discarded >= 0)
        self._require("verify_noise", "0 or more", 0.0 <= self.verify_noise < math.inf)
        self._require("ramp_increment", "0 or more", 0.0 <= self.ramp_increment < math.inf)
        self._require("ramp_limit", "1 or more", self.ramp_limit >= 1.0)
        self._require("start", "'reset' or 'as is'", self.start in ("reset", "as is"))
        together = self.together in ("cell", "row", "array")
        self._require("together", "'cell', 'row' or 'array'", together)

    def _require(self, field: str, expected: str, satisfied: bool) -> None:
        if not satisfied:
            raise ConfigurationError(
                f"WritePolicy.{field}: expected {expected}, got {getattr(self, field)!r}."
            )

    @property
    def reads_per_verify(self) -> int:
        """Reads that one verification of one cell takes, discarded ones included."""
        return self.verify_averages + self.verify_discarded
