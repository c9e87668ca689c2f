"""Three processes that train together; each writes what it saw to a file.

Run by test_distributed.py as ``python three_ranks.py FOLDER``. What is imported here is imported
once: the three are forked.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from conftest import Kind, Regression, optimise, with_adapters
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import aihwkit_lora as al
from aihwkit_lora.callbacks import FrozenGuard

RANKS = 3
CHIP = al.chips.get("rm-180nm")
KIND = Kind()


def digest(tensors: list[Tensor]) -> str:
    content = b"".join(t.detach().numpy().tobytes() for t in tensors)
    return hashlib.sha256(content).hexdigest()


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def chip(seed: int | None) -> nn.Module:
    """A small model on a programmed chip; its weights are the same on all ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 10))
        model = al.convert(net.requires_grad_(False), CHIP)
    al.program_(model, CHIP, seed=seed)
    return al.freeze_(model)


def programming(rank: int) -> dict[str, Any]:
    """Chips programmed with a seed, and with none: from torch's generators, which all differ."""
    own = al.fingerprint(chip(seed=rank))
    torch.manual_seed(rank)
    shared = chip(seed=None)
    left, first = torch.get_rng_state(), al.fingerprint(shared)
    al.reprogram_(shared, CHIP, {"0": torch.as_tensor(shared[0].weight) * 0.9})
    torch.manual_seed(rank)
    torch.randint(2**62, ())
    one_draw = torch.equal(torch.get_rng_state(), left)
    torch.manual_seed(0)
    of_rank_0 = al.fingerprint(chip(seed=int(torch.randint(2**62, ()))))
    return {
        "own seed": own,
        "no seed": first,
        "seed of rank 0": of_rank_0,
        "rewritten": al.fingerprint(shared),
        "one draw": one_draw,
    }


def data_parallel(rank: int) -> dict[str, Any]:
    """Plain DistributedDataParallel: each rank has a third of the batch."""
    model, x = KIND.adapted(), KIND.batch(3 * RANKS)
    alone = copy.deepcopy(model)
    for p in adapters(model):
        p.data.add_(rank)  # what rank 0 has comes to all
    parallel = DistributedDataParallel(model)
    found = {"buffers": len(list(parallel.buffers())), "difference": 0.0}
    for _ in range(2):
        optimise(alone, x)
        optimise(parallel, x[rank::RANKS])
        pairs = zip(adapters(alone), adapters(parallel), strict=True)
        difference = max(float((a.grad - b.grad).abs().max()) for a, b in pairs)
        found["difference"] = max(found["difference"], difference)
    return found | {
        "gradients": digest([p.grad for p in adapters(parallel) if p.grad is not None]),
        "adapters": digest(adapters(parallel)),
        "fingerprint": al.fingerprint(parallel),
        "expected": al.fingerprint(alone),
    }


def different_chips(rank: int) -> dict[str, Any]:
    """Arrays are no part of what DistributedDataParallel sends around."""
    model = with_adapters(KIND.frozen(seed=rank))
    before = al.fingerprint(model)
    parallel = DistributedDataParallel(model)
    optimise(parallel, KIND.x, steps=2)
    al.verify(parallel)
    return {
        "before": before,
        "after": al.fingerprint(parallel),
        "adapters": digest(adapters(parallel)),
    }


class Intruder(pl.Callback):
    """Writes an array of one rank after the first step."""

    def __init__(self, victim: int) -> None:
        self.victim = victim

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_rank == self.victim and trainer.global_step == 1:
            _, layer = next(al.frozen_layers(pl_module))
            layer.analog_module.programmed.conductance[0, 0, 0] += 0.125


def guarded(module: Regression, *callbacks: pl.Callback) -> dict[str, Any]:
    """Train with Lightning under the guard; return the error, if there is one."""
    trainer = pl.Trainer(
        strategy="ddp",
        devices=RANKS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=2,
        callbacks=[*callbacks, FrozenGuard(1)],
    )
    data = TensorDataset(KIND.batch(12), KIND.batch(12)[:, :10])
    error = ""
    try:
        trainer.fit(module, DataLoader(data, batch_size=2))
    except al.FrozenConductanceError as raised:
        error = str(raised)
    return {
        "error": error,
        "steps": trainer.global_step,
        "adapters": digest(list(module.adapters.values())),
        "fingerprint": al.fingerprint(module),
    }


class OwnChip(Regression):
    """Programmed by each process for itself, before they know of each other."""

    def __init__(self, seed: int) -> None:
        super().__init__(KIND)
        self.model = with_adapters(chip(seed))


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "programming": programming,
    "data parallel": data_parallel,
    "different chips": different_chips,
    "guarded": lambda rank: guarded(Regression(KIND)),
    "written": lambda rank: guarded(Regression(KIND), Intruder(victim=2)),
}


def work(rank: int, folder: Path) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "tests"},
    }
    warnings.simplefilter("error")
    for message in (".*many workers", ".*no `val_dataloader`", ".isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message)
    own_chip = OwnChip(seed=min(rank, 1))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {name: scenario(rank) for name, scenario in SCENARIOS.items()}
    found["programmed alone"] = guarded(own_chip)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        work, (Path(sys.argv[1]),), nprocs=RANKS, start_method="fork"
    )
