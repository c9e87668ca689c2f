"""Learning from the model's own past: the reference as a teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from aihwkit_lora.unlearning.objectives.catalogue import register
from aihwkit_lora.unlearning.objectives.objective import Batch, Objective
from aihwkit_lora.unlearning.objectives.relabelling import Relabels
from aihwkit_lora.unlearning.objectives.terms import kl, nll, other_outputs, run, run_reference

Retain = Literal["kl", "ce"]


@register
@dataclass(frozen=True, kw_only=True)
class MaskedTeacher(Relabels):
    """Answer forgotten samples as the reference would if it did not know their label (DELETE).

    Args:
        retain: ``"kl"``, as the reference answers, or ``"ce"``, as the labels say.
    """

    name: ClassVar[str] = "masked_teacher"
    summary: ClassVar[str] = "Answer as the reference would without the forgotten label"
    formula: ClassVar[str] = (
        "mean_f KL(softmax(z0 with z0_y = −∞) ‖ p) + retain_weight·[mean_r KL(p0 ‖ p) or CE_r]"
    )
    source: ClassVar[str] = "DELETE, arXiv:2503.23751"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "reference"})
    bounded: ClassVar[bool] = True
    retain: Retain = "kl"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("retain", "'kl' or 'ce'", self.retain in get_args(Retain))

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare with the reference, its forgotten output masked."""
        before = run_reference(model, inputs)
        others = other_outputs(before, targets, self.outputs)
        wanted = before.masked_fill(~others, -math.inf).softmax(dim=1)
        return kl(wanted, run(model, inputs)).mean()

    def retain_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare with the reference, or with the labels."""
        if self.retain == "ce":
            return super().retain_loss(model, inputs, targets)
        wanted = run_reference(model, inputs).softmax(dim=1)
        return kl(wanted, run(model, inputs)).mean()


@register
@dataclass(frozen=True, kw_only=True)
class SCRUB(Objective):
    """Move away from the reference on the forget set, then back to it on the retain set, in turns.

    Training is divided into rounds of equal length. Each of the first ``max_rounds`` ends with a
    share of steps that ascend on the forget set, which have no bound; all other steps descend. The
    source ascends first, where a fresh adapter has no effect and the divergence has no slope.

    Args:
        alpha: Weight of the divergence on the retain set.
        gamma: Weight of the cross-entropy on the retain set.
        temperature: Of both softmaxes, above 0.
        rounds: Number of rounds.
        max_rounds: How many of them ascend.
        max_share: Last part of such a round, which ascends, above 0 and below 1.

    Example:
        >>> objective = SCRUB(rounds=10, max_rounds=3, max_share=0.2)
        >>> [objective.ascends(progress) for progress in (0.0, 0.09, 0.11, 0.29, 0.39, 1.0)]
        [False, True, False, True, False, False]
    """

    name: ClassVar[str] = "scrub"
    summary: ClassVar[str] = "Away from the reference on the forget set, back on the retain set"
    formula: ClassVar[str] = "in turns −T²·KL_f(p0 ‖ p) and alpha·T²·KL_r(p0 ‖ p) + gamma·CE_r"
    source: ClassVar[str] = "arXiv:2302.09880"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "reference"})
    bounded: ClassVar[bool] = False
    alpha: float = 0.5
    gamma: float = 1.0
    temperature: float = 2.0
    rounds: int = 10
    max_rounds: int = 3
    max_share: float = 0.5

    def __post_init__(self) -> None:
        """Check the fields."""
        self.require("alpha", "of 0 or more", self.alpha >= 0)
        self.require("gamma", "of 0 or more", self.gamma >= 0)
        self.require("temperature", "above 0", self.temperature > 0)
        self.require("rounds", "of 1 or more", self.rounds >= 1)
        self.require("max_rounds", "from 1 to rounds", 1 <= self.max_rounds <= self.rounds)
        self.require("max_share", "above 0 and below 1", 0 < self.max_share < 1)

    def ascends(self, progress: float) -> bool:
        """Tell whether a step ascends on the forget set.

        Args:
            progress: Fraction of the training that is done.
        """
        share, finished = math.modf(progress * self.rounds)
        return finished < self.max_rounds and share >= 1.0 - self.max_share

    def loss(self, model: nn.Module, batch: Batch, *, progress: float = 0.0) -> Tensor:
        """Ascend or descend, as ``progress`` says."""
        if self.ascends(progress):
            inputs, _ = self.part(batch, "forget")
            return -self._divergence(model, inputs, run(model, inputs))
        inputs, targets = self.part(batch, "retain")
        logits = run(model, inputs)
        divergence = self._divergence(model, inputs, logits)
        return self.alpha * divergence + self.gamma * nll(logits, targets).mean()

    def _divergence(self, model: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        wanted = (run_reference(model, inputs) / self.temperature).softmax(dim=1)
        return self.temperature**2 * kl(wanted, logits / self.temperature).mean()
