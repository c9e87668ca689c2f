"""Objectives and evaluations in closed form, and the best epoch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.speaker_data import SpeakerClips
from aihwkit_lora.recipes.speaker_training import (
    OneCycle,
    SpeakerTrainee,
    fit,
    forgetting,
    naming,
    noisy_naming,
    saturating,
)
from aihwkit_lora.recipes.spiking import SpikingNet
from aihwkit_lora.recipes.stage_training import Evaluation


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "schedule: expected epochs of 1 or more, got 0"),
        ({"batch_size": 0}, "schedule: expected batch_size of 1 or more, got 0"),
        ({"learning_rate": 0.0}, "schedule: expected learning_rate above 0, got 0.0"),
    ],
)
def test_impossible_schedules_are_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        OneCycle(**{"epochs": 1, "learning_rate": 0.1, **fields})


@pytest.mark.parametrize(
    ("steps", "clips", "epochs"), [(1, 10, 1), (4, 8, 2), (5, 8, 3), (5, 9, 2), (24, 3, 24)]
)
def test_steps_become_whole_epochs(steps, clips, epochs):
    schedule = OneCycle.of_steps(steps, clips=clips, learning_rate=0.1, batch_size=4)
    assert schedule == OneCycle(epochs=epochs, learning_rate=0.1, batch_size=4)


class Fixed(nn.Module):
    """Says the same whatever it hears."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, clips):
        return self.logits.expand(len(clips), -1)


def test_forgetting_pulls_one_speaker_to_a_uniform_mix_of_the_others():
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    p = logits.log_softmax(0)
    loss = forgetting(forgotten=1, kept=(0, 2, 3))
    labels = torch.tensor([0, 1, 1, 3, 2])
    divergence = -math.log(3) - float(p[[0, 2, 3]].mean())
    expected = (2 * divergence - float(p[0] + p[3] + p[2])) / 5
    found = float(loss(Fixed(logits), torch.zeros(5, 10, 140), labels))
    assert found == pytest.approx(expected, rel=1e-6)
    # Batches without one of both kinds happen.
    only = float(loss(Fixed(logits), torch.zeros(2, 10, 140), torch.tensor([1, 1])))
    assert only == pytest.approx(divergence, rel=1e-6)
    none = float(loss(Fixed(logits), torch.zeros(1, 10, 140), torch.tensor([2])))
    assert none == pytest.approx(-float(p[2]), rel=1e-6)


def test_noisy_weights_are_drawn_around_the_present_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    x, labels = torch.ones(64, 2, 2), torch.zeros(64, dtype=torch.long)
    assert noisy_naming(0.0) is naming
    loss, before = noisy_naming(0.1), model[1].weight.detach().clone()
    found = torch.stack([loss(model, x, labels) for _ in range(400)])
    assert torch.equal(model[1].weight, before)
    # Logits differ by a sum of 8 draws; a cross-entropy of two classes depends on that alone.
    difference = (found.detach().exp() - 1).log()
    wanted = 0.1 * float(before.abs().max()) * 8**0.5
    # 400 draws: five standard errors of a standard deviation are 18 %.
    assert float(difference.std()) == pytest.approx(wanted, rel=0.18)
    found[0].backward()
    assert model[1].weight.grad.abs().sum() > 0


def clips(count, seed=0):
    """Each speaker has bands of their own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    spikes = torch.randint(0, 3, (count, 5, 10, 140), generator=generator, dtype=torch.uint8)
    for label in range(3):
        spikes[labels == label, :, :, 40 * label : 40 * label + 40] += 4
    return SpeakerClips(spikes=spikes, labels=labels)


@pytest.mark.parametrize("scores", [[1.0, 3.0, 2.0], [3.0, 2.0, 1.0], [1.0, 2.0, 2.0]])
def test_best_epoch_is_restored_and_later_ones_win_ties(tmp_path, scores):
    torch.manual_seed(0)
    schedule = OneCycle(epochs=3, learning_rate=0.01, batch_size=8)
    model, left, seen = SpikingNet(neurons=6, outputs=3), list(scores), []

    def score(_):
        seen.append(model.head.weight.detach().clone())
        return left.pop(0)

    trainee = SpeakerTrainee(model, naming, schedule, score=score)
    fit(trainee, clips(20), clips(6, 1), schedule, log=tmp_path / "log", callbacks=[])
    best = max(range(3), key=lambda epoch: (scores[epoch], epoch))
    assert [torch.equal(model.head.weight, weight) for weight in seen] == [
        epoch == best for epoch in range(3)
    ]


def test_without_a_score_the_last_epoch_stays_and_every_step_is_followed(tmp_path):
    schedule = OneCycle(epochs=2, learning_rate=0.01, batch_size=8)
    model, steps = SpikingNet(neurons=6, outputs=3), []
    after = lambda: steps.append(model.head.weight.detach().clone())  # noqa: E731
    trainee = SpeakerTrainee(model, naming, schedule, after_step=after)
    fit(trainee, clips(20), clips(6, 1), schedule, log=tmp_path / "log", callbacks=[])
    assert len(steps) == 2 * 3
    assert torch.equal(model.head.weight, steps[-1])


def test_net_learns_clips_that_are_easy(tmp_path):
    torch.manual_seed(0)
    schedule = OneCycle(epochs=6, learning_rate=0.01, batch_size=16)
    model, test = SpikingNet(neurons=32, outputs=3), clips(60, 2)
    trainee = SpeakerTrainee(model, naming, schedule)
    fit(trainee, clips(96), clips(12, 1), schedule, log=tmp_path / "log", callbacks=[])
    assert Evaluation.of(model, test).accuracy(0, 1, 2) > 0.9


CHIP = replace(al.chips.get("rm-180nm"), dac_bits=16, adc_bits=16)
"""The default chip, whose converters round 256 times more finely but clip where they did."""


def loud_layer(bias: bool = True):
    torch.manual_seed(0)
    layer = nn.Linear(300, 140, bias=bias)  # three tiles along the inputs, two across
    nn.init.uniform_(layer.weight, -0.2, 1.0)
    return layer, torch.rand(20, 300)


@pytest.mark.parametrize("bias", [True, False])
def test_saturating_layers_clip_where_the_chip_does(bias):
    layer, x = loud_layer(bias)
    chip = al.freeze_(al.convert(nn.Sequential(layer), CHIP), programmed_by="test")
    with saturating(layer, CHIP), torch.no_grad():
        clipped = layer(x)
    free = layer(x).detach()
    # Each of three tiles ends at 8 full scales; what is left is rounding of 16 bits.
    assert float((free - clipped).abs().max()) > 1.0
    assert torch.allclose(clipped, chip(x).detach(), atol=5e-3)


def test_quiet_layers_are_read_as_ever():
    layer, x = loud_layer()
    # 5 of 100 inputs of a tile at most: no sum gets to 8 times the largest product.
    quiet = torch.where(torch.arange(300) % 20 == 0, x, torch.zeros(()))
    with saturating(layer, CHIP):
        within = layer(quiet)
    assert torch.allclose(within, layer(quiet), rtol=1e-5, atol=1e-5)
    assert layer._forward_hooks == {}


def test_no_gradient_flows_through_a_clipped_sum():
    layer = nn.Linear(100, 2, bias=False)
    layer.weight.data = torch.stack([torch.ones(100), torch.eye(100)[0]])
    with saturating(layer, CHIP):
        layer(torch.ones(1, 100)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[0].tolist() == [0.0] * 100
    assert layer.weight.grad[1].tolist() == [1.0] * 100


def test_hooks_are_gone_after_an_exception():
    layer, _ = loud_layer()
    with pytest.raises(RuntimeError), saturating(layer, CHIP):
        layer(torch.ones(1, 7))
    assert layer._forward_hooks == {}
