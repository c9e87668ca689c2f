"""Whole models copied, pickled and saved: equal, independent, and still frozen."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from aihwkit.inference import PCMLikeNoiseModel
from torch import nn

import aihwkit_lora as al


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = [copy.deepcopy, pickled, saved]


@pytest.mark.parametrize("way", WAYS)
def test_an_adapted_model_survives(kind: Any, way: Any) -> None:
    model = kind.adapted()
    kind.assert_survived(way(model), model)


def test_a_model_survives_while_it_is_trained(kind: Any) -> None:
    model = kind.adapted()
    loss = model(kind.x).sum()  # the reference engine has built its tiles, autograd its graph
    twin = pickled(copy.deepcopy(model))
    loss.backward()
    kind.assert_survived(twin, model)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_shares_nothing_with_its_original(linear_kind: Any, way: Any, train: Any) -> None:
    model = linear_kind.adapted()
    twin = way(model)
    before = al.fingerprint(model)
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(twin, linear_kind.x)
    for _, layer in al.frozen_layers(twin):
        for _, held in layer.analog_module.programmed.named():
            held.mul_(0.5)
    assert al.fingerprint(model) == before
    al.verify(model)
    assert all(torch.equal(dict(model.named_parameters())[n], old) for n, old in adapters.items())
    with pytest.raises(al.FrozenConductanceError, match="expected the conductances and scales"):
        al.verify(twin)


@pytest.mark.parametrize("way", WAYS)
def test_copies_are_refused_the_same_writes(linear_kind: Any, way: Any) -> None:
    twin = way(linear_kind.adapted())
    with pytest.raises(al.FrozenConductanceError, match=r"layer 'layers\.0'"):
        twin.merge_adapter()
    with pytest.raises(al.FrozenConductanceError, match=r"layer 'layers\.0', tile"):
        next(next(al.frozen_layers(twin))[1].analog_tiles()).reset()


@pytest.mark.parametrize("way", WAYS)
def test_the_time_of_drift_survives(linear_kind: Any, way: Any) -> None:
    model = linear_kind.adapted()
    fresh = model(linear_kind.x)
    al.drift_(model, 3600.0, noise_model=PCMLikeNoiseModel())
    twin = way(model)
    assert not torch.equal(twin(linear_kind.x), fresh)
    linear_kind.assert_survived(way(model), model)
    assert torch.equal(al.drift_(twin, 0.0)(linear_kind.x), fresh)


def test_layers_that_share_a_module_still_share_it(kind_of: Any) -> None:
    layer = kind_of().frozen().layers[0]
    twice = nn.ModuleList([layer, layer])
    twin = pickled(copy.deepcopy(twice))
    assert twin[0] is twin[1]
    assert twin[0] is not layer
