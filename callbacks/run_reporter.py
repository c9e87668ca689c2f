"""A report on disk of every fit, also of one that fails."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from aihwkit_lora.callbacks.evaluation import validates_training
from aihwkit_lora.callbacks.ranks import on_all_ranks
from aihwkit_lora.chips import Chip
from aihwkit_lora.errors import AihwkitLoraError, ConfigurationError
from aihwkit_lora.metering import Counts, Ledger, price
from aihwkit_lora.metering.step_meter import OptimizerSteps, StepCounts
from aihwkit_lora.metering.step_values import LOGGED, of_phase
from aihwkit_lora.reporting import RunReport, StageRecord, StepRecord, environment
from aihwkit_lora.tiles import fingerprint, frozen_layers

_OF_METERS = frozenset(value.key for value in LOGGED)


class RunReporter(pl.Callback):
    """Write a :class:`RunReport` when a fit ends, or is ended by an exception.

    Each fit is one stage of an arm: its metrics, what was counted in its phase, whatever was
    written to arrays meanwhile, what that cost, and every step. Fits with the same path and other
    stage names, such as ``forget`` and then ``continue``, go to the same file. A fit that an
    exception ends is marked as interrupted; once it has been resumed from a checkpoint and
    finished, its stage takes the place of the interrupted one. ``aihwkit-lora report PATH`` prints
    the file.

    List it after the meters that count into the ledger. Where several processes train together,
    the first of them writes.

    Args:
        path: The file, such as ``runs/report.json``.
        chip: Whose prices to use.
        ledger: Where meters count.
        stage: Name of the stage.
        phase: The phase of the ledger that training is counted under.
        arm: Name of the arm: ``hybrid``, ``reprogram``, ``digital``, …
        recipe: Name of the recipe.
        seed: Of the run, for the record.
        config: Of the run, for the record: anything that JSON can hold. Fits add to it.
        metrics: Names of the callback metrics to keep; None for all but those of the meters.
        overwrite: Whether a finished stage of this name is replaced.

    Example:
        >>> import aihwkit_lora as al
        >>> chip, ledger = al.chips.get("rm-180nm"), al.Ledger()
        >>> reporter = RunReporter("report.json", chip, ledger, stage="forget", phase="unlearn")
        >>> reporter.state_key
        "RunReporter{'arm': 'hybrid', 'stage': 'forget'}"
    """

    def __init__(
        self,
        path: str | Path,
        chip: Chip,
        ledger: Ledger,
        *,
        stage: str,
        phase: str = "train",
        arm: str = "hybrid",
        recipe: str = "fit",
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        metrics: Collection[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path, self.chip, self.ledger = Path(path), chip, ledger
        self.stage, self.phase, self.arm = stage, phase, arm
        self.recipe, self.seed, self.config = recipe, seed, dict(config or {})
        self.metrics, self.overwrite = metrics, overwrite
        self._optimizers = OptimizerSteps()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._counts = StepCounts(self.ledger, select=self._of_stage)
        self._before = self._of_stage(self.ledger)
        self._steps: list[StepRecord] = []
        self._wall_s, self._started = 0.0, math.nan
        self._resumed = False

    @property
    def state_key(self) -> str:
        """Stages have states of their own in a checkpoint."""
        return self._generate_state_key(arm=self.arm, stage=self.stage)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; a checkpoint comes after this."""
        if stage == "fit":
            self._begin_anew()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the stage, if its place in the file is free.

        Raises:
            ConfigurationError: The file is that of another chip, recipe or seed, or has a finished
                stage of this name, or the ledger lacks what the checkpoint had counted; raised on
                every rank.
            DataError: The file is no report; raised on every rank.
        """
        error = on_all_ranks(self._hindrance() if trainer.is_global_zero else None, trainer)[0]
        if error is not None:
            raise error
        if self._resumed:
            self._counts.skip()
        else:
            self._before = self._of_stage(self.ledger)
            self._counts.restart()
        self._optimizers.start(pl_module)
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Record the step, if there was one."""
        if self._optimizers.take():
            counts = self._counts.next()
            energy_j = price(counts, self.chip).energy_j.value
            self._record(energy_j=energy_j, pulses=counts.pulses)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add metrics to the last step."""
        if validates_training(trainer) and self._steps:
            last = self._steps.pop()
            metrics = self._finite(trainer)
            self._record(energy_j=last.energy_j, pulses=last.pulses, metrics=metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop looking at optimisers."""
        self._optimizers.stop()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the finished stage."""
        self._write(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Write the stage as far as it got, if it had begun."""
        self._optimizers.stop()
        if math.isfinite(self._started):
            message = f"{type(exception).__name__}: {exception}"
            self._write(trainer, pl_module, interrupted=message.removesuffix(": "))

    def state_dict(self) -> dict[str, Any]:
        """Where the stage began and its steps so far, as plain values."""
        self._counts.collect()
        return {
            "before": self._before.to_dict(),
            "open": self._counts.open.to_dict(),
            "energy_j": [step.energy_j for step in self._steps],
            "pulses": [step.pulses for step in self._steps],
            "metrics": {step.step: dict(step.metrics) for step in self._steps if step.metrics},
            "wall_s": self._elapsed(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the stage of a checkpoint."""
        self._begin_anew()
        self._before = Counts.from_dict(state_dict["before"])
        self._counts.open = Counts.from_dict(state_dict["open"])
        self._wall_s = state_dict["wall_s"]
        for energy_j, pulses in zip(state_dict["energy_j"], state_dict["pulses"], strict=True):
            metrics = state_dict["metrics"].get(len(self._steps) + 1, {})
            self._record(energy_j=energy_j, pulses=pulses, metrics=metrics)
        self._resumed = True

    def _of_stage(self, ledger: Ledger) -> Counts:
        """What belongs to the stage: its phase, and writing arrays under any phase."""
        return of_phase(ledger, self.phase)

    def _record(
        self, *, energy_j: float, pulses: int, metrics: Mapping[str, float] | None = None
    ) -> None:
        step = len(self._steps) + 1
        self._steps.append(
            StepRecord(step=step, energy_j=energy_j, pulses=pulses, metrics=metrics or {})
        )

    def _finite(self, trainer: pl.Trainer) -> dict[str, float]:
        found = {key: float(value) for key, value in trainer.callback_metrics.items()}
        wanted = found.keys() - _OF_METERS if self.metrics is None else set(self.metrics)
        return {key: v for key, v in found.items() if key in wanted and math.isfinite(v)}

    def _elapsed(self) -> float:
        running = math.isfinite(self._started)
        return self._wall_s + (time.perf_counter() - self._started if running else 0.0)

    def _hindrance(self) -> AihwkitLoraError | None:
        """Why the stage cannot be written to the file."""
        try:
            report = self._report()
        except AihwkitLoraError as error:
            return error
        now = self._of_stage(self.ledger)
        if self._resumed and any(now[event] < self._before[event] for event in self._before):
            return ConfigurationError(
                f"RunReporter of stage '{self.stage}': expected the ledger of the checkpoint, got "
                "one that holds less. Resume with the meter that saves it, such as EnergyMeter."
            )
        for name, own in (("chip", self.chip.name), ("recipe", self.recipe), ("seed", self.seed)):
            if (found := getattr(report, name)) != own:
                return ConfigurationError(
                    f"{self.path}: expected a report of {name} {own!r}, got one of {found!r}. Give "
                    "RunReporter another path."
                )
        finished = [old.name for old in report.arms.get(self.arm, ()) if not old.interrupted]
        if self.stage in finished and not (self.overwrite or self._resumed):
            return ConfigurationError(
                f"{self.path}: expected no finished stage '{self.stage}' of arm '{self.arm}' yet, "
                "got one. Give RunReporter another path or stage, or overwrite=True."
            )
        return None

    def _report(self) -> RunReport:
        if self.path.exists():
            return RunReport.read(self.path)
        return RunReport(
            recipe=self.recipe,
            chip=self.chip.name,
            seed=self.seed,
            config=self.config,
            environment=environment(),
            arms={},
            ratios=(),
        )

    def _write(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, interrupted: str = ""
    ) -> None:
        wall_s, self._started = self._elapsed(), math.nan
        if not trainer.is_global_zero:
            return
        counts = self._of_stage(self.ledger).minus(self._before)
        frozen = any(True for _ in frozen_layers(pl_module))
        stage = StageRecord(
            name=self.stage,
            metrics=self._finite(trainer),
            counts=counts,
            energy=price(counts, self.chip),
            trainable_parameters=sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            fingerprint=fingerprint(pl_module) if frozen else "",
            steps=tuple(self._steps),
            wall_s=wall_s,
            interrupted=interrupted,
        )
        report = self._report()
        config = {**report.config, **self.config}
        replace(report, config=config).with_stage(self.arm, stage).write(self.path)
