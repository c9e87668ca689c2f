"""A small classifier of four clusters on frozen arrays that has been made to forget one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import aihwkit_lora as al

CHIP = al.chips.get("rm-180nm")
CLASSES, INPUTS, FORGOTTEN = 4, 12, 3


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def fit(net: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> nn.Module:
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return net


@dataclass(frozen=True)
class Case:
    """Sets, the network before forgetting, the model after it, and retrained networks."""

    sets: dict[str, Any]
    learnt: nn.Module
    model: PeftModel
    retrained: tuple[nn.Module, ...]
    retrain: Callable[[int], nn.Module]

    @property
    def three(self) -> dict[str, Any]:
        return {name: self.sets[name] for name in ("forget", "retain", "test")}


def _sets() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    centres = 2.0 * torch.randn(CLASSES, INPUTS, generator=generator)
    sets = {}
    for kept, gone, count in (("retain", "forget", 80), ("test", "forget_test", 120)):
        y = torch.arange(count) % CLASSES
        x = centres[y] + torch.randn(count, INPUTS, generator=generator)
        sets[kept] = (x[y != FORGOTTEN], y[y != FORGOTTEN])
        sets[gone] = (x[y == FORGOTTEN], y[y == FORGOTTEN])
    return sets


def _forget(model: PeftModel, sets: dict[str, tuple[Tensor, Tensor]]) -> None:
    (x, y), (gone, _) = sets["retain"], sets["forget"]

    def loss() -> Tensor:
        logits = model(gone)
        wanted = logits.detach().clone()
        wanted[:, FORGOTTEN] = -30.0
        away = nn.functional.cross_entropy(logits, wanted.softmax(dim=1))
        return nn.functional.cross_entropy(model(x), y) + away

    fit(model, loss, steps=60, rate=0.02)


@pytest.fixture(scope="session")
def _case() -> Case:
    sets = _sets()

    def learn(seed: int, *names: str) -> nn.Module:
        x, y = (torch.cat([sets[name][i] for name in names]) for i in range(2))
        torch.manual_seed(seed)
        net = build()
        return fit(net, lambda: nn.functional.cross_entropy(net(x), y), steps=80, rate=0.02)

    learnt = learn(9, "retain", "forget")
    model = al.convert(learnt, CHIP)
    al.program_(model, CHIP, seed=0)
    torch.manual_seed(0)
    peft = get_peft_model(al.freeze_(model), al.AnalogLoraConfig.for_model(model, r=4))
    _forget(peft, sets)
    retrained = tuple(learn(seed, "retain") for seed in range(3))
    return Case(sets, learnt, peft, retrained, lambda seed: learn(seed, "retain"))


@pytest.fixture
def case(_case: Case) -> Case:
    """The case, with a model that a test may change."""
    return replace(_case, model=copy.deepcopy(_case.model))
