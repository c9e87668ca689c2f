"""Training in processes that Lightning spawns, run by test_ranks.py as ``spawned.py FOLDER``."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from conftest import FAKE, Module, loader, tiny
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, PulseCounter


def main(folder: Path) -> None:
    ledger, saving = al.Ledger(), ModelCheckpoint(folder / "saved")
    trainer = pl.Trainer(
        strategy="ddp_spawn",
        devices=3,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        max_epochs=1,
        callbacks=[PulseCounter(ledger), EnergyMeter(FAKE, ledger), saving],
    )
    trainer.fit(Module(tiny()), loader(9, 4, 2))
    with (folder / "metrics.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    stored = torch.load(saving.best_model_path, weights_only=True)["callbacks"]
    seen = {
        "rows": rows,
        "ledger of the script": ledger.state_dict(),
        "ledger of the checkpoint": stored["EnergyMeter"]["ledger"],
        "energy_total_j": trainer.callback_metrics["energy_total_j"].item(),
    }
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*many workers")
    main(Path(sys.argv[1]))
