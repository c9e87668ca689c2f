"""How a stage of the face recipe is trained: AdamW, warm-up, cosine, the best epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.face_data import FaceData, FaceImages
from aihwkit_lora.recipes.face_objectives import Objective
from aihwkit_lora.recipes.stage_training import BestEpoch, train


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


class Trainee(BestEpoch):
    """A model in one stage of the face recipe.

    Args:
        model: Its parameters that want a gradient are trained.
        objective: The loss.
        schedule: Steps and rates.
        options: Of :class:`BestEpoch`.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, schedule: Schedule, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self._objective, self._schedule = objective, schedule
        self._steps = 1

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

    def _optimizer(self) -> Optimizer:
        schedule = self._schedule
        return AdamW(self._trained(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)


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
