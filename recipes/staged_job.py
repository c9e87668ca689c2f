"""What the jobs of all recipes share: a model on arrays, sweeps, and closing a stage's books."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import nn

import aihwkit_lora as al
from aihwkit_lora.chips import Chip
from aihwkit_lora.metering import Counts, Ledger
from aihwkit_lora.recipes.accuracy_sweep import AccuracySweep
from aihwkit_lora.recipes.drift_over_time import NoDrift
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.reporting import StageRecord, StepRecord


class StagedJob:
    """The stages of a run on one chip; recipes derive from it.

    Args:
        chip: Where the model runs, and whose prices hold.
        folder: Where stages, logs and pictures go.
    """

    def __init__(self, chip: Chip, folder: RunFolder) -> None:
        self.chip, self.folder = chip, folder

    def _on_arrays(
        self, learnt: nn.Module, *, seed: int, digital: Sequence[str] = ()
    ) -> tuple[nn.Module, Counts]:
        """Convert a model, program it by write–verify and freeze it; count what that took."""
        ledger = Ledger()
        model = al.convert(learnt, self.chip, exclude_modules=digital).requires_grad_(False)
        al.program_(model, self.chip, ledger=ledger, phase="program", seed=seed)
        return al.freeze_(model), ledger.total()

    def _looked_at(
        self,
        name: str,
        model: nn.Module,
        start: float,
        *sweeps: AccuracySweep | NoDrift,
        metrics: Mapping[str, float] | None = None,
    ) -> Finished:
        """Write sweeps down, in a stage that began at ``start`` and trains nothing."""
        found = dict(metrics or {})
        for sweep in sweeps:
            sweep.write(self.folder.path)
            if isinstance(sweep, NoDrift):
                self.folder.say(f"{name}: {sweep.reason}")
            found |= sweep.metrics()
        # Whatever the stage before has left may want a gradient.
        return self._finished(name, model, Counts(), start, metrics=found, trained=0)

    def _finished(
        self,
        name: str,
        model: nn.Module,
        counts: Counts,
        start: float,
        *,
        metrics: Mapping[str, float],
        steps: tuple[StepRecord, ...] = (),
        trained: int | None = None,
    ) -> Finished:
        """Record a stage that began at ``start``; ``trained`` if the model does not say it now."""
        frozen = next(al.frozen_layers(model), None) is not None
        record = StageRecord(
            name=name,
            metrics=metrics,
            counts=counts,
            energy=al.price(counts, self.chip),
            trainable_parameters=trainable(model) if trained is None else trained,
            fingerprint=al.fingerprint(model) if frozen else "",
            steps=steps,
            wall_s=time.perf_counter() - start,
        )
        return Finished(model, record)


def trainable(model: nn.Module) -> int:
    """Count scalars that get a gradient.

    Args:
        model: Any model.

    Example:
        >>> trainable(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False)))
        8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
