"""Parts of losses: how a model is run, likelihoods, divergences, and which answers are left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.unlearning.reference import reference


def run(model: nn.Module, inputs: Any) -> Tensor:
    """Run a model on inputs of a batch.

    Args:
        model: Gives a tensor, or an object that has it as ``logits``.
        inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Example:
        >>> run(nn.Bilinear(2, 3, 4), (torch.ones(5, 2), torch.ones(5, 3))).shape
        torch.Size([5, 4])
    """
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, tuple | list):
        output = model(*inputs)
    else:
        output = model(inputs)
    found: Tensor = getattr(output, "logits", output)
    return found


def run_reference(model: nn.Module, inputs: Any) -> Tensor:
    """Run a model without the adapters that are being trained, and without gradients.

    Args:
        model: See :func:`run` and :func:`~aihwkit_lora.unlearning.reference.reference`.
        inputs: See :func:`run`.
    Raises:
        StageError: There is no reference.
    """
    with torch.no_grad(), reference(model):
        return run(model, inputs)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each sample's label.

    Args:
        logits: Shape ``(n, classes)``.
        labels: Shape ``(n,)``, class indices.
    Returns:
        Shape ``(n,)``, in nats.
    Raises:
        DataError: The shapes are others.

    Example:
        >>> nll(torch.zeros(1, 4), torch.tensor([2]))
        tensor([1.3863])
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise DataError(
            "expected logits of shape (n, classes) and labels of shape (n,), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}. Language models take the "
            "objectives that start with 'token_'."
        )
    return F.cross_entropy(logits, labels, reduction="none")


def token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each sequence, where every token is predicted from those before.

    Args:
        logits: Shape ``(n, t, vocabulary)``.
        labels: Shape ``(n, t)``; −100 is left out. They are shifted here, as causal models do.
    Returns:
        Sums over the tokens that count, and how many these are; both of shape ``(n,)``.
    Raises:
        DataError: The shapes are others.

    Example:
        >>> token_nll(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]]))
        (tensor([1.3863]), tensor([1]))
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise DataError(
            "expected logits of shape (n, t, vocabulary) and labels of shape (n, t), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}. Classifiers take the objectives "
            "without 'token_'."
        )
    ahead = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ahead, reduction="none")
    return losses.sum(dim=1), (ahead != -100).sum(dim=1)


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """Kullback–Leibler divergence KL(target ‖ softmax(logits)) of each sample.

    Args:
        target: Shape ``(n, classes)``, probabilities; zeros count nothing.
        logits: Shape ``(n, classes)``.
    Returns:
        Shape ``(n,)``, in nats; 0 or more.

    Example:
        >>> kl(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.zeros(1, 4))
        tensor([0.6931])
    """
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="none").sum(dim=1)


def other_outputs(logits: Tensor, labels: Tensor, outputs: tuple[int, ...] | None = None) -> Tensor:
    """Mark what a sample may be taken for once its own label is forgotten.

    Args:
        logits: Shape ``(n, classes)``, 2 classes at least.
        labels: Shape ``(n,)``, class indices.
        outputs: To choose from; all if None.
    Returns:
        Shape ``(n, classes)``, True for all but the own label.
    Raises:
        ConfigurationError: There are no such outputs.

    Example:
        >>> other_outputs(torch.zeros(2, 4), torch.tensor([0, 3]), (0, 1, 2)).long()
        tensor([[0, 1, 1, 0],
                [1, 1, 1, 0]])
    """
    chosen = tuple(range(logits.shape[1])) if outputs is None else outputs
    if len(chosen) < 2:
        raise ConfigurationError(
            f"expected 2 outputs or more to choose from, got {list(chosen)} of a model with "
            f"{logits.shape[1]}. Forget fewer outputs, or name more that are kept."
        )
    return mark(logits, chosen).scatter(1, labels[:, None], value=False)


def mark(logits: Tensor, outputs: tuple[int, ...]) -> Tensor:
    """Mark some outputs of every sample.

    Args:
        logits: Shape ``(n, classes)``.
        outputs: From 0 to ``classes − 1``.
    Returns:
        Shape ``(n, classes)``, True for these.
    Raises:
        ConfigurationError: The model has no such output.

    Example:
        >>> mark(torch.zeros(1, 3), (0, 2))
        tensor([[ True, False,  True]])
    """
    if outputs and not 0 <= min(outputs) <= max(outputs) < logits.shape[1]:
        raise ConfigurationError(
            f"expected outputs from 0 to {logits.shape[1] - 1}, which the model has, got "
            f"{outputs}. Name those."
        )
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[:, list(outputs)] = True
    return mask


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of tensors of one shape.

    Args:
        prediction: Any shape.
        target: The same shape.
    Raises:
        DataError: It is another, which torch would broadcast.

    Example:
        >>> mse(torch.zeros(2), torch.tensor([1.0, 3.0]))
        tensor(5.)
    """
    if prediction.shape != target.shape:
        raise DataError(
            f"expected a prediction in the shape of its target, {tuple(target.shape)}, got "
            f"{tuple(prediction.shape)}. Return what the target is of: noise, velocity or image."
        )
    return F.mse_loss(prediction, target)
