"""From the hooks of a trainer to a meter, and from its values to every logger."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from aihwkit_lora.callbacks.ranks import ranks_of
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering import Ledger
from aihwkit_lora.metering.step_meter import StepMeter


class StepCallback(pl.Callback):
    """Calls a meter, and logs one row for each batch in which an optimiser has stepped.

    Several callbacks of this kind share a row. Its values are also metrics that other callbacks can
    watch, such as ``EarlyStopping``.

    Args:
        meter: What counts.
    """

    def __init__(self, meter: StepMeter) -> None:
        self._meter = meter
        self._row: dict[str, float] | None = None
        self._born_in = os.getpid()

    @property
    def ledger(self) -> Ledger:
        """Where counts are added."""
        return self._meter.ledger

    @property
    def phase(self) -> str:
        """Name of the phase of training in the ledger; may be changed between two batches."""
        return self._meter.phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._meter.phase = name

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count; what happened before belongs to no step.

        Raises:
            StageError: The optimisers have no parameter of the module, so that their steps cannot
                be told from others; DeepSpeed's are like that.
        """
        _require_own_parameters(trainer, pl_module)
        if self._born_in != os.getpid() and trainer.is_global_zero:
            warnings.warn(
                f"{type(self).__name__}: this process got a copy of the ledger, so that of the "
                "script stays as it is. Take the counts from the loggers or from a checkpoint, or "
                "launch with strategy='ddp'.",
                stacklevel=2,
            )
        self._meter.start(pl_module, ranks_of(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Log what the step cost, if there was one."""
        self._row = self._meter.end_batch()
        together = [one for one in callbacks_of(trainer) if isinstance(one, StepCallback)]
        rows = [one for one in together if one._row]
        if together[-1] is self and rows:
            _log(rows, trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End counting."""
        self._meter.finish()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End counting; what was counted stays in the ledger."""
        self._meter.stop()

    def state_dict(self) -> dict[str, Any]:
        """The ledger and the step that is open, as plain strings and whole numbers."""
        return self._meter.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the ledger and the open step of a checkpoint."""
        self._meter.load_state_dict(state_dict)

    @abstractmethod
    def _shown(self, row: Mapping[str, float]) -> dict[str, float]:
        """What the progress bar shows of a row."""


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All callbacks of a trainer, in the order in which they are called.

    Args:
        trainer: Any trainer.

    Example:
        >>> trainer = pl.Trainer(
        ...     logger=False, accelerator="cpu", enable_checkpointing=False, barebones=True
        ... )
        >>> callbacks_of(trainer)
        []
    """
    # Lightning 2.6.6 sets these attributes where mypy does not see it.
    found: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def _require_own_parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    own = {id(parameter) for parameter in pl_module.parameters()}
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    found = [id(parameter) in own for group in groups for parameter in group["params"]]
    if found and not any(found):
        raise StageError(
            f"{type(trainer.strategy).__name__}: expected optimisers over parameters of "
            f"{type(pl_module).__name__}, got optimisers over copies of them, so that steps of "
            "this module cannot be told. Use strategy='ddp' or 'fsdp'."
        )


def _log(callbacks: list[StepCallback], trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    # Not self.log: it keeps single precision, takes milliseconds for as many values, and in manual
    # optimisation Lightning 2.6.6 logs them again after batches without a step.
    values: dict[str, float] = {}
    for callback in callbacks:
        row = callback._row or {}
        values |= row
        trainer.progress_bar_metrics.update(callback._shown(row))
    tensors = torch.tensor(list(values.values()), dtype=torch.float64)
    trainer.callback_metrics.update(zip(values, tensors.unbind(), strict=True))
    step = _step(trainer, pl_module)
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every and ((step + 1) % every == 0 or trainer.should_stop):
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)


def _step(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """The number that Lightning gives to what a module logs in this batch."""
    if pl_module.automatic_optimization:
        return trainer.global_step - 1
    return trainer.fit_loop.epoch_loop.total_batch_idx
