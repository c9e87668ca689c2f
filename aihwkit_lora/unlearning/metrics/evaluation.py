"""Running a model for a metric, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import DataError
from aihwkit_lora.unlearning.metrics.checks import predicted_labels

Batch = tuple[Any, Tensor] | list[Any]
"""Inputs and targets; see :func:`logits_of` for what inputs can be."""


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Call a model and take its logits.

    Args:
        model: Returns logits, or something that has them as ``.logits``.
        inputs: A tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Example:
        >>> logits_of(nn.Identity(), torch.tensor([1.0]))
        tensor([1.])
    """
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    logits: Tensor = getattr(output, "logits", output)
    return logits


@contextmanager
def evaluating(model: nn.Module, *, seed: int = 0) -> Iterator[None]:
    """Evaluate in a block: evaluation mode, no gradients, random numbers from a seed.

    Afterwards modes and random states are what they were. The seed makes read noise repeatable.

    Args:
        model: Any model.
        seed: Of the block's random numbers.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluating(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), own_random_numbers(seed):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Start torch's random numbers from a seed in a block, and go on outside as if it were not.

    Args:
        seed: On all devices.

    Example:
        >>> before = torch.get_rng_state()
        >>> with own_random_numbers(0):
        ...     _ = torch.rand(3)
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def model_accuracy(model: nn.Module, batches: Iterable[Batch], *, seed: int = 0) -> float:
    """Accuracy of a model over batches, from 0 to 1.

    Args:
        model: Gives logits, shape ``(N, classes)``.
        batches: Inputs and targets on the model's device.
        seed: Of read noise.
    Raises:
        DataError: There is no sample, or shapes do not fit.

    Example:
        >>> model_accuracy(nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))])
        0.5
    """
    right = samples = 0
    with evaluating(model, seed=seed):
        for inputs, target in batches:
            right += int((predicted_labels(logits_of(model, inputs), target) == target).sum())
            samples += len(target)
    if not samples:
        raise DataError("batches: expected one batch or more, got none.")
    return right / samples
