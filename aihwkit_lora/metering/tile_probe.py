"""What watches the tiles of a layer: every read, every row drive, every conversion."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.metering.code_sums import (
    exact_dot,
    squared_codes,
    squared_codes_of_largest,
)
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.events import X2G_STEPS
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.sink import Sink
from aihwkit_lora.tiles.array import FrozenTileArray
from aihwkit_lora.tiles.blocks import TileTensors
from aihwkit_lora.tiles.layers import FrozenLayer
from aihwkit_lora.tiles.periphery import drive_bits

_PICO = 1e12
_BITS_WITHOUT_DAC = 8
_MOST_BITS = 9  # whose codes divide X2G_STEPS
_MOST_WAITING = 2**22  # values of repeats that wait to be counted: 16 MiB


class TileProbe:
    """Counts the reads of one frozen layer's tiles.

    Args:
        sink: Gets the counts.
        name: Full name of the layer.
        layer: Whose tiles are read.
        fallback: From normalised weights to siemens, if the layer does not know.
    """

    def __init__(
        self,
        sink: Sink,
        name: str,
        layer: FrozenLayer,
        fallback: ConductanceMapping,
    ) -> None:
        self.sink, self._name, self._layer, self._fallback = sink, name, layer, fallback
        self._bits = drive_bits(layer.analog_module.rpu_config.forward) or _BITS_WITHOUT_DAC
        self._full: int = 2 ** (min(self._bits, _MOST_BITS) - 1) - 1
        self._seen: TileTensors | None = None
        self._row_sums = self._column_sums = torch.empty(0)
        self._alike = False
        # Repeats of a read that is not over: of which tile, and what drove it.
        self._repeats: list[tuple[int, int, Tensor]] = []
        self._waiting = 0

    @property
    def ledger(self) -> Ledger:
        """Where counts end up."""
        return self.sink.ledger

    def on_read(self, drive: Tensor) -> None:
        """Count a read of all tiles, once per vector."""
        blocks, (_, own, vectors, _) = self._layer.analog_module.blocks, drive.shape
        # A row that tiles share counts for each of them.
        sums = self._sums()[0].sum(dim=1, keepdim=True) if own == 1 else self._sums()[0]
        conversions = vectors * blocks.out_features * blocks.in_tiles
        driven = vectors * blocks.driven_rows * blocks.out_tiles
        squares, active = squared_codes(drive, self._full)
        counts = {
            "array_cycles": vectors,
            "tile_reads": vectors * blocks.tiles,
            "cell_reads": vectors * blocks.driven_rows * blocks.out_features * self._cells,
            "cell_read_x2g": self._x2g(squares, sums),
            "adc_conversions": conversions,
            "shift_adds": conversions,
            **self._drives(driven, active * (blocks.out_tiles // own)),
        }
        self.sink.add(self._name, Counts(counts))

    def on_repeat(self, in_tile: int, out_tile: int, drive: Tensor) -> None:
        """Note another read of one tile; :meth:`on_repeated_cycles` counts all of them."""
        # Between two large products Python runs on cold caches: counting dozens of repeats one
        # after another takes a third of the time that each of them would take on its own here.
        self._repeats.append((in_tile, out_tile, drive))
        self._waiting += drive.numel()
        if self._waiting > _MOST_WAITING:
            self.sink.add(self._name, Counts(self._count_repeats()))

    def on_repeated_cycles(self, cycles: int) -> None:
        """Count repeats and the time that they took; tiles that wait take no cycle of their own."""
        self.sink.add(self._name, Counts({"array_cycles": cycles, **self._count_repeats()}))

    def _count_repeats(self) -> dict[str, int]:
        repeats, self._repeats, self._waiting = self._repeats, [], 0
        columns, sums = self._layer.analog_module.blocks.out_sizes, self._sums()[0]
        squares = np.zeros(sums.shape, np.int64)
        driven_alike: dict[int, tuple[NDArray[np.int64], int]] = {}
        reads = cells = conversions = driven = active = 0
        for in_tile, out_tile, drive in repeats:
            # Tiles that share their inputs are driven by the same tensor.
            if id(drive) not in driven_alike:
                found, lines = squared_codes(drive, self._full)
                driven_alike[id(drive)] = found.numpy(), lines
            codes, lines = driven_alike[id(drive)]
            vectors, rows = drive.shape
            squares[in_tile, out_tile, :rows] += codes
            reads += vectors
            driven += vectors * rows
            active += lines
            conversions += vectors * columns[out_tile]
            cells += vectors * rows * columns[out_tile]
        return {
            "tile_reads": reads,
            "cell_reads": cells * self._cells,
            "cell_read_x2g": self._x2g(torch.from_numpy(squares), sums),
            "adc_conversions": conversions,
            **self._drives(driven, active),
        }

    def on_transposed_read(self, grad: Tensor) -> None:
        """Count a read of all tiles backwards, once per vector."""
        array, vectors = self._layer.analog_module, grad.shape[0]
        blocks = array.blocks
        # The row of a bias is not sensed, but its cells conduct all the same.
        conversions = vectors * blocks.in_features * blocks.out_tiles
        reads = vectors * blocks.driven_rows * blocks.out_features
        driven = vectors * blocks.out_features * blocks.in_tiles
        counts = {
            "transposed_array_cycles": vectors,
            "transposed_tile_reads": vectors * blocks.tiles,
            "transposed_row_drives": driven,
            "transposed_row_drive_bits": driven * self._bits,
            "transposed_cell_reads": reads * self._cells,
            "transposed_cell_read_x2g": self._transposed_x2g(grad, array),
            "transposed_adc_conversions": conversions,
            "transposed_shift_adds": conversions,
        }
        self.sink.add(self._name, Counts(counts))

    @property
    def _mapping(self) -> ConductanceMapping:
        return self._layer.analog_module.programming.mapping or self._fallback

    @property
    def _cells(self) -> int:
        return self._mapping.cells_per_weight

    def _drives(self, driven: int, active: int) -> dict[str, int]:
        return {
            "row_drives": driven,
            "active_row_drives": active,
            "row_drive_bits": driven * self._bits,
            "active_row_drive_bits": active * self._bits,
        }

    def _x2g(self, squares: Tensor, sums: Tensor) -> int:
        steps = X2G_STEPS // self._full
        return exact_dot(squares, sums) * steps * steps

    def _transposed_x2g(self, grad: Tensor, array: FrozenTileArray) -> int:
        sums, scale = self._sums()[1], array.tensors.scale
        if self._alike:
            # A common factor of a tile's columns makes no difference to their share of the largest.
            sums, scale = sums.sum(0, keepdim=True), torch.ones_like(scale[:1])
        columns = array.blocks.split_outputs(grad)
        return self._x2g(squared_codes_of_largest(columns, scale, self._full), sums)

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Conductance of each row and of each column of each tile in whole pS.

        Shapes ``(in_tiles, out_tiles, rows)`` and ``(in_tiles, out_tiles, columns)``.
        """
        array = self._layer.analog_module
        if array.tensors is not self._seen:
            self._seen = array.tensors
            self._row_sums, self._column_sums = _sums(self._layer, self._mapping)
            self._alike = _scaled_alike(array)
        return self._row_sums, self._column_sums


def _sums(layer: FrozenLayer, mapping: ConductanceMapping) -> tuple[Tensor, Tensor]:
    array = layer.analog_module
    blocks = array.blocks
    rows = torch.zeros(blocks.in_tiles, blocks.out_tiles, blocks.rows, dtype=torch.int64)
    columns = torch.zeros(blocks.in_tiles, blocks.out_tiles, blocks.columns, dtype=torch.int64)
    for index, (in_tile, out_tile) in enumerate(array.positions()):
        siemens = _siemens(array, index, (in_tile, out_tile), mapping)
        cells = (siemens * _PICO).round().long().sum(dim=0)
        rows[in_tile, out_tile, : blocks.in_sizes[in_tile]] = cells.sum(dim=0)
        columns[in_tile, out_tile, : blocks.out_sizes[out_tile]] = cells.sum(dim=1)
    return rows, columns


def _siemens(
    array: FrozenTileArray, index: int, position: tuple[int, int], mapping: ConductanceMapping
) -> Tensor:
    """Conductances of one tile's cells as they are now, ``(cells_per_weight, columns, rows)``."""
    if mapping.pairs and array.programming.cells and array.tensors is array.programmed:
        return array.programming.cells[index].siemens
    # A weight says where its only cell is. Where pairs of cells are is not known otherwise: as they
    # would be written.
    weight = array.tensors.tile(array.blocks, position).conductance[0].T.detach().double().cpu()
    return mapping.to_siemens(mapping.positions(weight)).clamp(min=0.0)


def _scaled_alike(array: FrozenTileArray) -> bool:
    """Whether the columns of each tile have one digital factor in common."""
    used = array.blocks.used_columns(array.device)
    highest = array.tensors.scale.masked_fill(~used, -torch.inf).amax(-1)
    lowest = array.tensors.scale.masked_fill(~used, torch.inf).amin(-1)
    return bool((highest == lowest).all()) and bool((lowest != 0.0).all())
