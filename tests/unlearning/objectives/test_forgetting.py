"""Each objective for classifiers makes a small frozen network forget one class and keep the rest.

The classes are so far apart that nothing here is a matter of luck: seeds are fixed, and the
accuracies are 0 and 1, not about that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import aihwkit_lora as al
from aihwkit_lora.unlearning import objectives

# What to construct it with, and how many steps of Adam at 0.01 it takes.
RECIPES: dict[str, tuple[dict[str, Any], int]] = {
    "weighted_ga": ({}, 30),
    "neggrad_plus": ({"alpha": 0.7}, 40),
    "bounded_ga": ({}, 60),
    "npo": ({}, 60),
    "simnpo": ({}, 60),
    "random_label": ({}, 60),
    "kl_uniform": ({"margin": 1.0}, 60),
    "masked_teacher": ({}, 60),
    "scrub": ({}, 60),
    "boundary_shrink": ({"step": 0.5}, 60),
    "rmu": ({"layer": "1", "coefficient": 5.0, "seed": 1}, 100),
    "negation": ({}, 60),
}
NOT_FOR_CLASSIFIERS = {"esd", "gaussian_target", "pseudo_class", "uniform_target"}


def train_(model, objective, batch, steps) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        objective.loss(model, batch, progress=step / steps).backward()
        optimizer.step()


def accuracy(model, part) -> float:
    x, labels = part
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == labels).float().mean())


def test_every_objective_for_classifiers_is_tried():
    ours = {n for n in objectives.names() if objectives.get(n).__module__.startswith("aihwkit_")}
    others = {name for name in ours if name.startswith("token_")}
    assert {*RECIPES} == ours - others - NOT_FOR_CLASSIFIERS


@pytest.mark.parametrize("name", RECIPES)
def test_the_class_is_forgotten_and_the_others_are_kept(name, adapted, batch):
    options, steps = RECIPES[name]
    model = adapted()
    before = al.fingerprint(model)
    assert [accuracy(model, batch[part]) for part in ("forget", "retain")] == [1.0, 1.0]
    torch.manual_seed(2)
    train_(model, objectives.get(name)(**options), batch, steps)
    if name == "negation":
        objectives.apply_negation_(model, "default", strength=2.0)
    assert [accuracy(model, batch[part]) for part in ("forget", "retain")] == [0.0, 1.0]
    assert al.fingerprint(model) == before
