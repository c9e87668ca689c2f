"""What objectives of continual learning share: cross-entropy on new and replayed samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.unlearning.objectives.objective import Objective
from aihwkit_lora.unlearning.objectives.terms import nll, run

Batch = Mapping[str, tuple[Any, ...]]
"""``{"new": (inputs, targets), "replay": (inputs, targets)}``; most can do without a replay part.

For ``der++`` the replay part also has logits: ``(inputs, targets, logits)``.
"""

Data = Iterable[Sequence[Any]]
"""Batches of ``(inputs, targets)``, for example a ``DataLoader``."""


class ContinualObjective(Objective):
    """What training the adapter of a new task minimises.

    Call :meth:`prepare_` once the new adapter is there and before the optimiser is made, and
    :meth:`finish_` when it is trained; methods without preparation or memory do nothing there.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"new"})
    bounded: ClassVar[bool] = True

    def prepare_(self, model: nn.Module, data: Data = ()) -> None:
        """Get the model ready to learn a task; nothing unless overridden.

        Args:
            model: Its new adapter is what is trained.
            data: Of the new task.
        """

    def finish_(self, model: nn.Module, data: Data = ()) -> None:
        """Remember what later tasks have to know of this one; nothing unless overridden.

        Args:
            model: Its new adapter is trained.
            data: Of the new task.
        """

    def outputs_of(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Run the model once on each part of a batch.

        Args:
            model: As for :meth:`loss`.
            batch: As for :meth:`loss`.
        Returns:
            Logits of each part that is there, shape ``(n, classes)``.
        Raises:
            DataError: A part that the objective needs is missing.
        """
        wanted = self.needs - {"reference"} | ({"replay"} & set(batch))
        return {key: run(model, self.part(batch, key)[0]) for key in sorted(wanted)}


@dataclass(frozen=True, kw_only=True)
class Penalised(ContinualObjective):
    """Cross-entropy on what is new, and on what is replayed if anything is, plus a penalty.

    The mean is weighted: ``Σ w_i CE_i / Σ w_i``, with w = ``ratio`` for replayed samples and 1 for
    new ones, divided by how often the sample's class occurs in the batch if ``class_balanced``.

    Args:
        ratio: Weight of a replayed sample, of 0 or more.
        class_balanced: Whether classes count alike, however many samples they have.
    """

    ratio: float = 1.0
    class_balanced: bool = True

    def __post_init__(self) -> None:
        """Check the ratio."""
        self.require("ratio", "of 0 or more", self.ratio >= 0)

    def loss(self, model: nn.Module, batch: Batch, *, progress: float = 0.0) -> Tensor:
        """Run the model on each part once, and add the penalty."""
        logits = self.outputs_of(model, batch)
        return self.task_loss(batch, logits) + self.penalty(model, batch, logits)

    def penalty(self, model: nn.Module, batch: Batch, logits: Mapping[str, Tensor]) -> Tensor:
        """Compute what keeps earlier tasks; 0 unless overridden.

        Args:
            model: As for :meth:`loss`.
            batch: As for :meth:`loss`.
            logits: Of each part of the batch, shape ``(n, classes)``.
        """
        return logits["new"].new_zeros(())

    def task_loss(self, batch: Batch, logits: Mapping[str, Tensor]) -> Tensor:
        """Compute the weighted mean of cross-entropies.

        Args:
            batch: Targets of each part are class indices, shape ``(n,)``.
            logits: Of each part, shape ``(n, classes)``.
        """
        by_part = {key: nll(output, batch[key][1]) for key, output in logits.items()}
        factors = {"new": 1.0, "replay": self.ratio}
        weights = torch.cat([torch.full_like(by_part[key], factors[key]) for key in by_part])
        losses = torch.cat(list(by_part.values()))
        if self.class_balanced:
            targets = torch.cat([batch[key][1] for key in by_part])
            weights = weights / targets.bincount()[targets]
        return (weights * losses).sum() / weights.sum()
