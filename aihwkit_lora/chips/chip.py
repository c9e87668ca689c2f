"""A chip: arrays, converters, write policy and prices, each number with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aihwkit.simulator.configs import TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType

from aihwkit_lora.chips.mapping import ConductanceMapping
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
        rows: Word lines of an array; inputs of a tile. At least 1.
        columns: Bit lines of an array; outputs of a tile. At least 1.
        mapping: Conductance window that normalised weights fill.
        state_full_scale: Cell state (aihwkit's normalised device range of -1 to 1) that stands for
            the normalised weight 1; above 0, at most 1.
        write_policy: Device, tolerance and budget of the write–verify loop, in cell-state units.
        dac_bits: Resolution of a row's input, sign included; at least 2.
        adc_bits: Resolution of a column's output, sign included; at least 2.
        adc_full_scale: Column sum at which the ADC clips, in units of one full-scale input times
            one full-scale weight.
        prices: Cost of each counted event.
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
    state_full_scale: float
    write_policy: WritePolicy
    dac_bits: int
    adc_bits: int
    adc_full_scale: float
    prices: PriceList
    facts: Mapping[str, Quantity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._require("rows", "1 or more", self.rows >= 1)
        self._require("columns", "1 or more", self.columns >= 1)
        self._require("state_full_scale", "above 0 and at most 1", 0 < self.state_full_scale <= 1)
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
        states = self.write_policy.tolerance / self.state_full_scale
        return states * self.mapping.half_width_siemens

    def rpu_config(self) -> TorchInferenceRPUConfig:
        """Describe the chip's tiles to aihwkit, for its own conversion functions.

        Returns:
            A new configuration: tiles of the array's size, weights scaled to the window layer by
            layer, biases digital, DAC and ADC of the chip's resolution, inputs scaled to their
            largest magnitude. Read noise is off, and so are aihwkit's default noise model and
            drift compensation, which are those of phase-change memory: no source gives any for
            these arrays. Pass ``drift_`` the noise model that you hold for right.
        """
        config = TorchInferenceRPUConfig()
        config.mapping.max_input_size = self.rows
        config.mapping.max_output_size = self.columns
        config.mapping.weight_scaling_omega = 1.0
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
        config.noise_model = config.drift_compensation = None
        return config


chips: Registry[Chip] = Registry("chip")
"""All chips by name."""
