"""The loops of :mod:`aihwkit_lora.metering.code_sums`, compiled by numba."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_NEXT_TO_NOTHING = np.float32(1e-30)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile when it is first called, and keep the result on disk where that can be done."""
    # Not a number gives no code either way, and the sign of zero does not matter in a square.
    compile_ = partial(numba.njit, nogil=True, fastmath={"nnan", "nsz"})
    try:
        compiled: Callable[..., Any] = compile_(cache=True)(function)
    except RuntimeError:  # no folder can be written to (numba 0.68)
        compiled = compile_()(function)
    return compiled


@_compiled
def squared_codes(
    drives: NDArray[np.float32], full: np.float32, exact: int, sums: NDArray[np.int64]
) -> int:
    """Add to sums over vectors, and count what is not zero.

    Args:
        drives: Fractions of the full scale, shape ``(groups, vectors, tiles, rows)``.
        full: The largest code.
        exact: How many vectors a 32-bit sum holds exactly; it moves on to integers after them.
        sums: Shape ``(groups, tiles, rows)``.
    """
    groups, vectors, tiles, rows = drives.shape
    part, active = np.zeros((tiles, rows), np.float32), 0
    for group in range(groups):
        for vector in range(vectors):
            for tile in range(tiles):
                for row in range(rows):
                    code = np.rint(drives[group, vector, tile, row] * full)
                    part[tile, row] += code * code
                    active += code != 0.0
            if (vector + 1) % exact == 0 or vector + 1 == vectors:
                for tile in range(tiles):
                    for row in range(rows):
                        sums[group, tile, row] += np.int64(part[tile, row])
                        part[tile, row] = 0.0
    return active


@_compiled
def squared_codes_of_largest(
    drive: NDArray[np.float32],
    scale: NDArray[np.float32],
    full: np.float32,
    exact: int,
    sums: NDArray[np.int64],
) -> None:
    """Add to sums of shape ``(in_tiles, out_tiles, columns)``.

    Args:
        drive: Shape ``(vectors, out_tiles, columns)``.
        scale: Factors on it, shape ``(in_tiles, out_tiles, columns)``.
        full: The largest code, which the largest magnitude of a vector and tile gets.
        exact: How many vectors a 32-bit sum holds exactly; it moves on to integers after them.
        sums: Shape of ``scale``.
    """
    vectors, columns = len(drive), drive.shape[2]
    part, magnitude = np.zeros(columns, np.float32), np.empty(columns, np.float32)
    # Magnitudes are in the order of their bits, and the largest of integers takes one instruction
    # for eight of them; LLVM compares floats one by one.
    bits, top = magnitude.view(np.int32), np.zeros(1, np.int32)
    largest = top.view(np.float32)
    for row in range(len(scale)):
        for tile in range(drive.shape[1]):
            for vector in range(vectors):
                for column in range(columns):
                    product = drive[vector, tile, column] * scale[row, tile, column]
                    magnitude[column] = abs(product)
                most = np.int32(0)
                for column in range(columns):
                    most = bits[column] if bits[column] > most else most
                top[0] = most
                whole = max(largest[0], _NEXT_TO_NOTHING)
                for column in range(columns):
                    code = np.rint(magnitude[column] / whole * full)
                    part[column] += code * code
                if (vector + 1) % exact == 0 or vector + 1 == vectors:
                    for column in range(columns):
                        sums[row, tile, column] += np.int64(part[column])
                        part[column] = 0.0


@_compiled
def dot(left: NDArray[np.int64], right: NDArray[np.int64], sums: NDArray[np.uint64]) -> None:
    """Add up products of 32-bit halves, and count how often each 64-bit sum wraps around.

    Args:
        left: Whole numbers of 0 or more, shape ``(n,)``.
        right: The same.
        sums: Sum and wraps of low · low, low · high, high · low and high · high, shape ``(4, 2)``.
    """
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    for index in range(len(left)):
        first, second = np.uint64(left[index]), np.uint64(right[index])
        lows, highs = (first & mask, second & mask), (first >> half, second >> half)
        products = (lows[0] * lows[1], lows[0] * highs[1], highs[0] * lows[1], highs[0] * highs[1])
        for part in range(4):
            if products[part]:
                sums[part, 0] += products[part]
                sums[part, 1] += sums[part, 0] < products[part]
