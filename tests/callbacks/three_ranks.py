"""Three processes that train together under the meters; each writes what it saw to a file.

Run by test_ranks.py as ``python three_ranks.py FOLDER``. What is imported here is imported once:
the three are forked.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from conftest import FAKE, Memory, Module, Restartable, TwoOptimizers, loader, tiny
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, PulseCounter
from aihwkit_lora.callbacks.ranks import Ranks
from aihwkit_lora.metering import Counts
from aihwkit_lora.metering.step_meter import EnergyPerStep

RANKS = 3


class Writer(pl.Callback):
    """Writes as much on every rank as that rank is told, in the second batch."""

    def __init__(self, ledger: al.Ledger, pulses: list[int]) -> None:
        self.ledger, self.pulses = ledger, pulses

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            counts = Counts({"set_pulses": self.pulses[trainer.global_rank], "verify_reads": 5})
            self.ledger.add(counts, phase="reprogram", layer="0")


class Cut(pl.Callback):
    """Saves after the second batch, and ends the run on all ranks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, out: Any, x: Any, i: int
    ) -> None:
        if i == 1:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("power cut")


class Breaks(Module):
    """Raises in the second batch, on all ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise RuntimeError("in a step")
        return loss


def run(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    ledger: al.Ledger,
    validation: int = 0,
    resume: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train with both meters; say what was logged and counted, and what was raised."""
    memory, error = Memory(), ""
    meters = (PulseCounter(ledger), EnergyMeter(FAKE, ledger))
    trainer = pl.Trainer(
        devices=RANKS,
        accelerator="cpu",
        logger=[memory],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        callbacks=[*callbacks[:1], *meters, *callbacks[1:]],
        **{"strategy": "ddp", "max_epochs": 1, **options},
    )
    val = loader(RANKS * validation, 4, 2) if validation else None
    try:
        trainer.fit(module, loader(3 * RANKS, 4, 2), val, ckpt_path=resume)
    except (RuntimeError, al.AihwkitLoraError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"rows": memory.logged, "ledger": ledger.state_dict(), "error": error}


def plain(rank: int, folder: Path) -> dict[str, Any]:
    return run(Module(tiny()), ledger=al.Ledger())


def accumulated(rank: int, folder: Path) -> dict[str, Any]:
    return run(Module(tiny()), ledger=al.Ledger(), accumulate_grad_batches=3)


def by_hand(rank: int, folder: Path) -> dict[str, Any]:
    return run(TwoOptimizers(tiny(), every=2), ledger=al.Ledger())


def validated(rank: int, folder: Path) -> dict[str, Any]:
    ledger = al.Ledger()
    return run(Module(tiny()), ledger=ledger, validation=2, val_check_interval=1)


def written(rank: int, folder: Path) -> dict[str, Any]:
    ledger = al.Ledger()
    return run(Module(tiny()), Writer(ledger, [3, 3, 3]), ledger=ledger)


def written_apart(rank: int, folder: Path) -> dict[str, Any]:
    ledger = al.Ledger()
    return run(Module(tiny()), Writer(ledger, [3, 3, 4]), ledger=ledger)


def broken(rank: int, folder: Path) -> dict[str, Any]:
    return run(Breaks(tiny()), ledger=al.Ledger())


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """Uninterrupted, cut, and gone on with; all batches of the cut run belong to its first step."""
    found, path = {}, folder / "cut.ckpt"
    for name, steps in (("each batch", 1), ("three batches", 3)):
        options = {"accumulate_grad_batches": steps, "max_epochs": 2}
        found[name] = [
            run(Restartable(tiny()), ledger=al.Ledger(), **options),
            run(Restartable(tiny()), pl.Callback(), Cut(path), ledger=al.Ledger(), **options),
            run(Restartable(tiny()), ledger=al.Ledger(), resume=path, **options),
        ]
    return found


class Sharded(Module):
    """Shards its parameters over all ranks (FSDP 2)."""

    def configure_model(self) -> None:
        if not isinstance(self.model, FSDPModule):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def distributed_tensors(rank: int, folder: Path) -> dict[str, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    return run(Sharded(tiny()), ledger=al.Ledger(), strategy=strategy)


def sharded(rank: int, folder: Path) -> dict[str, Any]:
    """The meter alone under FSDP 1, which Lightning 2.6.6 starts on GPUs only."""
    ledger, cpu = al.Ledger(), torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(tiny(), use_orig_params=True, device_id=cpu)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    meter = EnergyPerStep(FAKE, ledger)
    meter.start(model, Ranks(sharded=True))
    rows = []
    for batch in range(2):
        torch.manual_seed(batch)
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        rows.append({"step": batch, **(meter.end_batch() or {})})
    meter.finish()
    own = sum(parameter.numel() for parameter in model.parameters())
    return {"rows": rows, "ledger": ledger.state_dict(), "error": "", "own": own}


def refused(rank: int, folder: Path) -> dict[str, Any]:
    try:
        return run(Module(tiny()), ledger=al.Ledger(), strategy="fsdp")
    except ValueError as raised:
        return {"error": str(raised)}


SCENARIOS = (
    *(plain, accumulated, by_hand, validated, written, written_apart, broken, resumed),
    *(sharded, distributed_tensors, refused),
)


def work(rank: int, folder: Path) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "tests"},
    }
    warnings.simplefilter("error")
    for message in (".*many workers", ".*no `val_dataloader`", ".isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {scenario.__name__: scenario(rank, folder) for scenario in SCENARIOS}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        work, (Path(sys.argv[1]),), nprocs=RANKS, start_method="fork"
    )
