"""A LoRA training step on frozen tiles, beside digital PEFT and the way that was published.

Usage: python benchmarks/step.py [--rounds 15] [--sizes 128 256 512 0] [--threads 1] [--json FILE]

A step is forward, mean squared error, backward, Adam and zero_grad on Linear(768, 3072), ReLU,
Linear(3072, 768), with LoRA of rank 8 on both layers and 256 vectors. "aihwkit" is the way of
arXiv:2411.17367: PEFT on the digital model, conversion with the LoRA matrices excluded,
``requires_grad = False`` on the analogue layers, ``AnalogAdam`` on all parameters. Clipping,
remapping and weight noise of that work are left out, which is in aihwkit's favour. Tiles map each
column to its full range and have 8-bit converters and aihwkit's default output noise.

Subjects take turns in one process, in an order that rotates every round. Memory and its growth
are read in a fresh process per subject (Linux). ``--quick`` only tests this file.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from aihwkit.nn import AnalogLinear
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.optim import AnalogAdam
from aihwkit.simulator.configs import InferenceRPUConfig, SingleRPUConfig, TorchInferenceRPUConfig
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

import aihwkit_lora as al

# Title and configuration of each kind of subject.
KINDS: dict[str, tuple[str, Any]] = {
    "digital": ("digital", None),
    "ours": ("ours", TorchInferenceRPUConfig),
    "cpp": ("aihwkit C++", InferenceRPUConfig),
    "torch": ("aihwkit torch", TorchInferenceRPUConfig),
    "pulsed": ("aihwkit pulsed with plain SGD", SingleRPUConfig),
}
Measured = dict[str, dict[str, float]]  # by name of the subject, then of the quantity
WARM_UP_ROUNDS, MEMORY_STEPS = 3, 3
SPEEDUP_TARGET, SPEEDUP_TILE, MEMORY_TARGET = 3.0, 128, 1.5
MEMORY_MEASURES = {"peak": "whole process", "increase": "above imports"}


@dataclass(frozen=True)
class Subject:
    """One way to train.

    Args:
        kind: Key of :data:`KINDS`.
        tile: Rows and columns of a tile; 0 for one tile per layer.
    """

    kind: str
    tile: int = 0

    @property
    def name(self) -> str:
        """Name in tables and in JSON."""
        title, config = KINDS[self.kind]
        size = f"{self.tile} × {self.tile}" if self.tile else "untiled"
        return f"{title}, {size}" if config else title


@dataclass(frozen=True)
class Workload:
    """What all subjects share.

    Args:
        features: Inputs and outputs of the network.
        hidden: Outputs of its first layer.
        vectors: Input vectors of a step.
        rank: Rank of the LoRA adapters.
        noise_free: Tiles multiply exactly, without converters and noise.
    """

    features: int = 768
    hidden: int = 3072
    vectors: int = 256
    rank: int = 8
    noise_free: bool = False

    def network(self) -> nn.Module:
        """The digital network, with the same weights each time."""
        torch.manual_seed(0)
        first, second = nn.Linear(self.features, self.hidden), nn.Linear(self.hidden, self.features)
        return nn.Sequential(first, nn.ReLU(), second)

    def batch(self) -> Tensor:
        """Inputs and goals, shape ``(2, vectors, features)``."""
        torch.manual_seed(1)
        return torch.randn(2, self.vectors, self.features)


WORK, GROWTH_WORK, QUICK_WORK = Workload(), Workload(96, 96, 32), Workload(48, 64, 8, 2)
GROWTH_STEPS, QUICK_STEPS = (100, 1000), (2, 6)


@dataclass(frozen=True)
class Training:
    """A model with adapters, ready to be trained."""

    model: nn.Module
    optimizer: Optimizer
    batch: Tensor

    def step(self) -> float:
        """Train one step and return the loss before it."""
        loss = mse_loss(self.model(self.batch[0]), self.batch[1])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def build(subject: Subject, work: Workload) -> Training:
    """Make a model from the shared weights, with adapters and their optimiser."""
    model = work.network()
    if subject.kind == "ours":
        model = convert_to_analog(model, _tiles(subject, work), ensure_analog_root=False)
        model = al.freeze_(model, programmed_by="benchmark")
    layers = al.target_modules(model) if subject.kind == "ours" else ["0", "2"]
    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(r=work.rank, target_modules=layers))
    if subject.kind in ("cpp", "torch", "pulsed"):
        model = _converted(model, _tiles(subject, work))
    return Training(model, _optimizer(subject, model), work.batch())


def _tiles(subject: Subject, work: Workload) -> Any:
    config = KINDS[subject.kind][1]()
    config.mapping.max_input_size = config.mapping.max_output_size = subject.tile
    config.mapping.weight_scaling_omega, config.mapping.weight_scaling_columnwise = 1.0, True
    config.forward.inp_res = config.forward.out_res = 1 / (2**8 - 2)
    config.forward.is_perfect = work.noise_free
    return config


def _converted(model: nn.Module, config: Any) -> nn.Module:
    adapters = [name for name, _ in model.named_modules() if ".lora_" in name]
    model = convert_to_analog(model, config, exclude_modules=adapters)
    for module in model.modules():
        if isinstance(module, AnalogLinear):
            module.requires_grad_(False)
    return model


def _optimizer(subject: Subject, model: nn.Module) -> Optimizer:
    if subject.kind in ("cpp", "torch"):
        return AnalogAdam(model.parameters(), lr=1e-3)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = torch.optim.SGD if subject.kind == "pulsed" else torch.optim.Adam
    return kind(trainable, lr=1e-3)


def measure_seconds(ways: Sequence[Subject], work: Workload, rounds: int) -> Measured:
    """Median and quartiles of the seconds of a step; each subject makes one step a round."""
    trainings = [(way.name, build(way, work)) for way in ways]
    seconds: dict[str, list[float]] = {name: [] for name, _ in trainings}
    for _ in range(WARM_UP_ROUNDS + rounds):
        for name, training in trainings:
            start = time.perf_counter()
            training.step()
            seconds[name].append(time.perf_counter() - start)
        trainings.append(trainings.pop(0))
    timed = {name: taken[WARM_UP_ROUNDS:] for name, taken in seconds.items()}
    cuts = {name: statistics.quantiles(taken, method="inclusive") for name, taken in timed.items()}
    return {name: {"median": cut[1], "q1": cut[0], "q3": cut[2]} for name, cut in cuts.items()}


def speed_ratios(seconds: Measured, sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Divide medians: aihwkit's by ours, and ours by the digital one, for each size of a tile."""
    ratios = {}
    for above, below in (("cpp", "ours"), ("torch", "ours"), ("ours", "digital")):
        for size in sizes:
            names = Subject(above, size).name, Subject(below, size).name
            ratios[" ÷ ".join(names)] = {
                "numerator": names[0],
                "denominator": names[1],
                "value": seconds[names[0]]["median"] / seconds[names[1]]["median"],
            }
    return ratios


def _memory_kib(file: str, field: str) -> int:
    return int(Path("/proc/self", file).read_text().partition(field)[2].split()[0])


def resident_kib() -> int:
    """Resident memory, counted page by page: the kernel's own sum lags behind.

    Pages that are free already go back first. Else those of a conversion that is over would count
    as memory of the steps that follow it.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _memory_kib("smaps_rollup", "Rss:")


def step_memory(subject: Subject, quick: bool) -> dict[str, float]:
    """Memory of this process in MiB: with imports only, with a model, at the peak of its steps."""
    imports = resident_kib()
    training = build(subject, QUICK_WORK if quick else WORK)
    built = resident_kib()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from the present memory
    for _ in range(MEMORY_STEPS):
        training.step()
    peak = _memory_kib("status", "VmHWM:")
    increase = max(1, peak - imports)  # of tiny models, none may be seen
    values = {"imports": imports, "built": built, "peak": peak, "increase": increase}
    return {f"{name}_mib": kib / 1024 for name, kib in values.items()}


def memory_growth(subject: Subject, quick: bool) -> dict[str, float]:
    """Growth of this process's memory in KiB between two steps of a long training."""
    training = build(subject, QUICK_WORK if quick else GROWTH_WORK)
    first, last = QUICK_STEPS if quick else GROWTH_STEPS
    for _ in range(first):
        training.step()
    before = resident_kib()
    for _ in range(first, last):
        training.step()
    return {"growth_kib": resident_kib() - before}


TASKS = {"memory": step_memory, "growth": memory_growth}


def run_task(task: str, subject: Subject, options: argparse.Namespace) -> dict[str, float]:
    """Run one of :data:`TASKS` in a fresh process; with ``--quick`` in this one."""
    if options.quick:
        return TASKS[task](subject, True)
    identity = ["--task", task, subject.kind, str(subject.tile)]
    command = [sys.executable, __file__, "--threads", str(options.threads), *identity]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(ways: Sequence[Subject], options: argparse.Namespace) -> Measured:
    """Memory of each subject, with the ratios of its peak and its increase to the digital one."""
    found = {way.name: run_task("memory", way, options) for way in ways}
    digital = found[Subject("digital").name]
    for entry in found.values():
        for measure in MEMORY_MEASURES:
            entry[f"{measure}_ratio"] = entry[f"{measure}_mib"] / digital[f"{measure}_mib"]
    return found


def machine(threads: int) -> dict[str, Any]:
    """Describe where the numbers were measured."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    return {
        "cpu": cpu.strip("\t :") or platform.machine(),
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "aihwkit", "peft")},
        "threads": threads,
    }


def targets(result: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Each target: its words, what was measured, and by how much that is better (or worse, < 0)."""
    for name, ratio in result["ratios"].items():
        least = 1.0 if name.startswith(KINDS["torch"][0]) else 0.0
        if ratio["denominator"] == Subject("ours", SPEEDUP_TILE).name:
            least = SPEEDUP_TARGET
        if least:
            yield f"{name} ≥ {least}", ratio["value"], ratio["value"] - least
    for measure, of in MEMORY_MEASURES.items():
        for name, entry in result["memory"].items():
            value = entry[f"{measure}_ratio"]
            if name.startswith(KINDS["ours"][0]):
                words = f"peak memory, {of}: {name} ÷ digital ≤ {MEMORY_TARGET}"
                yield words, value, MEMORY_TARGET - value


def print_report(result: dict[str, Any]) -> None:
    """Print everything as Markdown."""
    for part in ("machine", "settings"):
        print(", ".join(f"{key} {value}" for key, value in result[part].items()) + "\n")
    print("| subject | step, ms | quartiles | peak, MiB (÷ digital) | above imports (÷ digital) |")
    print("|---|---|---|---|---|")
    for name, taken in result["seconds"].items():
        median, q1, q3 = (f"{1000 * taken[key]:.1f}" for key in ("median", "q1", "q3"))
        of = result["memory"][name]
        peak, above = (f"{of[f'{m}_mib']:.0f} ({of[f'{m}_ratio']:.2f})" for m in MEMORY_MEASURES)
        print(f"| {name} | {median} | {q1} – {q3} | {peak} | {above} |")
    print("\n| ratio of step times | |\n|---|---|")
    for name, ratio in result["ratios"].items():
        print(f"| {name} | {ratio['value']:.2f} |")
    print("\n| target | measured | |\n|---|---|---|")
    for words, value, margin in targets(result):
        verdict = "met" if margin >= 0 else f"missed by {-margin:.2f}"
        print(f"| {words} | {value:.2f} | {verdict} |")
    steps = " to ".join(map(str, result["settings"]["growth_steps"]))
    print(f"\n| growth of memory, steps {steps} | KiB |\n|---|---|")
    for name, kib in result["growth_kib"].items():
        print(f"| {name} | {kib:,} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, at least 2")
    parser.add_argument("--sizes", type=int, nargs="+", help="sizes of a tile, 0: untiled")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the same to")
    parser.add_argument("--quick", action="store_true", help="tiny and meaningless, for tests")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.task:
        task, kind, tile = options.task
        print(json.dumps(TASKS[task](Subject(kind, int(tile)), False)))
        return
    rounds, work = (2, QUICK_WORK) if options.quick else (options.rounds, WORK)
    sizes = options.sizes or ([16, 32, 0] if options.quick else [128, 256, 512, 0])
    ways = [Subject("digital")]
    ways += [Subject(kind, size) for size in sizes for kind in ("ours", "cpp", "torch")]
    growing = Subject("digital"), Subject("ours", 128), Subject("pulsed", 128)
    steps = QUICK_STEPS if options.quick else GROWTH_STEPS
    seconds = measure_seconds(ways, work, rounds)
    result = {
        "machine": machine(options.threads),
        "settings": asdict(work) | {"rounds": rounds, "sizes": sizes, "growth_steps": steps},
        "seconds": seconds,
        "ratios": speed_ratios(seconds, sizes),
        "memory": measure_memory(ways, options),
        "growth_kib": {way.name: run_task("growth", way, options)["growth_kib"] for way in growing},
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print_report(result)


if __name__ == "__main__":
    gc.freeze()  # what was imported is no garbage; looking through it would disturb the timing
    main()
    gc.unfreeze()
