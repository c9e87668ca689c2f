"""What metering costs: a LoRA training step in Lightning, with and without the callbacks.

Usage: python benchmarks/metering.py [--rounds 20] [--sizes 128 512] [--threads 1] [--json FILE]

The step is that of ``benchmarks/step.py`` on frozen tiles: of the sizes asked for, which scale each
column and read again what overflows, and as ``convert`` makes them for the chip. Every way to train
is a fit of a few steps on a model of its own, and logs each step to a CSV file. Ways take turns in
one process, in an order that rotates every round; the time of a step runs from one
``on_train_batch_start`` to the next, on the wall and on the processor. A ratio is the median over
all rounds of a way's median step to that of the bare way in the same round. "Off again" is a model
that was metered once and is not any more. ``--quick`` only tests this file.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from pytorch_lightning.loggers import CSVLogger
from step import QUICK_WORK, WORK, Subject, Workload, build, machine
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, PulseCounter

CHIP = al.chips.get("rm-180nm")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
BARE, OFF, BOTH = "bare", "off again", "both meters"
STEPS, WARM_UP = 8, 2
TARGET = 1.03
Seconds = dict[str, list[float]]  # of a way, by clock, one for each round


def _both(ledger: al.Ledger) -> list[pl.Callback]:
    return [PulseCounter(ledger), EnergyMeter(CHIP, ledger)]


WAYS: dict[str, Callable[[al.Ledger], list[pl.Callback]]] = {
    BARE: lambda ledger: [],
    "PulseCounter": lambda ledger: _both(ledger)[:1],
    "EnergyMeter": lambda ledger: _both(ledger)[1:],
    BOTH: _both,
    OFF: lambda ledger: [],
}


class Clock(pl.Callback):
    """When each batch starts, by clock."""

    def __init__(self) -> None:
        self.starts: dict[str, list[float]] = {name: [] for name in CLOCKS}

    def on_train_batch_start(self, *_: Any) -> None:
        """Look at all clocks."""
        for name, clock in CLOCKS.items():
            self.starts[name].append(clock())

    def median(self, clock: str) -> float:
        """Seconds of the median step, without the first ones."""
        starts = self.starts[clock][WARM_UP:]
        return statistics.median(b - a for a, b in itertools.pairwise(starts))


def tiled(size: int, work: Workload) -> nn.Module:
    """The model of ``benchmarks/step.py`` on tiles of a size."""
    return build(Subject("ours", size), work).model


def for_chip(work: Workload) -> nn.Module:
    """The same network on the tiles of the chip."""
    model = al.freeze_(al.convert(work.network(), CHIP), programmed_by="benchmark")
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(r=work.rank, target_modules=al.target_modules(model)))


class Trainee(pl.LightningModule):
    """A model trained by Lightning as ``benchmarks/step.py`` trains it."""

    def __init__(self, model: nn.Module, work: Workload) -> None:
        super().__init__()
        self.model, self.batch = model, work.batch()

    def training_step(self, batch: Tensor) -> Tensor:
        """Mean squared error of a batch."""
        return mse_loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the adapters."""
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def fit(trainee: Trainee, callbacks: Sequence[pl.Callback], folder: Path, steps: int) -> Clock:
    """Train some steps and return what the clocks said; one start more than there are steps."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[clock, *callbacks],
    )
    data = DataLoader([trainee.batch] * (steps + 1), batch_size=None)
    trainer.fit(trainee, data)
    return clock


def measure(
    make: Callable[[Workload], nn.Module], work: Workload, rounds: int, steps: int
) -> dict[str, Seconds]:
    """Seconds of the median step of each way, in each round."""
    trainees = [(way, Trainee(make(work), work)) for way in WAYS]
    seconds: dict[str, Seconds] = {way: {clock: [] for clock in CLOCKS} for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        fit(dict(trainees)[OFF], _both(al.Ledger()), Path(name), WARM_UP + 2)
        for _ in range(rounds):
            for way, trainee in trainees:
                clocks = fit(trainee, WAYS[way](al.Ledger()), Path(name), steps)
                for clock in CLOCKS:
                    seconds[way][clock].append(clocks.median(clock))
            trainees.append(trainees.pop(0))
    return seconds


def summary(seconds: dict[str, Seconds]) -> dict[str, dict[str, dict[str, float]]]:
    """Median step of each way, and its ratio to the bare one with quartiles, by clock."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for way, clocks in seconds.items():
        found[way] = {}
        for clock, taken in clocks.items():
            ratios = [a / b for a, b in zip(taken, seconds[BARE][clock], strict=True)]
            q1, ratio, q3 = statistics.quantiles(ratios, method="inclusive")
            median = statistics.median(taken)
            found[way][clock] = {"median_s": median, "ratio": ratio, "q1": q1, "q3": q3}
    return found


def print_report(result: dict[str, Any]) -> None:
    """Print everything as Markdown."""
    for part in ("machine", "settings"):
        print(", ".join(f"{key} {value}" for key, value in result[part].items()) + "\n")
    print(
        "| tile | callbacks | step, ms | ÷ bare | quartiles | processor, ms | ÷ bare | quartiles |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for tile, ways in result["ways"].items():
        for way, clocks in ways.items():
            cells = (
                f"{1000 * of['median_s']:.1f} | {of['ratio']:.3f} | {of['q1']:.3f} – {of['q3']:.3f}"
                for of in clocks.values()
            )
            print(f"| {tile} | {way} | {' | '.join(cells)} |")
    print("\n| target | measured | |\n|---|---|---|")
    for tile, ways in result["ways"].items():
        ratio = ways[BOTH]["cpu"]["ratio"]
        verdict = "met" if ratio <= TARGET else f"missed by {ratio - TARGET:.3f}"
        print(f"| {tile}: {BOTH} ÷ {BARE}, processor, ≤ {TARGET} | {ratio:.3f} | {verdict} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="at least 2")
    parser.add_argument("--sizes", type=int, nargs="+", help="sizes of a tile")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the same to")
    parser.add_argument("--quick", action="store_true", help="tiny and meaningless, for tests")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    quick = options.quick
    work, rounds = (QUICK_WORK, 2) if quick else (WORK, options.rounds)
    sizes = options.sizes or ([16] if quick else [128, 512])
    steps = 3 + WARM_UP if quick else STEPS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning says of small fits
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        made = {f"{size} × {size}": partial(tiled, size) for size in sizes}
        measured = {
            tile: measure(make, work, rounds, steps)
            for tile, make in (made | {CHIP.name: for_chip}).items()
        }
    result = {
        "machine": machine(options.threads),
        "settings": asdict(work) | {"chip": CHIP.name, "rounds": rounds, "steps": steps - WARM_UP},
        "ways": {tile: summary(seconds) for tile, seconds in measured.items()},
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print_report(result)


if __name__ == "__main__":
    gc.freeze()  # what was imported is no garbage; looking through it would disturb the timing
    main()
    gc.unfreeze()
