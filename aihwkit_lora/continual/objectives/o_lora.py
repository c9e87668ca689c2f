"""Orthogonal low-rank adaptation: new adapters read other directions than earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.continual.objectives.catalogue import register
from aihwkit_lora.continual.objectives.objective import Batch, Penalised
from aihwkit_lora.unlearning.reference import adapted_layers, adapters_in_training


@register
@dataclass(frozen=True, kw_only=True)
class OLoRA(Penalised):
    """Keep the input directions of the new adapter orthogonal to those of all earlier ones.

    With A of shape ``(rank, inputs)``, as PEFT keeps it, the overlap of two adapters of a layer is
    ``Σ |A_i A_tᵀ|``, entry by entry, summed over layers as in the authors' code. Kernels of
    convolutions count as flat vectors. Earlier adapters are those that run and are not in training,
    whether they learnt or forgot something.

    Args:
        strength: λ₁, of 0 or more.
    """

    name: ClassVar[str] = "o_lora"
    summary: ClassVar[str] = "Read other input directions than all earlier adapters"
    formula: ClassVar[str] = "CE + λ·Σ_layers Σ_{i<t} ‖A_i A_tᵀ‖₁, entry by entry"
    source: ClassVar[str] = "Wang et al. 2023, arXiv:2310.14152, in the form of its code"
    strength: float = 0.5

    def __post_init__(self) -> None:
        """Check the strength."""
        super().__post_init__()
        self.require("strength", "of 0 or more", self.strength >= 0)

    def penalty(self, model: nn.Module, batch: Batch, logits: Mapping[str, Tensor]) -> Tensor:
        """Add up the overlaps."""
        overlaps = [(old @ new.T).abs().sum() for old, new in _pairs(model)]
        total = super().penalty(model, batch, logits)
        return total + self.strength * sum(overlaps, start=torch.zeros_like(total))


def _pairs(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    trained = adapters_in_training(model)
    for _, layer in adapted_layers(model):
        running = [name for name in layer.active_adapters if name in layer.lora_A]
        for new in (name for name in running if name in trained):
            for old in (name for name in running if name not in trained):
                yield down(layer, old).detach(), down(layer, new)


def down(layer: Any, adapter: str) -> Tensor:
    """Matrix A of an adapter.

    Args:
        layer: PEFT's LoRA layer.
        adapter: Name of the adapter.
    Returns:
        Shape ``(rank, inputs)``; kernels of convolutions are flat.
    """
    weight: Tensor = layer.lora_A[adapter].weight
    return weight.flatten(1)
