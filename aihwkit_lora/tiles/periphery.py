"""What a tile's converters do: the settings of aihwkit's ``IOParameters`` that we follow."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from aihwkit.simulator.parameters.enums import (
    AnalogMVType,
    BoundManagementType,
    NoiseManagementType,
    WeightNoiseType,
)
from aihwkit.simulator.parameters.io import IOParameters

from aihwkit_lora.errors import UnsupportedTileError

# Settings that add a non-ideality the blocked product does not have, and their "off" values.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "mv_type": (AnalogMVType.ONE_PASS, AnalogMVType.IDEAL),
    "bound_management": (BoundManagementType.NONE, BoundManagementType.ITERATIVE),
    "noise_management": (
        NoiseManagementType.NONE,
        NoiseManagementType.ABS_MAX,
        NoiseManagementType.CONSTANT,
        NoiseManagementType.MAX,
    ),
    "w_noise_type": (WeightNoiseType.NONE, WeightNoiseType.ADDITIVE_CONSTANT),
    "ir_drop": (0.0,),
    "out_nonlinearity": (0.0,),
    "slope_calibration": (0.0,),
    "v_offset_std": (0.0,),
    "r_series": (0.0,),
    "w_read_asymmetry_dtod": (0.0,),
    "bm_test_negative_bound": (True,),
}


@dataclass(frozen=True, kw_only=True)
class TileIO:
    """Converters and noise of one tile, in aihwkit's normalised units.

    A full-scale input is ``inp_bound``; a full-scale weight is 1.

    Args:
        perfect: An ideal product: no converters, no noise.
        inp_bound: Largest DAC output, 0 for none.
        inp_step: DAC step in the units of ``inp_bound``, 0 for a continuous input.
        inp_random: Whether the DAC rounds up or down at random, in proportion to the distance.
        inp_noise: Standard deviation added to each driven row.
        inp_asymmetry: Fraction by which negative inputs are weaker.
        w_noise: Standard deviation of each weight, drawn anew for each read.
        out_bound: ADC range, 0 for none.
        out_step: ADC step, 0 for a continuous output.
        out_random: Whether the ADC rounds at random.
        out_noise: Standard deviation added to each column before its ADC.
        out_asymmetry: Fraction by which negative column sums are weaker.
        out_scale: Fixed factor behind the ADC.
        scale_inputs: Whether each vector is scaled to its own largest value (ABS_MAX and MAX).
        scale_by_magnitude: Whether that is the largest magnitude (ABS_MAX) or value (MAX).
        constant_scale: Fixed input scale (CONSTANT noise management), 1 for none.
        scale_ceiling: Upper limit of the input scale, 0 for none.
        repeat_on_overflow: Whether an overflowing read is repeated at half the input (ITERATIVE).
        whole_batch: Whether one overflow repeats the batch, and only a batch of zeros is not read
            (aihwkit's torch tiles), or each vector stands for itself (its C++ tiles).
        max_halving: Largest factor by which inputs are reduced.
    """

    perfect: bool
    inp_bound: float
    inp_step: float
    inp_random: bool
    inp_noise: float
    inp_asymmetry: float
    w_noise: float
    out_bound: float
    out_step: float
    out_random: bool
    out_noise: float
    out_asymmetry: float
    out_scale: float
    scale_inputs: bool
    scale_by_magnitude: bool
    constant_scale: float
    scale_ceiling: float
    repeat_on_overflow: bool
    whole_batch: bool
    max_halving: float

    @classmethod
    def from_aihwkit(cls, forward: IOParameters, *, whole_batch: bool, layer: str = "") -> TileIO:
        """Take over the forward parameters of an ``RPUConfig``.

        Args:
            forward: ``rpu_config.forward``.
            whole_batch: True for aihwkit's torch tiles, False for its C++ tiles.
            layer: Full name of the layer, for error messages.
        Raises:
            UnsupportedTileError: The parameters ask for a non-ideality that the blocked product
                does not have; the message names the field and the value that would work.
        """
        if lacking := missing(forward):
            raise UnsupportedTileError(
                f"layer '{layer}': {lacking}. Set rpu_config.{lacking.field} accordingly before "
                "converting, or freeze with engine='reference', aihwkit's own tiles."
            )
        constant = forward.noise_management == NoiseManagementType.CONSTANT
        inp_step = _step(forward.inp_res, forward.inp_bound)
        halving = float(forward.max_bm_factor)
        if inp_step > 0:
            halving = min(halving, forward.max_bm_res / inp_step)
        perfect = forward.is_perfect or forward.mv_type == AnalogMVType.IDEAL
        # aihwkit's C++ tiles apply the fixed factor to an ideal product as well, its torch tiles
        # do not.
        scaled = not (perfect and whole_batch)
        weight_noise = forward.w_noise_type == WeightNoiseType.ADDITIVE_CONSTANT
        return cls(
            perfect=perfect,
            inp_bound=max(forward.inp_bound, 0.0),
            inp_step=inp_step,
            inp_random=forward.inp_sto_round,
            inp_noise=forward.inp_noise,
            inp_asymmetry=forward.inp_asymmetry,
            w_noise=forward.w_noise if weight_noise else 0.0,
            out_bound=max(forward.out_bound, 0.0),
            out_step=_step(forward.out_res, forward.out_bound),
            out_random=forward.out_sto_round,
            out_noise=forward.out_noise,
            out_asymmetry=forward.out_asymmetry,
            out_scale=forward.out_scale if scaled else 1.0,
            scale_inputs=forward.noise_management
            in (NoiseManagementType.ABS_MAX, NoiseManagementType.MAX),
            scale_by_magnitude=forward.noise_management != NoiseManagementType.MAX,
            constant_scale=forward.nm_thres if constant and forward.nm_thres > 0 else 1.0,
            scale_ceiling=0.0 if constant else forward.nm_thres,
            repeat_on_overflow=forward.bound_management == BoundManagementType.ITERATIVE,
            whole_batch=whole_batch,
            max_halving=halving,
        )

    @classmethod
    def ideal(cls) -> TileIO:
        """A tile without converters, as aihwkit's ``FloatingPointTile``."""
        return cls.from_aihwkit(IOParameters(is_perfect=True), whole_batch=False)

    @property
    def noisy(self) -> bool:
        """Whether something is added to the column sums of every read."""
        return self.out_noise > 0 or self.w_noise > 0


@dataclass(frozen=True)
class Lack:
    """A setting that the blocked product does not follow.

    Args:
        field: Which one, below the ``RPUConfig``.
        expected: What would be followed.
        found: What it is.
    """

    field: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"expected {self.field} = {self.expected}, got {self.found}"


def missing(forward: IOParameters) -> Lack | None:
    """Say which setting asks for a non-ideality that the blocked product does not have.

    Args:
        forward: ``rpu_config.forward``.
    Returns:
        The first such setting, with what was expected; None if there is none.

    Example:
        >>> print(missing(IOParameters(ir_drop=1.0)))
        expected forward.ir_drop = 0.0, got 1.0
        >>> missing(IOParameters()) is None
        True
    """
    if forward.is_perfect or forward.mv_type == AnalogMVType.IDEAL:
        return None
    present = {field.name for field in fields(forward)}
    if forward.w_noise <= 0.0:
        present.remove("w_noise_type")  # noise of no strength has no type
    for name, allowed in _MUST_BE.items():
        found = getattr(forward, name) if name in present else allowed[0]
        if found not in allowed:
            wanted = " or ".join(str(value) for value in allowed)
            return Lack(f"forward.{name}", wanted, str(found))
    return None


def drive_bits(forward: IOParameters) -> int | None:
    """Bits of a row's drive, sign included.

    Args:
        forward: ``rpu_config.forward``.
    Returns:
        None if the configuration has no DAC, or one of infinite resolution.

    Example:
        >>> drive_bits(IOParameters(inp_res=1 / (2**8 - 2))), drive_bits(IOParameters(inp_res=-1))
        (8, None)
    """
    step = _step(forward.inp_res, forward.inp_bound)
    if step <= 0.0 or forward.is_perfect or forward.mv_type == AnalogMVType.IDEAL:
        return None
    steps = round(2.0 * float(forward.inp_bound) / step)
    return steps.bit_length()


def _step(resolution: float, bound: float) -> float:
    """Converter step: aihwkit gives ``resolution`` as a step fraction or as a number of steps."""
    if resolution <= 0 or bound <= 0:
        return 0.0
    fraction = 1.0 / resolution if resolution > 1.0 else resolution
    return 2.0 * bound * fraction
