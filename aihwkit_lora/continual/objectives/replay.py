"""Earlier samples again, with their labels, or with the answers given to them back then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from aihwkit_lora.continual.objectives.catalogue import register
from aihwkit_lora.continual.objectives.objective import Batch, ContinualObjective, Penalised
from aihwkit_lora.errors import DataError
from aihwkit_lora.unlearning.objectives.terms import mse, nll


@register
@dataclass(frozen=True, kw_only=True)
class Replay(Penalised):
    """Learn new samples together with earlier ones, class by class.

    Example:
        >>> import torch
        >>> logits = torch.zeros(3, 2)
        >>> new, old = torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0])
        >>> batch = {"new": (logits, new), "replay": (logits, old)}
        >>> Replay().loss(nn.Identity(), batch)
        tensor(0.6931)
    """

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "Learn new samples together with earlier ones, classes balanced"
    formula: ClassVar[str] = "Σ w_i CE_i / Σ w_i, w = (ratio if replayed else 1) / count of class"
    source: ClassVar[str] = "experience replay; the speaker task of arXiv:2601.10037 with 30 %"
    needs: ClassVar[frozenset[str]] = frozenset({"new", "replay"})


@register
@dataclass(frozen=True, kw_only=True)
class DERPlusPlus(ContinualObjective):
    """Answer earlier samples as back then, and as their labels say (Dark Experience Replay++).

    The replay part of the batch is ``(inputs, targets, logits)``, as
    :class:`~aihwkit_lora.continual.buffer.ReplayBuffer` gives it after ``record(model)``. The
    square is averaged over logits, as in the authors' code. Outputs that the head has got since are
    left out of it.

    Args:
        alpha: Weight of the squared distance between logits, of 0 or more.
        beta: Weight of the cross-entropy on replayed samples, of 0 or more.

    Example:
        >>> import torch
        >>> part = (torch.zeros(2, 3), torch.tensor([0, 1]))
        >>> batch = {"new": part, "replay": (*part, torch.ones(2, 3))}
        >>> DERPlusPlus(alpha=0.5, beta=0.0).loss(nn.Identity(), batch)  # log 3 + 0.5
        tensor(1.5986)
    """

    name: ClassVar[str] = "der++"
    summary: ClassVar[str] = "Answer earlier samples as back then, and as their labels say"
    formula: ClassVar[str] = "CE_new + α·mean(z − z_buf)² + β·CE_buf"
    source: ClassVar[str] = "Buzzega et al. 2020, arXiv:2004.07211, DER++"
    needs: ClassVar[frozenset[str]] = frozenset({"new", "replay"})
    alpha: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        """Check the weights."""
        self.require("alpha", "of 0 or more", self.alpha >= 0)
        self.require("beta", "of 0 or more", self.beta >= 0)

    def loss(self, model: nn.Module, batch: Batch, *, progress: float = 0.0) -> Tensor:
        """Add the three terms."""
        logits = self.outputs_of(model, batch)
        _, targets, *rest = batch["replay"]
        if len(rest) != 1:
            raise DataError(
                "objective 'der++': expected replay as (inputs, targets, logits), got "
                f"{2 + len(rest)} parts. Call buffer.record(model) before drawing from it."
            )
        before = rest[0]
        now = logits["replay"][:, : before.shape[1]]
        new = nll(logits["new"], batch["new"][1]).mean()
        replayed = nll(logits["replay"], targets).mean()
        return new + self.alpha * mse(now, before) + self.beta * replayed
