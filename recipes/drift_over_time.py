"""What a year does to programmed arrays: accuracy over the time after programming.

Cells drift as the noise model of their chip says. Not every chip has one: a source that measured
retention at single times gives those times only, and where there is no source nothing is computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from aihwkit.inference.noise.base import BaseNoiseModel
from torch import Tensor, nn

from aihwkit_lora.callbacks.drift_sweep import brought_back
from aihwkit_lora.callbacks.evaluation import undisturbed
from aihwkit_lora.chips import Chip
from aihwkit_lora.recipes.accuracy_sweep import AccuracySweep, Hits, checked
from aihwkit_lora.recipes.sweep_picture import Axis
from aihwkit_lora.tiles import drift_

SECONDS = (1.0, 60.0, 3600.0, 86400.0, 30 * 86400.0, 365 * 86400.0)
"""A second, a minute, an hour, a day, thirty days and a year after programming."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DriftOverTime(AccuracySweep):
    """Accuracies over the time since programming; ``points`` are seconds.

    Example:
        >>> DriftOverTime.key(86400.0)
        'at_86400s'
    """

    name: ClassVar[str] = "drift"
    unit: ClassVar[str] = "s"
    picture: ClassVar[Axis] = Axis(
        title="Accuracy as conductances drift",
        label="time since programming",
        draws="fates of the cells",
        ticks={
            1.0: "1 s",
            60.0: "1 min",
            3600.0: "1 h",
            86400.0: "1 d",
            30 * 86400.0: "30 d",
            365 * 86400.0: "1 yr",
        },
    )

    @staticmethod
    def key(point: float) -> str:
        """End of the name of a metric, such as ``at_86400s``."""
        return f"at_{point:.15g}s"


@dataclass(frozen=True, kw_only=True)
class NoDrift:
    """Stands for a sweep that nobody has numbers for.

    Args:
        chip: Its name.

    Example:
        >>> NoDrift(chip="rm-180nm").metrics()
        {}
    """

    chip: str

    @property
    def reason(self) -> str:
        """Why there is no sweep."""
        return (
            f"no source says how the cells of '{self.chip}' drift; give the chip a noise_model, or "
            "call drift_over_time(..., noise_model=...) with the one that you hold for right"
        )

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def write(self, folder: str | Path) -> None:
        """Write the reason into ``drift.json``; there is nothing to draw.

        Args:
            folder: Made if need be.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"sweep": "drift", "skipped": self.reason}, indent=1) + "\n"
        (folder / "drift.json").write_text(text, encoding="utf-8")


def drift_on(
    chip: Chip,
    models: Mapping[str, nn.Module],
    inputs: Any,
    labels: Tensor,
    *,
    groups: Mapping[str, tuple[int, ...]],
    repeats: int = 10,
    seed: int = 0,
) -> DriftOverTime | NoDrift:
    """Sweep over the times that a chip's source has data for.

    Args:
        chip: Where the models run.
        models: See :func:`drift_over_time`, as all that follows.
        inputs: As the models take them.
        labels: Classes, shape ``(n,)``.
        groups: Classes by group.
        repeats: How often the fate of all cells is drawn, at least 1.
        seed: Of the first draw.
    Returns:
        A sweep, or, for a chip without a drift model, what says so.

    Example:
        >>> import aihwkit_lora as al
        >>> found = drift_on(al.chips.get("rm-180nm"), {}, None, torch.tensor([0]), groups={})
        >>> found.reason[:36]
        "no source says how the cells of 'rm-"
    """
    seconds = drift_times(chip)
    if not seconds:
        return NoDrift(chip=chip.name)
    return drift_over_time(
        models, inputs, labels, groups=groups, seconds=seconds, repeats=repeats, seed=seed
    )


def drift_times(chip: Chip) -> tuple[float, ...]:
    """Times after programming, in seconds, at which a chip's drift is known.

    Args:
        chip: Any.
    Returns:
        :data:`SECONDS`; the times that were measured if the model knows no others; none without a
        model.

    Example:
        >>> import aihwkit_lora as al
        >>> for name in ("rm-180nm", "neurram-130nm", "hermes-14nm"):
        ...     print(name, drift_times(al.chips.get(name)))
        rm-180nm ()
        neurram-130nm (1.0, 86400.0, 172800.0)
        hermes-14nm (1.0, 60.0, 3600.0, 86400.0, 2592000.0, 31536000.0)
    """
    if chip.noise_model is None:
        return ()
    # aihwkit's model of Wan et al., Nature 2022, holds one polynomial for each measured time.
    measured = getattr(chip.noise_model(), "coeff_dic", None)
    return tuple(sorted(map(float, measured))) if measured else SECONDS


def drift_over_time(
    models: Mapping[str, nn.Module],
    inputs: Any,
    labels: Tensor,
    *,
    groups: Mapping[str, tuple[int, ...]],
    seconds: tuple[float, ...] = SECONDS,
    repeats: int = 10,
    seed: int = 0,
    noise_model: BaseNoiseModel | None = None,
) -> DriftOverTime:
    """Let models be read some time after programming, and count what they still get right.

    The fate of the cells is drawn ``repeats`` times and followed through all times, see
    :func:`aihwkit_lora.drift_`; adapters are digital and do not drift. Nothing is written, and
    models, random states and observers' phases are afterwards what they were.

    Args:
        models: Frozen models by name, plain or wrapped by PEFT; they give logits.
        inputs: A tensor of shape ``(n, ...)``.
        labels: Classes, shape ``(n,)``, counted from 0.
        groups: Classes by group. Of the group ``"forget"`` the worst draw is the one that
            remembers most.
        seconds: Times since programming, each 0 or more.
        repeats: How often the fate of all cells is drawn, at least 1.
        seed: Of the first draw; the next draws take the next numbers.
        noise_model: How cells drift; None for the one of each layer's configuration.
    Raises:
        ConfigurationError: There is no model, group, time or draw; or a layer has no noise model,
            or it has no data for one of the times.
        DataError: A group is empty, or one of its classes has no sample.
        StageError: A model has no frozen layer.

    Example:
        >>> import aihwkit_lora as al
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), al.chips.get("hermes-14nm"))
        >>> model = al.freeze_(model, programmed_by="example")
        >>> found = drift_over_time(
        ...     {"base": model},
        ...     torch.randn(8, 3),
        ...     torch.tensor([0, 1]).repeat(4),
        ...     groups={"retain": (0, 1)},
        ...     seconds=(3600.0, 86400.0),
        ...     repeats=3,
        ... )
        >>> for key in found.metrics():
        ...     print(key)
        base/retain_accuracy_at_3600s
        base/retain_accuracy_at_3600s_worst
        base/retain_accuracy_at_86400s
        base/retain_accuracy_at_86400s_worst
    """
    seconds = tuple(map(float, seconds))
    groups, samples = checked("drift over time", models, labels, groups, seconds, draws=repeats)

    def hits(model: nn.Module) -> Hits:
        drawn = [_fate(model, inputs, seconds, noise_model, seed + n) for n in range(repeats)]
        logits = torch.stack(drawn, dim=1)
        right = torch.stack([Hits.per_class(each, labels) for each in logits])
        return Hits(clean=right[0, 0], right=right[1:], outputs=logits.shape[-1])

    return DriftOverTime(
        points=seconds,
        draws=repeats,
        groups=groups,
        samples=samples,
        models={name: hits(model) for name, model in models.items()},
        seed=seed,
    )


def _fate(
    model: nn.Module,
    inputs: Any,
    seconds: tuple[float, ...],
    noise_model: BaseNoiseModel | None,
    seed: int,
) -> Tensor:
    """Logits of a model as programmed and at each time, shape ``(1 + times, n, outputs)``."""
    found: list[Tensor] = []
    with undisturbed(model, phase="drift", seed=seed), brought_back(model):
        for time in (0.0, *seconds):
            found.append(drift_(model, time, noise_model=noise_model)(inputs))
    return torch.stack(found)
