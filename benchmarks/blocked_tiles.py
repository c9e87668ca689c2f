"""Forward and backward pass of a frozen layer against aihwkit's own tiles, side by side.

Usage: python benchmarks/blocked_tiles.py

Prints ratios of the median times of alternating runs in one process: above 1, the frozen layer
is faster. The gradient is towards the input only, as below a LoRA branch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import InferenceRPUConfig, TorchInferenceRPUConfig
from torch import Tensor, nn

import aihwkit_lora as al

SHAPES = ((128, 128), (512, 512), (768, 3072))
VECTORS = 256


def main() -> None:
    """Measure every shape on both kinds of tiles."""
    torch.set_num_threads(1)
    print(f"{VECTORS} vectors, tiles of 128 × 128, one thread; aihwkit's time ÷ ours")
    print("| shape | tiles | C++ tiles | torch tiles |\n|---|---|---|---|")
    for in_features, out_features in SHAPES:
        tiles = -(-in_features // 128) * -(-out_features // 128)
        ratios = [
            _ratio(config(), in_features, out_features)
            for config in (InferenceRPUConfig, TorchInferenceRPUConfig)
        ]
        print(f"| {in_features} → {out_features} | {tiles} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def _ratio(config: InferenceRPUConfig, in_features: int, out_features: int) -> float:
    config.mapping.max_input_size = config.mapping.max_output_size = 128
    net = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
    theirs = convert_to_analog(net, config, ensure_analog_root=False).requires_grad_(False)
    ours = al.freeze_(
        convert_to_analog(net, config, ensure_analog_root=False), programmed_by="benchmark"
    )
    x = torch.randn(VECTORS, in_features, requires_grad=True)
    times = [(_seconds(theirs, x), _seconds(ours, x)) for _ in range(15)][3:]
    return statistics.median(t for t, _ in times) / statistics.median(o for _, o in times)


def _seconds(model: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    model(x).sum().backward()
    x.grad = None
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
