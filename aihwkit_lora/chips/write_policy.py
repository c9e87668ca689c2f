"""How a chip writes its cells: the device, the closed loop's settings, and when it gives up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from aihwkit.simulator.configs.devices import PulsedDevice

from aihwkit_lora.errors import ConfigurationError

Extent = Literal["cell", "row", "array"]
"""Cells that belong together, from few to many: one, those of one word line, those of an array."""

Verifier = Literal["adc", "comparator"]
"""What tells a verification whether a cell is in tolerance."""

_EXTENTS: tuple[str, ...] = get_args(Extent)


def _require(settings: Any, name: str, expected: str, satisfied: bool) -> None:
    if not satisfied:
        raise ConfigurationError(
            f"{type(settings).__name__}.{name}: expected {expected}, got "
            f"{getattr(settings, name)!r}."
        )


@dataclass(frozen=True, kw_only=True)
class PulseStatistics:
    """Pulses that cells out of tolerance take, for counts without a closed loop.

    The defaults describe one case each, and other tolerances and devices need other numbers:

    * ``median_pulses`` and ``sigma_ln`` fit IBM's 14 nm OM ReRAM array at a tolerance of 0.02. They
      come from a simulated closed loop on the device parameters of Gong et al., IEDM 2022
      (doi:10.1109/IEDM45625.2022.10019569), not from a measured histogram.
    * ``mean_pulses`` is NeuRRAM's, as far as CiMLoop's cell file ``rram_wan_nature_2022`` implies
      it: a ``SetPulse`` of 8520 ns, in pulses of 1 µs.

    Attributes:
        mean_pulses: Mean number of pulses, for the level ``mean``; 0 or more.
        median_pulses: Median of a log-normal number, for the level ``sampled``; above 0.
        sigma_ln: Standard deviation of its logarithm; 0 or more.
    Raises:
        ConfigurationError: A value is outside its range.

    Example:
        >>> log_normal = PulseStatistics()
        >>> round(log_normal.median_pulses * math.exp(log_normal.sigma_ln**2 / 2), 2)  # its mean
        8.77
    """

    mean_pulses: float = 8.52
    median_pulses: float = 5.0
    sigma_ln: float = 1.06

    def __post_init__(self) -> None:
        _require(self, "mean_pulses", "0 or more", 0.0 <= self.mean_pulses < math.inf)
        _require(self, "median_pulses", "above 0", 0.0 < self.median_pulses < math.inf)
        _require(self, "sigma_ln", "0 or more", 0.0 <= self.sigma_ln < math.inf)


@dataclass(frozen=True, kw_only=True)
class WritePolicy:
    """Settings of the write–verify loop of one chip.

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
        verify_with: ``"adc"`` digitises every verify read. A ``"comparator"`` tells once per
            verification whether the cell is in tolerance and, if not, on which side. In HARP
            (arXiv:2604.12420, abstract), that takes 9.5 times less energy and 3.5 times less time
            than averaging several reads.
        ramp_increment: Growth of the step with each further pulse of the same polarity: the k-th
            repetition acts ``1 + k * ramp_increment`` times as strongly. 0 for identical pulses.
        ramp_limit: Largest such factor, where the driver's voltage ends; 1 or more.
        abrupt_reset: Whether one RESET pulse erases a cell, as in phase-change memory.
        start: Where the first programming of a chip begins: every cell freshly ``"reset"``, or
            ``"as is"``.
        order: Cells that take turns until all of them are done, before the next ones start. With
            ``"cell"``, one cell is finished after the other, as NeuRRAM's code does it
            (``program_array`` in github.com/weierwan/Neurram_48core).
        together: Cells that one pulse reaches at the same time; no more than take turns.
        statistics: Pulses per cell for the levels ``sampled`` and ``mean``, which run no loop.
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
    verify_with: Verifier = "adc"
    ramp_increment: float = 0.0
    ramp_limit: float = math.inf
    abrupt_reset: bool = False
    start: Literal["reset", "as is"] = "reset"
    order: Extent = "cell"
    together: Extent = "cell"
    statistics: PulseStatistics = PulseStatistics()

    def __post_init__(self) -> None:
        for name, expected, satisfied in (
            ("tolerance", "above 0", 0.0 < self.tolerance < math.inf),
            ("max_pulses", "0 or more", self.max_pulses >= 0),
            ("verify_averages", "1 or more", self.verify_averages >= 1),
            ("verify_discarded", "0 or more", self.verify_discarded >= 0),
            ("verify_noise", "0 or more", 0.0 <= self.verify_noise < math.inf),
            ("verify_with", "'adc' or 'comparator'", self.verify_with in ("adc", "comparator")),
            ("ramp_increment", "0 or more", 0.0 <= self.ramp_increment < math.inf),
            ("ramp_limit", "1 or more", self.ramp_limit >= 1.0),
            ("start", "'reset' or 'as is'", self.start in ("reset", "as is")),
            ("order", "'cell', 'row' or 'array'", self.order in _EXTENTS),
            ("together", "'cell', 'row' or 'array'", self.together in _EXTENTS),
        ):
            _require(self, name, expected, satisfied)
        within = _EXTENTS[: _EXTENTS.index(self.order) + 1]
        reason = f"as only cells that take turns (order={self.order!r}) can share a pulse"
        allowed = f"{' or '.join(map(repr, within))}, {reason}"
        _require(self, "together", allowed, self.together in within)

    @property
    def reads_per_verify(self) -> int:
        """Reads that one verification of one cell takes, discarded ones included."""
        return self.verify_averages + self.verify_discarded
