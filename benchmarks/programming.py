"""Cells programmed per second and peak memory, beside aihwkit's own ``program_weights``.

Run it from the repository root::

    python benchmarks/programming.py

One line per device and method. "in tolerance" is the share of cells whose apparent weight ends
within the tolerance; cells per second count all cells, whether they end there or not.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Line:
    """One measurement."""

    method: str
    cells: int
    seconds: float
    in_tolerance: float
    pulses_per_cell: float | None = None

    def __str__(self) -> str:
        pulses = (
            "" if self.pulses_per_cell is None else f"  {self.pulses_per_cell:6.2f} pulses/cell"
        )
        return (
            f"  {self.method:<24} {self.cells:>9,} cells {self.seconds:7.2f} s "
            f"{self.cells / self.seconds:>12,.0f} cells/s  "
            f"{100 * self.in_tolerance:6.2f} % in tolerance{pulses}"
        )


def targets(shape: tuple[int, int], generator: Generator) -> Tensor:
    """Weights like a trained layer's: normal, a fifth of the range wide, cut at its ends."""
    return (0.2 * torch.randn(shape, generator=generator)).clamp(-0.6, 0.6)


def peak_mib() -> float:
    """Most resident memory since :func:`forget_peak`, torch and aihwkit included (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def forget_peak() -> None:
    """Start the peak anew from the present memory."""
    Path("/proc/self/clear_refs").write_text("5")


def closed_loop(device: PulsedDevice, cells: int, tolerance: float) -> Line:
    """Time ``write_verify``, drawing the cells included."""
    generator = Generator().manual_seed(0)
    shape = (cells // 1000, 1000)
    target = targets(shape, generator)
    policy = WritePolicy(device=lambda: device, tolerance=tolerance)
    start = time.perf_counter()
    response = PulseResponse.draw(device, shape, generator)
    result = write_verify(target, response.fresh(generator), response, policy, generator)
    seconds = time.perf_counter() - start
    near = (result.state.apparent - target).abs() <= tolerance
    pulses = float(result.pulses.double().mean())
    return Line("write_verify", target.numel(), seconds, float(near.float().mean()), pulses)


def host_library(device: PulsedDevice, side: int, tolerance: float, iterations: int) -> Line:
    """Time aihwkit's ``program_weights`` on one tile; 1.2.0 runs on a tile's first call only.

    It takes a fixed number of iterations: its own criterion to stop is on the mean error.
    """
    target = targets((side, side), Generator().manual_seed(0))
    tile = AnalogTile(side, side, SingleRPUConfig(device=device))
    tile.set_learning_rate(0.1)
    tile.tile.set_weights(target)
    # With write noise, set_weights stores a noisy copy, and that is what aihwkit aims for.
    target = tile.tile.get_weights().clone()
    start = time.perf_counter()
    tile.program_weights(from_reference=False, max_iter=iterations, tolerance=None)
    seconds = time.perf_counter() - start
    near = (tile.tile.get_weights() - target).abs() <= tolerance
    method = f"aihwkit, {iterations} iterations"
    return Line(method, side * side, seconds, float(near.float().mean()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000, help="cells for write_verify")
    parser.add_argument("--side", type=int, default=128, help="rows and columns of aihwkit's tile")
    parser.add_argument("--iterations", type=int, default=300, help="of aihwkit's loop")
    parser.add_argument("--tolerance", type=float, default=0.05, help="in cell-state units")
    arguments = parser.parse_args()
    print(f"tolerance {arguments.tolerance}, {torch.get_num_threads()} threads")
    for name, device in {
        "OM ReRAM array": ReRamArrayOMPresetDevice(),
        "OM ReRAM array, no write noise": ReRamArrayOMPresetDevice(write_noise_std=0.0),
        "HfO2 ReRAM array": ReRamArrayHfO2PresetDevice(),
        "ReRAM (exp. step)": ReRamESPresetDevice(),
    }.items():
        print(name)
        forget_peak()
        print(closed_loop(device, arguments.cells, arguments.tolerance), end="")
        print(f"  {peak_mib():.0f} MiB at the peak")
        print(host_library(device, arguments.side, arguments.tolerance, arguments.iterations))


if __name__ == "__main__":
    main()
