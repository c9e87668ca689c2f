"""U-LiRA: a membership attack with one likelihood-ratio test for each sample.

It needs many models and so small networks: as many that learnt a sample and then unlearned it as
models that never saw it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.unlearning.metrics.checks import finite, predicted_labels, same_shape
from aihwkit_lora.unlearning.metrics.membership import auc

# Models that agree to a millionth in the logit give no information on their spread.
_SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Lira:
    """What U-LiRA found, over all samples and models.

    Args:
        accuracy: Balanced accuracy of the test "likelihood ratio above 1"; 0.5 is chance.
        auc: Area under the ROC curve of the likelihood ratio; 0.5 is chance.
        tpr_at_fpr: True-positive rate by the false-positive rate allowed; equal is chance.

    Example:
        >>> Lira(accuracy=0.5, auc=0.5, tpr_at_fpr={0.01: 0.01}).tpr_at_fpr[0.01]
        0.01
    """

    accuracy: float
    auc: float
    tpr_at_fpr: dict[float, float]


def scaled_confidence(logits: Tensor, target: Tensor) -> Tensor:
    """Logit of the confidence in the true class, which is nearly normal over models.

    ``phi = ln(p_y / (1 - p_y)) = z_y - ln sum over c != y of exp(z_c)``, computed from logits
    because ``1 - p_y`` would round to 0. Source: LiRA, arXiv:2112.03570, equation 6.

    Args:
        logits: Shape ``(N, classes)``, two classes or more.
        target: True labels, shape ``(N,)``.
    Returns:
        Shape ``(N,)``, in double precision.
    Raises:
        DataError: Shapes do not fit, there is no sample, or a logit is not finite.

    Example:
        >>> scaled_confidence(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
        tensor([2.], dtype=torch.float64)
    """
    scores = finite("logits", logits, dimensions=2)
    predicted_labels(scores, target)
    own = scores.gather(1, target[:, None])
    others = scores.scatter(1, target[:, None], -math.inf)
    return own.squeeze(1) - others.logsumexp(dim=1)


def u_lira(
    unlearned: Tensor,
    retrained: Tensor,
    *,
    false_positive_rates: Sequence[float] = (0.01,),
    shared_variance: bool = False,
) -> Lira:
    """Tell models that unlearned a sample from models that never saw it.

    For each sample, one normal distribution is fitted to ``phi`` over the models that unlearned it
    and one over those that never saw it; the score of a model is the logarithm of the ratio of both
    densities at its own ``phi``. The model whose score is taken is left out of the fit, and so is
    its opposite number, so that with nothing to find the accuracy is 0.5 on average. Each accuracy
    and rate goes from 0 to 1. Ideal: accuracy and ``auc`` 0.5, ``tpr_at_fpr[f]`` equal to ``f``.

    Source: U-LiRA, arXiv:2403.01218, after LiRA, arXiv:2112.03570.

    Args:
        unlearned: ``phi`` of :func:`scaled_confidence`, shape ``(models, samples)``, three models
            or more that were trained on the samples and unlearned them.
        retrained: The same of as many models that never saw the samples.
        false_positive_rates: At which to report the true-positive rate, each from 0 to 1.
        shared_variance: Use one variance for all samples, the better choice for a few models.
    Raises:
        ConfigurationError: A false-positive rate is not from 0 to 1.
        DataError: There are fewer than three models, shapes differ, or a value is not finite.

    Example:
        >>> never = torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
        >>> u_lira(never + 8, never).accuracy > 0.99
        True
    """
    wrong = [rate for rate in false_positive_rates if not 0.0 <= rate <= 1.0]
    if wrong:
        raise ConfigurationError(
            f"false_positive_rates: expected rates from 0 to 1, got {wrong[0]}."
        )
    seen, new = lira_scores(unlearned, retrained, shared_variance=shared_variance)
    flat, others = seen.flatten(), new.flatten()
    return Lira(
        accuracy=(_share_above_zero(flat) + _share_above_zero(-others)) / 2,
        auc=auc(flat, others),
        tpr_at_fpr={rate: _tpr(flat, others, rate) for rate in false_positive_rates},
    )


def lira_scores(
    unlearned: Tensor, retrained: Tensor, *, shared_variance: bool = False
) -> tuple[Tensor, Tensor]:
    """Logarithm of the likelihood ratio of each model and sample; arguments as :func:`u_lira`.

    Returns:
        Scores of the unlearned and of the retrained models, both ``(models, samples)``; high means
        "this model had seen the sample".
    Raises:
        DataError: There are fewer than three models, shapes differ, or a value is not finite.

    Example:
        >>> scores, _ = lira_scores(torch.zeros(3, 1), torch.zeros(3, 1))
        >>> scores.squeeze().tolist()
        [0.0, 0.0, 0.0]
    """
    same_shape(("unlearned", unlearned), ("retrained", retrained))
    seen = finite("unlearned", unlearned, dimensions=2, at_least=3)
    new = finite("retrained", retrained, dimensions=2, at_least=3)
    scores: tuple[list[Tensor], list[Tensor]] = ([], [])
    for model in range(len(seen)):
        rest = torch.arange(len(seen), device=seen.device) != model
        fits = [_fit(group[rest], shared_variance) for group in (seen, new)]
        for kept, value in zip(scores, (seen[model], new[model]), strict=True):
            kept.append(_log_density(value, *fits[0]) - _log_density(value, *fits[1]))
    return torch.stack(scores[0]), torch.stack(scores[1])


def _fit(values: Tensor, shared_variance: bool) -> tuple[Tensor, Tensor]:
    variance = values.var(dim=0)
    if shared_variance:
        variance = variance.mean().expand_as(variance)
    return values.mean(dim=0), variance.clamp(min=_SMALLEST_VARIANCE)


def _log_density(value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * ((value - mean).square() / variance + variance.log() + math.log(2 * math.pi))


def _share_above_zero(scores: Tensor) -> float:
    # A score of exactly 0 says nothing, so it is a coin toss.
    return float(((scores > 0).double() + (scores == 0).double() / 2).mean())


def _tpr(positive: Tensor, negative: Tensor, rate: float) -> float:
    """Share of positives above the lowest threshold that lets no more than ``rate`` pass."""
    allowed = math.floor(rate * len(negative) + 1e-9)
    if allowed >= len(negative):
        return 1.0
    threshold = negative.sort(descending=True).values[allowed]
    return float((positive > threshold).double().mean())
