"""Proof, while something new is learnt, that what was forgotten stays forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
from torchmetrics import Metric

from aihwkit_lora.callbacks.evaluation import (
    Predict,
    evaluate,
    predict_batch,
    publish,
    undisturbed,
    validates_training,
)
from aihwkit_lora.errors import ConfigurationError, RelapseError


def relapse_key(request: str) -> str:
    """Name the metric on a forget set in logs.

    Args:
        request: Name of the request to forget.

    Example:
        >>> relapse_key("person-2")
        'relapse/person-2'
    """
    return f"relapse/{request}"


class RelapseGuard(pl.Callback):
    """Evaluate forget sets of earlier requests while a model learns; stop if one is known again.

    Give it to every ``fit`` that comes after the forgetting. Each forget set is evaluated when
    training starts, which is its baseline, after each validation, and when training ends. The
    baseline of a request is taken once and also holds in later fits of the same guard, so that many
    small relapses do not go unnoticed. Logs :func:`relapse_key` for each request. The model, its
    random numbers and the phase of its observers are left as they were. Where several processes
    train together, each of them raises.

    Args:
        forget_sets: Batches to be forgotten, by request.
        metric: How much is known of them, such as an accuracy; one number that rises with it.
        tolerance: How far above its baseline the metric may rise, 0 or more.
        limit: Instead of a tolerance, what the metric may be at most, also when training starts.
        predict: From module and batch to predictions and targets; see :func:`predict_batch`.
        name: Of the metric, for messages; None for that of its class.
        seed: Of random numbers during evaluation, such as read noise; always the same ones.
        phase: Name under which an observed model's reads are counted.
    Raises:
        ConfigurationError: There is no forget set, both or neither of ``tolerance`` and ``limit``
            are given, the tolerance is negative, or the metric falls with what is known.

    Example:
        >>> import torch
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> person_2 = [(torch.zeros(8, 4), torch.full((8,), 2))]
        >>> accuracy = MulticlassAccuracy(num_classes=4)
        >>> guard = RelapseGuard({"person 2": person_2}, accuracy, tolerance=0.05)
        >>> guard.baselines
        {}
    """

    def __init__(
        self,
        forget_sets: Mapping[str, Iterable[Any]],
        metric: Metric,
        *,
        tolerance: float | None = None,
        limit: float | None = None,
        predict: Predict = predict_batch,
        name: str | None = None,
        seed: int = 0,
        phase: str = "relapse",
    ) -> None:
        self.forget_sets, self.metric = dict(forget_sets), metric
        self.tolerance, self.limit = tolerance, limit
        self.predict, self.seed, self.phase = predict, seed, phase
        self.name = name or type(metric).__name__
        self.baselines: dict[str, float] = {}
        self._evaluated_at = -1
        self._check()

    def _check(self) -> None:
        if not self.forget_sets:
            raise ConfigurationError("RelapseGuard: expected a forget set or more, got none.")
        if (self.tolerance is None) == (self.limit is None):
            raise ConfigurationError(
                "RelapseGuard: expected either a tolerance or a limit, got "
                f"tolerance={self.tolerance} and limit={self.limit}. Give one of them."
            )
        if self.tolerance is not None and not self.tolerance >= 0.0:
            raise ConfigurationError(
                f"RelapseGuard: expected a tolerance of 0 or more, got {self.tolerance}."
            )
        if self.metric.higher_is_better is False:
            raise ConfigurationError(
                "RelapseGuard: expected a metric that rises with what is known of a forget set, "
                f"got {type(self.metric).__name__}, which falls. Pass an accuracy, or a metric of "
                "your own that gives the negative."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the baseline of each request that has none yet.

        Raises:
            RelapseError: A forget set is above the limit already.
        """
        sets = self.forget_sets.items()
        new = {request: loader for request, loader in sets if request not in self.baselines}
        self._guard(trainer, pl_module, new)
        self._evaluated_at = -1

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate all forget sets.

        Raises:
            RelapseError: One of them is known again.
        """
        if validates_training(trainer):
            self._guard(trainer, pl_module, self.forget_sets)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate all forget sets a last time, unless the last validation just did.

        Raises:
            RelapseError: One of them is known again.
        """
        if self._evaluated_at != trainer.global_step:
            self._guard(trainer, pl_module, self.forget_sets)

    def state_dict(self) -> dict[str, Any]:
        """The baselines."""
        return {"baselines": dict(self.baselines)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the baselines of a checkpoint."""
        self.baselines = dict(state_dict["baselines"])

    def _guard(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        forget_sets: Mapping[str, Iterable[Any]],
    ) -> None:
        self._evaluated_at = trainer.global_step
        found = {}
        for request, loader in forget_sets.items():
            with undisturbed(pl_module, phase=self.phase, seed=self.seed):
                found[request] = evaluate(trainer, pl_module, self.metric, [loader], self.predict)
        publish(trainer, {relapse_key(request): value for request, value in found.items()})
        for request, value in found.items():
            self._compare(request, value, trainer.global_step)

    def _compare(self, request: str, found: float, step: int) -> None:
        highest, origin = self._highest(self.baselines.setdefault(request, found))
        # Not "found > highest", which a metric that is not a number would pass.
        if not found <= highest:
            raise RelapseError(
                f"request '{request}', step {step}: expected {self.name} of {highest:.4g} or less "
                f"on its forget set ({origin}), got {found:.4g}. The model knows again what it was "
                "made to forget: go back to an earlier checkpoint, see that the unlearning adapter "
                "is active, or let the objective hold this forget set down."
            )

    def _highest(self, baseline: float) -> tuple[float, str]:
        if self.limit is not None:
            return self.limit, "the limit"
        tolerance = self.tolerance or 0.0
        origin = f"{baseline:.4g} at the start of training, and a tolerance of {tolerance:g}"
        return baseline + tolerance, origin
