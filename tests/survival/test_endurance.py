"""A thousand steps leave no tensor, no object and no queue behind."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sized
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import aihwkit_lora as al

STEPS = 1000


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def containers(model: nn.Module) -> dict[str, int]:
    """Lengths of all that could be a queue in the model and in what its layers hold."""
    found = {}
    for name, module in model.named_modules():
        owners = {name: module}
        if hasattr(module, "engine"):
            owners[f"{name}.engine"] = module.engine
            readers = getattr(module.engine, "_readers", [])
            owners |= {f"{name}.reader{i}": reader for i, reader in enumerate(readers)}
        for owner, held in owners.items():
            values = {n: v for n, v in vars(held).items() if isinstance(v, Sized)}
            found |= {f"{owner}.{n}": len(v) for n, v in values.items() if v is not None}
            if hasattr(held, "analog_ctx"):
                context = held.analog_ctx
                found[f"{owner}.queue"] = len(context.analog_input) + len(
                    context.analog_grad_output
                )
    return found


@pytest.mark.parametrize("tiles", ["inference fused", "torch reference", "pulsed reference"])
def test_a_thousand_steps_leave_nothing_behind(tiles: str, kind_of: Any, train: Any) -> None:
    kind = kind_of("linear", *tiles.split())
    model = kind.adapted()
    before = al.fingerprint(model)
    # torch's own caches behind an autograd.Function fill up within the first few hundred steps.
    train(model, kind.x, steps=STEPS // 2)
    queues, count, blocks = containers(model), tensors(), [sys.getallocatedblocks()]
    for _ in range(2):
        train(model, kind.x, steps=STEPS // 4)
        assert tensors() == count
        blocks.append(sys.getallocatedblocks())
    assert containers(model) == queues
    # Less than one block a step: one that each of the two layers kept would be two. In the quieter
    # half, because whatever ran in this process before may still tidy up in the other.
    assert min(after - start for start, after in pairwise(blocks)) < STEPS // 4
    assert al.fingerprint(model) == before
    al.verify(model)


def test_what_is_kept_would_be_noticed(kind_of: Any, train: Any) -> None:
    kind = kind_of()
    model = kind.adapted()
    train(model, kind.x, steps=20)
    queues, count = containers(model), tensors()
    kept: list[Any] = []
    next(al.frozen_layers(model))[1].analog_module.kept = kept
    for _ in range(3):
        kept.append(model(kind.x).detach())
    assert tensors() == count + 3
    assert containers(model) != queues
