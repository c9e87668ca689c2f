"""Programming pulses of every training step, in any Lightning logger."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.simulator.configs.devices import PulsedDevice
from torch import nn

from aihwkit_lora.callbacks.step_counts import StepCounts
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering import Ledger
from aihwkit_lora.tiles import FrozenLinear

_LOGGED = ("set_pulses", "reset_pulses", "verify_reads")


class PulseCounter(pl.Callback):
    """Log the programming pulses and verify reads of each training step.

    Pulses come from whatever writes to the ledger: ``program_`` and ``reprogram_``. On a hybrid
    model they are zero, which is the point. aihwkit's own training of pulsed tiles leaves no count
    on a CPU, so models with such tiles are refused rather than reported as zero.

    Logs ``pulses``, ``set_pulses``, ``reset_pulses`` and ``verify_reads`` of the step, and
    ``pulses_total``. Loggers hold them as floats; the exact whole numbers are in the ledger, which
    is saved in checkpoints and restored on resume.

    Args:
        ledger: The record that ``program_`` and ``reprogram_`` add to.

    Example:
        >>> import aihwkit_lora as al
        >>> PulseCounter(al.Ledger()).state_key
        'PulseCounter'
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._steps = StepCounts(ledger)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse models whose pulses cannot be counted.

        Raises:
            StageError: A layer would be trained by pulses that nobody counts.
        """
        for name, layer in pl_module.named_modules():
            if _trains_by_pulses(layer):
                raise StageError(
                    f"layer '{name}': expected pulses that can be counted, got an unfrozen pulsed "
                    "tile, which aihwkit trains without a count on the CPU. Call program_(model, "
                    "chip) and freeze_(model), or drop PulseCounter."
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out what happened before training, such as the first programming."""
        self._steps = StepCounts(self.ledger, step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Log what this step added."""
        step = self._steps.after(trainer.global_step)
        if step is None:
            return
        pl_module.log("pulses", float(step.pulses), prog_bar=True)
        pl_module.log("pulses_total", float(self.ledger.total().pulses))
        pl_module.log_dict({event: float(step[event]) for event in _LOGGED})

    def state_dict(self) -> dict[str, Any]:
        """The ledger, as plain strings and whole numbers."""
        return self.ledger.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the ledger of a checkpoint."""
        self.ledger.load_state_dict(state_dict)


def _trains_by_pulses(layer: nn.Module) -> bool:
    if not isinstance(layer, AnalogLayerBase) or isinstance(layer, FrozenLinear):
        return False
    if layer.IS_CONTAINER:
        return False
    configs = (getattr(tile, "rpu_config", None) for tile in layer.analog_tiles())
    return any(isinstance(getattr(config, "device", None), PulsedDevice) for config in configs)
