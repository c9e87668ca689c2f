"""Frozen-conductance mode: layers and tiles that are read, never written."""

from aihwkit_lora.tiles.convert import convert
from aihwkit_lora.tiles.freeze import (
    fingerprint,
    freeze_,
    frozen_layers,
    target_modules,
    thaw_,
    verify,
)
from aihwkit_lora.tiles.frozen import FrozenLinear, FrozenTile, FrozenTileArray

__all__ = [
    "FrozenLinear",
    "FrozenTile",
    "FrozenTileArray",
    "convert",
    "fingerprint",
    "freeze_",
    "frozen_layers",
    "target_modules",
    "thaw_",
    "verify",
]
