"""Learn something new by any objective, beside what earlier adapters do."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import CombinedLoader
from torchmetrics import Metric

from aihwkit_lora.callbacks.evaluation import Predict
from aihwkit_lora.callbacks.objective_module import (
    Loss,
    ObjectiveModule,
    OptimizerFactory,
    predict_logits,
)
from aihwkit_lora.callbacks.relapse_guard import RelapseGuard


class ContinualModule(ObjectiveModule):
    """Train the newest adapters of a frozen model on a new task, by an objective.

    As :class:`UnlearningModule`, for batches ``{"new": (inputs, targets), "replay": (inputs,
    targets)}``. Meters of the trainer count under ``continual:<task>``.

    Args:
        module: The user's module around a frozen model with adapters; put the new one on with
            ``add_adapter_``, so that the earlier ones stay active and fixed.
        objective: Gives the loss; see ``continual.objectives``.
        task: Name of what is to be learnt, for logs and the ledger.
        guard: Stops training if something that was forgotten comes back.
        optimizer: From the parameters that are trained to an optimiser; None for the user's.
        max_steps: Optimiser steps of one fit, at least 1; must be given if the objective is
            unbounded.
        metric: Of the validation parts, which logs call accuracy; None for that of classes.
        predict: From module and batch to predictions and targets, as the metric takes them.
        heads: Full names, in the user's module, of digital modules that are trained as well.
    Raises:
        StageError: No layer is frozen, no adapter is trainable, or something else is.
        ConfigurationError: The task has no name, ``max_steps`` is below 1, or it is missing with an
            unbounded objective.

    Example:
        >>> import aihwkit_lora as al
        >>> from peft import LoraConfig
        >>> from torch import nn
        >>> from aihwkit_lora.continual import objectives
        >>> from aihwkit_lora.continual.composition import add_adapter_
        >>> class Classifier(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         net = al.convert(nn.Sequential(nn.Linear(8, 4)), al.chips.get("rm-180nm"))
        ...         net = al.freeze_(net, programmed_by="example")
        ...         self.model = add_adapter_(net, "learn", LoraConfig(r=2, target_modules=["0"]))
        ...
        ...     def forward(self, x):
        ...         return self.model(x)
        >>> module = ContinualModule(Classifier(), objectives.get("replay")(), task="person 5")
        >>> module.phase, module.key("loss")
        ('continual:person 5', 'continual/person 5/loss')
    """

    parts = ("new", "replay")
    verb = "continual"

    def __init__(
        self,
        module: pl.LightningModule,
        objective: Loss,
        *,
        task: str,
        guard: RelapseGuard | None = None,
        optimizer: OptimizerFactory | None = None,
        max_steps: int | None = None,
        metric: Metric | None = None,
        predict: Predict = predict_logits,
        heads: Collection[str] = (),
    ) -> None:
        super().__init__(
            module,
            objective,
            name=task,
            optimizer=optimizer,
            max_steps=max_steps,
            metric=metric,
            predict=predict,
            heads=heads,
        )
        self.guard = guard

    @property
    def task(self) -> str:
        """Name of what is to be learnt."""
        return self.name

    def data(
        self, new: Iterable[Any] | None, replay: Iterable[Any] | None = None
    ) -> CombinedLoader:
        """Pair batches of the new task with replayed ones; the shorter loader starts over.

        Args:
            new: Batches of inputs and targets to be learnt.
            replay: Batches of earlier tasks, without anything that was forgotten.
        Raises:
            ConfigurationError: One is None that the objective needs.
        """
        return self._combined(new=new, replay=replay)

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks of the user's module, and the guard."""
        given = self.module.configure_callbacks()
        own = [given] if isinstance(given, pl.Callback) else [*given]
        return own if self.guard is None else [*own, self.guard]
