"""End forgetting once a validation part says that it is done."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from aihwkit_lora.callbacks.evaluation import validates_training
from aihwkit_lora.callbacks.unlearning_module import UnlearningModule
from aihwkit_lora.errors import ConfigurationError


class ForgettingStopper(pl.Callback):
    """Stop when the forget set is forgotten and the rest is kept, both on validation data.

    It looks only at the accuracies that :class:`UnlearningModule` logs in the validations of a fit,
    never at test loaders. A stop that is chosen on data is no result on that data: report accuracy
    on other images.

    Args:
        forget_at_most: Accuracy on the validation part ``"forget"``, 0 to 1.
        retain_at_least: Accuracy on the validation part ``"retain"``, 0 to 1.
        patience: How many validations in a row must have met both, at least 1.
    Raises:
        ConfigurationError: A value is out of its range.

    Example:
        >>> ForgettingStopper(forget_at_most=0.01, retain_at_least=0.95).met
        0
    """

    def __init__(self, *, forget_at_most: float, retain_at_least: float, patience: int = 1) -> None:
        for name, value in (
            ("forget_at_most", forget_at_most),
            ("retain_at_least", retain_at_least),
        ):
            if not 0.0 <= value <= 1.0:
                raise ConfigurationError(
                    f"ForgettingStopper: expected {name} from 0 to 1, got {value}."
                )
        if patience < 1:
            raise ConfigurationError(
                f"ForgettingStopper: expected patience of 1 or more, got {patience}."
            )
        self.forget_at_most, self.retain_at_least = forget_at_most, retain_at_least
        self.patience = patience
        self.met = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that there will be something to look at.

        Raises:
            ConfigurationError: The module is no :class:`UnlearningModule`, or the validation
                loaders lack a part.
        """
        if not isinstance(pl_module, UnlearningModule):
            raise ConfigurationError(
                "ForgettingStopper: expected an UnlearningModule, got "
                f"{type(pl_module).__name__}. Use Lightning's EarlyStopping on a value of yours."
            )
        loaders = trainer.val_dataloaders
        if not isinstance(loaders, dict) or not {*pl_module.parts} <= loaders.keys():
            raise ConfigurationError(
                "ForgettingStopper: expected validation loaders "
                "{'forget': ..., 'retain': ...}, got "
                f"{[*loaders] if isinstance(loaders, dict) else type(loaders).__name__}. Pass them "
                "as val_dataloaders of fit."
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if both have been met often enough."""
        if not validates_training(trainer) or not isinstance(pl_module, UnlearningModule):
            return
        found = trainer.callback_metrics
        forgotten = found[pl_module.key("forget_accuracy")] <= self.forget_at_most
        kept = found[pl_module.key("retain_accuracy")] >= self.retain_at_least
        self.met = self.met + 1 if bool(forgotten and kept) else 0
        if self.met >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """How many validations in a row have met both."""
        return {"met": self.met}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.met = state_dict["met"]
