"""The blocked product of one layer on several chips in one pass, each with its own conductances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aihwkit_lora.tiles.blocked import (
    _add_up,
    _codes,
    _dac,
    _driven,
    _groups,
    _inputs,
    _limit,
    _scale,
)
from aihwkit_lora.tiles.blocks import Blocks, TileTensors
from aihwkit_lora.tiles.periphery import TileIO


def stackable(tensors: TileTensors, io: TileIO) -> bool:
    """Say whether chips can share a product: all tiles of a row see the same drive, once.

    Args:
        tensors: What the tiles hold on one of the chips.
        io: Converters and noise of each tile.

    Example:
        >>> from dataclasses import replace
        >>> held = TileTensors(torch.zeros(1, 3, 2), torch.ones(1, 1, 2))
        >>> stackable(held, TileIO.ideal())
        True
        >>> stackable(held, replace(TileIO.ideal(), perfect=False, inp_noise=0.1))
        False
    """
    if io.perfect:
        return tensors.input_range is None
    repeats = io.repeat_on_overflow and io.out_bound > 0
    return tensors.input_range is None and io.inp_noise <= 0 and not repeats


def many_chips_mvm(x: Tensor, chips: Sequence[TileTensors], blocks: Blocks, io: TileIO) -> Tensor:
    """Multiply each chip's vectors with each chip's tiles, as ``blocked_mvm`` does for one chip.

    All tiles of one chip that share their inputs become one wide tile, and the chips its
    neighbours along the output, each with inputs of its own.

    Args:
        x: Inputs, shape ``(chips, vectors, in_features)``.
        chips: What the tiles hold on each chip; see :func:`stackable`.
        blocks: How the layer is cut into tiles.
        io: Converters and noise of each tile.
    Returns:
        Shape ``(chips, vectors, out_features)``.

    Example:
        >>> one = TileTensors(torch.ones(1, 3, 2), torch.ones(1, 1, 2))
        >>> two = TileTensors(2.0 * one.conductance, one.scale)
        >>> x, layer = torch.ones(2, 1, 3), Blocks((3,), (2,))
        >>> many_chips_mvm(x, [one, two], layer, TileIO.ideal()).tolist()
        [[[3.0, 3.0]], [[6.0, 6.0]]]
    """
    count, vectors, _ = x.shape
    tensors, wide = _side_by_side(chips, blocks)
    parts = [_inputs(part, chips[0], blocks, io) for part in x]
    inputs = replace(
        parts[0],
        values=torch.cat([part.values for part in parts], dim=1),
        gain=torch.cat([part.gain for part in parts], dim=1),
        silent=_joined([part.silent for part in parts]),
    )
    drive = inputs.values if io.perfect else _dac(inputs.values * inputs.gain, io)
    drive = _driven(drive, io)
    total = x.new_zeros(count, vectors, wide.columns)
    # In the groups of one chip, so that sums are rounded as they are there.
    for tiles in _groups(vectors, blocks):
        codes = _codes(drive[tiles], tensors, wide, io, tiles)
        if io.out_bound > 0 and not io.perfect:
            codes.clamp_(-_limit(io), _limit(io))
        _add_up(total, codes, inputs.group(tiles), _scale(tensors, tiles), io)
    each = total.flatten(0, 1).unflatten(1, (blocks.out_tiles, blocks.columns))
    return blocks.join_outputs(each).view(count, vectors, blocks.out_features)


def _side_by_side(chips: Sequence[TileTensors], blocks: Blocks) -> tuple[TileTensors, Blocks]:
    columns = blocks.out_tiles * blocks.columns
    noises = [chip.out_noise for chip in chips if chip.out_noise is not None]
    tensors = TileTensors(
        conductance=torch.cat([chip.conductance for chip in chips], dim=2),
        scale=torch.stack([chip.scale.flatten(1) for chip in chips], dim=1),
        out_noise=torch.stack([noise.flatten(1) for noise in noises], dim=1) if noises else None,
    )
    return tensors, Blocks(blocks.in_sizes, (columns,) * len(chips), bias_row=blocks.bias_row)


def _joined(silent: Sequence[Tensor | None]) -> Tensor | None:
    found = [each for each in silent if each is not None]
    return torch.cat(found, dim=1) if found else None
