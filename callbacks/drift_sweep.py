"""How well a model does some time after its arrays were programmed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
from aihwkit.inference.noise.base import BaseNoiseModel
from torch import nn
from torchmetrics import Metric

from aihwkit_lora.callbacks.evaluation import (
    Predict,
    evaluate,
    predict_batch,
    publish,
    undisturbed,
    validates_training,
)
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.tiles import drift_, frozen_layers


def drift_key(metric: str, seconds: float, *, worst: bool = False) -> str:
    """Name a value of a sweep in logs.

    Args:
        metric: Name of the metric.
        seconds: Time since programming.
        worst: Whether it is the worst of several draws instead of their mean.

    Example:
        >>> drift_key("accuracy", 86400.0), drift_key("accuracy", 0.5, worst=True)
        ('drift/accuracy_at_86400s', 'drift/accuracy_at_0.5s_worst')
    """
    return f"drift/{metric}_at_{seconds:.15g}s" + "_worst" * worst


class DriftSweep(pl.Callback):
    """Evaluate a metric at several times after programming, as conductances drift.

    Runs at the end of training and, if asked, after every n-th validation. Arrays, random states,
    the model's mode and the phase of its observers are afterwards what they were, so a run with a
    sweep trains exactly as one without. Logs :func:`drift_key` for each time: the mean over the
    draws and, of several, the worst. Meters stop at the end of training: list the sweep before them
    if reads of the last one shall be counted.

    Args:
        seconds: Times since programming, each 0 or more; at 0 arrays are as programmed.
        metric: Evaluated anew at each time; gives one number.
        loader: Batches to evaluate on; None for the validation loaders of the trainer.
        name: Of the metric in logs; None for that of its class.
        noise_model: How cells drift; None for the one of each layer's configuration.
        predict: From module and batch to predictions and targets; see :func:`predict_batch`.
        repeats: How often the fate of all cells is drawn anew, at least 1.
        every_n_validations: Also run after each n-th validation, at least 1; None for the end only.
        seed: Of the first draw; the next draws take the next numbers.
        phase: Name under which an observed model's reads are counted.
    Raises:
        ConfigurationError: There is no time, a time comes twice, is negative or not a number,
            ``repeats`` or ``every_n_validations`` is below 1, or several draws are to be compared
            with a metric that does not say which is worse.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> sweep = DriftSweep([0.0, 3600.0], MulticlassAccuracy(num_classes=4), name="accuracy")
        >>> sweep.keys
        ('drift/accuracy_at_0s', 'drift/accuracy_at_3600s')
    """

    def __init__(
        self,
        seconds: Sequence[float],
        metric: Metric,
        *,
        loader: Iterable[Any] | None = None,
        name: str | None = None,
        noise_model: BaseNoiseModel | None = None,
        predict: Predict = predict_batch,
        repeats: int = 1,
        every_n_validations: int | None = None,
        seed: int = 0,
        phase: str = "drift",
    ) -> None:
        self.seconds, self.metric, self.loader = tuple(map(float, seconds)), metric, loader
        self.name = name or re.sub(r"(?<!^)(?=[A-Z])", "_", type(metric).__name__).lower()
        self.noise_model, self.predict = noise_model, predict
        self.repeats, self.every_n_validations = repeats, every_n_validations
        self.seed, self.phase = seed, phase
        self._validations, self._swept_at = 0, -1
        self._check()

    def _check(self) -> None:
        sound = [second for second in self.seconds if math.isfinite(second) and second >= 0.0]
        if not sound or len({*sound}) < len(self.seconds):
            raise ConfigurationError(
                "DriftSweep: expected different times since programming of 0 s or more, got "
                f"{self.seconds}."
            )
        for name in ("repeats", "every_n_validations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"DriftSweep: expected {name} of 1 or more, got {value}.")
        if self.repeats > 1 and self.metric.higher_is_better is None:
            raise ConfigurationError(
                f"DriftSweep: expected a metric that says which of {self.repeats} draws is the "
                f"worst, got {type(self.metric).__name__} without a direction. Give its class "
                "higher_is_better = True or False, or leave out repeats=."
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all values that a sweep logs."""
        kinds = (False, True) if self.repeats > 1 else (False,)
        return tuple(drift_key(self.name, t, worst=kind) for t in self.seconds for kind in kinds)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure that the sweep at the end will work.

        Raises:
            StageError: The model has no frozen layer.
            ConfigurationError: There is nothing to evaluate on, a layer has no noise model, or the
                model has no data for one of the times.
        """
        if self.loader is None and not trainer.enable_validation:
            raise ConfigurationError(
                "DriftSweep: expected batches to evaluate on, got a trainer without validation. "
                "Pass loader=, or validation data and a validation_step."
            )
        self._swept_at = -1
        with self._without_a_trace(pl_module, draw=0):
            for seconds in self.seconds:
                drift_(pl_module, seconds, noise_model=self.noise_model)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sweep, if this validation is due."""
        if not validates_training(trainer):
            return
        self._validations += 1
        if self.every_n_validations and self._validations % self.every_n_validations == 0:
            self._sweep(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sweep, unless the last validation just did."""
        if self._swept_at != trainer.global_step:
            self._sweep(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting validations."""
        self._validations = state_dict["validations"]

    def _sweep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        draws = [self._values(trainer, pl_module, draw) for draw in range(self.repeats)]
        self._swept_at = trainer.global_step
        publish(trainer, dict(zip(self.keys, self._summary(draws), strict=True)))

    def _values(self, trainer: pl.Trainer, pl_module: pl.LightningModule, draw: int) -> list[float]:
        loaders = [self.loader] if self.loader is not None else _validation_loaders(trainer)
        values = []
        with self._without_a_trace(pl_module, draw):
            for seconds in self.seconds:
                drift_(pl_module, seconds, noise_model=self.noise_model)
                values.append(evaluate(trainer, pl_module, self.metric, loaders, self.predict))
        return values

    @contextmanager
    def _without_a_trace(self, model: nn.Module, draw: int) -> Iterator[None]:
        with undisturbed(model, phase=self.phase, seed=self.seed + draw), brought_back(model):
            yield

    def _summary(self, draws: list[list[float]]) -> Iterator[float]:
        worst = min if self.metric.higher_is_better else max
        for values in zip(*draws, strict=True):
            yield fmean(values)
            if self.repeats > 1:
                yield worst(values)


@contextmanager
def brought_back(model: nn.Module) -> Iterator[None]:
    """Let cells have a new fate in the block; then bring arrays back to their time and old fate.

    Args:
        model: A frozen model.
    """
    arrays = [layer.analog_module for _, layer in frozen_layers(model)]
    before = [(array, array.seconds, array.tensors, array.fate) for array in arrays]
    for array in arrays:
        array.fate = None
    try:
        yield
    finally:
        for array, seconds, tensors, fate in before:
            array.show_at(seconds, tensors if seconds > 0.0 else None)
            array.fate = fate


def _validation_loaders(trainer: pl.Trainer) -> list[Iterable[Any]]:
    found: Any = trainer.val_dataloaders
    if isinstance(found, Mapping):
        return list(found.values())
    return list(found) if isinstance(found, list | tuple) else [found]
