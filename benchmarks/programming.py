"""Cells programmed per second, beside aihwkit's own ``program_weights`` on the same device.

Usage: python benchmarks/programming.py [--cells 1000000] [--side 128] [--iterations 30 100 300]
           [--tolerance 0.05] [--rounds 5] [--threads 2] [--json FILE]

``write_verify`` programs fresh cells within the default budget, once a large array and once a tile;
drawing the cells is part of its time. aihwkit programs one tile of the same size from its own start
near zero, with its defaults but for two things: it reads without noise, as ``write_verify`` does
here, and it runs a fixed number of iterations, as its own criterion to stop is the mean error of
all cells. Making its tile is not part of its time. Both aim at the same weights. "In tolerance" are
cells whose weight ends within the tolerance; all others are programmed too, only not well.

Subjects take turns in one process, in an order that rotates every round. Memory is read in a fresh
process per device (Linux). ``--quick`` only tests this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from aihwkit.simulator.configs import SingleRPUConfig
from aihwkit.simulator.configs.devices import PulsedDevice
from aihwkit.simulator.presets.devices import (
    ReRamArrayHfO2PresetDevice,
    ReRamArrayOMPresetDevice,
    ReRamESPresetDevice,
)
from aihwkit.simulator.tiles import AnalogTile
from torch import Generator, Tensor

from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.programming import PulseResponse, write_verify

DEVICES: dict[str, PulsedDevice] = {
    "OM ReRAM array": ReRamArrayOMPresetDevice(),
    "OM ReRAM array, no write noise": ReRamArrayOMPresetDevice(write_noise_std=0.0),
    "HfO2 ReRAM array": ReRamArrayHfO2PresetDevice(),
    "ReRAM, exponential step": ReRamESPresetDevice(),
}
ROWS_OF_A_LARGE_ARRAY = 1000
SECONDS_TARGET, MEMORY_TARGET_MIB = 5.0, 1024.0
TARGET_DEVICES = ("OM ReRAM array", "OM ReRAM array, no write noise")
TARGET_CELLS = 1_000_000
QUANTITIES = ("cells_per_second", "cells_in_tolerance_per_second")


@dataclass(frozen=True)
class Subject:
    """One way to program an array.

    Args:
        shape: Columns and rows.
        iterations: Of aihwkit's loop; 0 for ``write_verify``.
    """

    shape: tuple[int, int]
    iterations: int = 0

    @property
    def name(self) -> str:
        """Name in tables and in JSON."""
        way = f"aihwkit, {self.iterations} iterations" if self.iterations else "write_verify"
        return f"{way}, {self.shape[0]} × {self.shape[1]}"


@dataclass(frozen=True)
class Programmed:
    """What one run did."""

    seconds: float
    in_tolerance: int
    pulses: int | None = None


def targets(shape: tuple[int, int], generator: Generator) -> Tensor:
    """Weights like a trained layer's: normal, a fifth of the range wide, cut at its ends."""
    return (0.2 * torch.randn(shape, generator=generator)).clamp(-0.6, 0.6)


def program(subject: Subject, device: PulsedDevice, tolerance: float, seed: int) -> Programmed:
    """Program new cells once."""
    way = host_library if subject.iterations else closed_loop
    return way(subject, device, tolerance, Generator().manual_seed(seed))


def closed_loop(
    subject: Subject, device: PulsedDevice, tolerance: float, generator: Generator
) -> Programmed:
    """Time ``write_verify``, drawing the cells included."""
    target = targets(subject.shape, generator)
    policy = WritePolicy(device=lambda: device, tolerance=tolerance)
    start = time.perf_counter()
    response = PulseResponse.draw(device, subject.shape, generator)
    result = write_verify(target, response.fresh(generator), response, policy, generator)
    seconds = time.perf_counter() - start
    near = (result.state.apparent - target).abs() <= tolerance
    return Programmed(seconds, int(near.sum()), result.counts().pulses)


def host_library(
    subject: Subject, device: PulsedDevice, tolerance: float, generator: Generator
) -> Programmed:
    """Time aihwkit's ``program_weights``; in 1.2.0, this works on a tile's first call only."""
    config = SingleRPUConfig(device=device)
    config.forward.is_perfect = True
    tile = AnalogTile(*subject.shape, config)
    tile.tile.set_weights(targets(subject.shape, generator))
    # What a cell cannot reach, and write noise, are in the weights that aihwkit aims for.
    target = tile.tile.get_weights().clone()
    start = time.perf_counter()
    tile.program_weights(from_reference=False, max_iter=subject.iterations, tolerance=None)
    seconds = time.perf_counter() - start
    near = (tile.tile.get_weights() - target).abs() <= tolerance
    return Programmed(seconds, int(near.sum()))


def measure(
    device: PulsedDevice, ways: Sequence[Subject], tolerance: float, rounds: int
) -> dict[str, dict[str, Any]]:
    """Medians over rounds; in each, every subject programs new cells once."""
    runs: dict[str, list[Programmed]] = {way.name: [] for way in ways}
    turn = list(ways)
    for seed in range(rounds + 1):  # the first round warms up
        for way in turn:
            runs[way.name].append(program(way, device, tolerance, seed))
        turn.append(turn.pop(0))
    return {way.name: summary(way, runs[way.name][1:]) for way in ways}


def summary(subject: Subject, runs: Sequence[Programmed]) -> dict[str, Any]:
    """One line of the table."""
    cells = subject.shape[0] * subject.shape[1]
    q1, seconds, q3 = statistics.quantiles([run.seconds for run in runs], method="inclusive")
    near = statistics.median(run.in_tolerance for run in runs)
    pulses = [run.pulses for run in runs if run.pulses is not None]
    return {
        "cells": cells,
        "seconds": {"median": seconds, "q1": q1, "q3": q3},
        "cells_in_tolerance": near,
        "cells_per_second": cells / seconds,
        "cells_in_tolerance_per_second": near / seconds,
        "pulses_per_cell": statistics.median(pulses) / cells if pulses else None,
    }


def ratios(found: dict[str, dict[str, Any]], ways: Sequence[Subject]) -> list[dict[str, Any]]:
    """Divide the speed of every ``write_verify`` by that of every aihwkit loop."""
    ours = [way.name for way in ways if not way.iterations]
    theirs = [way.name for way in ways if way.iterations]
    return [
        {
            "measure": quantity,
            "numerator": above,
            "denominator": below,
            "value": found[above][quantity] / found[below][quantity],
        }
        for above in ours
        for below in theirs
        for quantity in QUANTITIES
    ]


def _memory_kib(file: str, field: str) -> int:
    return int(Path("/proc/self", file).read_text().partition(field)[2].split()[0])


def memory(device: str, cells: int, tolerance: float) -> dict[str, float]:
    """Resident memory of this process in MiB: with imports only, and at the peak of programming."""
    imports = _memory_kib("status", "VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from the present memory
    program(Subject(large(cells)), DEVICES[device], tolerance, 0)
    peak = _memory_kib("status", "VmHWM:")
    values = {"imports": imports, "peak": peak, "increase": peak - imports}
    return {f"{name}_mib": kib / 1024 for name, kib in values.items()}


def memory_apart(device: str, options: argparse.Namespace) -> dict[str, float]:
    """The same in a fresh process; with ``--quick`` in this one."""
    if options.quick:
        return memory(device, options.cells, options.tolerance)
    command = [sys.executable, __file__, "--memory-of", device, "--cells", str(options.cells)]
    command += ["--tolerance", str(options.tolerance), "--threads", str(options.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def large(cells: int) -> tuple[int, int]:
    """Shape of a large array, rounded down to whole columns."""
    rows = min(ROWS_OF_A_LARGE_ARRAY, cells)
    return cells // rows, rows


def machine(threads: int) -> dict[str, Any]:
    """Describe where the numbers were measured."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    return {
        "cpu": cpu.strip("\t :") or platform.machine(),
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "aihwkit")},
        "threads": threads,
    }


def met(result: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Each target: its words, what was measured, and by how much that is better (or worse, < 0)."""
    if result["settings"]["cells"] != TARGET_CELLS:
        return
    name = Subject(large(TARGET_CELLS)).name
    for device in TARGET_DEVICES:
        of = result["devices"][device]
        seconds, increase = of["subjects"][name]["seconds"]["median"], of["memory"]["increase_mib"]
        yield f"{device}: {name} ≤ {SECONDS_TARGET} s", seconds, SECONDS_TARGET - seconds
        words = f"{device}: memory above imports ≤ {MEMORY_TARGET_MIB:.0f} MiB"
        yield words, increase, MEMORY_TARGET_MIB - increase


def print_report(result: dict[str, Any]) -> None:
    """Print everything as Markdown."""
    for part in ("machine", "settings"):
        print(", ".join(f"{key} {value}" for key, value in result[part].items()) + "\n")
    for device, of in result["devices"].items():
        print(f"## {device}\n")
        print("| subject | s | quartiles | cells/s | in tolerance | pulses/cell |")
        print("|---|---|---|---|---|---|")
        for name, entry in of["subjects"].items():
            median, q1, q3 = (f"{entry['seconds'][key]:.3f}" for key in ("median", "q1", "q3"))
            near, pulses = entry["cells_in_tolerance"], entry["pulses_per_cell"]
            share = f"{near:,.0f} ({100 * near / entry['cells']:.1f} %)"
            tail = f"{share} | {'' if pulses is None else f'{pulses:.2f}'} |"
            print(f"| {name} | {median} | {q1} – {q3} | {entry['cells_per_second']:,.0f} | {tail}")
        taken = ", ".join(f"{key[:-4]} {value:.0f} MiB" for key, value in of["memory"].items())
        print(f"\nMemory of programming {result['settings']['cells']:,} cells: {taken}.\n")
        print("| ratio per second | of cells | of cells in tolerance |\n|---|---|---|")
        for one, two in zip(of["ratios"][::2], of["ratios"][1::2], strict=True):
            pair = f"{one['numerator']} ÷ {one['denominator']}"
            print(f"| {pair} | {one['value']:.2f} | {two['value']:.2f} |")
        print()
    print("| target | measured | |\n|---|---|---|")
    for words, value, margin in met(result):
        verdict = "met" if margin >= 0 else f"missed by {-margin:.2f}"
        print(f"| {words} | {value:.2f} | {verdict} |")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=TARGET_CELLS, help="of the large array")
    parser.add_argument("--side", type=int, default=128, help="columns and rows of a tile")
    parser.add_argument("--iterations", type=int, nargs="+", default=[30, 100, 300])
    parser.add_argument("--tolerance", type=float, default=0.05, help="in cell-state units")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the same to")
    parser.add_argument("--quick", action="store_true", help="tiny and meaningless, for tests")
    parser.add_argument("--memory-of", choices=DEVICES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.cells, options.side, options.iterations, options.rounds = 3000, 8, [2, 5], 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file that was asked for."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory(options.memory_of, options.cells, options.tolerance)))
        return
    tile = (options.side, options.side)
    ways = [Subject(large(options.cells)), Subject(tile)]
    ways += [Subject(tile, iterations) for iterations in options.iterations]
    devices = {}
    for name, device in DEVICES.items():
        found = measure(device, ways, options.tolerance, options.rounds)
        taken = memory_apart(name, options)
        devices[name] = {"subjects": found, "memory": taken, "ratios": ratios(found, ways)}
    settings = ("cells", "side", "iterations", "tolerance", "rounds")
    result = {
        "machine": machine(options.threads),
        "settings": {name: getattr(options, name) for name in settings},
        "devices": devices,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print_report(result)


if __name__ == "__main__":
    main()
