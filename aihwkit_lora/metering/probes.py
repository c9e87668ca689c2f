"""What watches a single layer: reads of its tiles, or its digital multiply–accumulates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.macs import MacCounter
from aihwkit_lora.tiles.layers import FrozenLayer

_FULL_SCALE = 2**16
"""Steps of a row's drive in ``cell_read_x2g``."""

_PICO = 1e12


class Sink(Protocol):
    """Where probes send what they count."""

    @property
    def ledger(self) -> Ledger:
        """Where counts end up."""

    def add(self, layer: str, counts: Counts) -> None:
        """Take the counts of a layer."""


class DigitalProbe:
    """A forward hook that counts the multiply–accumulates of a digital layer, both ways.

    Copies of an observed model are not observed: they get a hook that does nothing.

    Args:
        sink: Gets the counts.
        name: Full name of the layer.
        macs: Counts those of a layer of its type.
    """

    def __init__(self, sink: Sink, name: str, macs: MacCounter) -> None:
        self._sink, self._name, self._macs = sink, name, macs

    @property
    def ledger(self) -> Ledger:
        """Where counts end up."""
        return self._sink.ledger

    def __call__(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Tensor
    ) -> None:
        """Count a pass, and its gradients when they arrive."""
        macs = self._macs(layer, output)
        self._sink.add(self._name, Counts({"forward_macs": macs.forward}))
        if not output.requires_grad:
            return
        first = next(iter((*inputs, *named.values())), None)
        backward = Counts(
            {
                "input_gradient_macs": macs.input_gradient * _wants_gradient(first),
                "weight_gradient_macs": macs.weight_gradient
                * _wants_gradient(getattr(layer, "weight", None)),
            }
        )
        output.register_hook(lambda _: self._sink.add(self._name, backward))

    def __reduce__(self) -> tuple[type[_Nothing], tuple[()]]:
        return _Nothing, ()


class _Nothing:
    """What a copy of an observed layer has instead of a probe."""

    def __call__(self, *_: Any) -> None:
        return None


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
        self._sink, self._name, self._layer, self._fallback = sink, name, layer, fallback
        self._array: nn.Module | None = None
        self._row_sums = torch.empty(0)

    @property
    def ledger(self) -> Ledger:
        """Where counts end up."""
        return self._sink.ledger

    def on_read(self, drive: Tensor) -> None:
        """Count a read of all tiles, once per vector."""
        blocks, (_, own, vectors, _) = self._layer.analog_module.blocks, drive.shape
        squares = _sum_of_squares(drive, dim=2)
        # A row that tiles share counts for each of them.
        sums = self._sums().sum(dim=1, keepdim=True) if own == 1 else self._sums()
        conversions = vectors * blocks.out_features * blocks.in_tiles
        counts = {
            "array_cycles": vectors,
            "tile_reads": vectors * blocks.tiles,
            "row_drives": vectors * blocks.driven_rows * blocks.out_tiles,
            "active_row_drives": int(drive.count_nonzero()) * (blocks.out_tiles // own),
            "cell_reads": vectors * blocks.driven_rows * blocks.out_features,
            "cell_read_x2g": _exact_dot(squares, sums),
            "adc_conversions": conversions,
            "shift_adds": conversions,
        }
        self._sink.add(self._name, Counts(counts))

    def on_repeat(self, in_tile: int, out_tile: int, drive: Tensor) -> None:
        """Count another read of one tile; the tiles that wait for it take no further cycle."""
        blocks, vectors = self._layer.analog_module.blocks, drive.shape[0]
        rows, columns = blocks.in_sizes[in_tile], blocks.out_sizes[out_tile]
        sums = self._sums()[in_tile, out_tile]
        counts = {
            "tile_reads": vectors,
            "row_drives": vectors * rows,
            "active_row_drives": int(drive.count_nonzero()),
            "cell_reads": vectors * rows * columns,
            "cell_read_x2g": _exact_dot(_sum_of_squares(drive, dim=0), sums),
            "adc_conversions": vectors * columns,
        }
        self._sink.add(self._name, Counts(counts))

    def on_repeated_cycles(self, cycles: int) -> None:
        """Count the time that repeats took, with tiles working in parallel."""
        self._sink.add(self._name, Counts({"array_cycles": cycles}))

    def on_transposed_read(self, vectors: int) -> None:
        """Count a read of all tiles backwards, once per vector."""
        blocks = self._layer.analog_module.blocks
        conversions = vectors * blocks.in_features * blocks.out_tiles
        counts = {
            "transposed_array_cycles": vectors,
            "transposed_tile_reads": vectors * blocks.tiles,
            "transposed_row_drives": vectors * blocks.out_features * blocks.in_tiles,
            "transposed_cell_reads": vectors * blocks.in_features * blocks.out_features,
            "transposed_adc_conversions": conversions,
            "shift_adds": conversions,
        }
        self._sink.add(self._name, Counts(counts))

    def _sums(self) -> Tensor:
        """Conductance of each row of each tile in whole pS, ``(in_tiles, out_tiles, rows)``."""
        array = self._layer.analog_module
        if array is not self._array:
            mapping = array.programming.mapping or self._fallback
            self._array, self._row_sums = array, _row_sums(self._layer, mapping)
        return self._row_sums


def _row_sums(layer: FrozenLayer, mapping: ConductanceMapping) -> Tensor:
    array = layer.analog_module
    blocks = array.blocks
    sums = torch.zeros(blocks.in_tiles, blocks.out_tiles, blocks.rows, dtype=torch.int64)
    for in_tile, out_tile in array.positions():
        weight = array.tile(in_tile, out_tile)[0].detach().double().cpu()
        # A simulated cell far below the window would conduct less than nothing.
        cells = (mapping.to_siemens(weight).clamp(min=0.0) * _PICO).round().long()
        sums[in_tile, out_tile, : blocks.in_sizes[in_tile]] = cells.sum(dim=0)
    return sums


def _sum_of_squares(drive: Tensor, dim: int) -> Tensor:
    """Squares of the drives in steps of 2⁻¹⁶, summed over vectors, exactly."""
    steps = (drive.detach().abs().double() * _FULL_SCALE).round().long()
    return steps.square().sum(dim=dim).cpu()


def _exact_dot(squares: Tensor, sums: Tensor) -> int:
    # Python integers: the product of the two sums passes 2⁶³.
    pairs = zip(squares.flatten().tolist(), sums.flatten().tolist(), strict=True)
    return sum(x * g for x, g in pairs)


def _wants_gradient(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.requires_grad
