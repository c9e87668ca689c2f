"""A classifier to adapt, and an objective in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES = 6, 3


class Classifier(pl.LightningModule):
    """A user's module; it remembers which of its hooks were called."""

    def __init__(self, model: nn.Module, rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="model")
        self.model, self.called = model, []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _):
        raise AssertionError("the objective takes the place of this step")

    def validation_step(self, batch):
        self.log("own_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch):
        return self(batch[0])

    def on_train_epoch_end(self):
        self.called.append("on_train_epoch_end")
        self.log("own_epochs", float(self.current_epoch + 1))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [2.0 * batch[0], batch[1]]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.rate, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)]


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Cross-entropy of the parts, each with its weight; keeps what it was called with."""

    weights: Mapping[str, float]
    needs: frozenset[str] = frozenset()
    bounded: bool = True
    seen: list = field(default_factory=list)

    def loss(self, model, batch, *, progress=0.0):
        self.seen.append((model, {part: len(own[1]) for part, own in batch.items()}, progress))
        terms = (
            self.weights[part] * nn.functional.cross_entropy(model(inputs), targets)
            for part, (inputs, targets) in batch.items()
        )
        return sum(terms)


class Kept(DummyLogger):
    """Keeps all rows."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})


def samples(count: int, *, seed: int = 0, label: int | None = None) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(x, y if label is None else torch.full_like(y, label))


def batches(count: int, size: int = 2, **options) -> DataLoader:
    return DataLoader(samples(count * size, **options), batch_size=size)
