"""How the weight of a layer is cut into tiles, and how vectors are cut and joined to match."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """How a weight of shape ``(out_features, in_features)`` is cut into tiles.

    Args:
        in_sizes: Rows of each tile, along the input.
        out_sizes: Columns of each tile, along the output.
        bias_row: Whether the last row of the only tile along the input holds the bias; it is
            driven with 1 and is not an input feature.

    Example:
        >>> Blocks((3, 3), (4, 4, 3)).tiles
        6
        >>> Blocks((5,), (4,), bias_row=True).in_features
        4
    """

    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    bias_row: bool = False

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.in_sizes) * len(self.out_sizes)

    @property
    def in_tiles(self) -> int:
        """Number of tiles along the input."""
        return len(self.in_sizes)

    @property
    def out_tiles(self) -> int:
        """Number of tiles along the output."""
        return len(self.out_sizes)

    @property
    def driven_rows(self) -> int:
        """Rows that are driven in one read of one column of tiles, bias row included."""
        return sum(self.in_sizes)

    @property
    def in_features(self) -> int:
        """Length of an input vector."""
        return self.driven_rows - self.bias_row

    @property
    def out_features(self) -> int:
        """Length of an output vector."""
        return sum(self.out_sizes)

    @property
    def rows(self) -> int:
        """Rows of the largest tile; smaller ones are padded to it."""
        return max(self.in_sizes)

    @property
    def columns(self) -> int:
        """Columns of the largest tile; smaller ones are padded to it."""
        return max(self.out_sizes)

    def positions(self) -> Iterator[tuple[int, int]]:
        """Index of every tile along input and output, inputs first."""
        for i in range(self.in_tiles):
            for o in range(self.out_tiles):
                yield i, o

    def features_of(self, position: tuple[int, int]) -> tuple[slice, slice]:
        """Inputs and outputs that one tile serves.

        Args:
            position: Index of the tile along input and output.
        """
        in_ends, out_ends = tuple(accumulate(self.in_sizes)), tuple(accumulate(self.out_sizes))
        i, o = position
        rows = slice(in_ends[i] - self.in_sizes[i], in_ends[i] - self.bias_row)
        return rows, slice(out_ends[o] - self.out_sizes[o], out_ends[o])

    def used_columns(self, device: torch.device) -> Tensor:
        """Which columns of each tile there are, not padding; ``(out_tiles, columns)``, boolean."""
        return _used(self.out_sizes, device)

    def used_rows(self, device: torch.device) -> Tensor:
        """Which rows of each tile there are, not padding; ``(in_tiles, rows)``, boolean."""
        return _used(self.in_sizes, device)

    def put(
        self,
        conductance: Tensor,
        scale: Tensor,
        position: tuple[int, int],
        weight: Tensor,
        factor: Tensor,
    ) -> None:
        """Place one tile into blocked tensors.

        Args:
            conductance: Blocked conductances to write into.
            scale: Blocked scales to write into.
            position: Index of the tile along input and output.
            weight: Normalised weights, shape ``(out_size, in_size)``.
            factor: Output scales, shape ``(out_size,)``.
        """
        in_tile, out_tile = position
        columns, rows = weight.shape
        start = out_tile * self.columns
        conductance[in_tile, :rows, start : start + columns] = weight.T
        scale[in_tile, out_tile, :columns] = factor

    def split_inputs(self, x: Tensor) -> Tensor:
        """Cut ``(vectors, in_features)`` into ``(in_tiles, vectors, rows)``, padded with zeros.

        A bias row is left out; it is driven in its own way.
        """
        if self.bias_row:
            return x[None]
        if len(set(self.in_sizes)) == 1:
            return x.reshape(x.shape[0], self.in_tiles, self.rows).transpose(0, 1)
        parts = x.split(self.in_sizes, dim=1)
        return torch.stack([F.pad(part, (0, self.rows - part.shape[1])) for part in parts])

    def add_bias_row(self, values: Tensor) -> Tensor:
        """Drive a bias row with 1, behind the inputs ``(..., rows)``; nothing if there is none."""
        return F.pad(values, (0, 1), value=1.0) if self.bias_row else values

    def join_inputs(self, blocks: Tensor) -> Tensor:
        """Undo :meth:`split_inputs`; a bias row is dropped."""
        if self.bias_row:
            return blocks[0, :, : self.in_features]
        if len(set(self.in_sizes)) == 1:
            return blocks.transpose(0, 1).reshape(blocks.shape[1], self.in_features)
        parts = zip(blocks, self.in_sizes, strict=True)
        return torch.cat([block[:, :size] for block, size in parts], dim=1)

    def split_outputs(self, y: Tensor) -> Tensor:
        """Cut ``(vectors, out_features)`` into ``(vectors, out_tiles, columns)``, zero-padded."""
        if len(set(self.out_sizes)) == 1:
            return y.reshape(y.shape[0], self.out_tiles, self.columns)
        parts = y.split(self.out_sizes, dim=1)
        return torch.stack([F.pad(p, (0, self.columns - p.shape[1])) for p in parts], dim=1)

    def join_outputs(self, blocks: Tensor) -> Tensor:
        """Join ``(vectors, out_tiles, columns)`` to ``(vectors, out_features)``, unpadded."""
        if len(set(self.out_sizes)) == 1:
            return blocks.reshape(blocks.shape[0], self.out_features)
        parts = zip(blocks.unbind(1), self.out_sizes, strict=True)
        return torch.cat([block[:, :size] for block, size in parts], dim=1)


def _used(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    ends = torch.tensor(sizes, device=device)
    return torch.arange(max(sizes), device=device) < ends[:, None]


@dataclass(frozen=True, eq=False)
class TileTensors:
    """What the tiles of one layer hold, blocked.

    Args:
        conductance: Normalised conductances, shape ``(in_tiles, rows, out_tiles * columns)``.
        scale: Digital factor behind each column, shape ``(in_tiles, out_tiles, columns)``.
        input_range: Largest input of each tile, shape ``(in_tiles, out_tiles)``; None where inputs
            are scaled by noise management alone.
        out_noise: Deviation of each column's read noise, shape ``(in_tiles, out_tiles, columns)``;
            None where all columns have the same.
    """

    conductance: Tensor
    scale: Tensor
    input_range: Tensor | None = None
    out_noise: Tensor | None = None

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors that there are, by name."""
        for name in ("conductance", "scale", "input_range", "out_noise"):
            if (value := getattr(self, name)) is not None:
                yield name, value

    def to(self, device: torch.device) -> TileTensors:
        """The same on another device."""
        return TileTensors(**{name: value.to(device) for name, value in self.named()})

    def tile(self, blocks: Blocks, position: tuple[int, int]) -> TileTensors:
        """One tile as a layer of its own, unpadded.

        Args:
            blocks: How the layer is cut.
            position: Index of the tile along input and output.
        """
        i, o = position
        rows, columns = blocks.in_sizes[i], blocks.out_sizes[o]
        start = o * blocks.columns
        noise = self.out_noise
        return TileTensors(
            conductance=self.conductance[i : i + 1, :rows, start : start + columns],
            scale=self.scale[i : i + 1, o : o + 1, :columns],
            input_range=None
            if self.input_range is None
            else self.input_range[i : i + 1, o : o + 1],
            out_noise=None if noise is None else noise[i : i + 1, o : o + 1, :columns],
        )
