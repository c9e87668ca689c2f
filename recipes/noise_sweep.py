"""What write noise costs: accuracy over σ on many simulated chips, one model beside another.

The noise study of arXiv:2601.10037: every cell gets an error N(0, σ), σ from 1 to 10 µS, on 100
chips. There on exact weights; here on top of what write–verify has left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.callbacks.evaluation import undisturbed
from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.recipes.accuracy_sweep import AccuracySweep, Hits, checked
from aihwkit_lora.recipes.sweep_picture import Axis
from aihwkit_lora.tiles.write_noise import noisy_outputs

SIGMAS_MICROSIEMENS = tuple(range(1, 11))
"""Standard deviations of the paper's code."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSweep(AccuracySweep):
    """Accuracies under write noise; ``points`` are standard deviations in microsiemens.

    Example:
        >>> NoiseSweep.key(3)
        'at_3_us'
    """

    name: ClassVar[str] = "noise"
    unit: ClassVar[str] = "uS"
    picture: ClassVar[Axis] = Axis(
        title="Accuracy under write noise", label="write noise σ of a cell / µS", draws="chips"
    )

    @staticmethod
    def key(point: float) -> str:
        """End of the name of a metric, such as ``at_3_us``."""
        return f"at_{point:g}_us"


def noise_sweep(
    models: Mapping[str, nn.Module],
    inputs: Any,
    labels: Tensor,
    *,
    groups: Mapping[str, tuple[int, ...]],
    sigmas_microsiemens: tuple[float, ...] = SIGMAS_MICROSIEMENS,
    chips: int = 100,
    seed: int = 0,
    mapping: ConductanceMapping | None = None,
    at_once: int = 20,
) -> NoiseSweep:
    """Let models be read on many simulated chips, and count what they still get right.

    All models and all σ see the same series of chips: equal numbers of a chip mean equal directions
    of its errors, so that differences are the models' own. Nothing is written, and models, random
    states and observers' phases are afterwards what they were.

    Args:
        models: Frozen models by name, plain or wrapped by PEFT; they give logits.
        inputs: As the models take them: a tensor of shape ``(n, ...)``, or a tuple or dict.
        labels: Classes, shape ``(n,)``, counted from 0.
        groups: Classes by group. Of the group ``"forget"`` the worst chip is the one that
            remembers most.
        sigmas_microsiemens: Standard deviations of the error of a cell, in µS, each 0 or more.
        chips: How many, at least 1.
        seed: Of the series of chips.
        mapping: Cells and window of layers whose programming does not say.
        at_once: Chips in one pass, at least 1; time and memory only.
    Raises:
        ConfigurationError: There is no model, group, σ or chip; or a number is out of its range.
        DataError: A group is empty, or one of its classes has no sample.
        StageError: A model has no frozen layer, or is not read as it was programmed.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> model = al.freeze_(model, programmed_by="example")
        >>> found = noise_sweep(
        ...     {"base": model},
        ...     torch.randn(8, 3),
        ...     torch.tensor([0, 1]).repeat(4),
        ...     groups={"forget": (1,), "retain": (0,)},
        ...     sigmas_microsiemens=(1, 5),
        ...     chips=3,
        ...     mapping=chip.mapping,
        ... )
        >>> for key in found.metrics():
        ...     print(key)
        base/forget_accuracy_at_1_us
        base/forget_accuracy_at_1_us_worst
        base/forget_accuracy_at_5_us
        base/forget_accuracy_at_5_us_worst
        base/retain_accuracy_at_1_us
        base/retain_accuracy_at_1_us_worst
        base/retain_accuracy_at_5_us
        base/retain_accuracy_at_5_us_worst
    """
    sigmas = tuple(map(float, sigmas_microsiemens))
    groups, samples = checked("noise sweep", models, labels, groups, sigmas, draws=chips)

    read = partial(noisy_outputs, seed=seed, mapping=mapping, at_once=at_once)

    def hits(model: nn.Module) -> Hits:
        with undisturbed(model, phase="noise", seed=seed):
            clean = read(model, inputs, chips=1, sigma_siemens=0.0)
            right = [
                Hits.per_class(read(model, inputs, chips=chips, sigma_siemens=1e-6 * sigma), labels)
                for sigma in sigmas
            ]
        return Hits(
            clean=Hits.per_class(clean, labels)[0],
            right=torch.stack(right),
            outputs=clean.shape[-1],
        )

    return NoiseSweep(
        points=sigmas,
        draws=chips,
        groups=groups,
        samples=samples,
        models={name: hits(model) for name, model in models.items()},
        seed=seed,
    )
