"""The one trainer of all recipes: it says little, and writes down every step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger

from aihwkit_lora.recipes.progress import shown


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
