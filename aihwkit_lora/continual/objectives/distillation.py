"""Learning without forgetting: the model without the new adapter as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.continual.objectives.catalogue import register
from aihwkit_lora.continual.objectives.objective import Batch, Penalised
from aihwkit_lora.unlearning.objectives.terms import kl, mark, run_reference


@register
@dataclass(frozen=True, kw_only=True)
class LwF(Penalised):
    """On new samples, keep the old outputs as they were (Learning without Forgetting).

    The old model is the same one without the adapter in training: no second copy, but a second
    pass, whose tile reads count. ``KL(old ‖ new)`` is taken over the old outputs alone; with the
    factor T² its gradients do not depend on the temperature (Hinton et al., arXiv:1503.02531).

    Args:
        strength: λ, of 0 or more.
        temperature: T, above 0; 2 in the paper.
        outputs: The old outputs; by default all but the labels of the new samples in the batch.
    """

    name: ClassVar[str] = "lwf"
    summary: ClassVar[str] = "On new samples, keep the old outputs as they were"
    formula: ClassVar[str] = "CE + λ·T²·mean_new KL(softmax(z_old/T) ‖ softmax(z/T)), old outputs"
    source: ClassVar[str] = "Li and Hoiem 2016, arXiv:1606.09282"
    needs: ClassVar[frozenset[str]] = frozenset({"new", "reference"})
    strength: float = 1.0
    temperature: float = 2.0
    outputs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("strength", "of 0 or more", self.strength >= 0)
        self.require("temperature", "above 0", self.temperature > 0)
        named = self.outputs is None or len(self.outputs) >= 2
        self.require("outputs", "to be None or to name 2 or more", named)

    def penalty(self, model: nn.Module, batch: Batch, logits: Mapping[str, Tensor]) -> Tensor:
        """Compare with the old model."""
        inputs, targets, *_ = batch["new"]
        old = self._old_outputs(logits["new"], targets)
        before = run_reference(model, inputs)[:, old] / self.temperature
        now = logits["new"][:, old] / self.temperature
        return self.strength * self.temperature**2 * kl(before.softmax(dim=1), now).mean()

    def _old_outputs(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.outputs is None:
            mask = torch.ones_like(logits[0], dtype=torch.bool)
            mask[targets] = False
            return mask
        return mark(logits[:1], self.outputs)[0]
