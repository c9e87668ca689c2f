"""Reading aihwkit's layers: which tiles a layer has, and what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

import torch
from aihwkit.nn import AnalogLinear
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.simulator.configs.devices import FloatingPointDevice, IdealDevice
from aihwkit.simulator.tiles.array import TileModuleArray
from aihwkit.simulator.tiles.inference_torch import TorchInferenceTile
from aihwkit.simulator.tiles.module import TileModule
from torch import Tensor, nn

from aihwkit_lora.errors import UnsupportedTileError
from aihwkit_lora.tiles.blocked import Blocks


def analog_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find aihwkit's analogue layers, frozen or not, with their full names.

    Args:
        model: Any module; itself a layer, or holding some.
    """
    for name, module in model.named_modules():
        if isinstance(module, AnalogLayerBase) and not module.IS_CONTAINER:
            yield name, module


class TileGrid:
    """The tiles of one ``AnalogLinear``, along its input and output.

    Args:
        layer: An unfrozen layer of aihwkit.
        name: Its full name, for error messages.
    Raises:
        UnsupportedTileError: The layer is not an ``AnalogLinear``, or its bias or scaling has no
            frozen counterpart.

    Example:
        >>> from aihwkit.simulator.configs import TorchInferenceRPUConfig
        >>> config = TorchInferenceRPUConfig()
        >>> config.mapping.max_input_size = 2
        >>> TileGrid(AnalogLinear(5, 3, rpu_config=config), "fc").blocks
        Blocks(in_sizes=(2, 2, 1), out_sizes=(3,))
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        if not isinstance(layer, AnalogLinear):
            raise UnsupportedTileError(
                f"layer '{name}': expected an AnalogLinear, got {type(layer).__name__}. Convert "
                "linear layers only (exclude_modules of convert_to_analog), or keep this layer "
                "out of program_ and freeze_."
            )
        self.name, self.layer = name, layer
        module = layer.analog_module
        array = isinstance(module, TileModuleArray)
        self.tiles: list[list[TileModule]] = (
            [list(row) for row in module.array] if array else [[module]]
        )
        self.bias: Tensor | None = module.bias
        for tile in self.each():
            _refuse_unsupported(tile, name)
        self.blocks = Blocks(
            tuple(row[0].in_size for row in self.tiles),
            tuple(tile.out_size for tile in self.tiles[0]),
        )

    @property
    def rpu_config(self) -> Any:
        """Configuration of the tiles."""
        return self.tiles[0][0].rpu_config

    @property
    def pulsed(self) -> bool:
        """Whether the tiles simulate devices of their own, single or compound."""
        device = getattr(self.rpu_config, "device", None)
        return not isinstance(device, NoneType | IdealDevice | FloatingPointDevice)

    @property
    def torch_tiles(self) -> bool:
        """Whether the tiles are aihwkit's pure-torch ones, not its C++ ones."""
        return isinstance(self.tiles[0][0], TorchInferenceTile)

    @property
    def programmed_by_aihwkit(self) -> bool:
        """Whether aihwkit's own ``program_weights`` was applied to every tile."""
        return all(getattr(tile, "programmed_weights", None) is not None for tile in self.each())

    def each(self) -> Iterator[TileModule]:
        """All tiles, inputs first."""
        for row in self.tiles:
            yield from row

    def weight_digest(self) -> str:
        """SHA-256 of what all tiles hold, to notice later changes."""
        digest = hashlib.sha256()
        for tile in self.each():
            digest.update(tile_weight(tile).contiguous().numpy().tobytes())
        return digest.hexdigest()


def tile_weight(tile: TileModule) -> Tensor:
    """Copy a tile's normalised weights, shape ``(out_size, in_size)``, to the CPU.

    Args:
        tile: A tile of aihwkit without analogue bias.
    """
    weight: Tensor = tile.tile.get_weights()
    return weight.detach().float().cpu().clone()


def tile_scale(tile: TileModule) -> Tensor:
    """Digital factor behind each column: mapping, learned scales, drift compensation.

    Args:
        tile: A tile of aihwkit.
    Returns:
        Shape ``(out_size,)``, on the CPU.
    """
    scale = torch.ones(tile.out_size)
    scales = tile.get_scales()
    if scales is not None:
        scale = scale * scales.detach().float().cpu()
    alpha = getattr(tile, "alpha", None)
    return scale if alpha is None else scale * alpha.detach().float().cpu()


def _refuse_unsupported(tile: TileModule, name: str) -> None:
    where = f"layer '{name}', {type(tile).__name__}"
    if getattr(tile, "analog_bias", False):
        raise UnsupportedTileError(
            f"{where}: expected a digital bias, got one on the array. Set "
            "rpu_config.mapping.digital_bias = True before converting."
        )
    if getattr(tile, "input_range", None) is not None:
        raise UnsupportedTileError(
            f"{where}: expected inputs scaled by noise management, got a learned input range. Set "
            "rpu_config.pre_post.input_range.enable = False before converting."
        )


def hold(tile: TileModule, weight: Tensor) -> None:
    """Make an ordinary tile of aihwkit hold normalised weights; its scales stay as they are.

    Args:
        tile: A tile of aihwkit.
        weight: Shape ``(out_size, in_size)``.
    """
    tile.set_weights(weight.to(tile.device), None, apply_weight_scaling=False)


def hold_cells(tile: TileModule, persistent: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Make a pulsed tile of aihwkit hold given cells.

    aihwkit 1.2.0 draws the write noise of a device anew whenever its state is set, so the weights
    that the tile's reads see differ from the cells' by that noise.

    Args:
        tile: A tile with a single pulsed device.
        persistent: Hidden weights that pulses act on, shape ``(out_size, in_size)``.
        parameters: Device-to-device parameters by aihwkit's name, same shape.
    """
    hidden = dict(tile.get_hidden_parameters())
    hidden.update(parameters)
    if "persistent_weights" in hidden:
        hidden["persistent_weights"] = persistent
    tile.set_hidden_parameters(hidden)
    hold(tile, persistent)
