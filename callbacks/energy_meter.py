"""Energy and latency of every training step, in any Lightning logger."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl

from aihwkit_lora.callbacks.step_callback import StepCallback, callbacks_of
from aihwkit_lora.chips import Chip
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering import Ledger
from aihwkit_lora.metering.pricing import unpriced_events
from aihwkit_lora.metering.step_meter import EnergyPerStep


class EnergyMeter(StepCallback):
    """Count what each training step does on the chip and log its energy and latency.

    While it trains, reads of frozen tiles, digital MACs and optimiser updates go to the ledger. A
    step is what was counted in the phase of training since the last one, and what was written to
    arrays under any phase. Validation goes under a phase of its own and belongs to no step; the
    sanity check is not counted. The keys are listed in ``docs/callbacks.md``.

    In a distributed run reads and MACs of all ranks add up, and after each batch the ledgers of all
    ranks hold the same. The ledger is saved in checkpoints and restored on resume.

    Args:
        chip: Whose prices to use.
        ledger: Where counts are added. Programming counted there is part of the total.
        phase: Name of the phase of training steps, such as ``"unlearn:person 2"``.
        validation_phase: Name of the phase of validation.

    Example:
        >>> import aihwkit_lora as al
        >>> EnergyMeter(al.chips.get("rm-180nm"), al.Ledger(), phase="unlearn").phase
        'unlearn'
    """

    _meter: EnergyPerStep

    def __init__(
        self,
        chip: Chip,
        ledger: Ledger,
        *,
        phase: str = "train",
        validation_phase: str = "validate",
    ) -> None:
        meter = EnergyPerStep(chip, ledger, phase=phase, validation_phase=validation_phase)
        super().__init__(meter)

    @property
    def chip(self) -> Chip:
        """Whose prices are used."""
        return self._meter.chip

    @property
    def unpriced(self) -> tuple[str, ...]:
        """Events in the ledger that have no price, for energy or for time."""
        return unpriced_events(self.ledger.total(), self.chip)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count; what happened before belongs to no step.

        Raises:
            StageError: Another meter counts into this ledger, or a layer is analogue and not
                frozen.
        """
        for other in callbacks_of(trainer):
            if other is not self and isinstance(other, EnergyMeter) and other.ledger is self.ledger:
                raise StageError(
                    "EnergyMeter: expected a ledger of its own, got one that another EnergyMeter "
                    "has; everything would count twice. To price a run for several chips, use one "
                    "meter and price(ledger.total(), chip)."
                )
        super().on_train_start(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count under the phase of validation."""
        self._meter.begin_validation()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count under the phase of training again."""
        self._meter.end_validation()

    def _shown(self, row: Mapping[str, float]) -> dict[str, float]:
        return {"energy_uj": 1e6 * row["energy_j"]}
