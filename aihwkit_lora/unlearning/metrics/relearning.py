"""How fast a model knows again what it unlearned, once a few samples are shown to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.unlearning.metrics.evaluation import (
    Batch,
    logits_of,
    model_accuracy,
    own_random_numbers,
)


@dataclass(frozen=True, kw_only=True)
class RelearnCurve:
    """Accuracy over steps of relearning.

    Args:
        points: Steps taken and accuracy reached, the first before any step.
    Raises:
        DataError: There is no point, or the steps do not rise from 0.

    Example:
        >>> RelearnCurve(points=((0, 0.0), (1, 0.5), (2, 0.9))).steps_to(0.8)
        2
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.points]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise DataError(f"points: expected steps that rise from 0, got {steps}.")

    def steps_to(self, accuracy: float) -> int | None:
        """Steps until an accuracy is reached for the first time; None if it never is.

        Args:
            accuracy: From 0 to 1, for example a fraction of the accuracy before unlearning.
        """
        return next((step for step, reached in self.points if reached >= accuracy), None)


def relearn_curve(
    model: nn.Module,
    batch: Batch,
    evaluation: Batch,
    *,
    steps: int = 50,
    every: int = 1,
    learning_rate: float = 0.01,
    trainable: Callable[[str], bool] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    seed: int = 0,
) -> RelearnCurve:
    """Fine-tune a copy on a few forgotten samples and watch the accuracy come back.

    The model itself stays as it is. Full-batch steps; each accuracy is a fraction from 0 to 1.
    Ideal: the curve of a retrained model, as on an easy task that is fast as well; alone a curve
    proves nothing.

    Source: attack 3 in arXiv:2406.13356 and arXiv:2409.18025; relearn time in arXiv:2201.05629.

    Args:
        model: Gives logits, or something that has them as ``.logits``.
        batch: Inputs and targets of the forgotten samples that the attacker has.
        evaluation: Inputs and targets on which the accuracy is taken, not the same samples.
        steps: Of the optimiser, 1 or more.
        every: Evaluate after each so many steps.
        learning_rate: Of the optimiser.
        trainable: Tells by its name whether a parameter is trained. By default what wants a
            gradient or, where nothing does, the parameters of LoRA adapters. Sealed adapters stay
            sealed in the copy; what an attacker adds beside them is trainable.
        loss: Of logits and targets.
        optimizer: Called with parameters and ``lr=``.
        seed: Of read noise and dropout.
    Raises:
        ConfigurationError: There is nothing to train, or no step.
        DataError: Shapes do not fit, or there is no sample.
        SealError: Sealed parameters would be trained.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, samples = nn.Linear(2, 2), (torch.eye(2), torch.tensor([1, 0]))
        >>> relearn_curve(model, samples, samples, learning_rate=1.0, steps=5).steps_to(1.0)
        1
    """
    if steps < 1 or every < 1:
        raise ConfigurationError(
            f"relearn_curve: expected steps and every of 1 or more, got {steps} and {every}."
        )
    twin = copy.deepcopy(model)
    parameters = _made_trainable(twin, trainable)
    chosen: Any = optimizer(parameters, lr=learning_rate)
    points = [(0, model_accuracy(twin, [evaluation], seed=seed))]
    with own_random_numbers(seed), torch.enable_grad():
        twin.train()
        for step in range(1, steps + 1):
            chosen.zero_grad()
            loss(logits_of(twin, batch[0]), batch[1]).backward()
            chosen.step()
            if step % every == 0 or step == steps:
                points.append((step, model_accuracy(twin, [evaluation], seed=seed)))
    return RelearnCurve(points=tuple(points))


def _made_trainable(
    twin: nn.Module, trainable: Callable[[str], bool] | None
) -> Iterable[nn.Parameter]:
    named = dict(twin.named_parameters())
    if trainable is not None:
        chosen = {name for name in named if trainable(name)}
    else:
        chosen = {name for name, parameter in named.items() if parameter.requires_grad}
        chosen = chosen or {name for name in named if "lora_" in name}
    if not chosen:
        raise ConfigurationError(
            f"relearn_curve: expected parameters to train, found none among {len(named)}. Attach "
            "an adapter, or pass trainable=, a function of a parameter's name."
        )
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    return [named[name] for name in sorted(chosen)]


def relearn_time_ratio(
    unlearned: RelearnCurve,
    retrained: RelearnCurve,
    original_accuracy: float,
    *,
    margin: float = 0.1,
) -> float:
    """Relearning time of the unlearned over that of a retrained model (anamnesis index, AIN).

    ``AIN = r(U) / r(R)``, where ``r`` counts steps until ``(1 - margin) A_O`` is reached, with
    ``A_O`` the accuracy of the original model. 0 or more; infinite if the unlearned model never
    gets there. Ideal: 1. Far below 1 the knowledge was still there; far above it the model resists
    or is damaged.

    Source: Chundawat et al., arXiv:2201.05629.

    Args:
        unlearned: Curve of the unlearned model.
        retrained: Curve of a retrained model under the same attack.
        original_accuracy: Of the model before unlearning, on the same evaluation samples.
        margin: Fraction of it that may be missing, from 0 to less than 1.
    Raises:
        ConfigurationError: The margin is out of range.
        DataError: The retrained model never reaches the accuracy, or has it from the start.

    Example:
        >>> fast = RelearnCurve(points=((0, 0.0), (1, 1.0)))
        >>> slow = RelearnCurve(points=((0, 0.0), (4, 1.0)))
        >>> relearn_time_ratio(fast, slow, 1.0)
        0.25
    """
    if not 0.0 <= margin < 1.0:
        raise ConfigurationError(f"margin: expected from 0 to less than 1, got {margin}.")
    threshold = (1.0 - margin) * original_accuracy
    reference = retrained.steps_to(threshold)
    if not reference:
        raise DataError(
            f"retrained: expected a curve that reaches {threshold:.3g} after its start, got "
            f"{'it there from the start' if reference == 0 else 'one that never does'}. Take more "
            "steps, or another evaluation set."
        )
    steps = unlearned.steps_to(threshold)
    return math.inf if steps is None else steps / reference
