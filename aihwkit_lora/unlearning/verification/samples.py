"""The sets that a verification looks at, and what a model says about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aihwkit_lora.errors import DataError
from aihwkit_lora.unlearning.metrics.evaluation import Batch, evaluating, logits_of
from aihwkit_lora.unlearning.metrics.membership import true_class_confidence

Data = tuple[Any, Tensor] | Iterable[tuple[Any, Tensor]]
"""Inputs and labels, or batches of them, as a ``DataLoader`` gives."""


def batches_of(name: str, data: Data) -> tuple[Batch, ...]:
    """Take one batch, or several.

    Args:
        name: Of the set, for the error message.
        data: Inputs and labels, or batches of them.
    Raises:
        DataError: There is no sample, or something is no pair of inputs and labels.

    Example:
        >>> len(batches_of("forget", (torch.zeros(2, 3), torch.tensor([0, 1]))))
        1
    """
    single = isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)
    batches = (data,) if single else tuple(data)
    for batch in batches:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not pair or not isinstance(batch[1], Tensor) or batch[1].ndim != 1:
            raise DataError(
                f"{name}: expected inputs and labels, (x, y) with y of shape (n,), or batches of "
                f"them, got {type(batch).__name__}."
            )
    if not sum(len(batch[1]) for batch in batches):
        raise DataError(f"{name}: expected one sample or more, got none.")
    return batches


def joined(batches: Sequence[Batch]) -> Batch:
    """Make one batch of several.

    Args:
        batches: Inputs and labels; inputs are tensors, tuples or dicts of tensors.

    Example:
        >>> pair = (torch.zeros(2, 3), torch.tensor([0, 1]))
        >>> joined([pair, pair])[0].shape
        torch.Size([4, 3])
    """
    inputs = [batch[0] for batch in batches]
    labels = torch.cat([batch[1] for batch in batches])
    first = inputs[0]
    if isinstance(first, Mapping):
        return {key: torch.cat([each[key] for each in inputs]) for key in first}, labels
    if isinstance(first, tuple):
        return tuple(torch.cat(parts) for parts in zip(*inputs, strict=True)), labels
    return torch.cat(inputs), labels


def chosen(batch: Batch, which: Tensor) -> Batch:
    """Take some samples of a batch.

    Args:
        batch: Inputs and labels.
        which: Their indices.

    Example:
        >>> chosen((torch.eye(3), torch.arange(3)), torch.tensor([2]))[1]
        tensor([2])
    """
    inputs, labels = batch
    if isinstance(inputs, Mapping):
        return {key: value[which] for key, value in inputs.items()}, labels[which]
    if isinstance(inputs, tuple):
        return tuple(part[which] for part in inputs), labels[which]
    return inputs[which], labels[which]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says about the samples of a set.

    Args:
        logits: Shape ``(n, classes)``.
        labels: True ones, shape ``(n,)``.

    Example:
        >>> answers = Answers(torch.eye(2), torch.tensor([0, 0]))
        >>> answers.accuracy
        0.5
    """

    logits: Tensor
    labels: Tensor

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch], seed: int) -> Answers:
        """Ask a model in evaluation mode.

        Args:
            model: Gives logits.
            batches: Inputs and labels.
            seed: Of read noise.
        """
        with evaluating(model, seed=seed):
            logits = [logits_of(model, inputs).detach().cpu() for inputs, _ in batches]
        return cls(torch.cat(logits), torch.cat([labels.cpu() for _, labels in batches]))

    @cached_property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, double precision."""
        return self.logits.double().softmax(dim=1)

    @cached_property
    def right(self) -> Tensor:
        """Whether each label is right, as 0 or 1 in double precision."""
        return (self.logits.argmax(dim=1) == self.labels).double()

    @property
    def accuracy(self) -> float:
        """Share of right labels."""
        return float(self.right.mean())

    @property
    def confidence(self) -> Tensor:
        """Probability of each true label."""
        return true_class_confidence(self.probabilities, self.labels)

    @property
    def losses(self) -> Tensor:
        """Cross-entropy of each sample."""
        return F.cross_entropy(self.logits.double(), self.labels, reduction="none")
