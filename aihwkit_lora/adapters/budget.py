"""What adapters take in SRAM, and what would fit instead. One place for whoever asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aihwkit_lora.adapters.digital_unit import FLOAT_BITS, WIDTHS


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Numbers that one adapter of one layer stores.

    Args:
        rank: Inner dimension of A and B.
        per_rank: Weights of A and B for each unit of rank.
        biases: Biases of B, stored like weights.
        magnitudes: DoRA's factors of the outputs, which stay 16-bit floats.

    Example:
        >>> layer = Footprint(rank=4, per_rank=30)
        >>> layer.bits(8), layer.bits(8, rank=1)
        (960, 240)
    """

    rank: int
    per_rank: int
    biases: int = 0
    magnitudes: int = 0

    def bits(self, width: int, rank: int | None = None) -> int:
        """Bits in the SRAM.

        Args:
            width: Bits of a weight.
            rank: Instead of the adapter's own.
        """
        weights = self.per_rank * (self.rank if rank is None else rank) + self.biases
        return weights * width + self.magnitudes * FLOAT_BITS


def total_bits(parts: Sequence[Footprint], width: int) -> int:
    """Bits that adapters take together.

    Args:
        parts: Adapters of layers.
        width: Bits of a weight.
    """
    return sum(part.bits(width) for part in parts)


def largest_rank(parts: Sequence[Footprint], room: int, width: int) -> int:
    """Find the largest rank that, if all have it, fits.

    Args:
        parts: Adapters of layers; their own ranks do not matter.
        room: Bits.
        width: Bits of a weight.
    Returns:
        0 if none fits.

    Example:
        >>> largest_rank([Footprint(rank=9, per_rank=10), Footprint(rank=9, per_rank=20)], 500, 8)
        2
    """
    step = sum(part.per_rank for part in parts) * width
    at_zero = sum(part.bits(width, rank=0) for part in parts)
    return max(0, (room - at_zero) // step) if step else 0


def largest_width(parts: Sequence[Footprint], room: int) -> int:
    """Find the largest width at which adapters fit as they are.

    Args:
        parts: Adapters of layers.
        room: Bits.
    Returns:
        2 to 16 bits; 0 if none fits.

    Example:
        >>> largest_width([Footprint(rank=2, per_rank=10)], 100)
        5
    """
    return next((width for width in reversed(WIDTHS) if total_bits(parts, width) <= room), 0)
