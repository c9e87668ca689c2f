"""Attacks as metrics that go over batches and processes.

They keep every value, because an attacker sees all of them at once. As long as a group has too few
samples for the attack the result is NaN; the functions of the same names raise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from aihwkit_lora.errors import DataError
from aihwkit_lora.unlearning.metrics.checks import finite, same_shape
from aihwkit_lora.unlearning.metrics.lira import u_lira
from aihwkit_lora.unlearning.metrics.membership import Membership, loss_membership, svc_membership
from aihwkit_lora.unlearning.metrics.modular import group_index
from aihwkit_lora.unlearning.metrics.probe import linear_probe


class _Collected(Metric):
    """Values by name, kept flat and in double precision.

    A process that has seen nothing contributes an empty vector of the metric's own type, which
    torchmetrics 1.9 can only join with vectors of that type.
    """

    full_state_update = False
    is_differentiable = False
    kept: ClassVar[tuple[str, ...]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.kept:
            self.add_state(name, [], dist_reduce_fx="cat")
        self.set_dtype(torch.float64)

    def keep(self, name: str, values: Tensor) -> None:
        getattr(self, name).append(values.detach().double().flatten().to(self.device))

    def all_of(self, name: str) -> Tensor:
        values = getattr(self, name)
        if isinstance(values, list) and not values:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        joined: Tensor = dim_zero_cat(values)
        return joined

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)


class _MembershipMetric(_Collected):
    """A membership attack on one number for each sample."""

    at_least: ClassVar[dict[str, int]]
    prefix: ClassVar[str]
    attack: ClassVar[staticmethod[..., Membership]]

    def __init__(self, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed

    def update(self, values: Tensor, *, group: str) -> None:
        """Add samples of one group.

        Args:
            values: The feature of each sample, shape ``(N,)``.
            group: Which group they belong to.
        Raises:
            ConfigurationError: There is no such group.
            DataError: There is no sample, or a value is not finite.
        """
        group_index(group, self.kept)
        self.keep(group, finite(group, values))

    def compute(self) -> dict[str, Tensor]:
        """What the attack finds in all samples so far."""
        groups = {name: self.all_of(name) for name in self.kept}
        enough = all(len(groups[name]) >= least for name, least in self.at_least.items())
        found = self.attack(**groups, seed=self.seed) if enough else _NOTHING
        return {
            self.prefix: self.number(found.value),
            f"{self.prefix}_attacker_accuracy": self.number(found.attacker_accuracy),
            f"{self.prefix}_auc": self.number(found.auc),
        }


_NOTHING = Membership(value=math.nan, attacker_accuracy=math.nan, auc=math.nan, samples=0)


class SvcMembership(_MembershipMetric):
    """SalUn's attack on the confidence; see :func:`membership.svc_membership`.

    ``update(confidence, group=...)`` with ``"forget"``, ``"retain"`` and ``"test"``; ``compute``
    gives ``svc_membership`` (share of forgotten samples called strangers, ideal: that of a
    retrained model), ``svc_membership_attacker_accuracy`` and ``svc_membership_auc``. Source:
    SalUn, arXiv:2310.12508.

    Args:
        seed: Of the balanced choice and the folds.
        **kwargs: Of ``torchmetrics.Metric``.

    Example:
        >>> metric = SvcMembership()
        >>> metric.update(torch.linspace(0.8, 1, 20), group="retain")
        >>> metric.update(torch.linspace(0, 0.2, 20), group="test")
        >>> metric.update(torch.tensor([0.9, 0.1]), group="forget")
        >>> float(metric.compute()["svc_membership"])
        0.5
    """

    kept = ("forget", "retain", "test")
    at_least: ClassVar[dict[str, int]] = {"forget": 1, "retain": 2, "test": 2}
    prefix = "svc_membership"
    attack = staticmethod(svc_membership)


class LossMembership(_MembershipMetric):
    """Attack on the loss; see :func:`membership.loss_membership`.

    ``update(losses, group=...)`` with ``"forget"`` and ``"unseen"``; ``compute`` gives
    ``loss_membership`` (accuracy, ideal 0.5), ``loss_membership_attacker_accuracy`` (the same) and
    ``loss_membership_auc``. Source: SCRUB, arXiv:2302.09880.

    Args:
        seed: Of the balanced choice and the folds.
        **kwargs: Of ``torchmetrics.Metric``.

    Example:
        >>> metric = LossMembership()
        >>> metric.update(torch.linspace(0, 0.1, 20), group="forget")
        >>> metric.update(torch.linspace(1, 2, 20), group="unseen")
        >>> float(metric.compute()["loss_membership"])
        1.0
    """

    kept = ("forget", "unseen")
    at_least: ClassVar[dict[str, int]] = {"forget": 2, "unseen": 2}
    prefix = "loss_membership"
    attack = staticmethod(loss_membership)


class ULira(_Collected):
    """Likelihood-ratio attack with many models; see :func:`lira.u_lira`.

    ``compute`` gives ``u_lira_accuracy`` and ``u_lira_auc`` (ideal 0.5), and for each
    false-positive rate ``u_lira_tpr_at_<rate>`` (ideal: the rate). Source: U-LiRA,
    arXiv:2403.01218.

    Args:
        models: How many unlearned models there are, and how many retrained ones; 3 or more.
        false_positive_rates: At which to report the true-positive rate, each from 0 to 1.
        shared_variance: Use one variance for all samples, the better choice for a few models.
        **kwargs: Of ``torchmetrics.Metric``.

    Example:
        >>> metric, never = ULira(models=3), torch.tensor([[0.0], [1.0], [2.0]])
        >>> metric.update(never + 99, never)
        >>> float(metric.compute()["u_lira_accuracy"])
        1.0
    """

    kept = ("unlearned", "retrained")

    def __init__(
        self,
        models: int,
        *,
        false_positive_rates: Sequence[float] = (0.01,),
        shared_variance: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.models = models
        self.false_positive_rates = tuple(false_positive_rates)
        self.shared_variance = shared_variance

    def update(self, unlearned: Tensor, retrained: Tensor) -> None:
        """Add samples.

        Args:
            unlearned: ``phi`` of :func:`lira.scaled_confidence`, shape ``(models, N)``.
            retrained: The same of models that never saw the samples.
        Raises:
            DataError: Shapes do not fit, or a value is not finite.
        """
        same_shape(("unlearned", unlearned), ("retrained", retrained))
        if len(unlearned) != self.models:
            raise DataError(
                f"unlearned: expected {self.models} models, shape ({self.models}, N), got "
                f"{tuple(unlearned.shape)}. Pass models= when the metric is made."
            )
        # Sample by sample, so that batches follow each other in one flat vector.
        self.keep("unlearned", finite("unlearned", unlearned, dimensions=2).T)
        self.keep("retrained", finite("retrained", retrained, dimensions=2).T)

    def compute(self) -> dict[str, Tensor]:
        """What the attack finds in all samples so far."""
        seen, new = (self.all_of(name).reshape(-1, self.models).T for name in self.kept)
        rates = self.false_positive_rates
        if not seen.numel():
            names = ["accuracy", "auc", *(f"tpr_at_{rate}" for rate in rates)]
            return {f"u_lira_{name}": self.number(math.nan) for name in names}
        found = u_lira(seen, new, false_positive_rates=rates, shared_variance=self.shared_variance)
        at = {f"u_lira_tpr_at_{rate}": self.number(tpr) for rate, tpr in found.tpr_at_fpr.items()}
        accuracy, area = self.number(found.accuracy), self.number(found.auc)
        return {"u_lira_accuracy": accuracy, "u_lira_auc": area, **at}


class LinearProbe(_Collected):
    """Accuracy of a linear classifier on hidden features; see :func:`probe.linear_probe`.

    From 0 to 1; ideal: that of a retrained model. NaN until there are training samples of two
    classes, and test samples. Source: arXiv:2604.08271.

    Example:
        >>> metric, features = LinearProbe(), torch.tensor([[0.0], [0.1], [1.0], [1.1]])
        >>> metric.update(features, torch.tensor([0, 0, 1, 1]), group="train")
        >>> metric.update(features, torch.tensor([0, 0, 1, 1]), group="test")
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = None
    kept = ("train_features", "train_labels", "test_features", "test_labels")

    def update(self, features: Tensor, labels: Tensor, *, group: str) -> None:
        """Add samples.

        Args:
            features: Shape ``(N, features)``; see :func:`probe.collect_features`.
            labels: Shape ``(N,)``.
            group: ``"train"`` or ``"test"``.
        Raises:
            ConfigurationError: There is no such group.
            DataError: Shapes do not fit, or a feature is not finite.
        """
        group_index(group, ("train", "test"))
        rows = finite("features", features, dimensions=2)
        same_shape(("features", rows[:, 0]), ("labels", labels))
        self.keep(f"{group}_features", rows)
        self.keep(f"{group}_labels", labels)

    def compute(self) -> Tensor:
        """Accuracy of a probe trained on all samples so far."""
        values = {name: self.all_of(name) for name in self.kept}
        if len(values["train_labels"].unique()) < 2 or not len(values["test_labels"]):
            return self.number(math.nan)
        for group in ("train", "test"):
            rows = len(values[f"{group}_labels"])
            values[f"{group}_features"] = values[f"{group}_features"].reshape(rows, -1)
        return self.number(linear_probe(**values))
