"""Training in place: which devices can be counted, what a model starts from, what trains it."""

from __future__ import annotations

import pickle

import pytest
import torch
from aihwkit.optim import AnalogSGD
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import PulseCounter
from aihwkit_lora.errors import UnknownNameError
from aihwkit_lora.recipes.face_data import FaceData, FaceImages
from aihwkit_lora.recipes.face_training import Schedule, fit
from aihwkit_lora.recipes.in_situ import (
    PulsedTrainee,
    device_of,
    on_pulsed_tiles,
    weights_on_tiles,
)

CHIP = al.chips.get("rm-180nm")


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = nn.Linear(4, 20, bias=False), nn.ReLU(), nn.RMSNorm(20), nn.Linear(20, 3, bias=False)
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.fixture
def arrays(net):
    model = al.convert(net, CHIP)
    al.program_(model, CHIP, seed=0)
    return al.freeze_(model)


@pytest.mark.parametrize("name", ["TikiTakaEcRamPreset", "MixedPrecisionPCMPreset", "PCMPreset"])
def test_devices_whose_pulses_cannot_be_counted_are_refused(name):
    with pytest.raises(UnknownNameError, match=f"one pulsed device per weight '{name}'"):
        device_of(name)
    with pytest.raises(UnknownNameError, match="Did you mean 'EcRamPreset'"):
        device_of("EcRamPresett")


def test_training_begins_from_what_programming_left(net, arrays):
    before = net[1].weight.detach().clone()
    model = on_pulsed_tiles(net, arrays, "IdealizedPreset")
    assert torch.equal(net[1].weight, before)
    for index in (1, 4):
        held = torch.as_tensor(arrays[index].weight)
        assert not torch.equal(held, net[index].weight)
        found, _ = model[index].get_weights()
        there = torch.isclose(found, held, rtol=0, atol=1e-5)
        assert float(there.float().mean()) > 0.9
        # The rest do not reach that far.
        assert bool((found.abs() < held.abs())[~there].all())
    assert weights_on_tiles(model) == 4 * 20 + 20 * 3
    assert not model[3].weight.requires_grad
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin[1].get_weights()[0], model[1].get_weights()[0])


def test_cells_differ_by_the_seed_alone(net, arrays):
    def start(seed):
        return on_pulsed_tiles(net, arrays, "EcRamPreset", seed=seed)[1].get_weights()[0]

    assert torch.equal(start(0), start(0))


def faces(count):
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    images = torch.rand(count, 4, generator=generator)
    images[torch.arange(count), labels] += 1.0  # one bright pixel tells who it is
    images = images.view(count, 1, 2, 2)
    return FaceImages(images=images, labels=labels, photos=torch.arange(count))


def entropy(model, images, labels, *, progress=0.0):
    return nn.functional.cross_entropy(model(images), labels)


def test_pulses_train_and_are_counted_under_their_phase(net, arrays, tmp_path):
    model, ledger = on_pulsed_tiles(net, arrays, "EcRamPreset"), al.Ledger()
    data = faces(30)
    people = FaceData(train=data, validation=data, test=data, learnt=(0, 1), forgotten=0, new=2)
    schedule = Schedule(epochs=20, learning_rate=0.3, batch_size=10)
    trainee = PulsedTrainee(model, entropy, schedule)
    with torch.no_grad():
        before = float(entropy(model, data.images, data.labels))
    counter = PulseCounter(ledger, phase="forget")
    fit(trainee, data, people, schedule, log=tmp_path / "log", callbacks=[counter])
    assert isinstance(trainee.optimizers(use_pl_optimizer=False), AnalogSGD)
    with torch.no_grad():
        after = float(entropy(model, data.images, data.labels))
    assert after < 0.8 * before
    assert ledger.phases() == ("forget",)
    assert ledger.layers() == ("model.1", "model.4")
    assert ledger.total().pulses > 0
    assert torch.equal(model[3].weight, torch.ones(20))
