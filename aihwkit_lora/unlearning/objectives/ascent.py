"""Gradient ascent on the forget set, with and without a bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aihwkit_lora.unlearning.objectives.catalogue import register
from aihwkit_lora.unlearning.objectives.objective import Batch, ForgetRetain, Objective
from aihwkit_lora.unlearning.objectives.terms import nll, run


@register
@dataclass(frozen=True, kw_only=True)
class WeightedGA(Objective):
    """Cross-entropy of all samples together, those to forget with a negative weight.

    arXiv:2601.10037's code does this for faces, for 16 full-batch steps. It has no lower bound:
    beyond a few steps it costs the retained classes, and forgotten samples end up as one wrong
    class with high confidence.

    Args:
        weight: Of a sample to forget, below 0; retained ones have 1.

    Example:
        >>> batch = {
        ...     "forget": (torch.zeros(1, 2), torch.tensor([0])),
        ...     "retain": (torch.zeros(3, 2), torch.tensor([1, 1, 1])),
        ... }
        >>> WeightedGA().loss(nn.Linear(2, 2, bias=False), batch)  # (3 - 0.5) / 4 · ln 2
        tensor(0.4332, grad_fn=<MeanBackward0>)
    """

    name: ClassVar[str] = "weighted_ga"
    summary: ClassVar[str] = "Gradient ascent on forgotten samples among the others, few steps only"
    formula: ClassVar[str] = "mean over both sets of w·CE, w = weight to forget, 1 to retain"
    source: ClassVar[str] = "arXiv:2601.10037 (code, faces)"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})
    bounded: ClassVar[bool] = False
    weight: float = -0.5

    def __post_init__(self) -> None:
        """Check the weight."""
        self.require("weight", "below 0", self.weight < 0)

    def loss(self, model: nn.Module, batch: Batch, *, progress: float = 0.0) -> Tensor:
        """Average over both sets."""
        forget, retain = (self.part(batch, key) for key in ("forget", "retain"))
        losses = [self.weight * nll(run(model, forget[0]), forget[1])]
        losses.append(nll(run(model, retain[0]), retain[1]))
        return torch.cat(losses).mean()


@register
@dataclass(frozen=True, kw_only=True)
class NegGradPlus(Objective):
    """Descend on the retain set and ascend on the forget set (NegGrad+, arXiv:2302.09880).

    Args:
        alpha: Share of the retain set, above 0 and below 1.
    """

    name: ClassVar[str] = "neggrad_plus"
    summary: ClassVar[str] = "Descend on the retain set, ascend on the forget set"
    formula: ClassVar[str] = "alpha·CE_r − (1 − alpha)·CE_f"
    source: ClassVar[str] = "arXiv:2302.09880"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})
    bounded: ClassVar[bool] = False
    alpha: float = 0.95

    def __post_init__(self) -> None:
        """Check the share."""
        self.require("alpha", "above 0 and below 1", 0 < self.alpha < 1)

    def loss(self, model: nn.Module, batch: Batch, *, progress: float = 0.0) -> Tensor:
        """Subtract the one from the other."""
        forget, retain = (self.part(batch, key) for key in ("forget", "retain"))
        kept = nll(run(model, retain[0]), retain[1]).mean()
        lost = nll(run(model, forget[0]), forget[1]).mean()
        return self.alpha * kept - (1.0 - self.alpha) * lost


@register
@dataclass(frozen=True, kw_only=True)
class BoundedGA(ForgetRetain):
    """Gradient ascent until the cross-entropy of the forget set reaches a bound (GS-LoRA).

    Args:
        bound: Cross-entropy at which the ascent ends, in nats; ln(classes) is a guess.
        beta: Weight of the ascent.
    """

    name: ClassVar[str] = "bounded_ga"
    summary: ClassVar[str] = "Gradient ascent that ends where the forget set is unlikely enough"
    formula: ClassVar[str] = "beta·max(0, bound − CE_f) + retain_weight·CE_r"
    source: ClassVar[str] = "GS-LoRA, arXiv:2403.11530; BID-LoRA, arXiv:2604.12686"
    bounded: ClassVar[bool] = True
    bound: float = 5.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("bound", "above 0", self.bound > 0)
        self.require("beta", "above 0", self.beta > 0)

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Measure what is left to the bound."""
        return self.beta * F.relu(self.bound - nll(run(model, inputs), targets).mean())
