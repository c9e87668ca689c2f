"""All tiles of one layer as one blocked tensor, multiplied in one batched product.

Real arrays are small (128 × 128), so one layer is many tiles, each with its own converters and
noise. aihwkit loops over them in Python; here the loop is the batch dimension of one product. The
physics is aihwkit's: the steps below follow ``AnalogMVM.matmul`` and its C++ twin line by line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from aihwkit_lora.tiles.periphery import TileIO


@dataclass(frozen=True)
class Blocks:
    """How a weight of shape ``(out_features, in_features)`` is cut into tiles.

    Args:
        in_sizes: Rows of each tile, along the input.
        out_sizes: Columns of each tile, along the output.

    Example:
        >>> Blocks((3, 3), (4, 4, 3)).tiles
        6
    """

    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.in_sizes) * len(self.out_sizes)

    @property
    def in_features(self) -> int:
        """Length of an input vector."""
        return sum(self.in_sizes)

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
        for i in range(len(self.in_sizes)):
            for o in range(len(self.out_sizes)):
                yield i, o

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
        """Cut ``(vectors, in_features)`` into ``(in_tiles, vectors, rows)``, padded with zeros."""
        if len(set(self.in_sizes)) == 1:
            return x.reshape(x.shape[0], len(self.in_sizes), self.rows).transpose(0, 1)
        parts = x.split(self.in_sizes, dim=1)
        return torch.stack([F.pad(part, (0, self.rows - part.shape[1])) for part in parts])

    def join_inputs(self, blocks: Tensor) -> Tensor:
        """Undo :meth:`split_inputs`."""
        if len(set(self.in_sizes)) == 1:
            return blocks.transpose(0, 1).reshape(blocks.shape[1], self.in_features)
        parts = zip(blocks, self.in_sizes, strict=True)
        return torch.cat([block[:, :size] for block, size in parts], dim=1)

    def join_outputs(self, blocks: Tensor) -> Tensor:
        """Join ``(vectors, out_tiles, columns)`` to ``(vectors, out_features)``, unpadded."""
        if len(set(self.out_sizes)) == 1:
            return blocks.reshape(blocks.shape[0], self.out_features)
        parts = zip(blocks.unbind(1), self.out_sizes, strict=True)
        return torch.cat([block[:, :size] for block, size in parts], dim=1)


class ReadProbe(Protocol):
    """Something that is told of every read of a layer's tiles, while it happens."""

    def on_read(self, drive: Tensor) -> None:
        """All tiles were read once per vector.

        Args:
            drive: What the DACs applied, as a fraction of full scale, shape
                ``(in_tiles, vectors, rows)``.
        """

    def on_repeat(self, in_tile: int, out_tile: int, drive: Tensor) -> None:
        """One tile was read again because its ADC overflowed.

        Args:
            in_tile: Index of the tile along the input.
            out_tile: Index of the tile along the output.
            drive: What its DACs applied, shape ``(vectors, rows)``.
        """

    def on_repeated_cycles(self, cycles: int) -> None:
        """All repeats of a batch are done; tiles that repeated at once took one cycle together."""

    def on_transposed_read(self, vectors: int) -> None:
        """All tiles were read backwards (outputs driven, inputs sensed), once per vector."""


def blocked_mvm(
    x: Tensor,
    conductance: Tensor,
    scale: Tensor,
    blocks: Blocks,
    io: TileIO,
    probes: tuple[ReadProbe, ...] = (),
) -> Tensor:
    """Multiply input vectors with every tile and add up the partial sums digitally.

    Args:
        x: Inputs, shape ``(vectors, in_features)``.
        conductance: Normalised conductances, shape ``(in_tiles, rows, out_tiles * columns)``.
        scale: Digital output scale of each column, shape ``(in_tiles, out_tiles, columns)``.
        blocks: How the layer is cut into tiles.
        io: Converters and noise of each tile.
        probes: Told of each read.
    Returns:
        Outputs of each column of tiles, shape ``(vectors, out_tiles, columns)``; see
        :meth:`Blocks.join_outputs`.
    """
    inputs = blocks.split_inputs(x)
    if io.perfect:
        for probe in probes:
            # An ideal tile has no full scale of its own; each vector's largest value stands in.
            probe.on_read(inputs / inputs.abs().amax(-1, keepdim=True).clamp(min=1e-30))
        columns = _read(inputs, conductance, blocks)
    else:
        columns = _converted_read(inputs, conductance, blocks, io, probes)
    return (columns * scale[:, None]).sum(0)


def transposed_mvm(grad: Tensor, conductance: Tensor, scale: Tensor, blocks: Blocks) -> Tensor:
    """Send gradients back through the tiles, exactly.

    Args:
        grad: Gradient of the outputs, shape ``(vectors, out_tiles, columns)``.
        conductance: As in :func:`blocked_mvm`.
        scale: As in :func:`blocked_mvm`.
        blocks: How the layer is cut into tiles.
    Returns:
        Gradient of the inputs, shape ``(vectors, in_features)``.
    """
    columns = grad[None] * scale[:, None]
    return blocks.join_inputs(torch.bmm(columns.flatten(2), conductance.transpose(1, 2)))


def _read(drive: Tensor, conductance: Tensor, blocks: Blocks) -> Tensor:
    """Ideal column currents, shape ``(in_tiles, vectors, out_tiles, columns)``."""
    currents = torch.bmm(drive, conductance)
    return currents.view(*drive.shape[:2], len(blocks.out_sizes), blocks.columns)


def _converted_read(
    inputs: Tensor,
    conductance: Tensor,
    blocks: Blocks,
    io: TileIO,
    probes: tuple[ReadProbe, ...],
) -> Tensor:
    gain = _input_gain(inputs, io)
    drive = _dac(inputs * gain, io)
    for probe in probes:
        probe.on_read(_fraction_of_full_scale(drive, io))
    if io.inp_noise > 0:
        # Every tile has its own DACs, so tiles that share an input do not share its noise.
        tiles = conductance.view(len(blocks.in_sizes), blocks.rows, -1, blocks.columns)
        noisy = drive[:, None].expand(-1, len(blocks.out_sizes), -1, -1)
        noisy = noisy + io.inp_noise * torch.randn_like(noisy)
        currents = torch.matmul(noisy, tiles.transpose(1, 2)).transpose(1, 2)
    else:
        currents = _read(drive, conductance, blocks)
    columns, overflow = _adc(currents, io)
    columns = columns * (io.out_scale / gain)[..., None]
    if io.repeat_on_overflow and bool(overflow.any()):
        columns = _repeat_overflowing(
            columns, overflow, inputs, gain, conductance, blocks, io, probes
        )
    if io.scale_inputs and not io.repeat_whole_batch:
        # The C++ tiles return zeros, without noise, for a vector that is all zeros.
        columns = columns.masked_fill((inputs == 0).all(-1)[..., None, None], 0.0)
    return columns


def _input_gain(inputs: Tensor, io: TileIO) -> Tensor:
    """What each vector is multiplied by before its DACs, shape ``(in_tiles, vectors, 1)``.

    The reciprocal of a scale, not a division by it: only so do values on the edge between two DAC
    codes fall on the side where aihwkit puts them.
    """
    if not io.scale_inputs:
        return torch.full_like(inputs[..., :1], 1.0 / io.constant_scale)
    scale = inputs.abs().amax(-1, keepdim=True)
    if io.scale_ceiling > 0:
        scale = scale.clamp(max=io.scale_ceiling)
    return 1.0 / scale.masked_fill(scale <= 0, 1.0)


def _dac(values: Tensor, io: TileIO) -> Tensor:
    if io.inp_step > 0:
        values = (values / io.inp_step).round() * io.inp_step
    return values.clamp(-io.inp_bound, io.inp_bound) if io.inp_bound > 0 else values


def _adc(currents: Tensor, io: TileIO) -> tuple[Tensor, Tensor]:
    """Digitise column currents; also say which tile and vector overflowed."""
    if io.out_noise > 0:
        currents = currents + io.out_noise * torch.randn_like(currents)
    if io.out_step > 0:
        currents = (currents / io.out_step).round() * io.out_step
    if io.out_bound <= 0:
        return currents, currents.new_zeros(currents.shape[:3], dtype=torch.bool)
    clipped = currents.clamp(-io.out_bound, io.out_bound)
    return clipped, (clipped != currents).any(-1)


def _fraction_of_full_scale(drive: Tensor, io: TileIO) -> Tensor:
    return drive / io.inp_bound if io.inp_bound > 0 else drive


def _repeat_overflowing(
    columns: Tensor,
    overflow: Tensor,
    inputs: Tensor,
    gain: Tensor,
    conductance: Tensor,
    blocks: Blocks,
    io: TileIO,
    probes: tuple[ReadProbe, ...],
) -> Tensor:
    """Read overflowing tiles again at half the input, until none overflows (ITERATIVE).

    Overflows are rare, so this part does loop over tiles.
    """
    columns = columns.clone()
    cycles = torch.zeros(columns.shape[1], dtype=torch.int64, device=columns.device)
    tiles = conductance.view(len(blocks.in_sizes), blocks.rows, -1, blocks.columns)
    for in_tile, out_tile in overflow.any(1).nonzero().tolist():
        failing = overflow[in_tile, :, out_tile]
        if io.repeat_whole_batch:
            failing = torch.ones_like(failing)
        vectors = failing.nonzero()[:, 0]
        own_cycles = torch.zeros_like(cycles)
        halving = 1.0
        while len(vectors) and halving <= io.max_halving:
            halving *= 2.0
            reduced = gain[in_tile, vectors] / halving
            drive = _dac(inputs[in_tile, vectors] * reduced, io)
            for probe in probes:
                probe.on_repeat(in_tile, out_tile, _fraction_of_full_scale(drive, io))
            if io.inp_noise > 0:
                drive = drive + io.inp_noise * torch.randn_like(drive)
            read, again = _adc((drive @ tiles[in_tile, :, out_tile])[None, :, None], io)
            columns[in_tile, vectors, out_tile] = read[0, :, 0] * (io.out_scale / reduced)
            own_cycles[vectors] += 1
            still = again[0, :, 0]
            if io.repeat_whole_batch:
                still = still.any().expand_as(still)
            vectors = vectors[still]
        cycles = torch.maximum(cycles, own_cycles)
    for probe in probes:
        probe.on_repeated_cycles(int(cycles.sum()))
    return columns
