"""A run that is killed again and again, run by test_kill.py as ``killed.py FOLDER KILLS SEED``.

The runs are forks, so that what is imported here is imported once. Each saves after every batch,
also where gradients accumulate, and goes on from the last checkpoint that can be read. It does not
save after the last batch of an epoch: from such a checkpoint Lightning goes on in a way that makes
another resume, in the next epoch, repeat batches (tests/contracts/test_lightning.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from conftest import CHIP, Restartable, frozen, hybrid, loader
from pytorch_lightning.callbacks import Checkpoint

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, FrozenGuard, PulseCounter
from aihwkit_lora.metering import Counts

BATCHES, EPOCHS = 25, 4
LATEST_SECONDS = 0.03  # about as long as a batch takes, its checkpoint included


class Saver(Checkpoint):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.is_last_batch:
            number = trainer.fit_loop.epoch_loop.total_batch_idx
            trainer.save_checkpoint(self.folder / f"{number:04}.ckpt")


class Writer(pl.Callback):
    """Adds to the ledger what writing an array would add, in every seventh batch."""

    def __init__(self, ledger: al.Ledger) -> None:
        self.ledger = ledger

    def on_train_batch_start(self, trainer: pl.Trainer, *found: Any) -> None:
        if found[-1] % 7 == 0:
            counts = Counts({"set_pulses": 1 + found[-1], "verify_reads": 3})
            self.ledger.add(counts, phase="reprogram", layer="0")


def last_intact(folder: Path) -> Path | None:
    for path in sorted(folder.glob("*.ckpt"), reverse=True):
        try:
            torch.load(path, weights_only=True)
        except Exception:  # whatever half a file may raise
            continue
        return path
    return None


def train(folder: Path) -> None:
    """Train to the end, from wherever the last run came to; then write what came out."""
    folder.mkdir(exist_ok=True)
    ledger, module = al.Ledger(), Restartable(hybrid())
    ledger.add(Counts({"set_pulses": 1000}), phase="program", layer="0")
    meters = (PulseCounter(ledger), EnergyMeter(CHIP, ledger))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=EPOCHS,
        accumulate_grad_batches=3,
        callbacks=[*meters, Writer(ledger), FrozenGuard(), Saver(folder)],
    )
    trainer.fit(module, loader(BATCHES), ckpt_path=last_intact(folder))
    adapters = b"".join(p.detach().numpy().tobytes() for p in module.parameters())
    result = {
        "ledger": ledger.state_dict(),
        "fingerprint": al.fingerprint(module),
        "adapters": hashlib.sha256(adapters).hexdigest(),
        "metrics": {key: value.item() for key, value in trainer.callback_metrics.items()},
        "steps": trainer.global_step,
    }
    (folder / "result.json").write_text(json.dumps(result))


def forked(folder: Path) -> int:
    """Start a run of its own."""
    child = os.fork()
    if child:
        return child
    try:
        train(folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def newest(folder: Path) -> int:
    """Number of the newest checkpoint, -1 for none."""
    return max((int(path.stem) for path in folder.glob("*.ckpt")), default=-1)


def killed(folder: Path, batch: int, seconds: float) -> bool:
    """Start a run and kill it some time after a batch; tell whether that came before its end."""
    child, before = forked(folder), newest(folder)
    while newest(folder) < max(batch, before + 1):
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def main(folder: Path, kills: int, seed: int) -> None:
    """Run through, and run with as many kills; write what both came to."""
    frozen()  # programmed once, so that all runs have one chip
    moments = random.Random(seed)
    through, broken = folder / "through", folder / "broken"
    statuses = [os.waitpid(forked(through), 0)[1]]
    broken.mkdir()
    batches = sorted(moments.sample(range(BATCHES * EPOCHS - 10), kills))
    hits = [killed(broken, batch, moments.uniform(0, LATEST_SECONDS)) for batch in batches]
    statuses.append(os.waitpid(forked(broken), 0)[1])
    (folder / "kills.json").write_text(json.dumps({"hits": hits, "statuses": statuses}))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*many workers")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
