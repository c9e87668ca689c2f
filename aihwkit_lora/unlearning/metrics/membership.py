"""Attacks that ask whether a sample was in the training set, from the model's output alone.

A population attack like these may overestimate the protection (arXiv:2403.01218): finding nothing
proves nothing. :func:`~aihwkit_lora.unlearning.metrics.lira.u_lira` is stronger and needs many
models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aihwkit_lora.unlearning.metrics.checks import finite, predicted_labels, probability_rows

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Membership:
    """What a membership attack found.

    Args:
        value: The metric itself, a fraction; what it means stands with the attack.
        attacker_accuracy: Balanced, cross-validated accuracy of the attacker on what it was trained
            to tell apart; 0.5 is chance, and then ``value`` means nothing.
        auc: Area under the ROC curve of the raw feature for the same pair; 0.5 is chance.
        samples: Of each of the two classes that the attacker was trained on.

    Example:
        >>> Membership(value=0.5, attacker_accuracy=0.5, auc=0.5, samples=100).samples
        100
    """

    value: float
    attacker_accuracy: float
    auc: float
    samples: int


def true_class_confidence(probabilities: Tensor, target: Tensor) -> Tensor:
    """Probability that the model gives to the true class of each sample.

    Args:
        probabilities: Shape ``(N, classes)``.
        target: True labels, shape ``(N,)``.
    Returns:
        Shape ``(N,)``, from 0 to 1.
    Raises:
        DataError: Shapes do not fit, there is no sample, or rows are no probabilities.

    Example:
        >>> true_class_confidence(torch.tensor([[0.25, 0.75]]), torch.tensor([1]))
        tensor([0.7500], dtype=torch.float64)
    """
    rows = probability_rows("probabilities", probabilities)
    predicted_labels(rows, target)
    return rows.gather(1, target[:, None]).squeeze(1)


def svc_membership(
    forget: Tensor, retain: Tensor, test: Tensor, *, seed: int = 0, folds: int = 5
) -> Membership:
    """Share of forgotten samples that an attacker takes for samples never trained on.

    A support vector classifier (RBF kernel, C = 3, gamma = 1) learns to tell retained from test
    samples, as many of each, by the confidence in the true class; ``value`` is the share of
    forgotten samples that it calls "not a member", from 0 to 1. Ideal: the value of a retrained
    model, not 1. Where ``attacker_accuracy`` is near 0.5 the attacker is blind and ``value``
    arbitrary. The result does not depend on the order of samples.

    Source: SalUn, arXiv:2310.12508, ``SVC_MIA`` with its ``confidence`` feature.

    Args:
        forget: Confidences of forgotten samples; see :func:`true_class_confidence`.
        retain: Those of samples that stay in the training set, two or more.
        test: Those of samples never trained on, two or more.
        seed: Of the choice of samples for the larger class, and of the folds.
        folds: Of the cross-validation, at most as many as samples of a class.
    Raises:
        DataError: A group has too few samples, or a confidence is not finite.

    Example:
        >>> member, stranger = torch.linspace(0.8, 1, 50), torch.linspace(0, 0.2, 50)
        >>> found = svc_membership(torch.tensor([0.9, 0.9, 0.1, 0.9]), member, stranger)
        >>> found.value, found.attacker_accuracy, found.auc
        (0.25, 1.0, 1.0)
    """
    from sklearn.svm import SVC

    asked = finite("forget", forget)
    pair = _balanced(finite("retain", retain, at_least=2), finite("test", test, at_least=2), seed)
    features, labels = _stacked(*pair)
    attacker = SVC(C=3.0, kernel="rbf", gamma=1.0)
    accuracy = _cross_validated(attacker, features, labels, seed, folds)
    called = attacker.fit(features, labels).predict(asked.cpu().numpy()[:, None])
    return Membership(
        value=float(np.mean(called == 0)),
        attacker_accuracy=accuracy,
        auc=auc(retain, test),
        samples=len(pair[0]),
    )


def loss_membership(
    forget: Tensor, unseen: Tensor, *, seed: int = 0, folds: int = 10
) -> Membership:
    """Accuracy with which an attacker tells forgotten from unseen samples by their loss.

    Logistic regression on the standardised loss, as many samples of each kind, stratified
    cross-validation. ``value`` is the accuracy, from 0 to 1. Ideal: 0.5. Where classes differ in
    difficulty take unseen samples of the forgotten classes, or compare with a retrained model.
    ``auc`` has a direction: above 0.5 forgotten samples still have the smaller loss, below it their
    loss is conspicuously large.

    Source: SCRUB, arXiv:2302.09880, and the NeurIPS 2023 unlearning challenge, arXiv:2406.09073.

    Args:
        forget: Loss of each forgotten sample, two or more.
        unseen: Loss of each sample that was never trained on, two or more.
        seed: Of the choice of samples for the larger class, and of the folds.
        folds: Of the cross-validation, at most as many as samples of a class.
    Raises:
        DataError: A group has too few samples, or a loss is not finite.

    Example:
        >>> found = loss_membership(torch.linspace(0, 0.1, 40), torch.linspace(1, 2, 50))
        >>> found.value, found.auc, found.samples
        (1.0, 1.0, 40)
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    members = finite("forget", forget, at_least=2)
    strangers = finite("unseen", unseen, at_least=2)
    pair = _balanced(members, strangers, seed)
    # Standardised, so that the penalty on the slope does not hide differences of small losses.
    attacker = make_pipeline(StandardScaler(), LogisticRegression())
    accuracy = _cross_validated(attacker, *_stacked(*pair), seed, folds)
    return Membership(
        value=accuracy,
        attacker_accuracy=accuracy,
        auc=auc(-members, -strangers),
        samples=len(pair[0]),
    )


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties by half.

    From 0 to 1, 0.5 is chance. Source: Hanley and McNeil 1982, Radiology 143(1) (it is the
    Mann–Whitney statistic).

    Args:
        positive: Scores, shape ``(N,)``.
        negative: Scores, shape ``(M,)``.
    Raises:
        DataError: One of them is empty, or a score is not finite.

    Example:
        >>> auc(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0]))
        0.875
    """
    scores, others = finite("positive", positive), finite("negative", negative).sort().values
    below = torch.searchsorted(others, scores, right=False)
    up_to = torch.searchsorted(others, scores, right=True)
    return float((below + up_to).sum()) / (2 * len(scores) * len(others))


def _balanced(members: Tensor, strangers: Tensor, seed: int) -> tuple[Floats, Floats]:
    """As many of both, drawn from sorted values so that the order of samples does not matter."""
    size, generator = min(len(members), len(strangers)), np.random.default_rng(seed)
    drawn = [
        generator.permutation(np.sort(group.cpu().numpy()))[:size] for group in (members, strangers)
    ]
    return drawn[0], drawn[1]


def _stacked(members: Floats, strangers: Floats) -> tuple[Floats, NDArray[np.int64]]:
    features = np.concatenate([members, strangers])[:, None]
    return features, np.repeat(np.array([1, 0], dtype=np.int64), len(members))


def _cross_validated(
    attacker: Any, features: Floats, labels: NDArray[np.int64], seed: int, folds: int
) -> float:
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    splits = min(folds, len(labels) // 2)
    plan = StratifiedKFold(splits, shuffle=True, random_state=seed)
    scores = cross_val_score(attacker, features, labels, cv=plan, scoring="balanced_accuracy")
    return float(scores.mean())
