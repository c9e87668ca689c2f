"""What one pulse does to one cell: the update rules of aihwkit's pulsed devices, in torch.

Each rule follows aihwkit 1.2.0's C++ source (``src/rpucuda/rpu_*_device.cpp``), which is the
reference: the parameters of a cell carry the names that a tile's ``get_hidden_parameters()`` gives
them, so the same rule works on cells drawn here and on the cells of an existing tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass

import torch
from aihwkit.simulator.configs.devices import (
    ConstantStepDevice,
    ExpStepDevice,
    LinearStepDevice,
    PiecewiseStepDevice,
    PowStepDevice,
    PowStepReferenceDevice,
    PulsedDevice,
    SoftBoundsDevice,
    SoftBoundsPmaxDevice,
    SoftBoundsReferenceDevice,
)
from torch import Generator, Tensor

from aihwkit_lora.errors import UnsupportedTileError

Parameters = Mapping[str, Tensor]
"""Device-to-device parameters by aihwkit's name, one value per cell."""

Draw = Callable[[PulsedDevice, dict[str, Tensor], Generator], None]
Step = Callable[[PulsedDevice, Parameters, Tensor, Tensor, Tensor], Tensor]

COMMON = ("max_bound", "min_bound", "dwmin_up", "dwmin_down", "reset_bias")


@dataclass(frozen=True, kw_only=True)
class DeviceModel:
    """The update rule of one family of devices.

    Attributes:
        step: Change of the weight that one pulse causes, before the bounds act on it. Called with
            (device, parameters, weight, up, noise); ``up`` is True for SET, ``noise`` standard
            normal, all of one shape.
        draw: Adds the family's own parameters to the common ones, in place.
        names: Names of these own parameters.
        inert_when_corrupt: Whether a pulse leaves a cell without any range entirely untouched,
            its write noise included.
    """

    step: Step
    draw: Draw = lambda device, parameters, generator: None
    names: tuple[str, ...] = ()
    inert_when_corrupt: bool = False


def normal(like: Tensor, generator: Generator) -> Tensor:
    """Standard normal numbers in the shape of ``like``."""
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def draw_parameters(
    device: PulsedDevice, shape: tuple[int, ...], generator: Generator
) -> dict[str, Tensor]:
    """Draw the device-to-device parameters of an array of cells.

    Args:
        device: One of the supported aihwkit devices. Its ``construction_seed`` is not used.
        shape: Shape of the array.
        generator: Source of randomness; the parameters live on its device.
    Returns:
        Parameters by name, each of the given shape. Bounds, steps and biases are in weight units.
    Raises:
        UnsupportedTileError: There is no update rule for this device.

    Example:
        >>> from aihwkit.simulator.presets.devices import IdealizedPresetDevice
        >>> drawn = draw_parameters(IdealizedPresetDevice(), (2, 3), Generator().manual_seed(0))
        >>> drawn["dwmin_up"].shape
        torch.Size([2, 3])
    """
    model = model_of(device)
    device = resolved(device)
    parameters = _draw_common(device, shape, generator)
    if device.corrupt_devices_prob > 0.0:
        _corrupt(device, parameters, generator)
    if device.perfect_bias:
        _perfect_bias(device, parameters)
    model.draw(device, parameters, generator)
    return parameters


def _draw_common(
    device: PulsedDevice, shape: tuple[int, ...], generator: Generator
) -> dict[str, Tensor]:
    """``PulsedRPUDevice::populate``: bounds, step sizes and the reset bias."""
    zeros = torch.zeros(shape, device=generator.device)

    def spread(std: float) -> Tensor:
        return std * normal(zeros, generator)

    upper = device.w_max * (1.0 + spread(device.w_max_dtod))
    lower = device.w_min * (1.0 + spread(device.w_min_dtod))
    gain = spread(device.dw_min_dtod)
    gain = gain.exp() if device.dw_min_dtod_log_normal else 1.0 + gain
    asymmetry = spread(device.up_down_dtod)
    # aihwkit only ever weakens a direction: the stronger one keeps dw_min.
    up = (min(device.up_down, 0.0) + gain + asymmetry) * device.dw_min
    down = (min(-device.up_down, 0.0) + gain - asymmetry) * device.dw_min
    if device.enforce_consistency:
        up, down = up.abs(), down.abs()
        upper, lower = torch.maximum(upper, lower).abs(), -torch.minimum(upper, lower).abs()
    else:  # a cell with inverted bounds is switched off halfway between them
        middle = torch.where(lower > upper, (upper + lower) / 2, torch.nan)
        upper = torch.where(middle.isnan(), upper, middle)
        lower = torch.where(middle.isnan(), lower, middle)
    reset_bias = device.reset + spread(device.reset_dtod)
    return dict(zip(COMMON, (upper, lower, up, down, reset_bias), strict=True))


def _corrupt(device: PulsedDevice, parameters: dict[str, Tensor], generator: Generator) -> None:
    """Fix a fraction of the cells at a random value near zero."""
    upper, lower = parameters["max_bound"], parameters["min_bound"]
    chance, place = (
        torch.rand(upper.shape, generator=generator, device=upper.device) for _ in range(2)
    )
    reach = abs(device.corrupt_devices_range)
    low = torch.minimum(upper, lower).clamp(min=-reach)
    stuck = low + (torch.maximum(upper, lower).clamp(max=reach) - low) * place
    corrupt = chance < device.corrupt_devices_prob
    for name, value in (("max_bound", stuck), ("min_bound", stuck)):
        parameters[name] = torch.where(corrupt, value, parameters[name])
    for name in ("dwmin_up", "dwmin_down"):
        parameters[name] = parameters[name].masked_fill(corrupt, 0.0)


def _perfect_bias(device: PulsedDevice, parameters: dict[str, Tensor]) -> None:
    """Give the last column, which holds an analogue bias, equal steps and wide bounds."""
    for name in ("dwmin_up", "dwmin_down"):
        parameters[name][..., -1] = device.dw_min
    parameters["max_bound"][..., -1] = 100.0 * device.w_max
    parameters["min_bound"][..., -1] = 100.0 * device.w_min


def _either(up: Tensor, parameters: Parameters, name: str) -> Tensor:
    """The parameter of each cell's own pulse direction."""
    return torch.where(up, parameters[f"{name}_up"], parameters[f"{name}_down"])


def _signed(up: Tensor, size: Tensor) -> Tensor:
    return torch.where(up, size, -size)


def _constant_step(
    device: PulsedDevice, parameters: Parameters, weight: Tensor, up: Tensor, noise: Tensor
) -> Tensor:
    size = _either(up, parameters, "dwmin")
    return _signed(up, size * (1.0 + device.dw_min_std * noise))


def _linear_step(
    device: PulsedDevice, parameters: Parameters, weight: Tensor, up: Tensor, noise: Tensor
) -> Tensor:
    size = _either(up, parameters, "dwmin")
    mean = _either(up, parameters, "slope") * weight + size
    scale = mean if device.mult_noise else size
    return _signed(up, mean + scale * device.dw_min_std * noise)


def _soft_bounds_reference_step(
    device: PulsedDevice, parameters: Parameters, weight: Tensor, up: Tensor, noise: Tensor
) -> Tensor:
    size = _either(up, parameters, "dwmin")
    bound = torch.where(up, parameters["max_bound"], parameters["min_bound"])
    # A bound on the wrong side of zero cannot be approached: aihwkit drops the saturation there.
    saturates = (bound > 0) == up
    remaining = 1.0 - torch.where(saturates & (bound != 0), weight / bound, 0.0)
    if device.mult_noise:
        return _signed(up, size * remaining * (1.0 + device.dw_min_std * noise))
    return _signed(up, size * (remaining + device.dw_min_std * noise))


def _exp_step(
    device: PulsedDevice, parameters: Parameters, weight: Tensor, up: Tensor, noise: Tensor
) -> Tensor:
    span = parameters["max_bound"] - parameters["min_bound"]
    z = 2.0 * device.a * weight / span + device.b
    factor = torch.where(up, device.A_up, device.A_down)
    exponent = torch.where(up, device.gamma_up, -device.gamma_down)
    relative = (1.0 - factor * torch.exp(exponent * z)).clamp(min=0.0)
    mean = _signed(up, relative * _either(up, parameters, "dwmin"))
    std = device.dw_min_std * mean.abs()
    if device.dw_min_std > 0.0:
        slope = device.dw_min_std_slope * weight.abs()
        std = std + device.dw_min_std * (device.dw_min_std_add + slope)
    return torch.where(span > 0, mean + std * noise, 0.0)


def _pow_step(
    device: PulsedDevice, parameters: Parameters, weight: Tensor, up: Tensor, noise: Tensor
) -> Tensor:
    upper, lower = parameters["max_bound"], parameters["min_bound"]
    distance = torch.where(up, upper - weight, weight - lower) / (upper - lower)
    # Adding and subtracting a reference can round a cell to just outside its bound. The power of
    # that is NaN, and aihwkit 1.2.0's bounds then send the cell to the opposite end.
    distance = distance.clamp(min=0.0)
    mean = _either(up, parameters, "dwmin") * distance ** _either(up, parameters, "gamma")
    return torch.where(upper > lower, _signed(up, mean * (1.0 + device.dw_min_std * noise)), 0.0)


def _piecewise_step(
    device: PulsedDevice, parameters: Parameters, weight: Tensor, up: Tensor, noise: Tensor
) -> Tensor:
    upper, lower = parameters["max_bound"], parameters["min_bound"]
    nodes = weight.new_tensor([device.piecewise_down, device.piecewise_up])
    sections = nodes.shape[1] - 1
    place = (weight - lower) / (upper - lower) * sections
    place = torch.where(upper > lower, place, 0.0).clamp(0.0, sections)
    left = place.floor().long().clamp(max=max(sections - 1, 0))
    right = (left + 1).clamp(max=sections)
    factor = torch.lerp(nodes[up.long(), left], nodes[up.long(), right], place - left)
    size = factor * _either(up, parameters, "dwmin")
    return _signed(up, size * (1.0 + device.dw_min_std * noise))


def _draw_linear(device: PulsedDevice, parameters: dict[str, Tensor], generator: Generator) -> None:
    upper, lower = parameters["max_bound"], parameters["min_bound"]
    soft = isinstance(device, SoftBoundsDevice)  # step vanishes exactly at the cell's own bound
    if not soft and device.mean_bound_reference:
        upper, lower = (torch.full_like(upper, w) for w in (device.w_max, device.w_min))
    towards_up = lower - device.reverse_offset if device.reverse_up else upper
    towards_down = upper + device.reverse_offset if device.reverse_down else lower
    for name, towards in (("up", towards_up), ("down", towards_down)):
        decrease = torch.ones_like(towards)
        if not soft:
            dtod = getattr(device, f"gamma_{name}_dtod")
            decrease = getattr(device, f"gamma_{name}") + dtod * normal(towards, generator)
            decrease = decrease if device.allow_increasing else decrease.abs()
        slope = -decrease * parameters[f"dwmin_{name}"] / towards
        parameters[f"slope_{name}"] = torch.where(towards != 0, slope, 0.0)


def _draw_soft_bounds_reference(
    device: PulsedDevice, parameters: dict[str, Tensor], generator: Generator
) -> None:
    upper, lower = parameters["max_bound"], parameters["min_bound"]
    usable = (upper > 0) & (lower < 0)
    for name, dtod in (("max_bound", device.slope_up_dtod), ("min_bound", device.slope_down_dtod)):
        if dtod > 0.0:
            slope = (1.0 + dtod * normal(upper, generator)).abs()
            parameters[name] = torch.where(usable, parameters[name] / slope, parameters[name])
    upper, lower = parameters["max_bound"], parameters["min_bound"]
    reference = device.reference_mean + device.reference_std * normal(upper, generator)
    if device.subtract_symmetry_point:
        up, down = parameters["dwmin_up"], parameters["dwmin_down"]
        symmetry = torch.where(usable, (up - down) / (up / upper - down / lower), 0.0)
        reference = reference + symmetry
        parameters["reset_bias"] = parameters["reset_bias"] + symmetry
    parameters["reference"] = reference


def _draw_pow(device: PulsedDevice, parameters: dict[str, Tensor], generator: Generator) -> None:
    like = parameters["max_bound"]
    gain = 1.0 + device.pow_gamma_dtod * normal(like, generator)
    asymmetry = device.pow_up_down_dtod * normal(like, generator)
    up = (min(device.pow_up_down, 0.0) + gain + asymmetry) * device.pow_gamma
    down = (min(-device.pow_up_down, 0.0) + gain - asymmetry) * device.pow_gamma
    consistent = device.enforce_consistency
    parameters["gamma_up"] = up.abs() if consistent else up
    parameters["gamma_down"] = down.abs() if consistent else down


def _draw_pow_reference(
    device: PulsedDevice, parameters: dict[str, Tensor], generator: Generator
) -> None:
    _draw_pow(device, parameters, generator)
    like = parameters["max_bound"]
    reference = device.reference_mean + device.reference_std * normal(like, generator)
    if device.subtract_symmetry_point:
        symmetry = _pow_symmetry_point(device, parameters)
        reference = reference + symmetry
        parameters["reset_bias"] = parameters["reset_bias"] + symmetry
    parameters["reference"] = reference


def _pow_symmetry_point(device: PulsedDevice, parameters: Parameters) -> Tensor:
    """Pulse up and down without noise until nothing moves, as aihwkit does cell by cell."""
    upper, lower = parameters["max_bound"], parameters["min_bound"]
    point, up = torch.zeros_like(upper), torch.ones_like(upper, dtype=torch.bool)
    smallest = torch.minimum(parameters["dwmin_up"], parameters["dwmin_down"])
    steps = (10.0 * (upper - lower) / smallest).round().clamp(max=10_000)
    if device.n_estimation_steps > 0:
        steps = torch.full_like(upper, device.n_estimation_steps)
    usable = (upper > 0) & (lower < 0)
    for step in range(int(steps[usable].max()) if bool(usable.any()) else 0):
        move = sum(
            _pow_step(device, parameters, point, way, torch.zeros_like(point)) for way in (up, ~up)
        )
        moved = torch.where(usable & (step < steps), point + move, point)
        if bool((moved == point).all()):
            break
        point = moved
    return point


_EXP = DeviceModel(step=_exp_step, inert_when_corrupt=True)
_SLOPES = ("slope_up", "slope_down")
_GAMMAS = ("gamma_up", "gamma_down")
MODELS: dict[type[PulsedDevice], DeviceModel] = {
    ConstantStepDevice: DeviceModel(step=_constant_step),
    LinearStepDevice: DeviceModel(step=_linear_step, draw=_draw_linear, names=_SLOPES),
    SoftBoundsDevice: DeviceModel(step=_linear_step, draw=_draw_linear, names=_SLOPES),
    SoftBoundsReferenceDevice: DeviceModel(
        step=_soft_bounds_reference_step, draw=_draw_soft_bounds_reference, names=("reference",)
    ),
    ExpStepDevice: _EXP,
    PowStepDevice: DeviceModel(
        step=_pow_step, draw=_draw_pow, names=_GAMMAS, inert_when_corrupt=True
    ),
    PowStepReferenceDevice: DeviceModel(
        step=_pow_step,
        draw=_draw_pow_reference,
        names=(*_GAMMAS, "reference"),
        inert_when_corrupt=True,
    ),
    PiecewiseStepDevice: DeviceModel(step=_piecewise_step),
}
"""The update rule of each aihwkit device class; a subclass (a preset) has its parent's."""


def model_of(device: PulsedDevice) -> DeviceModel:
    """Return the update rule of an aihwkit device.

    Args:
        device: A device of one of the classes in :data:`MODELS`, or of a subclass.
    Raises:
        UnsupportedTileError: There is none; the message lists the supported classes.

    Example:
        >>> from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
        >>> model_of(ReRamArrayOMPresetDevice()).names
        ('reference',)
    """
    for family in type(device).__mro__:
        if family in MODELS:
            return MODELS[family]
    raise UnsupportedTileError(
        f"expected a pulsed device with a known update rule, got {type(device).__name__}. "
        f"Supported, with their subclasses: {', '.join(sorted(c.__name__ for c in MODELS))}."
    )


def resolved(device: PulsedDevice) -> PulsedDevice:
    """Return the device with ``dw_min`` and bounds filled in where its class derives them.

    Only ``SoftBoundsPmaxDevice`` does: it is given by its pulse response curve, and the formulas
    of its docstring turn that into the parameters of ``SoftBoundsDevice``.

    Example:
        >>> round(resolved(SoftBoundsPmaxDevice(p_max=1000, alpha=0.0005)).dw_min, 5)
        0.00254
    """
    if not isinstance(device, SoftBoundsPmaxDevice):
        return device
    factor = (device.range_max - device.range_min) / (1 - math.exp(-device.p_max * device.alpha))
    device = copy(device)
    device.w_min, device.w_max = device.range_min, device.range_min + factor
    device.dw_min, device.up_down = factor * device.alpha, 1 + 2 * device.range_min / factor
    return device
