"""Which layers on which tiles of aihwkit can be frozen, and what they then compute with.

Every cell of the table is tried: convert, compute, freeze, compute again, compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from aihwkit.exceptions import AihwkitException
from aihwkit.nn import (
    AnalogConv1d,
    AnalogConv2d,
    AnalogConv2dMapped,
    AnalogConv3d,
    AnalogLinear,
    AnalogLinearMapped,
    AnalogLSTMCell,
    AnalogRNN,
)
from aihwkit.simulator.configs import (
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    QuantizedTorchInferenceRPUConfig,
    TorchInferenceRPUConfig,
)
from aihwkit.simulator.configs.configs import TorchInferenceRPUConfigIRDropT
from aihwkit.simulator.parameters.quantization import ActivationQuantConfig
from aihwkit.simulator.presets import (
    AGADReRamSBPreset,
    MixedPrecisionReRamSBPreset,
    ReRamESPreset,
    TikiTakaReRamESPreset,
)
from aihwkit.simulator.tiles.custom import CustomRPUConfig
from aihwkit.simulator.tiles.transfer import TorchTransferTile
from torch import Tensor, nn

import aihwkit_lora as al

_TOLERANCE = 1e-5
"""Sums of a few products in another order: some units in the last place of a float32."""


class Found(StrEnum):
    """What became of one kind of layer on one kind of tile."""

    FUSED = "fused"
    """Frozen; all tiles in one blocked product, and equal to aihwkit's own."""
    REFERENCE = "reference"
    """Frozen; read with aihwkit's own tiles, and equal."""
    NOT_IN_AIHWKIT = "not in aihwkit"
    """aihwkit itself cannot build or compute such a layer."""
    REFUSED = "refused"
    """Cannot be frozen."""
    DIFFERENT = "different"
    """Frozen, but it computes something else. There should be none."""


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer, with an input for it.

    Args:
        build: From a configuration to the layer.
        shape: Of its input.
        bias_on_array: Whether the array is to hold the bias.
        split: Whether its tiles are small, so that there are several.
    """

    build: Callable[[Any], nn.Module]
    shape: tuple[int, ...]
    bias_on_array: bool = False
    split: bool = True


LAYER_KINDS: dict[str, LayerKind] = {
    "Linear": LayerKind(lambda c: AnalogLinear(32, 24, rpu_config=c), (6, 32)),
    "Linear, mapped": LayerKind(lambda c: AnalogLinearMapped(32, 24, rpu_config=c), (6, 32)),
    "Linear, bias on array": LayerKind(
        lambda c: AnalogLinear(32, 24, rpu_config=c), (6, 32), bias_on_array=True, split=False
    ),
    "Conv1d": LayerKind(
        lambda c: AnalogConv1d(4, 8, 4, stride=2, padding=1, rpu_config=c), (2, 4, 16), split=False
    ),
    "Conv2d": LayerKind(
        lambda c: AnalogConv2d(4, 24, (4, 2), padding=1, rpu_config=c), (2, 4, 6, 6)
    ),
    "Conv2d, mapped": LayerKind(
        lambda c: AnalogConv2dMapped(8, 24, (2, 2), padding=1, rpu_config=c), (2, 8, 5, 5)
    ),
    "Conv3d": LayerKind(
        lambda c: AnalogConv3d(4, 8, 2, padding=1, rpu_config=c), (2, 4, 4, 4, 4), split=False
    ),
    "RNN, LSTM": LayerKind(
        lambda c: AnalogRNN(AnalogLSTMCell, 32, 16, True, c, num_layers=2), (3, 2, 32)
    ),
}
"""Layers of the table, by what it calls them."""


def _ir_drop() -> Any:
    config = InferenceRPUConfig()
    config.forward.ir_drop = 1.0
    return config


def _quantised() -> Any:
    config = QuantizedTorchInferenceRPUConfig()
    config.pre_post.periph_quant.n_bits = 8
    config.act_quant_config = ActivationQuantConfig(n_bits=8)
    return config


def _transfer() -> Any:
    config = AGADReRamSBPreset()
    config.tile_class = TorchTransferTile
    return config


TILE_TYPES: dict[str, Callable[[], Any]] = {
    "InferenceTile": InferenceRPUConfig,
    "InferenceTile, IR drop": _ir_drop,
    "TorchInferenceTile": TorchInferenceRPUConfig,
    "TorchInferenceTile, IRDropT": TorchInferenceRPUConfigIRDropT,
    "QuantizedTorchInferenceTile": _quantised,
    "AnalogTile, pulsed (ReRamES)": ReRamESPreset,
    "AnalogTile, TikiTaka": TikiTakaReRamESPreset,
    "AnalogTile, mixed precision": MixedPrecisionReRamSBPreset,
    "TorchTransferTile (AGAD)": _transfer,
    "FloatingPointTile": FloatingPointRPUConfig,
    "CustomTile": CustomRPUConfig,
}
"""Configurations of the table, by what it calls their tiles."""


def try_freezing(kind: LayerKind, make: Callable[[], Any]) -> Found:
    """Freeze one layer on one kind of tile, and compare what it computes.

    Args:
        kind: The layer.
        make: Makes the configuration; noise of reads is switched off.

    Example:
        >>> str(try_freezing(LAYER_KINDS["Linear"], TILE_TYPES["InferenceTile"]))
        'fused'
    """
    torch.manual_seed(0)
    x = torch.randn(kind.shape)
    try:
        layer = kind.build(_noise_free(make(), kind))
        layer.train()(x)  # quantised peripheries take their ranges from here
        expected = _output(layer.eval(), x)
    except (AihwkitException, RuntimeError, AttributeError):
        return Found.NOT_IN_AIHWKIT
    try:
        frozen = al.freeze_(layer, programmed_by="coverage")
    except al.UnsupportedTileError:
        return Found.REFUSED
    if float((_output(frozen, x) - expected).abs().max()) > _TOLERANCE:
        return Found.DIFFERENT
    engines = {choice.engine for choice in al.engines(frozen)}
    return Found(engines.pop()) if len(engines) == 1 else Found.DIFFERENT


def tile_rows(
    layers: Mapping[str, LayerKind] = LAYER_KINDS,
    tiles: Mapping[str, Callable[[], Any]] = TILE_TYPES,
) -> list[list[str]]:
    """Try every layer on every kind of tile.

    Args:
        layers: Layers, by what the table calls them.
        tiles: Functions that make a configuration, by what the table calls its tiles.
    Returns:
        A header, and one row for each kind of tile.

    Example:
        >>> tile_rows({"Linear": LAYER_KINDS["Linear"]}, {"CustomTile": CustomRPUConfig})
        [['tiles', 'Linear'], ['CustomTile', 'fused']]
    """
    table = [["tiles", *layers]]
    for name, make in tiles.items():
        table.append([name, *(str(try_freezing(kind, make)) for kind in layers.values())])
    return table


def _noise_free(config: Any, kind: LayerKind) -> Any:
    size = 16 if kind.split else 0
    config.mapping.max_input_size = config.mapping.max_output_size = size
    config.mapping.weight_scaling_omega = 1.0
    config.mapping.digital_bias = not kind.bias_on_array
    if hasattr(config, "forward"):
        config.forward.out_noise = config.forward.w_noise = 0.0
        config.forward.out_res = 1e-9  # no sum lies on the edge between two codes
    return config


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    found = layer(x)
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output.detach()
