"""Frozen-conductance mode: layers and tiles that are read, never written."""

from aihwkit_lora.tiles.array import FrozenTile, FrozenTileArray
from aihwkit_lora.tiles.convert import convert
from aihwkit_lora.tiles.drift import drift_
from aihwkit_lora.tiles.freeze import (
    EngineChoice,
    engines,
    fingerprint,
    freeze_,
    frozen_layers,
    target_modules,
    thaw_,
    verify,
)
from aihwkit_lora.tiles.layers import (
    FrozenConv1d,
    FrozenConv2d,
    FrozenConv3d,
    FrozenLayer,
    FrozenLinear,
)
from aihwkit_lora.tiles.write_noise import evaluate_noisy, noisy_chips, noisy_outputs

__all__ = [
    "EngineChoice",
    "FrozenConv1d",
    "FrozenConv2d",
    "FrozenConv3d",
    "FrozenLayer",
    "FrozenLinear",
    "FrozenTile",
    "FrozenTileArray",
    "convert",
    "drift_",
    "engines",
    "evaluate_noisy",
    "fingerprint",
    "freeze_",
    "frozen_layers",
    "noisy_chips",
    "noisy_outputs",
    "target_modules",
    "thaw_",
    "verify",
]
