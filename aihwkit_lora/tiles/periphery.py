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
_MUST_BE_OFF: dict[str, tuple[Any, ...]] = {
    "mv_type": (AnalogMVType.ONE_PASS, AnalogMVType.IDEAL),
    "bound_management": (BoundManagementType.NONE, BoundManagementType.ITERATIVE),
    "noise_management": (
        NoiseManagementType.NONE,
        NoiseManagementType.ABS_MAX,
        NoiseManagementType.CONSTANT,
    ),
    "w_noise_type": (WeightNoiseType.NONE,),
    "w_noise": (0.0,),
    "ir_drop": (0.0,),
    "inp_asymmetry": (0.0,),
    "out_asymmetry": (0.0,),
    "out_noise_std": (0.0,),
    "out_nonlinearity": (0.0,),
    "slope_calibration": (0.0,),
    "v_offset_std": (0.0,),
    "r_series": (0.0,),
    "w_read_asymmetry_dtod": (0.0,),
    "inp_sto_round": (False,),
    "out_sto_round": (False,),
}


@dataclass(frozen=True, kw_only=True)
class TileIO:
    """Converters and noise of one tile, in aihwkit's normalised units.

    A full-scale input is ``inp_bound``; a full-scale weight is 1.

    Args:
        perfect: An ideal product: no converters, no noise.
        inp_bound: Largest DAC output, 0 for none.
        inp_step: DAC step in the units of ``inp_bound``, 0 for a continuous input.
        inp_noise: Standard deviation added to each driven row.
        out_bound: ADC range, 0 for none.
        out_step: ADC step, 0 for a continuous output.
        out_noise: Standard deviation added to each column before its ADC.
        out_scale: Fixed factor behind the ADC.
        scale_inputs: Whether each vector is scaled to its own largest magnitude (ABS_MAX).
        constant_scale: Fixed input scale (CONSTANT noise management), 1 for none.
        scale_ceiling: Upper limit of the input scale, 0 for none.
        repeat_on_overflow: Whether an overflowing read is repeated at half the input (ITERATIVE).
        repeat_whole_batch: Whether one overflow repeats the batch (aihwkit's torch tile) or only
            the vector concerned (its C++ tiles).
        max_halving: Largest factor by which inputs are reduced.
    """

    perfect: bool
    inp_bound: float
    inp_step: float
    inp_noise: float
    out_bound: float
    out_step: float
    out_noise: float
    out_scale: float
    scale_inputs: bool
    constant_scale: float
    scale_ceiling: float
    repeat_on_overflow: bool
    repeat_whole_batch: bool
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
        perfect = forward.is_perfect or forward.mv_type == AnalogMVType.IDEAL
        if not perfect:
            _refuse_unsupported(forward, layer)
        constant = forward.noise_management == NoiseManagementType.CONSTANT
        inp_step = _step(forward.inp_res, forward.inp_bound)
        halving = float(forward.max_bm_factor)
        if inp_step > 0:
            halving = min(halving, forward.max_bm_res / inp_step)
        return cls(
            perfect=perfect,
            inp_bound=max(forward.inp_bound, 0.0),
            inp_step=inp_step,
            inp_noise=forward.inp_noise,
            out_bound=max(forward.out_bound, 0.0),
            out_step=_step(forward.out_res, forward.out_bound),
            out_noise=forward.out_noise,
            out_scale=forward.out_scale,
            scale_inputs=forward.noise_management == NoiseManagementType.ABS_MAX,
            constant_scale=forward.nm_thres if constant and forward.nm_thres > 0 else 1.0,
            scale_ceiling=0.0 if constant else forward.nm_thres,
            repeat_on_overflow=forward.bound_management == BoundManagementType.ITERATIVE,
            repeat_whole_batch=whole_batch,
            max_halving=halving,
        )


def _step(resolution: float, bound: float) -> float:
    """Converter step: aihwkit gives ``resolution`` as a step fraction or as a number of steps."""
    if resolution <= 0 or bound <= 0:
        return 0.0
    fraction = 1.0 / resolution if resolution > 1.0 else resolution
    return 2.0 * bound * fraction


def _refuse_unsupported(forward: IOParameters, layer: str) -> None:
    present = {field.name for field in fields(forward)}
    for name, allowed in _MUST_BE_OFF.items():
        if name in present and getattr(forward, name) not in allowed:
            wanted = " or ".join(str(value) for value in allowed)
            raise UnsupportedTileError(
                f"layer '{layer}': expected forward.{name} = {wanted}, got "
                f"{getattr(forward, name)}. Set rpu_config.forward.{name} accordingly before "
                "converting, or keep this layer unfrozen."
            )
