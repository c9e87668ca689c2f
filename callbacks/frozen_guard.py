"""Proof, while training runs, that no frozen conductance moves."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from aihwkit_lora.callbacks.ranks import on_all_ranks
from aihwkit_lora.errors import ConfigurationError, FrozenConductanceError
from aihwkit_lora.tiles import fingerprint, verify


class FrozenGuard(pl.Callback):
    """Stop training as soon as a frozen conductance is found to have changed.

    The fingerprint is taken when training starts and compared at the end of each epoch and of
    training, and every ``every_n_steps`` steps if asked. It also notices ``reprogram_``: guard only
    what shall not be written at all. Where several processes train together, all have to hold the
    same conductances; if one does not, each of them raises.

    Args:
        every_n_steps: Also compare after each n-th optimiser step, or after the batch in which it
            falls; hashing costs a pass over all conductances. At least 1, or None.
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
        self._compared_at = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the fingerprint, and compare it with those of the other processes.

        Raises:
            StageError: The model has no frozen layer.
            FrozenConductanceError: Two ranks hold different conductances; raised on every rank.
        """
        self.fingerprint, self._compared_at = fingerprint(pl_module), trainer.global_step
        ranks = on_all_ranks(self.fingerprint, trainer)
        for rank, found in enumerate(ranks):
            if found != ranks[0]:
                raise FrozenConductanceError(
                    f"rank 0 and rank {rank}: expected the same conductances, got fingerprints "
                    f"{ranks[0][:12]}… and {found[:12]}…. Each process has programmed a chip of "
                    "its own: start from the same weights and pass all of them the same seed, "
                    "program_(model, chip, seed=0)."
                )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Compare, if this step is due."""
        every = self.every_n_steps
        # A batch may take no step, or several.
        if every is not None and trainer.global_step // every > self._compared_at // every:
            self._compare(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare."""
        self._compare(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare a last time."""
        self._compare(trainer, pl_module)

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own, self._compared_at = fingerprint(pl_module), trainer.global_step
        # Every rank learns of all before it raises; one that raised alone would let others wait.
        ranks = on_all_ranks(own, trainer)
        changed = [rank for rank, found in enumerate(ranks) if found != self.fingerprint]
        if not changed:
            return
        if own == self.fingerprint:
            raise FrozenConductanceError(
                f"step {trainer.global_step}: expected the conductances of the start of training "
                f"on every rank, got others on rank {changed[0]}, but not on rank "
                f"{trainer.global_rank}. See the error of rank {changed[0]}; a write that is meant "
                "has to happen on all ranks, with the same seed."
            )
        verify(pl_module)  # names the tile, if something wrote it behind our back
        raise FrozenConductanceError(
            f"step {trainer.global_step}: expected the conductances of the start of training, got "
            "others, written by reprogram_. Take FrozenGuard off for runs that reprogram."
        )
