"""What a ledger gained since the last training step."""

from __future__ import annotations

from aihwkit_lora.metering import Counts, Ledger


class StepCounts:
    """Cut a growing ledger into training steps.

    Args:
        ledger: The ledger that grows.
        without: Phases that belong to no step, such as validation.
        step: Optimiser steps taken so far.

    Example:
        >>> ledger = Ledger()
        >>> steps = StepCounts(ledger)
        >>> ledger.add(Counts({"set_pulses": 3}), phase="train", layer="head")
        >>> steps.next()["set_pulses"], steps.next()["set_pulses"]
        (3, 0)
    """

    def __init__(self, ledger: Ledger, *, without: tuple[str, ...] = (), step: int = 0) -> None:
        self._ledger, self._without, self._step = ledger, without, step
        self._before = self._total()

    def next(self) -> Counts:
        """Return what was added since the last call, or since the start."""
        total = self._total()
        step, self._before = total.minus(self._before), total
        return step

    def after(self, step: int) -> Counts | None:
        """Return what was added up to an optimiser step.

        Args:
            step: Optimiser steps taken by now, such as ``trainer.global_step``.
        Returns:
            None if there was no step since the last call: gradients accumulate over batches.
        """
        if step == self._step:
            return None
        self._step = step
        return self.next()

    def _total(self) -> Counts:
        phases = (phase for phase in self._ledger.phases() if phase not in self._without)
        return Counts.sum(self._ledger.total(phase=phase) for phase in phases)
