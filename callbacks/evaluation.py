"""Evaluating a model in the middle of training, as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn
from torchmetrics import Metric

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.observe import Observer, observers

Predict = Callable[[pl.LightningModule, Any], tuple[Any, Any]]
"""From a module and a batch on its device to predictions and targets, as the metric takes them."""


def predict_batch(pl_module: pl.LightningModule, batch: Any) -> tuple[Any, Any]:
    """Call the module with the first half of a batch; the second half is the target.

    Args:
        pl_module: A module with a ``forward``.
        batch: Inputs and targets.
    Returns:
        Predictions and targets.
    Raises:
        ConfigurationError: The batch is no pair, or the module has no ``forward``.

    Example:
        >>> class Doubles(pl.LightningModule):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> predict_batch(Doubles(), (torch.tensor([3]), torch.tensor([6])))
        (tensor([6]), tensor([6]))
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ConfigurationError(
            f"batch: expected a pair of inputs and targets, got {type(batch).__name__}. Pass "
            "predict=, a function of module and batch that returns predictions and targets."
        )
    if type(pl_module).forward is pl.LightningModule.forward:
        raise ConfigurationError(
            f"{type(pl_module).__name__}: expected a module with a forward(inputs), got one "
            "without. Pass predict=, a function of module and batch that returns predictions and "
            "targets."
        )
    inputs, targets = batch
    return pl_module(inputs), targets


def evaluate(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    metric: Metric,
    loaders: Iterable[Iterable[Any]],
    predict: Predict,
) -> float:
    """Show all batches to the model as it is and return the metric over all of them.

    Where several processes train together, torchmetrics adds up their states, so that all of them
    get the same value.

    Args:
        trainer: Moves batches to the model's device.
        pl_module: What to evaluate, in the mode that it is in.
        metric: Gives one number; the metric itself is left alone, a copy is used.
        loaders: Batches, one loader after the other.
        predict: See :data:`Predict`.
    Raises:
        ConfigurationError: The metric gives no single number.
    """
    own = metric.clone().to(pl_module.device)
    own.reset()
    for loader in loaders:
        for batch in loader:
            on_device = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.forward_context():
                own.update(*predict(pl_module, on_device))
    value = own.compute()
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ConfigurationError(
            f"{type(metric).__name__}: expected a metric that gives one number, got {found}. Pass "
            "one that averages, or one callback for each."
        )
    return float(value)


@contextmanager
def undisturbed(model: nn.Module, *, phase: str, seed: int) -> Iterator[None]:
    """Evaluate without a trace: afterwards training goes on as if nothing had happened.

    In the block the model is in evaluation mode, no gradient is kept, random numbers start from a
    seed, and whoever observes the model counts under another phase. After it, also after an
    exception, modes, phases and the random states of torch, numpy and Python are what they were.

    Args:
        model: Any model.
        phase: Where observers put the reads of the block.
        seed: Of the block's random numbers, such as read noise; the same on all processes.

    Example:
        >>> model, before = nn.Dropout(), torch.get_rng_state()
        >>> with undisturbed(model, phase="drift", seed=0):
        ...     print(model.training, torch.is_grad_enabled(), torch.rand(1).requires_grad)
        False False False
        >>> model.training, bool((torch.get_rng_state() == before).all())
        (True, True)
    """
    modes = [(module, module.training) for module in model.modules()]
    observed = [(observer, observer.phase) for observer in observers(model)]
    with ExitStack() as restore:
        isolated = isolate_rng()
        isolated.__enter__()
        # Not `with isolate_rng()`, which does not restore after an exception (Lightning 2.6.6).
        restore.callback(isolated.__exit__, None, None, None)
        restore.callback(_set_modes, modes)
        restore.callback(_set_phases, observed)
        restore.enter_context(torch.no_grad())
        model.eval()
        _set_phases([(observer, phase) for observer, _ in observed])
        torch.manual_seed(seed)
        yield


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _set_phases(phases: Iterable[tuple[Observer, str]]) -> None:
    for observer, phase in phases:
        observer.phase = phase


def validates_training(trainer: pl.Trainer) -> bool:
    """Tell whether this is a validation within ``fit`` that counts, not its sanity check.

    Args:
        trainer: Within a hook of validation.
    """
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def publish(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Give values to the loggers at once, and to whoever reads ``trainer.callback_metrics``.

    Unlike ``pl_module.log`` it works at the end of training, and before an error is raised.

    Args:
        trainer: Whose loggers.
        values: Numbers by key; nothing happens if there are none.
    """
    if not values:
        return
    # What the property returns is kept and only added to (Lightning 2.6.6).
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)
        logger.save()
