"""Read noise follows torch's seed, in the model itself and in its copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# aihwkit 1.2.0 draws the noise of its C++ tiles from a generator that no seed reaches, so the
# reference engine follows seeds on torch tiles only.
SEEDED = [
    *((network, config, "fused") for network in ("linear", "convolution")
      for config in ("inference", "torch", "pulsed")),
    *((network, "torch", "reference") for network in ("linear", "convolution")),
]  # fmt: skip


@pytest.fixture(params=SEEDED, ids=" ".join)
def noisy(request: pytest.FixtureRequest, kind_of: Any) -> Any:
    return kind_of(*request.param, noisy=True)


def read(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return model(x).detach()


def test_same_seed_same_noise_also_in_copies(noisy: Any) -> None:
    model, x = noisy.adapted(), noisy.x
    early = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    first = read(model, x, 0)
    late = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in (model, *early, *late):
        assert torch.equal(read(twin, x, 0), first)
        assert not torch.equal(read(twin, x, 1), first)


def test_noise_is_drawn_anew_in_each_read(noisy: Any) -> None:
    model, x = noisy.adapted(), noisy.x
    outputs = [read(model, x, 0), *(model(x).detach() for _ in range(3))]
    pairs = [(a, b) for i, a in enumerate(outputs) for b in outputs[:i]]
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_reads_take_as_many_random_numbers_each_time(noisy: Any) -> None:
    model = noisy.adapted()
    states = []
    for _ in range(3):  # the first read of the reference engine builds tiles, at random
        torch.manual_seed(0)
        model(noisy.x)
        states.append(torch.get_rng_state())
    assert torch.equal(states[1], states[0])
    assert torch.equal(states[2], states[0])


def test_gradients_draw_no_noise(noisy: Any) -> None:
    model = noisy.adapted()
    loss = model(noisy.x).sum()
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_training_is_repeatable_with_noise(noisy: Any, train: Any) -> None:
    found = []
    for seed in (0, 0, 1):
        model = noisy.adapted()
        torch.manual_seed(seed)
        train(model, noisy.x, steps=3)
        found.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(found[1], found[0])
    assert not torch.equal(found[2], found[0])


def test_without_noise_nothing_is_random(kind: Any) -> None:
    model, x = kind.adapted(), kind.x
    before = torch.get_rng_state()
    outputs = [model(x) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert torch.equal(kind.adapted()(x), outputs[0])
