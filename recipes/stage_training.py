"""What the training of stages has in common: the best epoch, a record per step, one trainer."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from aihwkit_lora.callbacks import StepCounts
from aihwkit_lora.chips import Chip
from aihwkit_lora.metering import Ledger, price
from aihwkit_lora.recipes.progress import shown
from aihwkit_lora.reporting import StepRecord

VALIDATION = "validate"
"""Phase of the ledger that validation is counted under; it belongs to no training step."""


class Samples(Protocol):
    """Labelled samples, as a model sees them."""

    @property
    def inputs(self) -> Tensor:
        """What the model sees, shape ``(n, …)``."""
        ...

    @property
    def labels(self) -> Tensor:
        """Index of the right output, shape ``(n,)``."""
        ...


Score = Callable[["Evaluation"], float]
"""From an evaluation on validation samples to a number that shall be high."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model says about some samples.

    Args:
        logits: Shape ``(n, outputs)``.
        labels: Shape ``(n,)``.

    Example:
        >>> result = Evaluation(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> result.accuracy(0), result.accuracy(1)
        (1.0, 0.5)
    """

    logits: Tensor
    labels: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, samples: Samples) -> Evaluation:
        """Show samples to a model in evaluation mode; its mode is restored afterwards.

        Args:
            model: Gives logits.
            samples: What it sees.
        """
        training = model.training
        model.eval()
        logits = model(samples.inputs)
        model.train(training)
        return cls(logits, samples.labels)

    def accuracy(self, *labels: int) -> float:
        """Fraction of the samples with some labels that are given the right one."""
        mask = self._of(labels)
        right = self.logits[mask].argmax(dim=1) == self.labels[mask]
        return float(right.double().mean())

    def loss(self, *labels: int) -> float:
        """Mean cross-entropy over the samples with some labels.

        One without an output yet must not be asked for.
        """
        mask = self._of(labels)
        return float(nn.functional.cross_entropy(self.logits[mask], self.labels[mask]))

    def _of(self, labels: tuple[int, ...]) -> Tensor:
        return torch.isin(self.labels, torch.tensor(labels))


class BestEpoch(pl.LightningModule):
    """A model in one stage that goes back to its best epoch in the end.

    Derived classes say what a step minimises, and by which optimiser.

    Args:
        model: Its parameters that want a gradient are trained.
        score: Ranks epochs by their evaluation on validation samples; the last epoch stays if None.
        after_step: Called after each optimiser step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        score: Score | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.model = model
        self._score, self._after_step = score, after_step
        self._best_score = -math.inf
        self._best: list[Tensor] = []

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update, then let the baseline write its arrays."""
        super().optimizer_step(*args, **kwargs)
        self._after_step()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Remember the parameters of the best epoch so far; later ones win ties."""
        if self._score is None:
            return
        inputs, labels = batch
        score = self._score(Evaluation(self.model(inputs), labels))
        if score >= self._best_score:
            self._best_score = score
            self._best = [parameter.detach().clone() for parameter in self._trained()]

    def on_train_end(self) -> None:
        """Go back to the best epoch."""
        self.restore_best()

    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the parameters of the best epoch."""
        if self._best:
            for parameter, value in zip(self._trained(), self._best, strict=True):
                parameter.copy_(value)

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
            self.steps[-1] = replace(self.steps[-1], metrics=self._evaluate())


def shaken(model: nn.Module, relative: float) -> dict[str, Tensor]:
    """Draw weights of linear layers around the present ones, as write errors would move them.

    Args:
        model: Not changed; gradients reach its weights.
        relative: Standard deviation, as a fraction of each layer's largest magnitude.
    Returns:
        Weights by name, for ``torch.func.functional_call``.

    Example:
        >>> list(shaken(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), 0.1))
        ['0.weight']
    """
    return {
        f"{name}.weight": layer.weight
        + relative * layer.weight.detach().abs().max() * torch.randn_like(layer.weight)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


def train(
    module: pl.LightningModule,
    batches: Any,
    validation: Any = None,
    *,
    log: Path,
    callbacks: list[pl.Callback],
    **limits: Any,
) -> None:
    """Train a stage with Lightning, on the CPU.

    Args:
        module: What to train.
        batches: A loader.
        validation: A loader of what is looked at after each epoch, if anything is.
        log: Folder for the values of each step, as CSV.
        callbacks: Lightning callbacks.
        limits: Further options of the trainer: how long, how gradients are clipped.
    """
    with _hushed():
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=CSVLogger(log.parent, name=log.name, version=""),
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=shown(),
            enable_model_summary=False,
            callbacks=callbacks,
            **limits,
        )
        trainer.fit(module, batches, validation)


@contextmanager
def _hushed() -> Iterator[None]:
    """Lightning says the same about devices, workers and tips in each stage."""
    known = logging.getLogger("pytorch_lightning")
    level = known.level
    known.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Data are in memory, so workers would only cost time; stages are small on purpose.
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*Experiment logs directory.*")
            # pytorch-lightning 2.6.6 asks torch 2.15 in a way that is on its way out.
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
            yield
    finally:
        known.setLevel(level)
