"""Accuracy of some models along one axis of trouble, with several draws at each point of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes import sweep_picture


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One accuracy over several draws, as fractions.

    Args:
        mean: Over the draws.
        std: Standard deviation over the draws, of a sample; 0 for a single draw.
        worst: The lowest, or the highest where the class was to be forgotten.

    Example:
        >>> import torch
        >>> Spread.of(torch.tensor([0.5, 1.0, 0.75]), high_is_bad=False)
        Spread(mean=0.75, std=0.25, worst=0.5)
    """

    mean: float
    std: float
    worst: float

    @classmethod
    def of(cls, values: Tensor, *, high_is_bad: bool) -> Spread:
        """Summarise the accuracies of all draws.

        Args:
            values: Fractions, shape ``(draws,)``, at least one.
            high_is_bad: Whether the worst is the highest.
        """
        several = len(values) > 1
        return cls(
            mean=float(values.mean()),
            std=float(values.std()) if several else 0.0,
            worst=float(values.max() if high_is_bad else values.min()),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Hits:
    """How often one model was right.

    Args:
        clean: Right answers per class on arrays as they were programmed, shape ``(classes,)``.
        right: The same at each point for each draw, shape ``(points, draws, classes)``.
        outputs: How many classes the model has an output for.
    """

    clean: Tensor
    right: Tensor
    outputs: int

    @staticmethod
    def per_class(logits: Tensor, labels: Tensor) -> Tensor:
        """Count right answers.

        Args:
            logits: Shape ``(draws, n, outputs)``.
            labels: Shape ``(n,)``, counted from 0.
        Returns:
            Shape ``(draws, classes)``, whole numbers.

        Example:
            >>> import torch
            >>> logits = torch.eye(3)[None]
            >>> Hits.per_class(logits, torch.tensor([0, 1, 1]))
            tensor([[1, 1]])
        """
        right = (logits.argmax(dim=-1) == labels).long()
        counts = right.new_zeros(len(logits), int(labels.max()) + 1)
        return counts.index_add_(1, labels, right)


@dataclass(frozen=True, kw_only=True, eq=False)
class AccuracySweep:
    """What a sweep found; :class:`NoiseSweep` and :class:`DriftOverTime` say along which axis.

    Args:
        points: Where on the axis, in its unit.
        draws: Simulated chips, or fates of one chip, at each point.
        groups: Classes by group.
        samples: Samples of each class, shape ``(classes,)``.
        models: What each model got right.
        seed: Of all draws.
        forgotten: The group whose accuracy shall be low: its worst is its highest.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    picture: ClassVar[sweep_picture.Axis]

    points: tuple[float, ...]
    draws: int
    groups: Mapping[str, tuple[int, ...]]
    samples: Tensor
    models: Mapping[str, Hits]
    seed: int
    forgotten: str = "forget"

    @staticmethod
    def key(point: float) -> str:
        """End of the name of a metric at a point of the axis."""
        raise NotImplementedError

    def groups_of(self, model: str) -> tuple[str, ...]:
        """Groups that a model can name: it has an output for each of their classes."""
        outputs = self.models[model].outputs
        return tuple(name for name, own in self.groups.items() if max(own) < outputs)

    def accuracies(self, model: str, classes: tuple[int, ...]) -> Tensor:
        """Accuracy over all samples of some classes, shape ``(points, draws)``."""
        own = list(classes)
        right = self.models[model].right[..., own].sum(dim=-1)
        return right.double() / int(self.samples[own].sum())

    def clean(self, model: str, classes: tuple[int, ...]) -> float:
        """The same on arrays as they were programmed."""
        own = list(classes)
        return int(self.models[model].clean[own].sum()) / int(self.samples[own].sum())

    def spreads(self, model: str, group: str) -> list[Spread]:
        """Accuracy of a model on a group at each point."""
        return self._spreads(model, self.groups[group], group == self.forgotten)

    def metrics(self) -> dict[str, float]:
        """Means and worst cases for a ``StageRecord``, as fractions.

        Returns:
            ``"<model>/<group>_accuracy_at_<point>"``, and the same with ``_worst``. A group that a
            model has no output for is absent, not zero.
        """
        return dict(self._metrics())

    def _metrics(self) -> Iterator[tuple[str, float]]:
        for model in self.models:
            for group in self.groups_of(model):
                found = self.spreads(model, group)
                for point, spread in zip(self.points, found, strict=True):
                    key = f"{model}/{group}_accuracy_{self.key(point)}"
                    yield key, spread.mean
                    yield f"{key}_worst", spread.worst

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: per model, point and class or group the mean, std and worst."""
        return {
            "sweep": self.name,
            "unit": self.unit,
            "points": list(self.points),
            "draws": self.draws,
            "seed": self.seed,
            "groups": {name: list(own) for name, own in self.groups.items()},
            "worst_is_highest": [self.forgotten] if self.forgotten in self.groups else [],
            "samples": self.samples.tolist(),
            "models": {model: self._model(model) for model in self.models},
        }

    def write(self, folder: str | Path) -> None:
        """Write ``<name>.json`` and, unless no model can name any group, ``<name>.png``.

        Args:
            folder: Made if need be.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        (folder / f"{self.name}.json").write_text(text, encoding="utf-8")
        panels = self._panels()
        if panels:
            sweep_picture.draw(panels, self.picture, self.draws, folder / f"{self.name}.png")

    def _model(self, model: str) -> dict[str, Any]:
        forgotten = self.groups.get(self.forgotten, ())
        classes = [c for c in self._classes() if c < self.models[model].outputs]
        per_class = {c: self._spreads(model, (c,), c in forgotten) for c in classes}
        per_group = {name: self.spreads(model, name) for name in self.groups_of(model)}
        return {
            "clean": {
                "classes": {str(c): self.clean(model, (c,)) for c in classes},
                "groups": {name: self.clean(model, self.groups[name]) for name in per_group},
            },
            "points": [
                {
                    "at": point,
                    "classes": {str(c): vars(found[i]) for c, found in per_class.items()},
                    "groups": {name: vars(found[i]) for name, found in per_group.items()},
                }
                for i, point in enumerate(self.points)
            ],
        }

    def _panels(self) -> list[sweep_picture.Panel]:
        return [
            sweep_picture.Panel(
                title=group,
                lines={
                    model: self._line(model, group)
                    for model in self.models
                    if group in self.groups_of(model)
                },
            )
            for group in self.groups
            if any(group in self.groups_of(model) for model in self.models)
        ]

    def _line(self, model: str, group: str) -> sweep_picture.Line:
        found = self.spreads(model, group)
        return sweep_picture.Line(
            points=self.points,
            clean=self.clean(model, self.groups[group]),
            mean=[spread.mean for spread in found],
            std=[spread.std for spread in found],
            worst=[spread.worst for spread in found],
        )

    def _classes(self) -> list[int]:
        return [c for c, count in enumerate(self.samples.tolist()) if count]

    def _spreads(self, model: str, classes: tuple[int, ...], high_is_bad: bool) -> list[Spread]:
        values = self.accuracies(model, classes)
        return [Spread.of(draws, high_is_bad=high_is_bad) for draws in values]


def checked(
    sweep: str,
    models: Mapping[str, Any],
    labels: Tensor,
    groups: Mapping[str, tuple[int, ...]],
    points: tuple[float, ...],
    *,
    draws: int,
) -> tuple[Mapping[str, tuple[int, ...]], Tensor]:
    """Refuse a sweep that could not be summed up, before anything is computed.

    Args:
        sweep: Its name, for messages.
        models: By name.
        labels: Shape ``(n,)``.
        groups: Classes by group.
        points: Of the axis.
        draws: At each point.
    Returns:
        The groups, and the samples of each class, shape ``(classes,)``.
    Raises:
        ConfigurationError: There is no model, group or draw, or points are missing, negative or
            twice.
        DataError: A group is empty, or one of its classes has no sample.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 1, 1])
        >>> checked("noise", {"base": None}, labels, {"all": (0, 1)}, (1.0,), draws=9)
        ({'all': (0, 1)}, tensor([1, 2]))
    """
    for name, given in (("model", models), ("group of classes", groups)):
        if not given:
            raise ConfigurationError(f"{sweep}: expected at least one {name}, got none.")
    if not points or min(points) < 0.0 or len({*points}) < len(points):
        raise ConfigurationError(
            f"{sweep}: expected different points of 0 or more along the axis, got {points}."
        )
    if draws < 1:
        raise ConfigurationError(f"{sweep}: expected 1 draw or more at each point, got {draws}.")
    samples = labels.bincount()
    there = {c for c, count in enumerate(samples.tolist()) if count}
    for group, classes in groups.items():
        if not classes or not there.issuperset(classes):
            raise DataError(
                f"{sweep}, group '{group}': expected classes with at least one sample each, got "
                f"{tuple(classes)}; there are samples of {tuple(sorted(there))}."
            )
    return {group: tuple(classes) for group, classes in groups.items()}, samples
