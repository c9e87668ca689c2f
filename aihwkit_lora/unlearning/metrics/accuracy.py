"""Accuracy on what is forgotten and on what is kept, and how far both are from a retrained model.

A *retrained* model has been trained from scratch without the forgotten data. What it does is the
ideal value, which is why the accuracies themselves say little.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.unlearning.metrics.checks import predicted_labels

GROUPS = ("forget", "retain", "test")
"""The three sets of Tug-of-War."""


def forget_retain_accuracy(
    predictions: Tensor,
    target: Tensor,
    *,
    forgotten: Collection[int] = (),
    forget: Tensor | None = None,
) -> dict[str, Tensor]:
    """Accuracy on forgotten and on retained samples.

    ``A(S) = #{i in S: predicted label = true label} / #S``, each from 0 to 1. Ideal: that of a
    retrained model; with whole classes forgotten that is 0 for ``forget_accuracy``, with random
    samples about the accuracy on the test set. A group without samples is absent, not zero.

    Source: SalUn, arXiv:2310.12508 (its UA is ``1 - forget_accuracy``).

    Args:
        predictions: Scores, shape ``(N, classes)``, or labels, shape ``(N,)``.
        target: True labels, shape ``(N,)``.
        forgotten: Classes that are forgotten, or
        forget: which samples are, booleans of shape ``(N,)``.
    Returns:
        ``forget_accuracy`` and ``retain_accuracy``, in double precision.
    Raises:
        ConfigurationError: Both or neither of ``forgotten`` and ``forget`` are given.
        DataError: Shapes do not fit, or there is no sample.

    Example:
        >>> labels, target = torch.tensor([2, 0, 1, 0]), torch.tensor([2, 2, 1, 0])
        >>> accuracy = forget_retain_accuracy(labels, target, forgotten=[2])
        >>> {name: float(value) for name, value in accuracy.items()}
        {'forget_accuracy': 0.5, 'retain_accuracy': 1.0}
    """
    return group_accuracies(count_groups(predictions, target, forgotten, forget))


def count_groups(
    predictions: Tensor, target: Tensor, forgotten: Collection[int], forget: Tensor | None
) -> Tensor:
    """Count right answers and samples; arguments as in :func:`forget_retain_accuracy`.

    Returns:
        Integers, shape ``(2, 2)``: forgotten and retained samples, by right answers and all.
    Raises:
        ConfigurationError: Both or neither of ``forgotten`` and ``forget`` are given.
        DataError: Shapes do not fit, or there is no sample.

    Example:
        >>> count_groups(torch.tensor([2, 0, 1]), torch.tensor([2, 2, 1]), [2], None)
        tensor([[1, 2],
                [1, 1]])
    """
    right = predicted_labels(predictions, target) == target
    mask = _forget_mask(target, forgotten, forget)
    groups = torch.stack([mask, ~mask]).to(right.device)
    return torch.stack([(groups & right).sum(dim=1), groups.sum(dim=1)], dim=1)


def _forget_mask(target: Tensor, forgotten: Collection[int], forget: Tensor | None) -> Tensor:
    if (len(forgotten) > 0) == (forget is not None):
        raise ConfigurationError(
            "forget_retain_accuracy: expected either the forgotten classes or a mask of forgotten "
            f"samples, got forgotten={list(forgotten)} and "
            f"{'no mask' if forget is None else 'a mask'}. Pass forgotten= or forget=."
        )
    if forget is None:
        return torch.isin(target, torch.tensor(list(forgotten), device=target.device))
    if forget.shape != target.shape or forget.dtype != torch.bool:
        raise DataError(
            f"forget: expected booleans of shape {tuple(target.shape)}, got {forget.dtype} of "
            f"shape {tuple(forget.shape)}."
        )
    return forget


def group_accuracies(counts: Tensor) -> dict[str, Tensor]:
    """Divide right answers by samples, for each group that has any.

    Args:
        counts: What :func:`count_groups` returns, or a sum of such.

    Example:
        >>> group_accuracies(torch.tensor([[0, 0], [3, 4]]))
        {'retain_accuracy': tensor(0.7500, dtype=torch.float64)}
    """
    # Integers divide in single precision, which counts above 2^24 would not survive.
    right, samples = counts.double().unbind(dim=1)
    return {
        f"{group}_accuracy": right[row] / samples[row]
        for row, group in enumerate(GROUPS[:2])
        if samples[row] > 0
    }


def accuracy_gap(
    unlearned: Mapping[str, float], retrained: Mapping[str, float]
) -> dict[str, float]:
    """Signed distance of each value from the retrained model's.

    ``gap = value(unlearned) - value(retrained)``, from -1 to 1 for accuracies. Ideal: 0. A positive
    gap on the forget set means that something is still known, a negative one that too much was
    changed.

    Source: "gap to Retrain" of SalUn, arXiv:2310.12508.

    Args:
        unlearned: Values by name.
        retrained: Values of the same names; others do not matter.
    Returns:
        Gaps, by name with ``_gap`` appended.
    Raises:
        DataError: There is no value, or the retrained model lacks one.

    Example:
        >>> accuracy_gap({"forget_accuracy": 0.25}, {"forget_accuracy": 0.0})
        {'forget_accuracy_gap': 0.25}
    """
    missing = sorted(set(unlearned) - set(retrained))
    if missing or not unlearned:
        raise DataError(
            "accuracy_gap: expected values, each also of the retrained model, got "
            f"{sorted(unlearned)} and lack {missing}. Evaluate both models on the same sets."
        )
    return {f"{name}_gap": float(unlearned[name]) - float(retrained[name]) for name in unlearned}


def average_gap(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Mean distance from the retrained model over all values, regardless of sign.

    ``mean |value(unlearned) - value(retrained)|``, 0 or more. Ideal: 0. Source: "Avg. Gap" of
    SalUn, arXiv:2310.12508, there over UA, RA, TA and membership inference, in per cent.

    Args:
        unlearned: Values by name.
        retrained: Values of the same names; others do not matter.
    Raises:
        DataError: There is no value, or the retrained model lacks one.

    Example:
        >>> average_gap({"forget": 0.25, "retain": 0.5}, {"forget": 0.0, "retain": 0.75})
        0.25
    """
    gaps = accuracy_gap(unlearned, retrained).values()
    return sum(abs(gap) for gap in gaps) / len(gaps)


def tug_of_war(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Closeness to the retrained model on what is forgotten, retained and new, in one number.

    ``ToW = prod over S in {forget, retain, test} of (1 - |A_U(S) - A_R(S)|)``, from 0 to 1. Ideal:
    1; compare with what a second retrained model reaches. It looks at outputs only: a branch on the
    last layer alone can score highest with all features intact.

    Source: RUM, arXiv:2406.01257.

    Args:
        unlearned: ``forget_accuracy``, ``retain_accuracy`` and ``test_accuracy``, fractions.
        retrained: The same three of the retrained model.
    Raises:
        DataError: One of the six is missing or no fraction.

    Example:
        >>> retrained = {"forget_accuracy": 0.0, "retain_accuracy": 1.0, "test_accuracy": 0.75}
        >>> tug_of_war(retrained | {"forget_accuracy": 0.5}, retrained)
        0.5
    """
    pairs = [(_fraction(unlearned, group), _fraction(retrained, group)) for group in GROUPS]
    return math.prod(1.0 - abs(ours - theirs) for ours, theirs in pairs)


def _fraction(accuracies: Mapping[str, float], group: str) -> float:
    key = f"{group}_accuracy"
    value = float(accuracies.get(key, math.nan))
    if not 0.0 <= value <= 1.0:
        raise DataError(
            f"tug_of_war: expected '{key}' as a fraction from 0 to 1, got "
            f"{accuracies.get(key, 'nothing')}. Evaluate both models on all three sets."
        )
    return value


def count_tug_of_war(unlearned: Tensor, retrained: Tensor, target: Tensor) -> Tensor:
    """Count what both models get right on some samples of one set.

    Args:
        unlearned: Scores ``(N, classes)`` or labels ``(N,)`` of the unlearned model.
        retrained: Those of the retrained model.
        target: True labels, shape ``(N,)``.
    Returns:
        Integers, shape ``(3,)``: right by the unlearned model, by the retrained one, and samples.
    Raises:
        DataError: Shapes do not fit, or there is no sample.

    Example:
        >>> target = torch.tensor([0, 1])
        >>> count_tug_of_war(torch.tensor([0, 0]), torch.tensor([0, 1]), target)
        tensor([1, 2, 2])
    """
    right = [(predicted_labels(p, target) == target).sum() for p in (unlearned, retrained)]
    return torch.stack([*right, torch.tensor(len(target), device=right[0].device)])
