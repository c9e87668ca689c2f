"""Elastic weight consolidation on the few parameters that are trained: those of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.continual.objectives.catalogue import register
from aihwkit_lora.continual.objectives.objective import Batch, Data, Penalised
from aihwkit_lora.errors import DataError, StageError
from aihwkit_lora.unlearning.objectives.terms import nll, run


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Where parameters were after a task, and how much that task depends on each.

    Args:
        values: By name of the parameter.
        fisher: Diagonal of the Fisher information, same names and shapes; 0 or more.
    """

    values: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]


def measure_fisher(model: nn.Module, data: Data) -> Anchor:
    """Estimate the diagonal of the empirical Fisher information of what is in training.

    ``F = mean_i (∂ log p(y_i | x_i) / ∂θ)²``, with the labels as given, sample by sample. The model
    runs in evaluation mode; its reads count. Gradients that were there are left alone.

    Args:
        model: Parameters that ask for gradients are measured.
        data: Batches of ``(inputs, targets)``; inputs a tensor, or a tuple or mapping of tensors.
    Returns:
        The information, and the present values.
    Raises:
        DataError: There is no sample.

    Example:
        >>> torch.manual_seed(0).initial_seed()
        0
        >>> data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
        >>> measure_fisher(nn.Linear(3, 2), data).fisher["weight"].shape
        torch.Size([2, 3])
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fisher = {name: torch.zeros_like(p) for name, p in trained.items()}
    training, count = model.training, 0
    model.eval()
    for inputs, target in _samples(data):
        loss = nll(run(model, inputs), target).sum()
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                fisher[name] += gradient.square()
        count += 1
    model.train(training)
    if not count:
        raise DataError("measure_fisher: expected samples, got none. Pass data of the task.")
    return Anchor(
        values={name: p.detach().clone() for name, p in trained.items()},
        fisher={name: information / count for name, information in fisher.items()},
    )


@register
@dataclass(frozen=True, kw_only=True)
class EWC(Penalised):
    """Pull each parameter back to where it was, the more an earlier task depends on it.

    Parameters are those of the adapter in training, so this is for *one* adapter that learns task
    after task; adapters of their own are fixed anyway. :meth:`finish_` measures a task and anchors
    it.

    Args:
        strength: λ, of 0 or more.
        anchors: One for each task measured so far.
    """

    name: ClassVar[str] = "ewc"
    summary: ClassVar[str] = "Pull an adapter back to where it was, where earlier tasks need it"
    formula: ClassVar[str] = "CE + λ/2·Σ_tasks Σ_i F_i (θ_i − θ*_i)², θ of the adapter in training"
    source: ClassVar[str] = "Kirkpatrick et al. 2017, arXiv:1612.00796"
    strength: float = 100.0
    anchors: list[Anchor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        """Check the strength."""
        super().__post_init__()
        self.require("strength", "of 0 or more", self.strength >= 0)

    def finish_(self, model: nn.Module, data: Data = ()) -> None:
        """Measure the Fisher information on the task's data, and anchor the present values."""
        self.anchors.append(measure_fisher(model, data))

    def penalty(self, model: nn.Module, batch: Batch, logits: Mapping[str, Tensor]) -> Tensor:
        """Add up the squares, weighted."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        terms = [
            (anchor.fisher[name] * (trained[name] - value).square()).sum()
            for anchor in self.anchors
            for name, value in anchor.values.items()
            if name in trained
        ]
        if self.anchors and not terms:
            raise StageError(
                "objective 'ewc': expected an anchored parameter that is still in training, got "
                "none. It holds one adapter that learns task after task: call train_only_(model, "
                "name) for that one instead of adding another."
            )
        total = super().penalty(model, batch, logits)
        return total + self.strength / 2 * sum(terms, start=torch.zeros_like(total))


def _samples(data: Data) -> Iterator[tuple[Any, Tensor]]:
    for inputs, targets, *_ in data:
        for index in range(len(targets)):
            yield _at(inputs, index), targets[index : index + 1]


def _at(inputs: Any, index: int) -> Any:
    if isinstance(inputs, Mapping):
        return {key: value[index : index + 1] for key, value in inputs.items()}
    if isinstance(inputs, Sequence):
        return tuple(value[index : index + 1] for value in inputs)
    return inputs[index : index + 1]
