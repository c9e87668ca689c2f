"""Options of the language recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.lm_data import LmDataConfig
from aihwkit_lora.recipes.lm_model import LmShape
from aihwkit_lora.unlearning import objectives

HEADS = ("digital", "array")
"""Where the output layer is."""

_QUICK: Mapping[str, Any] = {
    "authors": 4,
    "forgotten": 1,
    "new": 1,
    "width": 16,
    "depth": 1,
    "learn_steps": 3,
    "forget_steps": 2,
    "continue_steps": 2,
    "restore_steps": 2,
    "judged": 4,
    "noise_chips": 1,
}


@dataclass(frozen=True, kw_only=True)
class LmUnlearning(LmDataConfig):
    """Options of the recipe; those of the data come first.

    Args:
        chip: Name of the chip to program and to price for, or a YAML file that describes one.
        baseline: Whether to run the arms without arrays and with a full update, too.
        quick: Whether to take few steps with a tiny model and few authors, to see that everything
            works. It knows nothing.
        vocabulary: Most words that have a number each; the others are spelt.
        width: Features of a token.
        depth: Number of blocks.
        head: Where the output layer is: ``"digital"``, or in an ``"array"``.
        learn_steps: Steps of learning the first authors, in torch.
        weight_noise: Weight noise while learning, as a fraction of the largest weight.
        weight_clip: Largest weight of a layer while learning, in its standard deviations.
        objective: How to forget: ``"token_npo"``, ``"token_simnpo"`` or ``"token_ga"``.
        beta: Sharpness of the first two, above 0. ``token_npo``'s own 0.1 is for long answers; with
            it, forgetting short ones goes on until it ruins what is kept.
        rank: Rank of the adapters.
        alpha: Their scale, times the rank.
        batch_size: Sequences per step; while forgetting and continuing a quarter of them, at
            least one, are about the authors to forget or add.
        forget_steps: Steps of forgetting.
        continue_steps: Steps of learning the new authors; the kept ones are replayed.
        stand_ins: Whether forgotten questions are replayed, too, with the answers that the model
            gives once it has forgotten. Otherwise right answers slowly come back.
        restore_steps: Steps of restoring a chip with errors.
        learning_rate: Of learning.
        adapter_rate: Learning rate of adapters.
        judged: Questions of each set that TOFU's metrics are taken on; the forgotten ones all are.
        noise_microsiemens: Errors of programming that are looked at; the last one is restored.
        noise_chips: Chips with such errors.
    Raises:
        ConfigurationError: A number is too small, or there is no such objective or head.

    Example:
        >>> LmUnlearning(seed=1, objective="token_simnpo").forgotten
        3
    """

    chip: str = "rm-180nm"
    baseline: bool = True
    quick: bool = False
    vocabulary: int = 2000
    width: int = 128
    depth: int = 3
    head: str = "digital"
    learn_steps: int = 400
    weight_noise: float = 0.03
    weight_clip: float = 3.0
    objective: str = "token_npo"
    beta: float = 1.0
    rank: int = 8
    alpha: float = 16.0
    batch_size: int = 32
    forget_steps: int = 80
    continue_steps: int = 150
    stand_ins: bool = True
    restore_steps: int = 60
    learning_rate: float = 2e-3
    adapter_rate: float = 2e-3
    judged: int = 48
    noise_microsiemens: tuple[int, ...] = (1, 2, 5)
    noise_chips: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        al.chips.find(self.chip)
        for name in (field.name for field in dataclasses.fields(self)):
            counted = name.endswith(("_steps", "_size", "rank", "_chips", "vocabulary", "judged"))
            self._require(name, "of at least 1", not counted or getattr(self, name) >= 1)
        # Its own checks refuse sizes that do not fit.
        LmShape(vocabulary=1, length=1, width=self.width, depth=self.depth)
        self._require("weight_clip", "above 0", self.weight_clip > 0)
        least = min(self.noise_microsiemens, default=0)
        self._require("noise_microsiemens", "with errors of at least 1 µS", least >= 1)
        self._require("head", " or ".join(map(repr, HEADS)), self.head in HEADS)
        known = tuple(name for name in objectives.names() if name.startswith("token_"))
        self._require("objective", " or ".join(map(repr, known)), self.objective in known)
        self._require("beta", "above 0", self.beta > 0)

    @property
    def has_beta(self) -> bool:
        """Whether the objective has a sharpness."""
        return self.objective != "token_ga"

    def _require(self, name: str, expected: str, satisfied: bool) -> None:
        if not satisfied:
            raise ConfigurationError(f"expected {name} {expected}, found {getattr(self, name)!r}.")

    def shortened(self) -> LmUnlearning:
        """These options with a tiny model, few authors and steps, for a run that knows nothing."""
        return dataclasses.replace(self, **_QUICK)
