"""A small hybrid model, a Lightning module around it, and a logger that keeps everything."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import aihwkit_lora as al
from aihwkit_lora.metering import EVENTS, PriceList, Quantity, Status

BATCH = 2
CHIP = al.chips.get("rm-180nm")


def prices(unit: str, values: dict[str, float]) -> dict[str, Quantity]:
    known = {"unit": unit, "source": "round", "status": Status.ASSUMED}
    return {event: Quantity(value=value, **known) for event, value in values.items()}


JOULES = {
    "tile_reads": 1.0,
    "transposed_tile_reads": 10.0,
    "forward_macs": 0.5,
    "input_gradient_macs": 0.25,
    "weight_gradient_macs": 0.25,
    "optimizer_updates": 2.0,
    "sram_read_bits": 8.0,
    "set_pulses": 100.0,
    "reset_pulses": 200.0,
    "verify_reads": 4.0,
}
SECONDS = {"array_cycles": 1.0, "transposed_array_cycles": 2.0, "set_slots": 64.0}
# Arrays of 2 × 2, and prices that one can add up in one's head.
FAKE = replace(
    CHIP,
    name="fake",
    rows=2,
    columns=2,
    prices=PriceList(
        energy=prices("J", JOULES),
        latency=prices("s", SECONDS),
        energy_free=frozenset(set(EVENTS.names()) - JOULES.keys()),
        latency_free=frozenset(set(EVENTS.names()) - SECONDS.keys()),
    ),
)


@functools.cache
def frozen() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    model = al.convert(layers, CHIP).requires_grad_(False)
    al.program_(model, CHIP, seed=0)
    return al.freeze_(model)


def hybrid() -> nn.Module:
    model = copy.deepcopy(frozen())
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=al.target_modules(model)))


@functools.cache
def small() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False))
    return al.freeze_(al.convert(layers.requires_grad_(False), FAKE), programmed_by="test")


def tiny() -> nn.Module:
    """Two frozen layers, of two tiles and of one, with adapters of rank 1: 10 parameters."""
    model = copy.deepcopy(small())
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=1, target_modules=["0", "1"]))


def nothing() -> None:
    """Unlike a lambda, it can be sent to another process."""


class Module(pl.LightningModule):
    """Regression to random numbers; every epoch draws the same read noise again."""

    def __init__(
        self,
        model: nn.Module,
        *,
        after_step: Callable[[], Any] = nothing,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.after_step = model, after_step
        self.optimizer = optimizer

    def on_train_epoch_start(self):
        torch.manual_seed(self.current_epoch)

    def training_step(self, batch, _):
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.model(batch[0])

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.after_step()

    def configure_optimizers(self):
        if self.optimizer is not None:
            return self.optimizer(self.model)
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=0.05)


class Restartable(Module):
    """Draws the same read noise in a batch, and keeps gradients, however often it is interrupted.

    Lightning 2.6.6 does not save the gradients that a step has accumulated.
    """

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(1000 * self.current_epoch + batch_idx)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["gradients"] = {n: p.grad for n, p in self.named_parameters()}

    def on_load_checkpoint(self, checkpoint):
        self.gradients = checkpoint["gradients"]

    def on_train_start(self):
        for name, gradient in getattr(self, "gradients", {}).items():
            self.get_parameter(name).grad = gradient


class TwoOptimizers(Restartable):
    """Steps two optimisers by hand in each batch that is due, and none in others."""

    def __init__(self, model: nn.Module, every: int = 1, **options: Any) -> None:
        super().__init__(model, **options)
        self.every, self.automatic_optimization = every, False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % self.every == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [torch.optim.SGD(parameters[i::2], lr=0.05) for i in range(2)]


class Resumable(DataLoader):
    """Goes on where it was when its state was saved."""

    given = start = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.given = number + 1
                yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.start = state["given"] % len(self)


class Memory(DummyLogger):
    """Keeps all that is logged: dictionaries, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None):
        self.logged.append({"step": step, **metrics})


def loader(batches: int, inputs: int = 6, outputs: int = 3) -> Resumable:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(BATCH * batches, inputs, generator=generator)
    y = torch.randn(BATCH * batches, outputs, generator=generator)
    return Resumable(TensorDataset(x, y), batch_size=BATCH)


@pytest.fixture
def lab(tmp_path):
    """Everything a test of callbacks needs."""

    def fit(
        module,
        *callbacks,
        batches=3,
        validation=0,
        resume=None,
        sizes=(6, 3),
        loggers=(),
        data=None,
        **options,
    ):
        memory = Memory()
        defaults = {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "max_epochs": 1,
        }
        files = CSVLogger(tmp_path, version=len(list(tmp_path.glob("*/*"))))
        trainer = pl.Trainer(
            logger=[files, memory, *loggers], callbacks=list(callbacks), **defaults | options
        )
        trainer.memory = memory
        val = loader(validation, *sizes) if validation else None
        train, val = data or (loader(batches, *sizes), val)
        with warnings.catch_warnings():
            # Few data in memory, and some modules are not validated: on purpose.
            warnings.filterwarnings("ignore", ".*does not have many workers")
            warnings.filterwarnings("ignore", ".*but have no `val_dataloader`")
            trainer.fit(module, train, val, ckpt_path=resume)
        return trainer

    return SimpleNamespace(
        chip=CHIP, batch=BATCH, hybrid=hybrid, frozen=lambda: copy.deepcopy(frozen()),
        Module=Module, fit=fit, folder=tmp_path, fake=FAKE, tiny=tiny, loader=loader,
        Restartable=Restartable, TwoOptimizers=TwoOptimizers,
    )  # fmt: skip
