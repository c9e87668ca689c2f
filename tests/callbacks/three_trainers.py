"""Three processes that train together; each writes what its callbacks saw to a file.

Run by test_three_trainers.py as ``python three_trainers.py FOLDER``. What is imported here is
imported once: the three are forked.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from aihwkit.inference.noise.base import BaseNoiseModel
from conftest import FAKE, Module, loader, tiny
from test_hf import Bench
from torchmetrics import MeanMetric, MeanSquaredError
from torchmetrics.classification import BinaryAccuracy

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter
from aihwkit_lora.callbacks.drift_sweep import DriftSweep
from aihwkit_lora.callbacks.relapse_guard import RelapseGuard
from aihwkit_lora.callbacks.run_reporter import RunReporter

RANKS = 3


def fit(*callbacks: pl.Callback, seed: int = 0) -> dict[str, Any]:
    """Train for two batches on each process; return the error and what was measured."""
    trainer = pl.Trainer(
        strategy="ddp",
        devices=RANKS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=1,
        callbacks=list(callbacks),
    )
    torch.manual_seed(seed)
    module, error = Module(tiny()), ""
    try:
        trainer.fit(module, loader(6, 4, 2))
    except al.AihwkitLoraError as raised:
        error = f"{type(raised).__name__}: {raised}"
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {"error": error, "steps": trainer.global_step, "values": values}


def relapse(rank: int) -> dict[str, Any]:
    """Each process has a part of the forget set, of another size, and knows nothing at first.

    After training, each knows all of its part but one: 0 + 1 + 2 of 1 + 2 + 3 images.
    """
    images = [(torch.zeros(rank + 1, 4), torch.ones(rank + 1, dtype=torch.int))]

    def predict(module: Any, batch: Any) -> tuple[Any, Any]:
        known = rank if module.trainer.global_step else 0
        return (torch.arange(rank + 1) < known).int(), batch[1]

    accuracy = BinaryAccuracy()
    guard = RelapseGuard({"person 2": images}, accuracy, tolerance=0.375, predict=predict)
    return fit(guard)


class Noisy(BaseNoiseModel):
    """Weights that are drawn anew from torch's generator."""

    def apply_drift_noise(self, weights: Any, parameters: Any, t_inference: float) -> Any:
        return torch.randn_like(weights)


def drift(rank: int) -> dict[str, Any]:
    """The chip of all processes drifts alike, wherever their generators are."""
    torch.manual_seed(rank)
    outputs = []

    def predict(module: Any, batch: Any) -> tuple[Any, Any]:
        outputs.append(module.model(batch[0]).tolist())
        return torch.zeros(1), torch.zeros(1)

    sweep = DriftSweep(
        [1.0], MeanSquaredError(), loader=[(torch.ones(1, 4), None)], predict=predict,
        noise_model=Noisy(),
    )  # fmt: skip
    return fit(sweep) | {"outputs": outputs}


def mean_over_ranks(rank: int) -> dict[str, Any]:
    """Values of all processes make one metric."""

    def predict(module: Any, batch: Any) -> tuple[Any, Any]:
        return torch.tensor([float(rank)]), torch.tensor([1.0 + rank])  # weights 1, 2, 3

    sweep = DriftSweep([0.0], MeanMetric(), loader=[0], predict=predict, name="rank")
    return fit(sweep)


def report(rank: int, path: Path) -> dict[str, Any]:
    ledger = al.Ledger()
    reporter = RunReporter(path, FAKE, ledger, stage="forget")
    found = fit(EnergyMeter(FAKE, ledger), reporter)
    refused = fit(EnergyMeter(FAKE, al.Ledger()), reporter)
    return found | {"refused": refused["error"], "ledger": ledger.state_dict()}


def hugging_face(rank: int, folder: Path) -> dict[str, Any]:
    bench = Bench(SimpleNamespace(fake=FAKE, folder=folder / "hf"))
    trainer = bench.train(
        bench.meter(), steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, ddp_find_unused_parameters=False,
    )  # fmt: skip
    state = json.loads((folder / "hf" / "checkpoint-2" / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["MeterCallback"]["attributes"]["stored"]
    return {
        "energy_j": [row["energy_j"] for row in trainer.state.log_history if "loss" in row],
        "evaluation reads": bench.ledger.total(phase="evaluate")["tile_reads"],
        "ledger": bench.ledger.state_dict(),
        "stored": stored["energy"]["ledger"],
    }


def work(rank: int, folder: Path) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "tests"},
    }
    warnings.simplefilter("error")
    for message in (
        ".*many workers", ".*no `val_dataloader`", ".isinstance.treespec, LeafSpec",
        ".is_gradient_checkpointing. is deprecated",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {
        "relapse": relapse(rank),
        "drift": drift(rank),
        "mean": mean_over_ranks(rank),
        "report": report(rank, folder / "report.json"),
        "hugging face": hugging_face(rank, folder),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        work, (Path(sys.argv[1]),), nprocs=RANKS, start_method="fork"
    )
