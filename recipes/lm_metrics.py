"""The metrics of TOFU (arXiv:2401.06121, section 2.2): what a language model still knows.

Forget quality compares with a model retrained without the forgotten authors; model utility is about
everything else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from aihwkit_lora.errors import DataError


def answer_probability(nll: Tensor, tokens: Tensor) -> Tensor:
    """Probability of answers, normalised for their length: ``P(a|q)^(1/|a|)``.

    Args:
        nll: Sum over an answer's tokens of −log p, in nats, any shape.
        tokens: How many there are, the same shape.
    Returns:
        From 0 to 1, the same shape, in double precision.

    Example:
        >>> answer_probability(torch.tensor([math.log(16)]), torch.tensor([4]))
        tensor([0.5000], dtype=torch.float64)
    """
    return torch.exp(-nll.double() / tokens)


def choice_probability(right: Tensor, wrong: Tensor) -> Tensor:
    """Probability of the right answer among given ones: ``P(a₁|q) / Σᵢ P(aᵢ|q)``.

    TOFU takes it for real authors and world facts, with probabilities normalised for length.

    Args:
        right: Of the right answer, shape ``(n,)``.
        wrong: Of the others, shape ``(n, k)``.

    Example:
        >>> choice_probability(torch.tensor([0.5]), torch.tensor([[0.25, 0.25]]))
        tensor([0.5000])
    """
    return right / (right + wrong.sum(dim=1))


def truth_ratio(paraphrased: Tensor, wrong: Tensor) -> Tensor:
    """How likely wrong answers are beside a right one in the same words.

    ``R = mean over wrong answers of P(â|q)^(1/|â|), divided by P(ã|q)^(1/|ã|)``. Near 0 for what is
    known; about 1 where right and wrong are the same to the model.

    Args:
        paraphrased: ``P(ã|q)^(1/|ã|)`` of the paraphrased answer, shape ``(n,)``.
        wrong: Those of the wrong answers, shape ``(n, k)``.

    Example:
        >>> truth_ratio(torch.tensor([0.5]), torch.tensor([[0.25, 0.75]]))
        tensor([1.])
    """
    return wrong.mean(dim=1) / paraphrased


def truthfulness(ratios: Tensor) -> Tensor:
    """Truth ratios as a utility: ``max(0, 1 − R)``, high where the right answer is preferred.

    Args:
        ratios: 0 or more.

    Example:
        >>> truthfulness(torch.tensor([0.25, 3.0]))
        tensor([0.7500, 0.0000])
    """
    return (1.0 - ratios).clamp(min=0.0)


def rouge_l_recall(reference: Sequence[str], answer: Sequence[str]) -> float:
    """Part of the reference that an answer holds in the same order (Lin, 2004).

    ``LCS(reference, answer) / |reference|``. Words are compared as they are, without stemming.

    Args:
        reference: Words, at least one.
        answer: Words.
    Raises:
        DataError: The reference is empty.

    Example:
        >>> rouge_l_recall("the cat sat down".split(), "the dog sat".split())
        0.5
    """
    if not reference:
        raise DataError("rouge_l_recall: expected a reference of at least one word, found none.")
    row = [0] * (len(answer) + 1)
    for word in reference:
        before = row
        row = [0]
        for place, other in enumerate(answer):
            longer = max(row[place], before[place + 1])
            row.append(before[place] + 1 if word == other else longer)
    return row[-1] / len(reference)


def model_utility(values: Collection[float]) -> float:
    """Harmonic mean of probability, ROUGE-L recall and truthfulness over sets of questions.

    One value near 0 takes the mean to 0.

    Args:
        values: 0 or more each, at least one.
    Raises:
        DataError: There is none, or one is below 0.

    Example:
        >>> model_utility([1.0, 0.5])
        0.6666666666666666
    """
    if not values or min(values) < 0.0:
        raise DataError(
            f"model_utility: expected values of 0 or more, found {sorted(values) or 'none'}."
        )
    if min(values) == 0.0:
        return 0.0
    return len(values) / math.fsum(1.0 / value for value in values)


def forget_quality(unlearned: Sequence[float], retrained: Sequence[float]) -> float:
    """Whether truth ratios on forgotten questions tell a model from a retrained one.

    The p-value of a two-sided Kolmogorov–Smirnov test with two samples, exact. Above 0.05 the test
    cannot tell them apart; with few questions it seldom can.

    Args:
        unlearned: Truth ratios of the model that has forgotten.
        retrained: Those of a model trained without the forgotten questions.
    Returns:
        From 0 to 1.
    Raises:
        DataError: A sample is empty.

    Example:
        >>> forget_quality([1, 2, 3], [1, 2, 3]), forget_quality([1, 2, 3], [4, 5, 6])
        (1.0, 0.1)
    """
    if not unlearned or not retrained:
        raise DataError(
            f"forget_quality: expected truth ratios of both models, found {len(unlearned)} and "
            f"{len(retrained)}. Give the forgotten questions perturbed answers."
        )
    n, m = len(unlearned), len(retrained)
    orders = math.comb(n + m, n)
    return (orders - _paths_within(n, m, _largest_gap(unlearned, retrained))) / orders


def _largest_gap(one: Sequence[float], other: Sequence[float]) -> int:
    """Largest distance of the two distribution functions, times both sizes; an integer."""
    n, m = len(one), len(other)
    return max(
        abs(m * sum(x <= value for x in one) - n * sum(y <= value for y in other))
        for value in {*one, *other}
    )


def _paths_within(n: int, m: int, gap: int) -> int:
    """Orders of ``n`` and ``m`` values, all equally likely, that never get ``gap`` apart.

    Counted as lattice paths, with integers, so nothing is rounded (Hodges, 1958).
    """
    row = [0] * (m + 1)
    for i in range(n + 1):
        for j in range(m + 1):
            from_left = row[j - 1] if j else int(i == 0)
            # The first row starts the paths; in others, ``row[j]`` still is the row before.
            total = from_left + (row[j] if i else 0)
            row[j] = total if abs(m * i - n * j) < gap else 0
    return row[m]
