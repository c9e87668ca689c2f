"""Energy and latency of every training step, in any Lightning logger."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from aihwkit_lora.callbacks.step_counts import StepCounts
from aihwkit_lora.chips import Chip
from aihwkit_lora.metering import Ledger, price
from aihwkit_lora.metering.observe import Observer


class EnergyMeter(pl.Callback):
    """Count what each training step does on the chip and log its energy and latency.

    While it trains, reads of frozen tiles, digital MACs and optimiser updates go to the ledger;
    validation goes under a phase of its own and does not belong to a step. Logs ``energy_j`` and
    ``latency_s`` of the step and ``energy_total_j``, the sum over the whole ledger.

    Args:
        chip: Whose prices to use.
        ledger: Where counts are added. Programming counted there is part of the energy.
        phase: Name of the phase of training steps.
        validation_phase: Name of the phase of validation.

    Example:
        >>> import aihwkit_lora as al
        >>> EnergyMeter(al.chips.get("rm-180nm"), al.Ledger(), phase="unlearn").phase
        'unlearn'
    """

    def __init__(
        self,
        chip: Chip,
        ledger: Ledger,
        *,
        phase: str = "train",
        validation_phase: str = "validate",
    ) -> None:
        self.chip, self.ledger = chip, ledger
        self.phase, self.validation_phase = phase, validation_phase
        self._observer: Observer | None = None
        self._steps = StepCounts(ledger, without=(validation_phase,))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to observe the model."""
        self._steps = StepCounts(
            self.ledger, without=(self.validation_phase,), step=trainer.global_step
        )
        mapping = self.chip.mapping
        self._observer = Observer(pl_module, self.ledger, phase=self.phase, mapping=mapping)
        self._observer.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Log what this step cost."""
        counts = self._steps.after(trainer.global_step)
        if counts is None:
            return
        step = price(counts, self.chip)
        whole = price(self.ledger.total(), self.chip)
        pl_module.log("energy_j", step.energy_j.value, prog_bar=True)
        pl_module.log("latency_s", step.latency_s.value)
        pl_module.log("energy_total_j", whole.energy_j.value)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count under the phase of validation."""
        if self._observer is not None:
            self._observer.phase = self.validation_phase

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count under the phase of training again."""
        if self._observer is not None:
            self._observer.phase = self.phase

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop observing."""
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop observing; what was counted stays in the ledger."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """The ledger, as plain strings and whole numbers."""
        return self.ledger.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the ledger of a checkpoint."""
        self.ledger.load_state_dict(state_dict)

    def _stop(self) -> None:
        if self._observer is not None:
            self._observer.stop()
            self._observer = None
