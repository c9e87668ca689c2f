"""A stream on a small frozen model: by sum nothing comes back, with the newest adapter it does."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.continual import objectives
from aihwkit_lora.continual.buffer import ReplayBuffer
from aihwkit_lora.continual.composition import active_adapters, add_adapter_
from aihwkit_lora.continual.head import grow_head_
from aihwkit_lora.continual.streams import TaskStream
from aihwkit_lora.unlearning import objectives as unlearning_objectives

STREAM = TaskStream.parse(["learn 0 1 2", "forget 1", "learn 3", "forget 0", "learn 4"])
FEATURES, EACH = 8, 40


@pytest.fixture(scope="module")
def data():
    """Five classes around five corners: 40 samples each to train, 40 to test."""
    generator = torch.Generator().manual_seed(0)
    centres = 2.0 * torch.randn(5, FEATURES, generator=generator)

    def split():
        noise = 0.7 * torch.randn(5, EACH, FEATURES, generator=generator)
        return (centres[:, None] + noise).unbind(0)

    return {"train": split(), "test": split()}


@pytest.fixture(scope="module")
def learnt(data):
    """A net that knows the first three classes, programmed and frozen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 24), nn.ReLU(), nn.Linear(24, 3))
    x, y = samples(data["train"], ("0", "1", "2"))
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    model = al.convert(net, al.chips.get("rm-180nm")).requires_grad_(False)
    return al.freeze_(model, programmed_by="test")


def samples(split, units):
    labels = [int(unit) for unit in units]
    x = torch.cat([split[label] for label in labels])
    return x, torch.tensor(labels).repeat_interleave(EACH)


@torch.no_grad()
def accuracy(model, data, units):
    x, y = samples(data["test"], units)
    model.eval()
    return float((model(x).argmax(1) == y).float().mean())


class Run:
    """Serves a stream, and remembers how much of what is forgotten was known after each step."""

    def __init__(self, model, data, composition):
        self.model, self.data, self.composition = model, data, composition
        self.buffer, self.relapse = ReplayBuffer(ratio=0.5), []

    def serve(self, phase):
        if phase.index == 0:
            self.buffer.add(*samples(self.data["train"], phase.units))
            return
        torch.manual_seed(phase.index)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])
        self.model = add_adapter_(
            self.model, phase.request.adapter, config, composition=self.composition
        )
        (self.learn if phase.learns else self.forget)(phase)

    def forget(self, phase):
        objective = unlearning_objectives.get("npo")(beta=0.5)
        forgotten = samples(self.data["train"], phase.units)
        assert self.buffer.remove(*phase.units) > 0
        retained = self.buffer.balanced()
        self.train(objective, {"forget": forgotten, "retain": retained}, 80)

    def learn(self, phase):
        grow_head_(self.model, len(phase.units))
        new, replayed = samples(self.data["train"], phase.units), self.buffer.balanced()
        self.buffer.add(*new)
        self.relapse = []
        objective = objectives.get("replay")()
        self.train(objective, {"new": new, "replay": replayed}, 80, phase.forgotten_so_far)

    def train(self, objective, batch, steps, watched=()):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=0.02)
        for step in range(steps):
            if watched:
                self.relapse.append(accuracy(self.model, self.data, watched))
            self.model.train()
            optimiser.zero_grad()
            objective.loss(self.model, batch, progress=step / steps).backward()
            optimiser.step()


def test_by_sum_what_is_forgotten_stays_forgotten(learnt, data):
    run = Run(copy.deepcopy(learnt), data, "sum")
    mark = al.fingerprint(run.model)
    assert accuracy(run.model, data, ("0", "1", "2")) > 0.9
    for phase in STREAM:
        run.serve(phase)
        if phase.forgotten_so_far:
            assert accuracy(run.model, data, phase.forgotten_so_far) == 0.0
        if phase.index and phase.learns:
            assert max(run.relapse) <= 0.01  # one point, at any step
        assert accuracy(run.model, data, phase.kept) > 0.9
        assert set(run.buffer.units) == set(phase.kept)
    assert active_adapters(run.model) == ("forget-1", "learn-3", "forget-0", "learn-4")
    assert al.fingerprint(run.model) == mark


def test_with_the_newest_adapter_only_it_comes_back(learnt, data):
    run = Run(copy.deepcopy(learnt), data, "newest")
    for phase in list(STREAM)[:3]:
        run.serve(phase)
        if not phase.learns:
            assert accuracy(run.model, data, phase.forgotten_so_far) == 0.0
    # Before the first step of the new adapter it is all there, and it is not gone at once.
    assert run.relapse[0] > 0.9
    assert sum(known > 0.4 for known in run.relapse) >= 5
