"""Three processes that forget together; each writes what it ends with.

Run by test_unlearning_module.py as ``python objective_ranks.py FOLDER``.
"""

from __future__ import annotations

import datetime
import os
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from conftest import CHIP, hybrid
from objectives import Classifier, batches

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, ForgettingStopper, UnlearningModule
from aihwkit_lora.unlearning.objectives.preference import NPO

RANKS = 3


class Silent(Classifier):
    """Logs nothing of its own, so that what is logged is ours."""

    on_train_epoch_end = pl.LightningModule.on_train_epoch_end


def work(rank: int, folder: Path) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "tests"},
    }
    warnings.simplefilter("error")
    for message in (".*many workers", ".*isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message)
    meeting = f"file://{folder / 'meeting'}"
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=patience
    )
    torch.manual_seed(rank)
    ledger = al.Ledger()
    stopper = ForgettingStopper(forget_at_most=1.0, retain_at_least=0.0, patience=2)
    trainer = pl.Trainer(
        devices=RANKS,
        accelerator="cpu",
        strategy="ddp",
        max_epochs=5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        callbacks=[EnergyMeter(CHIP, ledger), stopper],
    )
    module = UnlearningModule(Silent(hybrid()), NPO(), request="2")
    data = module.data(batches(RANKS, label=2), batches(2 * RANKS, seed=1))
    validation = {"forget": batches(RANKS, seed=3), "retain": batches(RANKS, seed=4)}
    trainer.fit(module, data, validation)
    found = {
        "adapters": {name: p for name, p in module.named_parameters() if p.requires_grad},
        "metrics": {k: v.item() for k, v in trainer.callback_metrics.items() if "accuracy" in k},
        "steps": trainer.global_step,
        "updates": ledger.total(phase="unlearn:2")["optimizer_updates"],
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        work, (Path(sys.argv[1]),), nprocs=RANKS, start_method="fork"
    )
