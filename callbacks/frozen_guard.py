"""Proof, while training runs, that no frozen conductance moves."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from aihwkit_lora.errors import ConfigurationError, FrozenConductanceError
from aihwkit_lora.tiles import fingerprint, verify


class FrozenGuard(pl.Callback):
    """Stop training as soon as a frozen conductance is found to have changed.

    The fingerprint is taken when training starts and compared at the end of each epoch and of
    training, and every ``every_n_steps`` steps if asked. It also notices ``reprogram_``: guard only
    what shall not be written at all.

    Args:
        every_n_steps: Also compare after each n-th optimiser step; hashing costs a pass over all
            conductances. At least 1, or None.
    Raises:
        ConfigurationError: ``every_n_steps`` is below 1.

    Example:
        >>> FrozenGuard(every_n_steps=100).fingerprint is None
        True
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigurationError(
                f"FrozenGuard: expected every_n_steps of 1 or more, got {every_n_steps}."
            )
        self.every_n_steps = every_n_steps
        self.fingerprint: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the fingerprint.

        Raises:
            StageError: The model has no frozen layer.
        """
        self.fingerprint = fingerprint(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Compare, if this step is due."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._compare(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare."""
        self._compare(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare a last time."""
        self._compare(trainer, pl_module)

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if fingerprint(pl_module) == self.fingerprint:
            return
        verify(pl_module)  # names the tile, if something wrote it behind our back
        raise FrozenConductanceError(
            f"step {trainer.global_step}: expected the conductances of the start of training, got "
            "others, written by reprogram_. Take FrozenGuard off for runs that reprogram."
        )
