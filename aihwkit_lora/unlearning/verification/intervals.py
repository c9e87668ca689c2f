"""Intervals of 95 % around what was measured on few samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aihwkit_lora.errors import DataError

CONFIDENCE = 0.95
"""Coverage that all intervals aim for."""

_NORMAL = 1.959963984540054  # its quantile at 97.5 %
_RESAMPLES = 1000


def wilson(right: float, samples: int) -> tuple[float, float]:
    """Interval of a share that was counted on independent samples.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22; unlike the normal approximation it is right near 0
    and 1, where forgetting happens.

    Args:
        right: How many of the samples, 0 to ``samples``.
        samples: How many there are, 1 or more.
    Returns:
        Lower and upper end, from 0 to 1.
    Raises:
        DataError: There is no sample, or more are right than there are.

    Example:
        >>> [round(end, 3) for end in wilson(0, 20)]
        [0.0, 0.161]
    """
    if samples < 1 or not 0 <= right <= samples:
        raise DataError(f"wilson: expected 0 to n right of n samples, got {right} of {samples}.")
    share, z2 = right / samples, _NORMAL**2
    middle = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    spread = math.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    half = _NORMAL * spread / (1 + z2 / samples)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    groups: Sequence[Tensor], statistic: Callable[[Sequence[Tensor]], Tensor], *, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of a statistic of the means of some groups.

    Source: Efron 1979, Ann. Stat. 7(1); 1000 resamples, each group drawn from itself.

    Args:
        groups: Values of each group's samples, shape ``(N,)`` or ``(N, values)``.
        statistic: From the groups' means, each of shape ``(resamples, ...)``, to one number each.
        seed: Of the resampling.
    Returns:
        Lower and upper end.
    Raises:
        DataError: A group is empty.

    Example:
        >>> low, high = bootstrap([torch.arange(100.0)], lambda means: means[0])
        >>> low < 49.5 < high
        True
    """
    if not groups or any(len(group) < 1 for group in groups):
        raise DataError("bootstrap: expected one sample or more in each group, got none.")
    generator = torch.Generator().manual_seed(seed)
    means = []
    for group in groups:
        values = group.detach().double().cpu()
        drawn = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
        means.append(values[drawn].mean(dim=1))
    tail = (1.0 - CONFIDENCE) / 2
    ends = statistic(means).quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
