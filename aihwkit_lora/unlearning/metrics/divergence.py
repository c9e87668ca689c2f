"""How far a model's outputs are from those of a model retrained without the forgotten data.

All take probabilities of the same samples in the same order, shape ``(N, classes)``, and use the
natural logarithm. Two models retrained from different seeds differ too, so what counts is the
distance beyond :func:`divergence_floor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from aihwkit_lora.errors import DataError
from aihwkit_lora.unlearning.metrics.checks import predicted_labels, probability_rows, same_shape

PerSample = Callable[[Tensor, Tensor], Tensor]
"""From probabilities of two models to one number for each sample."""


def _checked(unlearned: Tensor, retrained: Tensor) -> tuple[Tensor, Tensor]:
    same_shape(("unlearned", unlearned), ("retrained", retrained))
    return probability_rows("unlearned", unlearned), probability_rows("retrained", retrained)


def _kl_rows(p: Tensor, q: Tensor) -> Tensor:
    # xlogy has 0 log 0 = 0; clamped because rounding can leave -1e-17.
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(dim=1).clamp(min=0.0)


def kl_per_sample(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Kullback–Leibler divergence of each sample, shape ``(N,)``; see :func:`kl_divergence`.

    Raises:
        DataError: Shapes differ, there is no sample, or rows are no probabilities.

    Example:
        >>> p = torch.tensor([[0.5, 0.5]])
        >>> kl_per_sample(p, p)
        tensor([0.], dtype=torch.float64)
    """
    return _kl_rows(*_checked(unlearned, retrained))


def js_per_sample(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Jensen–Shannon divergence of each sample, shape ``(N,)``; see :func:`js_divergence`.

    Raises:
        DataError: Shapes differ, there is no sample, or rows are no probabilities.

    Example:
        >>> js_per_sample(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([0.6931], dtype=torch.float64)
    """
    p, q = _checked(unlearned, retrained)
    middle = (p + q) / 2
    return (_kl_rows(p, middle) + _kl_rows(q, middle)) / 2


def distance_per_sample(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Euclidean distance of each sample, shape ``(N,)``; see :func:`activation_distance`.

    Raises:
        DataError: Shapes differ, there is no sample, or rows are no probabilities.

    Example:
        >>> distance_per_sample(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([1.4142], dtype=torch.float64)
    """
    p, q = _checked(unlearned, retrained)
    distances: Tensor = torch.linalg.vector_norm(p - q, dim=1)
    return distances


def kl_divergence(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Mean Kullback–Leibler divergence of the unlearned from the retrained model.

    ``KL = mean over x of sum_c p_U(c|x) ln(p_U(c|x) / p_R(c|x))``, 0 or more, in nats; infinite
    where the retrained model excludes a class that the unlearned one does not. Ideal: its value
    between two retrained models. Source: survey arXiv:2209.02299.

    Args:
        unlearned: Probabilities, shape ``(N, classes)``.
        retrained: Probabilities of the same samples.
    Raises:
        DataError: Shapes differ, there is no sample, or rows are no probabilities.

    Example:
        >>> kl_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
        tensor(0.6931, dtype=torch.float64)
    """
    return kl_per_sample(unlearned, retrained).mean()


def js_divergence(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Mean Jensen–Shannon divergence between unlearned and retrained model.

    ``JS = mean over x of (KL(p_U, m) + KL(p_R, m)) / 2`` with ``m = (p_U + p_R) / 2``, from 0 to
    ``ln 2 = 0.6931`` nats, symmetric. Ideal: :func:`divergence_floor`, not 0. Report it on
    forgotten and on retained samples. Source: survey arXiv:2209.02299; Lin 1991, IEEE T-IT 37(1).

    Args:
        unlearned: Probabilities, shape ``(N, classes)``.
        retrained: Probabilities of the same samples.
    Raises:
        DataError: Shapes differ, there is no sample, or rows are no probabilities.

    Example:
        >>> js_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(0.6931, dtype=torch.float64)
    """
    return js_per_sample(unlearned, retrained).mean()


def divergence_floor(retrained: Sequence[Tensor]) -> Tensor:
    """Jensen–Shannon divergence that retrained models have among themselves.

    Mean of :func:`js_divergence` over all pairs of models, from 0 to ``ln 2``. No method can be
    expected to come closer to a retrained model than another retrained model does.

    Args:
        retrained: Probabilities of two models or more that differ in their seed, each of shape
            ``(N, classes)``, for the same samples.
    Raises:
        DataError: There are fewer than two models, shapes differ, there is no sample, or rows are
            no probabilities.

    Example:
        >>> one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> divergence_floor([one, one, other])  # two of the three pairs differ
        tensor(0.4621, dtype=torch.float64)
    """
    if len(retrained) < 2:
        raise DataError(
            "divergence_floor: expected probabilities of two retrained models or more, got "
            f"{len(retrained)}. Retrain with another seed."
        )
    return torch.stack([js_divergence(p, q) for p, q in combinations(retrained, 2)]).mean()


def activation_distance(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Mean Euclidean distance between the output probabilities of both models.

    ``mean over x of ||p_U(x) - p_R(x)||_2``, from 0 to ``sqrt(2)``. Ideal: its value between two
    retrained models. Source: survey arXiv:2209.02299.

    Args:
        unlearned: Probabilities, shape ``(N, classes)``.
        retrained: Probabilities of the same samples.
    Raises:
        DataError: Shapes differ, there is no sample, or rows are no probabilities.

    Example:
        >>> activation_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.4, 0.6]]))
        tensor(0.8485, dtype=torch.float64)
    """
    return distance_per_sample(unlearned, retrained).mean()


def completeness(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Overlap of the labels that both models predict.

    Jaccard index of the two sets of (sample, predicted label): with ``a`` agreements among ``N``
    samples, ``a / (2 N - a)``, from 0 to 1. Ideal: its value between two retrained models, at most
    1. Source: survey arXiv:2209.02299; Cao and Yang 2015, IEEE S&P.

    Args:
        unlearned: Scores ``(N, classes)`` or labels ``(N,)``.
        retrained: The same of the retrained model.
    Raises:
        DataError: Shapes do not fit, or there is no sample.

    Example:
        >>> completeness(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
        tensor(0.5000, dtype=torch.float64)
    """
    return jaccard(count_agreements(unlearned, retrained))


def count_agreements(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Count samples that both models label alike, and all samples, as integers ``(2,)``.

    Raises:
        DataError: Shapes do not fit, or there is no sample.

    Example:
        >>> count_agreements(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
        tensor([2, 3])
    """
    theirs = retrained.argmax(dim=1) if retrained.ndim == 2 else retrained
    agree = predicted_labels(unlearned, theirs) == theirs
    return torch.stack([agree.sum(), torch.tensor(len(agree), device=agree.device)])


def jaccard(counts: Tensor) -> Tensor:
    """Jaccard index from agreements and samples.

    Args:
        counts: What :func:`count_agreements` returns, or a sum of such.

    Example:
        >>> jaccard(torch.tensor([2, 3]))
        tensor(0.5000, dtype=torch.float64)
    """
    agreements, samples = counts.double().unbind()
    return agreements / (2 * samples - agreements)


def zrf(unlearned: Tensor, random_teacher: Tensor) -> Tensor:
    """Zero-retrain forgetting: how much forgotten samples look new to the model.

    ``ZRF = 1 - mean over x_f of JS(p_U(x_f), p_random(x_f))`` against a randomly initialised
    network of the same shape, from ``1 - ln 2 = 0.307`` to 1. Ideal: what a retrained model has,
    neither the least nor 1. Source: Chundawat et al., arXiv:2205.08096.

    Args:
        unlearned: Probabilities of forgotten samples, shape ``(N, classes)``.
        random_teacher: Those of the randomly initialised network.
    Raises:
        DataError: Shapes differ, there is no sample, or rows are no probabilities.

    Example:
        >>> sure, random = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
        >>> zrf(sure, random) < zrf(random, random)
        tensor(True)
    """
    value: Tensor = 1.0 - js_per_sample(unlearned, random_teacher).mean()
    return value
