"""A chip: arrays, converters, write policy and prices, each number with its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from aihwkit.inference.compensation.base import BaseDriftCompensation
from aihwkit.inference.noise.base import BaseNoiseModel
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType

from aihwkit_lora.chips.mapping import CellEncoding, ConductanceMapping
from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.pricing import PriceList, Quantity
from aihwkit_lora.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip that models can be converted to, programmed on and priced for.

    Args:
        name: Key in :data:`chips`.
        title: What it is, in one line.
        rows: Inputs of a tile, at least 1. Where the cells of a weight lie on several word lines,
            these together are one row.
        columns: Outputs of a tile, at least 1.
        mapping: Cells of a weight, and the window of their conductances.
        cell_states: Cell states (aihwkit's normalised conductance) that stand for the window's
            lower and upper end.
        scaling: Whether the weights of a whole ``"tile"`` share one digital factor that stretches
            them over the window, or each ``"column"`` has its own.
        write_policy: Device, tolerance and budget of the write–verify loop, in cell-state units.
        dac_bits: Resolution of a row's input, sign included; at least 2.
        adc_bits: Resolution of a column's output, sign included; at least 2.
        adc_full_scale: Column sum at which the ADC clips, in units of one full-scale input times
            one full-scale weight.
        prices: Cost of each counted event.
        endurance_pulses: Pulses that a cell is taken to survive; None if nobody says.
        programming_noise: Makes aihwkit's model of the error that programming leaves, for counts
            at level ``sampled``; ``noise_model`` if None.
        noise_model: Makes aihwkit's noise model of the cells, for ``drift_``; None if no source
            gives one.
        drift_compensation: Makes aihwkit's compensation of the drift; None for none.
        facts: Everything else that was assumed or cited, by name, with its source.
    Raises:
        ConfigurationError: A size, resolution or scale is out of its range.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> chip.rows, chip.columns, chip.rpu_config().mapping.max_input_size
        (128, 128, 128)
    """

    name: str
    title: str
    rows: int
    columns: int
    mapping: ConductanceMapping
    write_policy: WritePolicy
    dac_bits: int
    adc_bits: int
    adc_full_scale: float
    prices: PriceList
    cell_states: tuple[float, float] = (-1.0, 1.0)
    scaling: Literal["tile", "column"] = "tile"
    endurance_pulses: Quantity | None = None
    programming_noise: Callable[[], BaseNoiseModel] | None = None
    noise_model: Callable[[], BaseNoiseModel] | None = None
    drift_compensation: Callable[[], BaseDriftCompensation] | None = None
    facts: Mapping[str, Quantity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._require("rows", "1 or more", self.rows >= 1)
        self._require("columns", "1 or more", self.columns >= 1)
        self._require("scaling", "'tile' or 'column'", self.scaling in ("tile", "column"))
        _ = self.encoding
        self._require("dac_bits", "2 or more", self.dac_bits >= 2)
        self._require("adc_bits", "2 or more", self.adc_bits >= 2)
        self._require("adc_full_scale", "above 0", self.adc_full_scale > 0)

    def _require(self, name: str, expected: str, satisfied: bool) -> None:
        if not satisfied:
            raise ConfigurationError(
                f"chip '{self.name}': expected {name} {expected}, got {getattr(self, name)!r}."
            )

    @property
    def tolerance_siemens(self) -> float:
        """Largest accepted distance of a verified cell from its target."""
        return self.write_policy.tolerance * self.encoding.siemens_per_state

    @property
    def encoding(self) -> CellEncoding:
        """Between normalised weights and the states of the cells that store them."""
        return CellEncoding(mapping=self.mapping, states=self.cell_states)

    def rpu_config(self) -> TorchInferenceRPUConfig:
        """Describe the chip's tiles to aihwkit, for its own conversion functions.

        Returns:
            A new configuration: tiles of the array's size, weights scaled to the window tile by
            tile or column by column, biases digital, DAC and ADC of the chip's resolution, inputs
            scaled to their largest magnitude, and the chip's noise model and drift compensation
            instead of aihwkit's defaults, which are those of phase-change memory. Read noise is
            off. Where the chip has no noise model, pass ``drift_`` the one that you hold for right.
        """
        config = TorchInferenceRPUConfig()
        config.mapping.max_input_size = self.rows
        config.mapping.max_output_size = self.columns
        config.mapping.weight_scaling_omega = 1.0
        config.mapping.weight_scaling_columnwise = self.scaling == "column"
        config.mapping.digital_bias = True
        forward = config.forward
        forward.inp_res = 1.0 / (2**self.dac_bits - 2)
        forward.inp_bound = 1.0
        forward.out_res = 1.0 / (2**self.adc_bits - 2)
        forward.out_bound = self.adc_full_scale
        forward.out_noise = 0.0
        forward.w_noise = 0.0
        forward.noise_management = NoiseManagementType.ABS_MAX
        forward.bound_management = BoundManagementType.NONE
        config.noise_model = self.noise_model() if self.noise_model else None
        config.drift_compensation = self.drift_compensation() if self.drift_compensation else None
        return config


chips: Registry[Chip] = Registry("chip")
"""All chips by name."""
