"""Accuracies and divergences as metrics that go over batches and processes.

Each keeps exact counts, or a sum in double precision, and calls the function of the same name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.unlearning.metrics import accuracy, divergence


class ForgetRetainAccuracy(Metric):
    """Accuracy on forgotten and on retained samples; see :func:`accuracy.forget_retain_accuracy`.

    ``compute`` gives ``forget_accuracy`` and ``retain_accuracy``; a group without samples is
    absent. Ideal: that of a retrained model. Source: SalUn, arXiv:2310.12508.

    Args:
        forgotten: Classes that are forgotten; empty if each update brings a mask.
        **kwargs: Of ``torchmetrics.Metric``.

    Example:
        >>> metric = ForgetRetainAccuracy(forgotten=[2])
        >>> metric.update(torch.tensor([2, 0, 1, 0]), torch.tensor([2, 2, 1, 0]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'forget_accuracy': 0.5, 'retain_accuracy': 1.0}
    """

    full_state_update = False
    is_differentiable = False
    counts: Tensor

    def __init__(self, forgotten: Collection[int] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.forgotten = tuple(forgotten)
        self.add_state("counts", torch.zeros(2, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, forget: Tensor | None = None) -> None:
        """Add samples.

        Args:
            preds: Scores, shape ``(N, classes)``, or labels, shape ``(N,)``.
            target: True labels, shape ``(N,)``.
            forget: Which samples are forgotten, if no classes are; booleans of shape ``(N,)``.
        Raises:
            ConfigurationError: Both or neither of classes and mask are given.
            DataError: Shapes do not fit, or there is no sample.
        """
        self.counts = self.counts + accuracy.count_groups(preds, target, self.forgotten, forget)

    def compute(self) -> dict[str, Tensor]:
        """Accuracies so far, by name."""
        return accuracy.group_accuracies(self.counts)


class TugOfWar(Metric):
    """Closeness to the retrained model in one number; see :func:`accuracy.tug_of_war`.

    From 0 to 1, ideal 1; NaN until each of the three sets has samples. Source: RUM,
    arXiv:2406.01257.

    Example:
        >>> metric, target = TugOfWar(), torch.tensor([0, 1])
        >>> for group in ("retain", "test"):
        ...     metric.update(target, target, target, group=group)
        >>> metric.update(torch.tensor([0, 0]), torch.tensor([1, 0]), target, group="forget")
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(3, 3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, unlearned: Tensor, retrained: Tensor, target: Tensor, *, group: str) -> None:
        """Add samples of one set.

        Args:
            unlearned: Scores ``(N, classes)`` or labels ``(N,)`` of the unlearned model.
            retrained: Those of the retrained model.
            target: True labels, shape ``(N,)``.
            group: ``"forget"``, ``"retain"`` or ``"test"``.
        Raises:
            ConfigurationError: There is no such group.
            DataError: Shapes do not fit, or there is no sample.
        """
        row = group_index(group, accuracy.GROUPS)
        added = torch.zeros_like(self.counts)
        added[row] = accuracy.count_tug_of_war(unlearned, retrained, target)
        self.counts = self.counts + added

    def compute(self) -> Tensor:
        """Tug-of-War so far."""
        ours, theirs, samples = self.counts.double().unbind(dim=1)
        product: Tensor = (1.0 - (ours / samples - theirs / samples).abs()).prod()
        return product


def group_index(group: str, groups: tuple[str, ...]) -> int:
    """Position of a group among those that a metric knows.

    Args:
        group: Its name.
        groups: All names.
    Raises:
        ConfigurationError: There is no such group.

    Example:
        >>> group_index("retain", ("forget", "retain"))
        1
    """
    if group not in groups:
        raise ConfigurationError(f"group: expected one of {', '.join(groups)}, got '{group}'.")
    return groups.index(group)


class _MeanOfSamples(Metric):
    """Mean over samples of something that compares two models."""

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = False
    per_sample: ClassVar[staticmethod[[Tensor, Tensor], Tensor]]
    total: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, unlearned: Tensor, retrained: Tensor) -> None:
        """Add samples.

        Args:
            unlearned: Probabilities, shape ``(N, classes)``.
            retrained: Probabilities of the same samples by the model to compare with.
        Raises:
            DataError: Shapes differ, there is no sample, or rows are no probabilities.
        """
        values = self.per_sample(unlearned, retrained)
        self.total = self.total + values.sum()
        self.samples = self.samples + len(values)

    def compute(self) -> Tensor:
        """Mean so far."""
        mean: Tensor = self.total / self.samples
        return mean


class JsToRetrained(_MeanOfSamples):
    """Jensen–Shannon divergence to a retrained model; see :func:`divergence.js_divergence`.

    From 0 to ``ln 2``; ideal: the floor among retrained models. Source: survey arXiv:2209.02299.

    Example:
        >>> metric = JsToRetrained()
        >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    per_sample = staticmethod(divergence.js_per_sample)


class KlToRetrained(_MeanOfSamples):
    """Kullback–Leibler divergence from a retrained model; see :func:`divergence.kl_divergence`.

    0 or more; ideal: its value between two retrained models. Source: survey arXiv:2209.02299.

    Example:
        >>> metric = KlToRetrained()
        >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    per_sample = staticmethod(divergence.kl_per_sample)


class ActivationDistance(_MeanOfSamples):
    """Distance of probabilities to a retrained model; see :func:`divergence.activation_distance`.

    From 0 to ``sqrt(2)``; ideal: its value between two retrained models. Source: survey
    arXiv:2209.02299.

    Example:
        >>> metric = ActivationDistance()
        >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.4, 0.6]]))
        >>> metric.compute()
        tensor(0.8485, dtype=torch.float64)
    """

    per_sample = staticmethod(divergence.distance_per_sample)


class ZeroRetrainForgetting(_MeanOfSamples):
    """Likeness to a randomly initialised network on forgotten samples; see :func:`divergence.zrf`.

    From ``1 - ln 2`` to 1; ideal: what a retrained model has. Its second argument of ``update`` are
    the probabilities of the random network. Source: arXiv:2205.08096.

    Example:
        >>> metric = ZeroRetrainForgetting()
        >>> metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.5]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = None
    per_sample = staticmethod(divergence.js_per_sample)

    def compute(self) -> Tensor:
        """Value so far."""
        return 1.0 - super().compute()


class Completeness(Metric):
    """Overlap of predicted labels with a retrained model; see :func:`divergence.completeness`.

    From 0 to 1; ideal: its value between two retrained models. Source: survey arXiv:2209.02299.

    Example:
        >>> metric = Completeness()
        >>> metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, unlearned: Tensor, retrained: Tensor) -> None:
        """Add samples.

        Args:
            unlearned: Scores ``(N, classes)`` or labels ``(N,)``.
            retrained: The same of the retrained model.
        Raises:
            DataError: Shapes do not fit, or there is no sample.
        """
        self.counts = self.counts + divergence.count_agreements(unlearned, retrained)

    def compute(self) -> Tensor:
        """Overlap so far."""
        return divergence.jaccard(self.counts)
