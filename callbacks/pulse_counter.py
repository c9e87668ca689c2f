"""Programming pulses of every training step, in any Lightning logger."""

from __future__ import annotations

from collections.abc import Mapping

from aihwkit_lora.callbacks.step_callback import StepCallback
from aihwkit_lora.metering import Ledger
from aihwkit_lora.metering.step_meter import PulsesPerStep


class PulseCounter(StepCallback):
    """Log the programming pulses, verify reads and wear of each training step.

    Pulses come from whatever writes to the ledger, ``program_`` and ``reprogram_``, and from
    training in place: aihwkit's pulsed tiles are watched, and a layer whose pulses cannot be
    counted is refused rather than reported as zero. On a hybrid model pulses are zero, which is the
    point. The keys are listed in ``docs/callbacks.md``.

    Loggers get floats; the exact whole numbers are in the ledger, which is saved in checkpoints and
    restored on resume. In a distributed run all ranks have to write the same.

    Args:
        ledger: The record that ``program_`` and ``reprogram_`` add to.
        phase: Under which name the pulses of training in place are counted.
        seed: Of the draws where aihwkit counts no pulses; see ``watch_pulses``.

    Example:
        >>> import aihwkit_lora as al
        >>> PulseCounter(al.Ledger()).state_key
        'PulseCounter'
    """

    def __init__(self, ledger: Ledger, *, phase: str = "train", seed: int = 0) -> None:
        super().__init__(PulsesPerStep(ledger, phase=phase, seed=seed))

    def _shown(self, row: Mapping[str, float]) -> dict[str, float]:
        return {"pulses": row["pulses"]}
