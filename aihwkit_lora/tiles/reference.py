"""The reference engine: reads with aihwkit's own tiles, which it builds for itself.

They are made from the frozen conductances when first needed, belong to no module, are never
saved or copied, and get no gradient: what they hold can be lost, but not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from aihwkit.simulator.digital_low_precision.quantization_manager import QuantizationManager
from aihwkit.simulator.parameters.enums import NoiseManagementType
from aihwkit.simulator.tiles.module import TileModule
from torch import Tensor, nn

from aihwkit_lora.errors import StageError, UnsupportedTileError
from aihwkit_lora.tiles.blocked import ReadProbe, fraction_of_largest, transposed_mvm
from aihwkit_lora.tiles.blocks import Blocks, TileTensors
from aihwkit_lora.tiles.engines import kind_of
from aihwkit_lora.tiles.grid import TileGrid


@dataclass(frozen=True, eq=False)
class Periphery:
    """What one tile has besides its conductances and scales.

    Args:
        drawn: Parameters of torch tiles' reads that aihwkit drew, by name.
        extra: The same of C++ tiles, and running averages, by aihwkit's key.
        quantizers: Fixed quantisers of scales and outputs, by attribute name.
    """

    drawn: Mapping[str, Tensor]
    extra: Mapping[str, Any]
    quantizers: Mapping[str, nn.Module]


class ReferenceEngine:
    """Reads with tiles of aihwkit.

    Forwards and backwards are aihwkit's: the gradient is exact for its inference tiles, and
    follows ``rpu_config.backward`` for training tiles. Noise of its C++ tiles comes from a
    generator that no seed reaches (aihwkit 1.2.0). Reads that their bound management repeats
    inside are not seen by an observer.

    Args:
        grid: The layer, not frozen yet.
        reason: Why it was chosen.
    Raises:
        StageError: A quantiser of the layer was never calibrated.
        UnsupportedTileError: Reads would change the tile.
    """

    name = "reference"

    def __init__(self, grid: TileGrid, reason: str) -> None:
        first = next(grid.each())
        _require_unchanged_by_reads(first, grid.name)
        kind = kind_of(first, grid.name)
        self.reason = reason
        self._own_backward = kind.noisy_backward
        self._config = deepcopy(kind.reader(first.rpu_config))
        self._class = kind.reader_class or type(first)
        array = grid.array
        alone = array is None
        self._tiles = [_periphery(tile, grid.name, with_output=not alone) for tile in grid.each()]
        owner = first if array is None else array
        self._out_name = "out_quantizer" if alone else "module_out_quantizer"
        self._bias_quantizer = _fixed(owner, "bias_quantizer", grid.name, grid.bias)
        self._out_quantizer = _fixed(owner, self._out_name, grid.name)
        self._readers: list[TileModule] = []
        self._made_for: TileTensors | None = None

    def read(
        self,
        x: Tensor,
        tensors: TileTensors,
        blocks: Blocks,
        probes: tuple[ReadProbe, ...] = (),
    ) -> Tensor:
        """Read tile by tile; from ``(vectors, in_features)`` to ``(vectors, out_features)``."""
        for probe in probes:
            # aihwkit's tiles keep their drives inside.
            driven = blocks.add_bias_row(blocks.split_inputs(x)[:, None])
            probe.on_read(fraction_of_largest(driven))
        total = x.new_zeros(len(x), blocks.out_features)
        for position, reader in self._each(tensors, blocks):
            rows, columns = blocks.features_of(position)
            with torch.no_grad():
                total[:, columns] += reader(x[:, rows].cpu()).to(x.device)
        return total

    def read_back(self, grad: Tensor, tensors: TileTensors, blocks: Blocks) -> Tensor:
        """Read backwards; from ``(vectors, out_features)`` to ``(vectors, in_features)``."""
        if not self._own_backward:
            return transposed_mvm(grad, tensors, blocks)
        total = grad.new_zeros(len(grad), blocks.in_features)
        for position, reader in self._each(tensors, blocks):
            rows, columns = blocks.features_of(position)
            with torch.no_grad():
                part = reader.backward(grad[:, columns].cpu().contiguous())
            total[:, rows] += part.to(grad.device)
        return total

    def finish(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """Add the digital bias; quantise both if the layer does."""
        if bias is not None:
            y = y + (bias if self._bias_quantizer is None else self._bias_quantizer(bias))
        return y if self._out_quantizer is None else self._out_quantizer(y)

    def _each(self, tensors: TileTensors, blocks: Blocks) -> Any:
        if self._made_for is not tensors:
            self._readers = [
                self._reader(tensors.tile(blocks, position), blocks, periphery)
                for position, periphery in zip(blocks.positions(), self._tiles, strict=True)
            ]
            self._made_for = tensors
        return zip(blocks.positions(), self._readers, strict=True)

    def _reader(self, held: TileTensors, blocks: Blocks, periphery: Periphery) -> TileModule:
        _, rows, columns = held.conductance.shape
        state = torch.get_rng_state()  # aihwkit initialises new tiles at random
        tile: TileModule = self._class(
            columns, rows - blocks.bias_row, deepcopy(self._config), blocks.bias_row
        )
        torch.set_rng_state(state)
        tile.tile.set_weights(held.conductance[0].T.contiguous().cpu())
        tile.set_scales(held.scale[0, 0].cpu().clone())
        if held.input_range is not None:
            tile.set_input_range(float(held.input_range[0, 0]))
        # What is done behind the sum of all tiles, their readers must not do before.
        for name in ("scale_quantizer", "bias_quantizer", "out_quantizer"):
            if hasattr(tile, name):
                setattr(tile, name, None)
        _fit(tile, periphery)
        return tile.requires_grad_(False).eval()

    def refill(self, grid: TileGrid) -> None:
        """Give an ordinary layer the drawn parameters and quantisers of the frozen one."""
        for tile, periphery in zip(grid.each(), self._tiles, strict=True):
            _fit(tile, periphery)
        owner = next(grid.each()) if grid.array is None else grid.array
        behind = {"bias_quantizer": self._bias_quantizer, self._out_name: self._out_quantizer}
        for name, quantizer in behind.items():
            if quantizer is not None:
                setattr(owner, name, deepcopy(quantizer))

    def for_tile(self, index: int) -> ReferenceEngine:
        """An engine for one tile alone, inputs first."""
        single = copy(self)
        single._tiles, single._readers, single._made_for = [self._tiles[index]], [], None
        return single

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": [], "_made_for": None}


def _require_unchanged_by_reads(tile: TileModule, layer: str) -> None:
    forward = getattr(tile.rpu_config, "forward", None)
    moving = NoiseManagementType.AVERAGE_ABS_MAX
    if forward is not None and not forward.is_perfect and forward.noise_management == moving:
        raise UnsupportedTileError(
            f"layer '{layer}': expected a read to leave the tile as it is, got "
            f"forward.noise_management = {moving}, a running average that every read moves. Set "
            "rpu_config.forward.noise_management = NoiseManagementType.ABS_MAX before converting."
        )


def _fit(tile: TileModule, periphery: Periphery) -> None:
    if periphery.extra:
        tile.tile.load_extra(tile.tile.dump_extra() | dict(periphery.extra), False)
    if periphery.drawn:
        tile.set_forward_parameters(dict(periphery.drawn))
    for name, quantizer in periphery.quantizers.items():
        setattr(tile, name, deepcopy(quantizer))


def _periphery(tile: TileModule, layer: str, *, with_output: bool) -> Periphery:
    dumped = tile.tile.dump_extra() if hasattr(tile.tile, "dump_extra") else None
    extra = {k: v for k, v in (dumped or {}).items() if k.startswith("rpu.fb_pass.")}
    read = None if extra else getattr(tile, "get_forward_parameters", None)
    drawn = {} if read is None else read()
    scales, limit = tile.get_scales(), getattr(tile, "input_range", None)
    if limit is not None:
        scales = limit if scales is None else scales * limit
    quantizers = {}
    if scales is not None:  # without scales there is nothing to quantise
        quantizers["scale_quantizer"] = _fixed(tile, "scale_quantizer", layer, scales)
    if with_output:
        quantizers["out_quantizer"] = _fixed(tile, "out_quantizer", layer)
    return Periphery(
        drawn={name: value.clone() for name, value in drawn.items()},
        extra=extra,
        quantizers={name: each for name, each in quantizers.items() if each is not None},
    )


def _fixed(
    owner: nn.Module, name: str, layer: str, values: Tensor | None = None
) -> nn.Module | None:
    """Copy a quantiser with its range fixed.

    Args:
        owner: Tile or array that has it, perhaps.
        name: Name of its attribute.
        layer: Full name of the layer, for error messages.
        values: What it quantises, where that is known: an uncalibrated one takes its range from
            there, as aihwkit does at the first evaluation.
    """
    found: nn.Module | None = getattr(owner, name, None)
    if found is None:
        return None
    quantizer = deepcopy(found).eval().requires_grad_(False)
    for part in quantizer.modules():
        if not isinstance(part, QuantizationManager):
            continue
        if not part.quantizer.is_initialized and values is not None:
            part.estimate_ranges()
            part(values.detach())
        if not part.quantizer.is_initialized:
            raise StageError(
                f"layer '{layer}': expected a calibrated {name}, got one without a range. Run the "
                "converted model on some data in train mode before freeze_(model)."
            )
        part.fix_ranges()
    return quantizer
