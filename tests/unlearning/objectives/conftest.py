"""A small frozen classifier that knows four well-separated classes, with an adapter to train."""

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
CLASSES, INPUTS, PER_CLASS, FORGOTTEN = 4, 10, 12, 2

Batch = dict[str, tuple[Any, Tensor]]


class Fixed(nn.Module):
    """Gives parameters as outputs, whatever it sees, so that a loss is a function of them."""

    def __init__(self, forget: Tensor, retain: Tensor) -> None:
        super().__init__()
        self.forget, self.retain = nn.Parameter(forget.clone()), nn.Parameter(retain.clone())

    def forward(self, part: str) -> Tensor:
        return (self.forget if part == "forget" else self.retain) * 1.0


def fixed_batch(forget: Tensor, retain: Tensor) -> Batch:
    """A batch for :class:`Fixed`: labels only."""
    return {"forget": (("forget",), forget), "retain": (("retain",), retain)}


@pytest.fixture(scope="session")
def learnt() -> dict[str, Any]:
    """State of a network that tells the classes apart, and the samples it was taught."""
    generator = torch.Generator().manual_seed(0)
    centres = 2.0 * torch.randn(CLASSES, INPUTS, generator=generator)
    labels = torch.arange(CLASSES).repeat_interleave(PER_CLASS)
    noise = torch.randn(len(labels), INPUTS, generator=generator)
    x = centres[labels] + 0.3 * noise
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    assert (net(x).argmax(dim=1) == labels).all()
    return {"state": net.state_dict(), "x": x, "labels": labels}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, CLASSES))


@pytest.fixture
def batch(learnt: dict[str, Any]) -> Batch:
    forgotten = learnt["labels"] == FORGOTTEN
    return {
        "forget": (learnt["x"][forgotten], learnt["labels"][forgotten]),
        "retain": (learnt["x"][~forgotten], learnt["labels"][~forgotten]),
    }


@pytest.fixture
def frozen(learnt: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = network()
        net.load_state_dict(learnt["state"])
        return al.freeze_(al.convert(net, CHIP), programmed_by="test")

    return make


@pytest.fixture
def adapted(frozen: Callable[[], nn.Module]) -> Callable[..., PeftModel]:
    """Makes the frozen network with an adapter, which has no effect yet unless told otherwise."""

    def make(**options: Any) -> PeftModel:
        torch.manual_seed(1)
        model = frozen()
        defaults = {"r": 4, "lora_alpha": 8, "target_modules": al.target_modules(model)}
        return get_peft_model(model, LoraConfig(**(defaults | options)))

    return make
