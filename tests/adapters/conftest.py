"""Frozen models with adapters that have an effect from the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import aihwkit_lora as al

CHIP = replace(al.chips.get("rm-180nm"), rows=8, columns=4)
NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(
        nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 8, bias=False), nn.Linear(8, 3)
    ),
    "signal": lambda: nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 4, 2, stride=2)
    ),
    "image": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)),
    "volume": lambda: nn.Sequential(nn.Conv3d(2, 3, 2)),
}
SHAPES = {"linear": (10,), "signal": (2, 8), "image": (2, 4, 4), "volume": (2, 3, 3, 3)}

Make = Callable[..., PeftModel]


@pytest.fixture
def frozen() -> Callable[..., nn.Module]:
    def make(network: str = "linear") -> nn.Module:
        torch.manual_seed(0)
        model = al.convert(NETS[network](), CHIP)
        return al.freeze_(model, programmed_by="test")

    return make


@pytest.fixture
def adapted(frozen: Callable[..., nn.Module]) -> Make:
    def make(network: str = "linear", **options: Any) -> PeftModel:
        model = frozen(network)
        torch.manual_seed(1)
        return get_peft_model(model, lora(model, **options)).eval()

    return make


@pytest.fixture
def config() -> Callable[..., LoraConfig]:
    return lora


def lora(model: nn.Module, **options: Any) -> LoraConfig:
    defaults = {"r": 2, "target_modules": al.target_modules(model), "init_lora_weights": False}
    return LoraConfig(**(defaults | options))


@pytest.fixture
def batch() -> Callable[..., Tensor]:
    def make(network: str = "linear", size: int = 5) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randn(size, *SHAPES[network], generator=generator)

    return make
