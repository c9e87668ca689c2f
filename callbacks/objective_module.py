"""Train the adapters of a user's module by an objective, on batches of several parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, Protocol, cast

import pytorch_lightning as pl
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from aihwkit_lora.callbacks.around import Around
from aihwkit_lora.callbacks.evaluation import Predict
from aihwkit_lora.callbacks.run_reporter import RunReporter
from aihwkit_lora.callbacks.step_callback import StepCallback, callbacks_of
from aihwkit_lora.callbacks.trainable import restrict_, trainable
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.unlearning.objectives.terms import run

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""From the parameters to be trained to an optimiser over them."""


class Loss(Protocol):
    """What an objective for unlearning or for continual learning has to offer."""

    @property
    def needs(self) -> frozenset[str]:
        """Parts of a batch that it cannot do without, and ``"reference"``."""

    @property
    def bounded(self) -> bool:
        """Whether the loss has a lower bound."""

    def loss(self, model: nn.Module, batch: Any, *, progress: float = 0.0) -> Tensor:
        """Loss of a batch."""


def predict_logits(pl_module: pl.LightningModule, batch: Any) -> tuple[Any, Any]:
    """Call a module as objectives do: inputs may be a tensor, positional or keyword arguments.

    Args:
        pl_module: Gives logits, or an object with ``logits``.
        batch: Inputs and targets.
    Returns:
        Logits and targets.
    Raises:
        ConfigurationError: The batch is no pair.

    Example:
        >>> import torch
        >>> class Adds(pl.LightningModule):
        ...     def forward(self, x, y):
        ...         return x + y
        >>> predict_logits(Adds(), ((torch.tensor([1]), torch.tensor([2])), torch.tensor([0])))
        (tensor([3]), tensor([0]))
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ConfigurationError(
            f"batch: expected a pair of inputs and targets, got {type(batch).__name__}. Pass "
            "predict=, a function of module and batch that returns predictions and targets."
        )
    inputs, targets = batch
    return run(pl_module, inputs), targets


class ObjectiveModule(Around):
    """Common to unlearning and continual learning; see the classes that derive from it."""

    parts: ClassVar[tuple[str, ...]]
    verb: ClassVar[str]

    def __init__(
        self,
        module: pl.LightningModule,
        objective: Loss,
        *,
        name: str,
        optimizer: OptimizerFactory | None = None,
        max_steps: int | None = None,
        metric: Metric | None = None,
        predict: Predict = predict_logits,
        heads: Collection[str] = (),
    ) -> None:
        super().__init__(module)
        self.objective, self.name = objective, name
        self.optimizer, self.max_steps = optimizer, max_steps
        self.predict, self.heads = predict, tuple(heads)
        metric = MulticlassAccuracy(average="micro") if metric is None else metric
        self.accuracies = nn.ModuleDict({part: metric.clone() for part in self.parts})
        self._steps: float = 0.0
        self._check()

    def _check(self) -> None:
        if not self.name.strip():
            raise ConfigurationError(
                f"{type(self).__name__}: expected a name for logs and the ledger, got "
                f"{self.name!r}."
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigurationError(
                f"{type(self).__name__}: expected max_steps of 1 or more, got {self.max_steps}."
            )
        if not self.objective.bounded and self.max_steps is None:
            raise ConfigurationError(
                f"{type(self).__name__}: expected max_steps with "
                f"{type(self.objective).__name__}, whose loss falls without bound, got None. Give "
                "the steps after which it shall stop, or take a bounded objective."
            )
        _ = self.model
        trainable(self.module, self.heads)

    @property
    def phase(self) -> str:
        """Name under which meters count the steps, such as ``"unlearn:person 2"``."""
        return f"{self.verb}:{self.name}"

    @property
    def progress(self) -> float:
        """Fraction of the steps of this fit that is done; 0 where their number is not known."""
        return min(1.0, self.global_step / self._steps) if self._steps else 0.0

    def key(self, value: str) -> str:
        """Name of a value in logs.

        Args:
            value: ``"loss"``, or ``"<part>_accuracy"``.
        """
        return f"{self.verb}/{self.name}/{value}"

    def configure_optimizers(self) -> Any:
        """Optimisers of the user's module, or the one given, over trainable adapters only.

        Raises:
            StageError: Something else is trainable, or the optimisers have nothing to train.
        """
        parameters = list(trainable(self.module, self.heads).values())
        if self.optimizer is not None:
            return restrict_(self.optimizer(parameters), parameters)
        with self._speaking():
            return restrict_(self.module.configure_optimizers(), parameters)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Ask the objective for the loss of a batch.

        Args:
            batch: From part to a batch of it.
            batch_idx: Not used.
        Raises:
            ConfigurationError: A part is missing that the objective needs.
        """
        needed = self.objective.needs & {*self.parts}
        found = batch.keys() if isinstance(batch, Mapping) else set()
        if not needed <= found or not found:
            raise ConfigurationError(
                f"batch of {type(self).__name__}: expected the parts "
                f"{_listed(needed or self.parts)}, got "
                f"{_listed(found) if found else type(batch).__name__}. Train on "
                f"data({', '.join(self.parts)})."
            )
        loss = self.objective.loss(self.model, batch, progress=self.progress)
        self.log(self.key("loss"), loss, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Measure the accuracy on a part; loaders of other names go to the user's module.

        Args:
            batch: Of one loader.
            batch_idx: Handed on.
            dataloader_idx: Place of the loader in the mapping of validation loaders.
        """
        part = self._part_validated(dataloader_idx)
        if part is None:
            return self._step("validation_step", batch, batch_idx, dataloader_idx)
        accuracy = cast(Metric, self.accuracies[part])
        accuracy.update(*self.predict(self, batch))
        self.log(
            self.key(f"{part}_accuracy"),
            accuracy,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            add_dataloader_idx=False,
        )
        return None

    def on_fit_start(self) -> None:
        """Let the meters of the trainer count under :attr:`phase`."""
        for callback in callbacks_of(self.trainer):
            if isinstance(callback, StepCallback | RunReporter):
                callback.phase = self.phase
        with self._speaking():
            self.module.on_fit_start()

    def on_train_start(self) -> None:
        """Find out how many steps there will be."""
        steps = float(self.trainer.estimated_stepping_batches)
        if self.max_steps is not None:
            steps = self.max_steps if steps < 0 else min(steps, self.max_steps)
        self._steps = steps if 0 < steps < float("inf") else 0.0
        with self._speaking():
            self.module.on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Take no step beyond ``max_steps``, whatever the trainer's least number of epochs is."""
        return -1 if self._at_the_end() else None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop at ``max_steps``."""
        if self._at_the_end():
            self.trainer.should_stop = True

    def _at_the_end(self) -> bool:
        return self.max_steps is not None and self.global_step >= self.max_steps

    def _part_validated(self, dataloader_idx: int) -> str | None:
        loaders = self.trainer.val_dataloaders
        name = [*loaders][dataloader_idx] if isinstance(loaders, Mapping) else None
        return name if name in self.parts else None

    def _combined(self, **loaders: Iterable[Any] | None) -> CombinedLoader:
        missing = [part for part in self.parts if loaders[part] is None]
        needed = [part for part in missing if part in self.objective.needs]
        if needed:
            raise ConfigurationError(
                f"{type(self).__name__}: expected batches of {_listed(needed)}, which "
                f"{type(self.objective).__name__} needs, got None. Give "
                f"{' and '.join(f'{part}=' for part in needed)}."
            )
        given = {part: loader for part, loader in loaders.items() if loader is not None}
        return CombinedLoader(given, "max_size_cycle")


def _listed(parts: Iterable[str]) -> str:
    return " and ".join(f"'{part}'" for part in sorted(parts))
