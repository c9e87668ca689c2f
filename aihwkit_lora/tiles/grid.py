"""Reading aihwkit's layers: which tiles a layer has, and what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import NoneType
from typing import Any

import torch
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.simulator.configs.devices import FloatingPointDevice, IdealDevice
from aihwkit.simulator.tiles.module import TileModule
from torch import Tensor, nn

from aihwkit_lora.errors import UnsupportedTileError
from aihwkit_lora.tiles.blocks import Blocks, TileTensors
from aihwkit_lora.tiles.engines import kind_of
from aihwkit_lora.tiles.record import Cells


def analog_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find aihwkit's analogue layers, frozen or not, with their full names.

    Args:
        model: Any module; itself a layer, or holding some.
    """
    for name, module in model.named_modules():
        if isinstance(module, AnalogLayerBase) and not module.IS_CONTAINER:
            yield name, module


class TileGrid:
    """The tiles of one layer of aihwkit, along its input and output.

    Args:
        layer: An unfrozen analogue layer, linear or convolutional; mapped or not.
        name: Its full name, for error messages.
    Raises:
        UnsupportedTileError: The layer has tiles of a class that nobody has said how to freeze.

    Example:
        >>> from aihwkit.nn import AnalogLinear
        >>> from aihwkit.simulator.configs import TorchInferenceRPUConfig
        >>> config = TorchInferenceRPUConfig()
        >>> config.mapping.max_input_size = 2
        >>> TileGrid(AnalogLinear(5, 3, rpu_config=config), "fc").blocks
        Blocks(in_sizes=(2, 2, 1), out_sizes=(3,), bias_row=False)
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.name, self.layer = name, layer
        # Mapped convolutions hold their tiles themselves; other layers in an analog_module.
        owner = getattr(layer, "analog_module", layer)
        if not isinstance(owner, TileModule) and not hasattr(owner, "array"):
            raise UnsupportedTileError(
                f"layer '{name}': expected a layer made of tiles, got {type(layer).__name__} with "
                f"{type(owner).__name__}. Keep it out of program_ and freeze_, for example with "
                "exclude_modules of convert."
            )
        self.array: nn.Module | None = None if isinstance(owner, TileModule) else owner
        self.tiles: list[list[TileModule]] = (
            [[owner]] if self.array is None else [list(row) for row in owner.array]
        )
        first = self.tiles[0][0]
        for tile in self.each():
            kind_of(tile, name)
        bias = getattr(owner, "bias", None)
        self.bias: Tensor | None = bias if isinstance(bias, Tensor) else None
        on_array = bool(getattr(first, "analog_bias", False))
        self.blocks = Blocks(
            tuple(row[0].in_size + on_array for row in self.tiles),
            tuple(tile.out_size for tile in self.tiles[0]),
            bias_row=on_array,
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
    """Copy a tile's normalised weights, shape ``(out_size, rows)``, to the CPU.

    Args:
        tile: A tile of aihwkit. If it holds the bias, that is the last row.
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


def tile_input_range(tile: TileModule) -> float | None:
    """Largest input of a tile, None if inputs are scaled by noise management alone.

    Args:
        tile: A tile of aihwkit.
    """
    found = getattr(tile, "input_range", None)
    return None if found is None else abs(float(found.detach()))


def tile_out_noise(tile: TileModule) -> Tensor | None:
    """Deviation of the read noise of each column, None if all have the same.

    Args:
        tile: A tile of aihwkit.
    Returns:
        Shape ``(out_size,)``, on the CPU.
    """
    read = getattr(tile, "get_forward_parameters", None)
    values: Tensor | None = read().get("out_noise_values") if read is not None else None
    if values is None or values.numel() != tile.out_size:
        return None
    return values.detach().float().cpu().flatten()


def blocked(grid: TileGrid, weights: list[Tensor]) -> TileTensors:
    """Pack a layer's tiles into blocked tensors, zero where a tile is smaller than the largest.

    Args:
        grid: The layer.
        weights: Normalised weights of each tile, shape ``(out_size, rows)``, inputs first.
    """
    blocks = grid.blocks
    conductance = torch.zeros(blocks.in_tiles, blocks.rows, blocks.out_tiles * blocks.columns)
    scale = torch.zeros(blocks.in_tiles, blocks.out_tiles, blocks.columns)
    tiles = list(grid.each())
    for position, tile, weight in zip(blocks.positions(), tiles, weights, strict=True):
        blocks.put(conductance, scale, position, weight, tile_scale(tile))
    ranges = [tile_input_range(tile) for tile in tiles]
    noises = [tile_out_noise(tile) for tile in tiles]
    return TileTensors(conductance, scale, _ranges(ranges, blocks), _noises(noises, blocks))


def _ranges(ranges: list[float | None], blocks: Blocks) -> Tensor | None:
    found = [value for value in ranges if value is not None]
    if not found:
        return None
    return torch.tensor(found).view(blocks.in_tiles, blocks.out_tiles)


def _noises(noises: list[Tensor | None], blocks: Blocks) -> Tensor | None:
    if any(noise is None for noise in noises):
        return None
    packed = torch.zeros(blocks.in_tiles, blocks.out_tiles, blocks.columns)
    for (in_tile, out_tile), noise in zip(blocks.positions(), noises, strict=True):
        assert noise is not None  # checked above
        packed[in_tile, out_tile, : len(noise)] = noise
    return packed


def hold(tile: TileModule, weight: Tensor) -> None:
    """Make an ordinary tile of aihwkit hold normalised weights; its scales stay as they are.

    Args:
        tile: A tile of aihwkit.
        weight: Shape ``(out_size, rows)``, with the bias as last row if the tile holds it.
    """
    bias = weight[:, -1].to(tile.device) if tile.analog_bias else None
    rows = weight[:, : weight.shape[1] - (bias is not None)].to(tile.device)
    tile.set_weights(rows, bias, apply_weight_scaling=False)


def hold_cells(tile: TileModule, cells: Cells) -> None:
    """Make a pulsed tile of aihwkit hold given cells, one per weight.

    aihwkit 1.2.0 draws the write noise of a device anew whenever its state is set, so the weights
    that the tile's reads see differ from the cells' by that noise.

    Args:
        tile: A tile with a single pulsed device.
        cells: Cells of the tile, as ``program_`` has written them.
    """
    hidden, persistent = dict(tile.get_hidden_parameters()), cells.state.persistent[0]
    hidden.update({name: value[0] for name, value in cells.response.parameters.items()})
    if "persistent_weights" in hidden:
        hidden["persistent_weights"] = persistent
    tile.set_hidden_parameters(hidden)
    hold(tile, persistent)
