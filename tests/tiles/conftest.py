"""Every kind of tile that can be frozen, in a small model, with all that could move it."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import (
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    SingleRPUConfig,
    TorchInferenceRPUConfig,
)
from aihwkit.simulator.configs.configs import (
    QuantizedTorchInferenceRPUConfig,
    TorchInferenceRPUConfigIRDropT,
)
from aihwkit.simulator.configs.devices import ConstantStepDevice
from aihwkit.simulator.parameters.enums import (
    WeightClipType,
    WeightModifierType,
    WeightRemapType,
)
from aihwkit.simulator.parameters.inference import (
    WeightClipParameter,
    WeightModifierParameter,
    WeightRemapParameter,
)
from aihwkit.simulator.presets import (
    AGADReRamESPreset,
    MixedPrecisionReRamSBPreset,
    ReRamES2Preset,
    ReRamESPreset,
    ReRamSBPreset,
    TikiTakaReRamESPreset,
    TTv2ReRamSBPreset,
)
from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
from aihwkit.simulator.tiles.custom import CustomRPUConfig
from aihwkit.simulator.tiles.transfer import TorchTransferTile
from torch import Tensor, nn

import aihwkit_lora as al


@dataclass(frozen=True)
class Kind:
    """A kind of tile, in a digital layer ``stem`` followed by an analogue one, ``frozen``.

    All that moves weights, scales and input ranges of an ordinary tile by itself is switched on,
    input ranges and quantisers are calibrated, and noise of reads is off unless asked for.

    Args:
        name: What the tests call it.
        config: Makes aihwkit's configuration.
        convolution: Whether the layers are ``Conv2d`` or ``Linear``.
        tile: Most inputs and outputs of a tile; as it is, a layer has at least four tiles.
        compound: Whether a weight is made of several devices, which ``program_`` does not write.
        moves_by_itself: Whether a step of its optimiser moves it at rate 0.
    """

    name: str
    config: Callable[[], Any]
    convolution: bool = False
    tile: tuple[int, int] = (8, 6)
    compound: bool = False
    moves_by_itself: bool = True

    def batch(self) -> Tensor:
        """Five inputs of the model."""
        return torch.randn(5, 1, 6, 6) if self.convolution else torch.randn(5, 16)

    def ordinary(self, *, noise: float = 0.0) -> Any:
        """The model, not frozen yet."""
        config = _restless(self.config())
        config.mapping.max_input_size, config.mapping.max_output_size = self.tile
        if hasattr(config, "forward"):
            config.forward.out_noise = noise
        torch.manual_seed(0)
        layers = (
            {"stem": nn.Conv2d(1, 2, 3, padding=1), "frozen": nn.Conv2d(2, 12, 3)}
            if self.convolution
            else {"stem": nn.Linear(16, 16), "frozen": nn.Linear(16, 12)}
        )
        net = nn.Sequential(OrderedDict(layers))
        model = convert_to_analog(net, config, exclude_modules=["stem"])
        for _ in range(4):
            model(self.batch())
        return model

    def frozen(self, *, noise: float = 0.0) -> Any:
        """The frozen model, equal in each call."""
        torch.manual_seed(1)
        return copy.deepcopy(_kept(self, noise))


@functools.cache
def _kept(kind: Kind, noise: float) -> nn.Module:
    return al.freeze_(kind.ordinary(noise=noise), programmed_by="test")


def _restless(config: Any) -> Any:
    config.mapping.learn_out_scaling = config.mapping.out_scaling_columnwise = True
    config.mapping.weight_scaling_omega = 0.6
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = 2
    if hasattr(config, "clip"):
        config.clip = WeightClipParameter(type=WeightClipType.FIXED_VALUE, fixed_value=0.3)
        config.remap = WeightRemapParameter(type=WeightRemapType.LAYERWISE_SYMMETRIC)
        config.modifier = WeightModifierParameter(type=WeightModifierType.ADD_NORMAL, std_dev=0.2)
    for device in _devices(config):
        device.lifetime, device.diffusion = 10.0, 0.01
    return config


def _devices(config: Any) -> list[Any]:
    device = getattr(config, "device", None)
    if device is None:
        return []
    return list(getattr(device, "unit_cell_devices", [getattr(device, "device", device)]))


def _quantised() -> Any:
    config = QuantizedTorchInferenceRPUConfig()
    config.pre_post.periph_quant.n_bits = 8
    return config


def _with_ir_drop() -> Any:
    config = InferenceRPUConfig()
    config.forward.ir_drop = 1.0  # which needs the reference engine
    return config


def _with_bias_on_array() -> Any:
    config = InferenceRPUConfig()
    config.mapping.digital_bias = False  # which takes a layer of one tile
    return config


def _torch_transfer() -> Any:
    config = AGADReRamESPreset()
    config.tile_class = TorchTransferTile
    config.device.transfer_every = 5.0  # vectors: no more than one transfer in a batch
    return config


def _reram_array() -> Any:
    return SingleRPUConfig(device=ReRamArrayOMPresetDevice())


def _constant_step() -> Any:
    return SingleRPUConfig(device=ConstantStepDevice())


_compound = functools.partial(Kind, compound=True)

# One of each class of tiles, and of each way to read it.
EACH_CLASS = [
    Kind("Inference", InferenceRPUConfig),
    Kind("Inference with IR drop", _with_ir_drop),
    Kind("Inference with bias on array", _with_bias_on_array, tile=(64, 64)),
    Kind("TorchInference", TorchInferenceRPUConfig),
    Kind("quantised TorchInference", _quantised),
    Kind("TorchInference Conv2d", TorchInferenceRPUConfig, convolution=True),
    Kind("ReRamES", ReRamESPreset),
    Kind("FloatingPoint", FloatingPointRPUConfig),
    Kind("Custom", CustomRPUConfig, moves_by_itself=False),
    _compound("TikiTaka", TikiTakaReRamESPreset),
    _compound("TorchTransfer", _torch_transfer),
]
MORE = [
    Kind("TorchInference with IR drop in time", TorchInferenceRPUConfigIRDropT),
    Kind("Inference Conv2d", InferenceRPUConfig, convolution=True),
    Kind("ReRamES Conv2d", ReRamESPreset, convolution=True),
    Kind("ReRamSB", ReRamSBPreset),
    Kind("ReRamArrayOM", _reram_array),
    Kind("ConstantStep", _constant_step),
    _compound("TTv2", TTv2ReRamSBPreset),
    _compound("MixedPrecision", MixedPrecisionReRamSBPreset),
    _compound("ReRamES2", ReRamES2Preset),
    _compound("AGAD", AGADReRamESPreset),
]


def _parameters(fitting: Callable[[Kind], bool]) -> list[Any]:
    usual = [pytest.param(kind, id=kind.name) for kind in EACH_CLASS if fitting(kind)]
    more = [
        pytest.param(kind, id=kind.name, marks=pytest.mark.slow) for kind in MORE if fitting(kind)
    ]
    return usual + more


@pytest.fixture(params=_parameters(lambda kind: True))
def tile_kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind of tile in turn."""
    return request.param


@pytest.fixture(params=_parameters(lambda kind: not kind.compound))
def programmable_kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind that ``program_`` writes."""
    return request.param


@pytest.fixture(params=_parameters(lambda kind: kind.config is not _with_bias_on_array))
def loadable_kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind with a digital bias."""
    return request.param
