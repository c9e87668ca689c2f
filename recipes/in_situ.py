"""Training in place: models on pulsed tiles of aihwkit, which take every update as pulses."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.optim import AnalogSGD
from aihwkit.simulator import presets
from aihwkit.simulator.configs import MappingParameter, SingleRPUConfig
from aihwkit.simulator.tiles.module import TileModule
from torch import nn
from torch.optim import Optimizer

import aihwkit_lora as al
from aihwkit_lora.errors import UnknownNameError
from aihwkit_lora.recipes.face_training import Trainee
from aihwkit_lora.registry import nearest

_LARGEST = 0.6
"""Where the largest weight of a tile stands, of a device that reaches about 1: room to learn."""


def device_of(name: str) -> type[SingleRPUConfig]:
    """Find one of aihwkit's presets with one pulsed device per weight.

    Only of these can pulses be counted on a processor: those of devices that transfer into another
    one (Tiki-Taka and its kin, mixed precision) follow from sums that aihwkit keeps to itself.

    Args:
        name: As in ``aihwkit.simulator.presets``.
    Raises:
        UnknownNameError: There is no such preset, or it has other devices.

    Example:
        >>> device_of("EcRamPreset").__name__
        'EcRamPreset'
    """
    kinds = {
        kind.__name__: kind
        for _, kind in inspect.getmembers(presets, inspect.isclass)
        if issubclass(kind, SingleRPUConfig)
    }
    if name not in kinds:
        raise UnknownNameError(
            f"unknown preset with one pulsed device per weight '{name}'. {nearest(name, kinds)}"
        )
    return kinds[name]


@torch.no_grad()
def on_pulsed_tiles(
    model: nn.Module, arrays: nn.Module, device: str, *, seed: int = 0
) -> nn.Module:
    """Put what some arrays hold into pulsed tiles, by setting weights: that takes no pulse here.

    Cells of a device differ in how far they reach; one that does not reach its weight stays at its
    limit.

    Args:
        model: The model in torch; not changed.
        arrays: The same model on frozen arrays.
        device: See :func:`device_of`.
        seed: Of the differences between cells.
    Returns:
        A copy on pulsed tiles; what is digital wants no gradient.
    """
    start = copy.deepcopy(model).requires_grad_(False)
    for name, layer in al.frozen_layers(arrays):
        start.get_parameter(f"{name}.weight").copy_(torch.as_tensor(layer.weight))
    configuration = device_of(device)(mapping=MappingParameter(weight_scaling_omega=_LARGEST))
    configuration.device.construction_seed = seed + 1  # 0 would mean the clock
    # aihwkit would give the root a class of its own, which cannot be pickled.
    pulsed: nn.Module = convert_to_analog(start, configuration, ensure_analog_root=False)
    return pulsed


def weights_on_tiles(model: nn.Module) -> int:
    """Number of weights on the analogue tiles of a model.

    Args:
        model: A model of aihwkit.

    Example:
        >>> weights_on_tiles(convert_to_analog(nn.Linear(3, 2), device_of("IdealizedPreset")()))
        6
    """
    tiles = [module for module in model.modules() if isinstance(module, TileModule)]
    return sum(tile.in_size * tile.out_size for tile in tiles)


class PulsedTrainee(Trainee):
    """A stage that is trained in place: ``AnalogSGD`` sends pulses instead of adding numbers."""

    def _optimizer(self) -> Optimizer:
        optimizer: Any = AnalogSGD(self._trained(), lr=self._schedule.learning_rate)
        optimizer.regroup_param_groups()
        return optimizer  # type: ignore[no-any-return]
