"""How a stage of a recipe is trained: one Lightning module, one schedule, one record per step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from aihwkit_lora.callbacks import StepCounts
from aihwkit_lora.chips import Chip
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Ledger, price
from aihwkit_lora.recipes.face_data import FaceData, FaceImages
from aihwkit_lora.recipes.face_objectives import Objective
from aihwkit_lora.recipes.trainer import train
from aihwkit_lora.reporting import StepRecord

VALIDATION = "validate"
"""Phase of the ledger that validation is counted under; it belongs to no training step."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a stage trains: AdamW, linear warm-up, cosine to zero.

    Args:
        epochs: Passes over the images, at least 1.
        learning_rate: At its peak, above 0.
        batch_size: Images per step, at least 1; None for all at once.
        weight_decay: Of AdamW.
        warm_up: Part of all steps in which the rate rises, 0 to 1.
    Raises:
        ConfigurationError: A value is out of its range.

    Example:
        >>> Schedule(epochs=2, learning_rate=0.01).factor(step=0, steps=100)
        0.1
    """

    epochs: int
    learning_rate: float
    batch_size: int | None = 128
    weight_decay: float = 0.0
    warm_up: float = 0.1

    def __post_init__(self) -> None:
        self._require("epochs", "1 or more", self.epochs >= 1)
        self._require("learning_rate", "above 0", self.learning_rate > 0)
        self._require("batch_size", "1 or more", self.batch_size is None or self.batch_size >= 1)
        self._require("warm_up", "from 0 to 1", 0 <= self.warm_up <= 1)

    def _require(self, name: str, expected: str, satisfied: bool) -> None:
        if not satisfied:
            raise ConfigurationError(
                f"schedule: expected {name} {expected}, got {getattr(self, name)!r}."
            )

    def factor(self, step: int, steps: int) -> float:
        """Learning rate of a step as a fraction of the peak.

        Args:
            step: Counted from 0.
            steps: Steps of the whole stage.
        """
        rising = max(1, round(self.warm_up * steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


Score = Callable[["Evaluation"], float]
"""From an evaluation on validation images to a number that shall be high."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model says about some images.

    Args:
        logits: Shape ``(n, outputs)``.
        labels: Shape ``(n,)``.
    """

    logits: Tensor
    labels: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, faces: FaceImages) -> Evaluation:
        """Show all images to a model in evaluation mode; its mode is restored afterwards."""
        training = model.training
        model.eval()
        logits = model(faces.images)
        model.train(training)
        return cls(logits, faces.labels)

    def accuracy(self, *people: int) -> float:
        """Fraction of the images of some people that are given the right label."""
        mask = torch.isin(self.labels, torch.tensor(people))
        right = self.logits[mask].argmax(dim=1) == self.labels[mask]
        return float(right.double().mean())

    def loss(self, *people: int) -> float:
        """Mean cross-entropy over the images of some people."""
        mask = torch.isin(self.labels, torch.tensor(people))
        return float(nn.functional.cross_entropy(self.logits[mask], self.labels[mask]))


class Trainee(pl.LightningModule):
    """A model in one stage: objective, schedule, and the best epoch's parameters.

    Args:
        model: Its parameters that want a gradient are trained.
        objective: The loss.
        schedule: Steps and rates.
        score: Ranks epochs by their evaluation on validation images; the last epoch stays if None.
        after_step: Called after each optimiser step.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        schedule: Schedule,
        *,
        score: Score | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.model = model
        self._objective, self._schedule = objective, schedule
        self._score, self._after_step = score, after_step
        self._steps = 1
        self._best_score = -math.inf
        self._best: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of a batch of images and labels."""
        return self._objective(self.model, *batch, progress=self.global_step / self._steps)

    def configure_optimizers(self) -> Any:
        """The optimiser (AdamW) over what wants a gradient, and the schedule's rates."""
        schedule, steps = self._schedule, int(self.trainer.estimated_stepping_batches)
        self._steps = steps
        optimizer = self._optimizer()
        rates = LambdaLR(optimizer, lambda step: schedule.factor(step, steps))
        return [optimizer], [{"scheduler": rates, "interval": "step"}]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update, then let the baseline write its arrays."""
        super().optimizer_step(*args, **kwargs)
        self._after_step()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Remember the parameters of the best epoch so far; later ones win ties."""
        images, labels = batch
        if self._score is None:
            return
        score = self._score(Evaluation(self.model(images), labels))
        if score >= self._best_score:
            self._best_score = score
            self._best = [parameter.detach().clone() for parameter in self._trained()]

    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the parameters of the best epoch."""
        if self._best:
            for parameter, value in zip(self._trained(), self._best, strict=True):
                parameter.copy_(value)

    def _optimizer(self) -> Optimizer:
        schedule = self._schedule
        return AdamW(self._trained(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


class StepRecorder(pl.Callback):
    """Keep a record of every step, with metrics at the end of each epoch.

    Args:
        ledger: Where the stage is counted.
        chip: Whose prices to use.
        evaluate: Metrics of the model as it is; what it reads counts as validation.
    """

    def __init__(
        self, ledger: Ledger, chip: Chip, evaluate: Callable[[], dict[str, float]]
    ) -> None:
        self.steps: list[StepRecord] = []
        self._chip, self._evaluate = chip, evaluate
        self._ledger = ledger
        self._counts = StepCounts(ledger, without=(VALIDATION,))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out what was counted before."""
        self._counts = StepCounts(self._ledger, without=(VALIDATION,))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Record the step."""
        counts = self._counts.after(trainer.global_step)
        if counts is None:
            return
        self.steps.append(
            StepRecord(
                step=len(self.steps) + 1,
                energy_j=price(counts, self._chip).energy_j.value,
                pulses=counts.pulses,
                metrics={},
            )
        )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add metrics to the last step."""
        if self.steps:
            last = self.steps[-1]
            self.steps[-1] = StepRecord(
                step=last.step,
                energy_j=last.energy_j,
                pulses=last.pulses,
                metrics=self._evaluate(),
            )


def fit(
    trainee: Trainee,
    images: FaceImages,
    faces: FaceData,
    schedule: Schedule,
    *,
    log: Path,
    callbacks: list[pl.Callback],
) -> None:
    """Train a stage with Lightning.

    Args:
        trainee: What to train.
        images: What to train on.
        faces: Where the validation images are.
        schedule: Epochs and batch size.
        log: Folder for the values of each step, as CSV.
        callbacks: Lightning callbacks.
    """
    batch_size = min(schedule.batch_size or len(images), len(images))
    train(
        trainee,
        DataLoader(_data(images), batch_size=batch_size, shuffle=True),
        DataLoader(_data(faces.validation), batch_size=len(faces.validation)),
        log=log,
        callbacks=callbacks,
        max_epochs=schedule.epochs,
        gradient_clip_val=1.0,
    )


def _data(faces: FaceImages) -> TensorDataset:
    return TensorDataset(faces.images, faces.labels)
