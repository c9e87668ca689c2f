"""Small frozen models, adapters that act, and classes that lie apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.continual.composition import add_adapter_

CHIP = replace(al.chips.get("rm-180nm"), rows=8, columns=4)
FEATURES, CLASSES = 10, 3

Make = Callable[..., PeftModel]


def lora(model: nn.Module, **options: Any) -> LoraConfig:
    defaults = {"r": 2, "target_modules": al.target_modules(model), "init_lora_weights": False}
    return LoraConfig(**(defaults | options))


@pytest.fixture
def config() -> Callable[..., LoraConfig]:
    return lora


@pytest.fixture
def frozen() -> Callable[..., nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(FEATURES, 12), nn.ReLU(), nn.Linear(12, CLASSES))
        return al.freeze_(al.convert(net, CHIP), programmed_by="test")

    return make


@pytest.fixture
def stacked(frozen: Callable[..., nn.Module]) -> Make:
    """A frozen model with some adapters, none of which adds nothing."""

    def make(*names: str, **options: Any) -> PeftModel:
        model = frozen()
        torch.manual_seed(1)
        for name in names:
            model = add_adapter_(model, name, lora(model, **options))
        assert isinstance(model, PeftModel)
        return model

    return make


@pytest.fixture
def batch() -> Callable[..., dict[str, tuple[Tensor, Tensor]]]:
    def make(new: int = 6, replay: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(2)

        def part(size: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(size, FEATURES, generator=generator)
            return x, torch.randint(CLASSES, (size,), generator=generator)

        parts = {"new": part(new), "replay": part(replay)}
        return {key: value for key, value in parts.items() if len(value[1])}

    return make
