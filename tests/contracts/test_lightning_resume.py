"""What Lightning trains when a run is resumed, and resumed again."""

import contextlib

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 5


class Counted(pl.LightningModule):
    """Notes which batches of which epochs it trains on."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 1), []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, index))
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InterruptionError(Exception):
    pass


class StopAfter(pl.Callback):
    """Saves right after a batch, and ends the run there."""

    def __init__(self, path, epoch, batch):
        self.path, self.last = path, (epoch, batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if (trainer.current_epoch, index) == self.last:
            trainer.save_checkpoint(self.path)
            raise InterruptionError


def trained(start, *stops):
    module = Counted()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(stops),
    )
    data = DataLoader(TensorDataset(torch.ones(BATCHES, 1)))
    with contextlib.suppress(InterruptionError):
        trainer.fit(module, data, ckpt_path=start)
    return module.seen


@pytest.mark.filterwarnings("ignore:.*many workers", "ignore:.*not resumable")
@pytest.mark.parametrize("first", [3, BATCHES - 1])
def test_a_second_resume_repeats_batches_if_the_first_began_at_an_epochs_end(tmp_path, first):
    one, two = tmp_path / "one.ckpt", tmp_path / "two.ckpt"
    seen = trained(None, StopAfter(one, 0, first))
    seen += trained(one, StopAfter(two, 1, 2))
    last = trained(two)
    everything = [(epoch, batch) for epoch in range(3) for batch in range(BATCHES)]
    if first < BATCHES - 1:
        assert seen + last == everything
    else:
        # Its epoch_progress says that epoch 1 was over when the second checkpoint was written.
        assert seen == everything[: BATCHES + 3]
        assert last != everything[BATCHES + 3 :]
        assert last[0] == (1, 0)
