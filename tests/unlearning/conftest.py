"""A frozen model with two adapters: 'forget' on some of its layers, 'learn' on all."""

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


def frozen_net(seed: int = 0, programmed_by: str = "test") -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 8, bias=False), nn.Linear(8, 3))
    return al.freeze_(al.convert(net, CHIP), programmed_by=programmed_by)


def lora_config(targets: list[str] | str, **options: Any) -> LoraConfig:
    defaults = {"r": 2, "target_modules": targets, "init_lora_weights": False}
    return LoraConfig(**(defaults | options))


@pytest.fixture
def frozen_model() -> Callable[..., nn.Module]:
    return frozen_net


@pytest.fixture
def branch() -> Callable[..., LoraConfig]:
    return lora_config


@pytest.fixture
def two_adapters() -> Callable[..., PeftModel]:
    """Makes the model; 'forget' is not on layer '2'. Both are active, and 'learn' is trained."""

    def make(**options: Any) -> PeftModel:
        model = frozen_net()
        torch.manual_seed(1)
        forget = lora_config(["0", "3"], **options)
        peft = get_peft_model(model, forget, adapter_name="forget")
        peft.add_adapter("learn", lora_config(["0", "2", "3"]))
        peft.base_model.set_adapter(["forget", "learn"])
        for name, parameter in peft.named_parameters():
            parameter.requires_grad_(".learn." in name)
        return peft.eval()

    return make


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(2))
