"""How a stage of the language recipe is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.recipes.image_training import Denoiser
from aihwkit_lora.unlearning.objectives.preference import npo
from aihwkit_lora.unlearning.objectives.terms import run, token_nll
from aihwkit_lora.unlearning.objectives.tokens import TokenNPO, token_cross_entropy

Batch = tuple[Tensor, Tensor]
"""Tokens and labels, both ``(n, t)``."""


class Reader(Denoiser):
    """A language model that learns answers: cross-entropy of their tokens, with weight noise.

    The optimiser, its schedule, the noise and the clipping are those of the image recipe.
    """

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Predict next tokens."""
        logits: Tensor = self.model(tokens)
        return logits

    def training_step(self, batch: Batch) -> Tensor:  # type: ignore[override]
        """Cross-entropy over the tokens of all answers."""
        tokens, labels = batch
        logits = torch.func.functional_call(self.model, self._shaken(), (tokens,))
        loss = token_cross_entropy(logits, labels)
        self.log("loss", loss, prog_bar=True, batch_size=len(tokens))
        return loss


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Learn the answers of several parts of a batch; each part counts by itself.

    Args:
        needs: Names of the parts.

    Example:
        >>> Answering(needs=frozenset({"new", "replay"})).bounded
        True
    """

    needs: frozenset[str]
    bounded: ClassVar[bool] = True

    def loss(
        self, model: nn.Module, batch: Mapping[str, Batch], *, progress: float = 0.0
    ) -> Tensor:
        """Sum of the parts' mean cross-entropies.

        Args:
            model: From tokens to logits.
            batch: From part to tokens and labels.
            progress: Not used.
        """
        parts = [batch[part] for part in sorted(self.needs)]
        losses = [token_cross_entropy(run(model, tokens), labels) for tokens, labels in parts]
        return torch.stack(losses).sum()


@dataclass(frozen=True, kw_only=True, eq=False)
class TaughtNPO(TokenNPO):
    """``token_npo`` for a model without adapters, whose reference is a copy of it.

    Args:
        teacher: The model before; not trained.
    """

    teacher: nn.Module

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare whole sequences with the teacher.

        Args:
            model: From tokens to logits.
            inputs: Tokens.
            targets: Labels.
        """
        with torch.no_grad():
            before, _ = token_nll(run(self.teacher, inputs), targets)
        return npo(token_nll(run(model, inputs), targets)[0], before, self.beta)
