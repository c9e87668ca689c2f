"""Forget by any objective, in any trainer of Lightning."""

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


class UnlearningModule(ObjectiveModule):
    """Train the adapters of a frozen model to forget, by an objective instead of its own loss.

    A batch is ``{"forget": (inputs, targets), "retain": (inputs, targets)}``; :meth:`data` makes
    loaders of them. Validation loaders are a mapping of the same form, on images that are not
    trained on: their accuracies are logged, and :class:`ForgettingStopper` stops by them. Loaders
    of other names, ``trainer.test`` and ``trainer.predict`` go to the user's module; nothing of the
    test data is looked at in training. Meters of the trainer count under ``unlearn:<request>``.

    With an adapter on frozen weights the data is suppressed, not gone: the arrays still hold it.

    Args:
        module: The user's module around a frozen model with adapters. What it calls in
            ``training_step`` is replaced, its optimisers and other hooks stay.
        objective: Gives the loss; see ``unlearning.objectives``.
        request: Name of what is to be forgotten, for logs and the ledger.
        optimizer: From the parameters that are trained to an optimiser; None for the user's.
        max_steps: Optimiser steps of one fit, at least 1; must be given if the objective is
            unbounded.
        metric: Of the validation parts, which logs call accuracy; None for that of classes.
        predict: From module and batch to predictions and targets, as the metric takes them.
        heads: Full names, in the user's module, of digital modules that are trained as well.
    Raises:
        StageError: No layer is frozen, no adapter is trainable, or something else is.
        ConfigurationError: The request has no name, ``max_steps`` is below 1, or it is missing
            with an unbounded objective.

    Example:
        >>> import aihwkit_lora as al
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from aihwkit_lora.unlearning import objectives
        >>> class Classifier(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         net = al.convert(nn.Sequential(nn.Linear(8, 4)), al.chips.get("rm-180nm"))
        ...         net = al.freeze_(net, programmed_by="example")
        ...         self.model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        ...
        ...     def forward(self, x):
        ...         return self.model(x)
        >>> objective = objectives.get(objectives.DEFAULT)()
        >>> module = UnlearningModule(Classifier(), objective, request="person 2")
        >>> module.phase, module.key("forget_accuracy")
        ('unlearn:person 2', 'unlearn/person 2/forget_accuracy')
    """

    parts = ("forget", "retain")
    verb = "unlearn"

    def __init__(
        self,
        module: pl.LightningModule,
        objective: Loss,
        *,
        request: str,
        optimizer: OptimizerFactory | None = None,
        max_steps: int | None = None,
        metric: Metric | None = None,
        predict: Predict = predict_logits,
        heads: Collection[str] = (),
    ) -> None:
        super().__init__(
            module,
            objective,
            name=request,
            optimizer=optimizer,
            max_steps=max_steps,
            metric=metric,
            predict=predict,
            heads=heads,
        )

    @property
    def request(self) -> str:
        """Name of what is to be forgotten."""
        return self.name

    def data(
        self, forget: Iterable[Any] | None, retain: Iterable[Any] | None = None
    ) -> CombinedLoader:
        """Pair batches to forget with batches to retain; the shorter loader starts over.

        Args:
            forget: Batches of inputs and targets to be forgotten.
            retain: Batches of what shall be kept.
        Raises:
            ConfigurationError: One is None that the objective needs.
        """
        return self._combined(forget=forget, retain=retain)
