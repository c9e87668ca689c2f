"""All tiles of one layer as one blocked tensor, multiplied in few batched products.

Real arrays are small (128 × 128), so one layer is many tiles, each with its own converters and
noise. aihwkit loops over them in Python; here all tiles along the output share one product, and
the partial sums of the tiles along the input are added up while they are still in the cache. The
physics is aihwkit's: the steps below follow ``AnalogMVM.matmul`` and its C++ twin line by line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aihwkit_lora.tiles.blocks import Blocks, TileTensors
from aihwkit_lora.tiles.periphery import TileIO

# Tiles along the input go together until their column sums fill this many values (4 MiB), which
# is about what a core's cache holds: more is slower, less costs calls.
_CACHED_VALUES = 2**20
# The largest code times the step can miss the bound by the last bit of a float32.
_SLACK = 1.0 + 1e-6


class ReadProbe(Protocol):
    """Something that is told of every read of a layer's tiles, while it happens."""

    def on_read(self, drive: Tensor) -> None:
        """All tiles were read once per vector.

        Args:
            drive: What the DACs applied, as a fraction of full scale, shape
                ``(in_tiles, 1, vectors, rows)``, or ``(in_tiles, out_tiles, vectors, rows)`` where
                tiles that share an input scale it on their own.
        """

    def on_repeat(self, in_tile: int, out_tile: int, drive: Tensor) -> None:
        """One tile was read again because its ADC overflowed.

        Args:
            in_tile: Index of the tile along the input.
            out_tile: Index of the tile along the output.
            drive: What its DACs applied, shape ``(vectors, rows)``. It stays as it is, and tiles
                that share their inputs are driven by one and the same tensor.
        """

    def on_repeated_cycles(self, cycles: int) -> None:
        """All repeats of a batch are done; tiles that repeated at once took one cycle together."""

    def on_transposed_read(self, grad: Tensor) -> None:
        """All tiles were read backwards (outputs driven, inputs sensed), once per vector.

        Args:
            grad: Gradients of the outputs, shape ``(vectors, out_features)``.
        """


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What goes into the DACs of a layer.

    Args:
        values: Inputs in units of each tile's range, shape ``(in_tiles, own, vectors, rows)``;
            ``own`` is 1, or ``out_tiles`` where tiles that share an input scale it differently.
        gain: What each vector is multiplied by before its DACs, ``(in_tiles, own, vectors, 1)``.
        silent: Which vectors are not read at all, same shape, boolean; None if all are.
    """

    values: Tensor
    gain: Tensor
    silent: Tensor | None

    def group(self, tiles: slice) -> _Inputs:
        """Those of some of the tiles along the input."""
        silent = None if self.silent is None else self.silent[tiles]
        return _Inputs(self.values[tiles], self.gain[tiles], silent)


def blocked_mvm(
    x: Tensor,
    tensors: TileTensors,
    blocks: Blocks,
    io: TileIO,
    probes: tuple[ReadProbe, ...] = (),
) -> Tensor:
    """Multiply input vectors with every tile and add up the partial sums digitally.

    Args:
        x: Inputs, shape ``(vectors, in_features)``.
        tensors: What the tiles hold.
        blocks: How the layer is cut into tiles.
        io: Converters and noise of each tile.
        probes: Told of each read.
    Returns:
        Shape ``(vectors, out_features)``.
    """
    inputs = _inputs(x, tensors, blocks, io)
    drive = inputs.values if io.perfect else _dac(inputs.values * inputs.gain, io)
    for probe in probes:
        probe.on_read(_fraction_of_full_scale(drive, io))
    if io.inp_noise > 0 and not io.perfect:
        # Every tile has its own DACs, so tiles that share an input do not share its noise.
        drive = drive.expand(-1, blocks.out_tiles, -1, -1)
    drive = _driven(drive, io)
    repeats = _Repeats(inputs, tensors, blocks, io, probes)
    own, columns = drive.shape[1], blocks.out_tiles * blocks.columns
    total = x.new_zeros(len(x), columns) if own == 1 else x.new_zeros(own, len(x), blocks.columns)
    for tiles in _groups(len(x), blocks):
        codes = _codes(drive[tiles], tensors, blocks, io, tiles)
        if io.out_bound > 0 and not io.perfect and _overflows(codes, io):
            repeats.of(codes, tiles)
        part, scale = inputs.group(tiles), _scale(tensors, tiles)
        _add_up(total.view(own, len(x), codes.shape[-1]), codes, part, scale, io)
    repeats.done()
    if own > 1:
        return blocks.join_outputs(total.transpose(0, 1))
    # As it is wherever possible: what autograd is handed must not be a view made in here, or
    # nobody could change it in place, as ReLU(inplace=True) does.
    whole = columns == blocks.out_features
    return total if whole else blocks.join_outputs(total.unflatten(1, (blocks.out_tiles, -1)))


def transposed_mvm(grad: Tensor, tensors: TileTensors, blocks: Blocks) -> Tensor:
    """Send gradients back through the tiles, exactly.

    Converters and noise pass gradients on unchanged (straight through), and so do inputs and
    column sums that were clipped.

    Args:
        grad: Gradient of the outputs, shape ``(vectors, out_features)``.
        tensors: What the tiles hold.
        blocks: How the layer is cut into tiles.
    Returns:
        Gradient of the inputs, shape ``(vectors, in_features)``.
    """
    columns = blocks.split_outputs(grad)
    rows = grad.new_empty(blocks.in_tiles, len(grad), blocks.rows)
    for tiles in _groups(len(grad), blocks):
        scaled = (columns * tensors.scale[tiles, None]).flatten(2)
        torch.bmm(scaled, tensors.conductance[tiles].transpose(1, 2), out=rows[tiles])
    return blocks.join_inputs(rows)


def exact_mvm(x: Tensor, tensors: TileTensors, blocks: Blocks) -> Tensor:
    """Multiply without converters and noise, and without a bias row: the linear map itself.

    Args:
        x: Inputs, shape ``(vectors, in_features)``.
        tensors: What the tiles hold.
        blocks: How the layer is cut into tiles.
    """
    linear = replace(tensors, input_range=None, out_noise=None)
    if not blocks.bias_row:
        return blocked_mvm(x, linear, blocks, TileIO.ideal())
    rest = replace(linear, conductance=linear.conductance[:, : blocks.in_features])
    smaller = Blocks((blocks.in_features,), blocks.out_sizes)
    return blocked_mvm(x, rest, smaller, TileIO.ideal())


def _groups(vectors: int, blocks: Blocks) -> list[slice]:
    """Which tiles along the input go together into one batched product."""
    values = max(1, vectors * blocks.out_tiles * blocks.columns)
    size = max(1, _CACHED_VALUES // values)
    return [slice(i, min(i + size, blocks.in_tiles)) for i in range(0, blocks.in_tiles, size)]


def _inputs(x: Tensor, tensors: TileTensors, blocks: Blocks, io: TileIO) -> _Inputs:
    values = blocks.split_inputs(x)[:, None]
    if tensors.input_range is not None:
        limit = tensors.input_range[..., None, None]
        values = values.clamp(-limit, limit) / limit
    values = blocks.add_bias_row(values)
    if io.perfect or not io.scale_inputs:
        gain = values.new_full((*values.shape[:3], 1), 1.0 / io.constant_scale)
        return _Inputs(values, gain, None)
    if io.scale_by_magnitude:
        scale = values.abs().amax(-1, keepdim=True)
    else:
        used = blocks.used_rows(values.device)[:, None, None]
        scale = values.masked_fill(~used, -torch.inf).amax(-1, keepdim=True)
    if io.scale_ceiling > 0:
        scale = scale.clamp(max=io.scale_ceiling)
    # A C++ tile does not read a vector that has no scale: zeros, or nothing above zero (MAX).
    silent = scale <= 0.0
    if io.whole_batch:
        # A torch tile skips a batch of zeros, and reads the zeros of any other batch.
        silent = (scale == 0.0).all(dim=2, keepdim=True) & (io.inp_noise <= 0.0)
    # The reciprocal of a scale, not a division by it: only so do values on the edge between two
    # DAC codes fall on the side where aihwkit puts them.
    gain = 1.0 / scale.masked_fill(scale <= 0.0, 1.0)
    return _Inputs(values, gain, silent)


def _add_up(total: Tensor, codes: Tensor, inputs: _Inputs, scale: Tensor, io: TileIO) -> None:
    """Scale column sums and add those of all tiles along the input to the total, in place."""
    codes.mul_(_per_tile(scale, codes.shape[1]))
    if io.perfect:
        total.add_(codes.sum(0), alpha=io.out_scale)
        return
    factor = (io.out_step or 1.0) * (io.out_scale / inputs.gain)
    if inputs.silent is not None:
        factor = factor.masked_fill(inputs.silent, 0.0)
    if len(codes) == 1:
        total.addcmul_(codes[0], factor[0])
    else:
        total.add_(codes.mul_(factor).sum(0))


def _scale(tensors: TileTensors, tiles: slice) -> Tensor:
    """Factor behind each column: an input in units of its range comes back in its own units."""
    scale, limit = tensors.scale[tiles], tensors.input_range
    return scale if limit is None else scale * limit[tiles, :, None]


def _per_tile(values: Tensor, own: int) -> Tensor:
    """Columns' values, ``(tiles, out_tiles, columns)``, to multiply column sums with."""
    return values.flatten(1)[:, None, None] if own == 1 else values[:, :, None]


def _currents(
    drive: Tensor, tensors: TileTensors, blocks: Blocks, io: TileIO, tiles: slice
) -> Tensor:
    """Column sums in steps of the ADC, noise included, ``(tiles, own, vectors, columns)``."""
    count, own, vectors, _ = drive.shape
    conductance = tensors.conductance[tiles]
    if own > 1:
        # (tiles, rows, out_tiles * columns) -> (tiles * out_tiles, rows, columns)
        conductance = conductance.unflatten(2, (own, blocks.columns)).transpose(1, 2).flatten(0, 1)
    flat = drive.flatten(0, 1)
    shape = (count, own, vectors, conductance.shape[2])
    if io.perfect or not io.noisy:
        return _weaker_negative(torch.bmm(flat, conductance).view(shape), io.out_asymmetry)
    # The product is added to the noise, in the ADC's steps, so that neither takes another pass.
    per_step = 1.0 / io.out_step if io.out_step > 0 else 1.0
    noise = drive.new_empty(shape)
    if io.w_noise > 0 or tensors.out_noise is not None:
        noise.normal_().mul_(_deviation(drive, tensors, io, tiles) * per_step)
    else:
        noise.normal_(std=io.out_noise * per_step)
    if io.out_asymmetry != 0:
        sums = torch.bmm(flat, conductance).view(shape)
        return noise.add_(_weaker_negative(sums, io.out_asymmetry), alpha=per_step)
    noise.view(-1, *shape[2:]).baddbmm_(flat, conductance, alpha=per_step)
    return noise


def _weaker_negative(values: Tensor, asymmetry: float) -> Tensor:
    if asymmetry == 0:
        return values
    return torch.where(values < 0, values * (1.0 - asymmetry), values)


def _deviation(drive: Tensor, tensors: TileTensors, io: TileIO, tiles: slice) -> Tensor:
    """Deviation of the read noise of each column sum."""
    noise = tensors.out_noise
    columns = _per_tile(noise[tiles], drive.shape[1]) if noise is not None else io.out_noise
    if io.w_noise <= 0:
        return torch.as_tensor(columns)
    # Independent noise on each weight adds up to |x| times that noise on the column sum.
    weights = io.w_noise * torch.linalg.vector_norm(drive, dim=-1, keepdim=True)
    total: Tensor = (weights.square() + torch.as_tensor(columns).square()).sqrt()
    return total


def _dac(values: Tensor, io: TileIO) -> Tensor:
    """What the DACs apply, in place."""
    if io.inp_step > 0:
        values = _rounded(values.div_(io.inp_step), io.inp_random).mul_(io.inp_step)
    return values.clamp_(-io.inp_bound, io.inp_bound) if io.inp_bound > 0 else values


def _driven(drive: Tensor, io: TileIO) -> Tensor:
    """What the rows see of what the DACs apply."""
    if io.perfect:
        return drive
    if io.inp_noise > 0:
        drive = drive + io.inp_noise * torch.randn_like(drive)
    return _weaker_negative(drive, io.inp_asymmetry)


def _codes(drive: Tensor, tensors: TileTensors, blocks: Blocks, io: TileIO, tiles: slice) -> Tensor:
    """What the ADCs give before they limit it, ``(tiles, own, vectors, columns)``."""
    currents = _currents(drive, tensors, blocks, io, tiles)
    # With noise, column sums are in steps already.
    if io.perfect or io.out_step <= 0:
        return currents
    if not io.noisy:
        currents.div_(io.out_step)
    return _rounded(currents, io.out_random)


def _limit(io: TileIO) -> float:
    """Largest code of the ADC."""
    return io.out_bound / (io.out_step or 1.0)


def _overflows(codes: Tensor, io: TileIO) -> bool:
    if not codes.numel():
        return False
    lowest, highest = torch.aminmax(codes)
    return max(-float(lowest), float(highest)) > _limit(io) * _SLACK


def _rounded(values: Tensor, at_random: bool) -> Tensor:
    if at_random:
        values = values + (torch.rand_like(values) - 0.5)
    return values.round_()


def fraction_of_largest(drive: Tensor) -> Tensor:
    """Drives of tiles whose full scale is their own affair: each vector's largest stands in for it.

    Args:
        drive: What drives the rows, shape ``(..., rows)``.
    """
    return drive / drive.abs().amax(-1, keepdim=True).clamp(min=1e-30)


def _fraction_of_full_scale(drive: Tensor, io: TileIO) -> Tensor:
    if io.perfect or io.inp_bound <= 0:
        return fraction_of_largest(drive)
    return drive if io.inp_bound == 1.0 else drive / io.inp_bound


class _Drive(NamedTuple):
    """What drives the rows of a tile, shape ``(vectors, rows)``, and the share of full scale."""

    values: Tensor
    fraction: Tensor


class _Repeats:
    """Overflowing tiles, read again at half the input until none overflows (ITERATIVE).

    Overflows are rare, so this part does loop over tiles.
    """

    def __init__(
        self,
        inputs: _Inputs,
        tensors: TileTensors,
        blocks: Blocks,
        io: TileIO,
        probes: tuple[ReadProbe, ...],
    ) -> None:
        self._inputs, self._tensors, self._blocks = inputs, tensors, blocks
        self._io, self._probes = io, probes
        self._cycles: Tensor | None = None
        self._drives_of, self._drives = -1, dict[tuple[int, float], _Drive]()

    def of(self, codes: Tensor, tiles: slice) -> None:
        """Limit the codes of tiles and vectors that overflowed, or replace them by repeated reads.

        Args:
            codes: Of a group of tiles, shape ``(tiles, own, vectors, columns)``; changed in place.
            tiles: The group.
        """
        columns, limit = self._blocks.columns, _limit(self._io)
        # (tiles, vectors, out_tiles, columns), a view
        shared = codes.shape[1] == 1
        each = codes[:, 0].unflatten(2, (-1, columns)) if shared else codes.transpose(1, 2)
        overflow = ((each.abs() > limit * _SLACK) & self._blocks.used_columns(codes.device)).any(-1)
        codes.clamp_(-limit, limit)
        if not self._io.repeat_on_overflow:
            return
        for offset, out_tile in overflow.any(1).nonzero().tolist():
            failing = overflow[offset, :, out_tile]
            if self._io.whole_batch:
                failing = torch.ones_like(failing)
            self._read_again(each[offset, :, out_tile], failing, tiles.start + offset, out_tile)

    def _read_again(self, codes: Tensor, failing: Tensor, in_tile: int, out_tile: int) -> None:
        io, own = self._io, min(out_tile, self._inputs.values.shape[1] - 1)
        count = self._inputs.values.shape[2]
        tile = self._tensors.tile(self._blocks, (in_tile, out_tile))
        rows, columns = tile.conductance.shape[1:]
        vectors, cycles, halving = failing.nonzero()[:, 0], torch.zeros_like(failing).long(), 1.0
        while len(vectors) and halving <= io.max_halving:
            halving *= 2.0
            # All vectors are a view, some are a copy.
            chosen = slice(None) if len(vectors) == count else vectors
            drive = self._drive(in_tile, own, rows, halving, chosen)
            for probe in self._probes:
                probe.on_repeat(in_tile, out_tile, drive.fraction)
            driven, single = _driven(drive.values, io)[None, None], Blocks((rows,), (columns,))
            again = _codes(driven, tile, single, io, slice(0, 1))[0, 0]
            overflow = (again.abs() > _limit(io) * _SLACK).any(-1)
            # Behind the ADC, codes are scaled by the first gain; the halving goes on top.
            codes[chosen, :columns] = again.clamp_(-_limit(io), _limit(io)) * halving
            cycles[chosen] += 1
            vectors = vectors[overflow.any().expand_as(overflow) if io.whole_batch else overflow]
        self._cycles = cycles if self._cycles is None else torch.maximum(self._cycles, cycles)

    def _drive(
        self, in_tile: int, own: int, rows: int, halving: float, chosen: slice | Tensor
    ) -> _Drive:
        """What the DACs apply in a repeated read: the same to all tiles that share their inputs."""
        if self._drives_of != in_tile:  # tiles come in the order of their inputs
            self._drives_of, self._drives = in_tile, {}
        io, shared = self._io, isinstance(chosen, slice) and not self._io.inp_random
        if shared and (own, halving) in self._drives:
            return self._drives[own, halving]
        values, gain = self._inputs.values[in_tile, own], self._inputs.gain[in_tile, own]
        applied = _dac(values[chosen, :rows] * (gain[chosen] / halving), io)
        drive = _Drive(applied, _fraction_of_full_scale(applied, io))
        if shared:
            self._drives[own, halving] = drive
        return drive

    def done(self) -> None:
        """Tell the probes how long the repeats took, with tiles working in parallel."""
        if self._cycles is None:
            return
        for probe in self._probes:
            probe.on_repeated_cycles(int(self._cycles.sum()))
