"""What the metrics ask of their arguments; whatever falls short is a :class:`DataError`."""

from __future__ import annotations

import torch
from torch import Tensor

from aihwkit_lora.errors import DataError

# Rows of bfloat16 probabilities add up to one within about a hundredth.
_SUM_TOLERANCE = 0.02


def predicted_labels(predictions: Tensor, target: Tensor) -> Tensor:
    """Take the most probable class of each sample, or labels as they are.

    Args:
        predictions: Scores, shape ``(N, classes)``, or labels, shape ``(N,)``.
        target: True labels, shape ``(N,)``, with at least one sample.
    Returns:
        Labels, shape ``(N,)``.
    Raises:
        DataError: The shapes do not fit, or there is no sample.

    Example:
        >>> predicted_labels(torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([1, 1]))
        tensor([1, 0])
    """
    if target.ndim != 1 or target.numel() == 0:
        raise DataError(
            "target: expected labels of one sample or more, shape (N,), got shape "
            f"{tuple(target.shape)}."
        )
    labels = predictions.argmax(dim=1) if predictions.ndim == 2 else predictions
    if labels.shape != target.shape:
        raise DataError(
            f"predictions: expected shape ({len(target)}, classes) or ({len(target)},) as there "
            f"are {len(target)} targets, got {tuple(predictions.shape)}."
        )
    return labels


def probability_rows(name: str, values: Tensor) -> Tensor:
    """Check probabilities and make each row add up to one in double precision.

    Args:
        name: Of the argument, for messages.
        values: Shape ``(N, classes)``, of any floating type.
    Raises:
        DataError: There is no sample, a value is negative or not finite, or a row does not add up
            to one, as logits do not.

    Example:
        >>> probability_rows("p", torch.tensor([[0.25, 0.75]]))
        tensor([[0.2500, 0.7500]], dtype=torch.float64)
    """
    rows = values.detach().double()
    if rows.ndim != 2 or rows.numel() == 0:
        raise DataError(
            f"{name}: expected probabilities of one sample or more, shape (N, classes), got shape "
            f"{tuple(values.shape)}."
        )
    sums = rows.sum(dim=1, keepdim=True)
    if not bool((rows >= 0).all()) or not bool(((sums - 1).abs() <= _SUM_TOLERANCE).all()):
        raise DataError(
            f"{name}: expected probabilities, 0 or more and with rows that add up to 1, got values "
            f"from {float(rows.min()):.3g} and sums from {float(sums.min()):.3g} to "
            f"{float(sums.max()):.3g}. Take softmax(dim=1) of logits."
        )
    return rows / sums


def same_shape(first: tuple[str, Tensor], second: tuple[str, Tensor]) -> None:
    """Refuse two tensors that do not belong to the same samples.

    Args:
        first: Name and tensor.
        second: Name and tensor.
    Raises:
        DataError: Their shapes differ.

    Example:
        >>> same_shape(("p", torch.zeros(2)), ("q", torch.zeros(2)))
    """
    if first[1].shape != second[1].shape:
        raise DataError(
            f"{second[0]}: expected the shape of {first[0]}, {tuple(first[1].shape)}, got "
            f"{tuple(second[1].shape)}. Both belong to the same samples in the same order."
        )


def finite(name: str, values: Tensor, *, dimensions: int = 1, at_least: int = 1) -> Tensor:
    """Check numbers and return them in double precision, detached.

    Args:
        name: Of the argument, for messages.
        values: Shape ``(N,)`` or with more dimensions.
        dimensions: How many.
        at_least: Smallest length of the first of them.
    Raises:
        DataError: There are too few, or one is not finite.

    Example:
        >>> finite("losses", torch.tensor([0.5]))
        tensor([0.5000], dtype=torch.float64)
    """
    if values.ndim != dimensions or len(values) < at_least or values.numel() == 0:
        raise DataError(
            f"{name}: expected {dimensions} dimension(s) and a length of {at_least} or more, got "
            f"shape {tuple(values.shape)}."
        )
    doubles = values.detach().double()
    if not bool(torch.isfinite(doubles).all()):
        bad = int((~torch.isfinite(doubles)).sum())
        raise DataError(f"{name}: expected finite numbers, got {bad} that are not.")
    return doubles
