"""A small hybrid model, a Lightning module around it, and a logger that keeps everything."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
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

BATCH = 2
CHIP = al.chips.get("rm-180nm")


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


class Module(pl.LightningModule):
    """Regression to random numbers; every epoch draws the same read noise again."""

    def __init__(
        self,
        model: nn.Module,
        *,
        after_step: Callable[[], Any] = lambda: None,
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


class Memory(DummyLogger):
    """Keeps all that is logged: dictionaries, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None):
        self.logged.append({"step": step, **metrics})


def loader(batches: int) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(BATCH * batches, 6, generator=generator)
    y = torch.randn(BATCH * batches, 3, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


@pytest.fixture
def lab(tmp_path):
    """Everything a test of callbacks needs."""

    def fit(module, *callbacks, batches=3, validation=0, resume=None, **options):
        memory = Memory()
        trainer = pl.Trainer(
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=[CSVLogger(tmp_path, version=len(list(tmp_path.glob("*/*")))), memory],
            callbacks=list(callbacks),
            **{"max_epochs": 1, **options},
        )
        trainer.memory = memory
        val = loader(validation) if validation else None
        with warnings.catch_warnings():
            # Few data in memory, and some modules are not validated: on purpose.
            warnings.filterwarnings("ignore", ".*does not have many workers")
            warnings.filterwarnings("ignore", ".*but have no `val_dataloader`")
            trainer.fit(module, loader(batches), val, ckpt_path=resume)
        return trainer

    return SimpleNamespace(
        chip=CHIP, batch=BATCH, hybrid=hybrid, frozen=lambda: copy.deepcopy(frozen()),
        Module=Module, fit=fit, folder=tmp_path,
    )  # fmt: skip
