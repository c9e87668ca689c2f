"""Exact sums over the codes of DACs: how hard the rows of tiles were driven.

On a processor each sum takes one pass over the drives, by a compiled loop: a training step must not
notice that it is metered. On other devices the same is a handful of torch's operations.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

_COMPILED_FOR = "cpu"
_WHOLE = 2**24
"""Up to here sums of whole numbers are exact in 32-bit floats, in any order."""


def squared_codes(drive: Tensor, full: int) -> tuple[Tensor, int]:
    """Add up the squares of the codes of each row, and count the codes that are not zero.

    Args:
        drive: Fractions of the full scale, shape ``(..., vectors, rows)``.
        full: The largest code, up to 255.
    Returns:
        Sums over vectors, 64-bit integers of shape ``(..., rows)`` on the CPU, and the number of
        codes that are not zero.

    Example:
        >>> squared_codes(torch.tensor([[0.5, 0.0], [1.0, 0.0]]), full=127)
        (tensor([20225,     0]), 2)
    """
    values = drive.detach()
    if values.dtype is not torch.float32:
        values = values.float()
    if values.device.type != _COMPILED_FOR:
        squares = (values * full).round_().square_()
        added = _whole_sum(squares, full**2)
        return added, int(_whole_sum(squares.clamp_(max=1.0), 1).sum())
    # Arrays, since each small operation of torch takes some ten times as long as numpy's.
    *leading, vectors, rows = values.shape
    tiles = values.numpy().reshape(math.prod(leading), vectors, rows)
    found = np.zeros((len(tiles), rows), np.int64)
    # In the order that they have in memory: tiles of one layer often share a batch of inputs.
    if tiles.flags.c_contiguous:
        ordered, sums = tiles[:, :, None], found[:, None]
    else:
        ordered, sums = np.ascontiguousarray(tiles.transpose(1, 0, 2))[None], found[None]
    exact = _WHOLE // full**2
    active = _loops().squared_codes(ordered, np.float32(full), exact, sums)
    return torch.from_numpy(found.reshape(*leading, rows)), int(active)


def squared_codes_of_largest(drive: Tensor, scale: Tensor, full: int) -> Tensor:
    """Add up the squares of the codes of each column, where each vector fills its tile's scale.

    Args:
        drive: What drives the columns, shape ``(vectors, out_tiles, columns)``.
        scale: Factors on it, different in each tile, shape ``(in_tiles, out_tiles, columns)``.
        full: The largest code, up to 255; the largest magnitude of a vector and tile gets it.
    Returns:
        Sums over vectors, 64-bit integers of the shape of ``scale``, on the CPU.

    Example:
        >>> drive, scale = torch.tensor([[[4.0, -1.0]]]), torch.tensor([[[1.0, 2.0]]])
        >>> squared_codes_of_largest(drive, scale, full=127)
        tensor([[[16129,  4096]]])
    """
    values, factors = drive.detach().float(), scale.detach().float()
    if values.device.type != _COMPILED_FOR:
        return torch.stack([_of_largest(values * factor, full) for factor in factors])
    found = np.zeros(tuple(factors.shape), np.int64)
    arrays = values.contiguous().numpy(), factors.contiguous().numpy()
    _loops().squared_codes_of_largest(*arrays, np.float32(full), _WHOLE // full**2, found)
    return torch.from_numpy(found)


def exact_dot(left: Tensor, right: Tensor) -> int:
    """Add up products of whole numbers, exactly, where the sum may pass 2⁶³.

    Args:
        left: 64-bit integers of 0 or more on the CPU, of any shape.
        right: The same, of the same shape.

    Example:
        >>> large = torch.tensor([2**40, 2**33])
        >>> exact_dot(large, large) == 2**80 + 2**66
        True
    """
    sums = np.zeros((4, 2), np.uint64)
    _loops().dot(left.numpy().reshape(-1), right.numpy().reshape(-1), sums)
    # Of products of halves: low · low, low · high, high · low, high · high.
    parts = [low + (wraps << 64) for low, wraps in sums.tolist()]
    return sum(part << shift for part, shift in zip(parts, (0, 32, 32, 64), strict=True))


@cache
def _loops() -> ModuleType:
    """The compiled loops, once somebody counts: numba takes a while to import."""
    from aihwkit_lora.metering import code_loops

    return code_loops


def _of_largest(drive: Tensor, full: int) -> Tensor:
    magnitudes = drive.abs()
    largest = magnitudes.amax(-1, keepdim=True).clamp_(min=1e-30)
    codes = magnitudes.div_(largest).mul_(full).round_()
    return _whole_sum(codes.square_().movedim(0, -2), full**2)


def _whole_sum(values: Tensor, largest: int) -> Tensor:
    """Add up whole numbers of up to ``largest`` over vectors, the last dimension but one."""
    parts = values.split(max(1, _WHOLE // largest), -2)
    return torch.stack([part.sum(-2).long() for part in parts]).sum(0).cpu()
