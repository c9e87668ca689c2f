"""Schedules and evaluations in closed form; the best epoch; records of steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts
from aihwkit_lora.recipes.face_data import FaceData, FaceImages
from aihwkit_lora.recipes.face_training import Schedule, Trainee, fit
from aihwkit_lora.recipes.stage_training import Evaluation, StepRecorder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "schedule: expected epochs 1 or more, got 0"),
        ({"learning_rate": 0.0}, "schedule: expected learning_rate above 0, got 0.0"),
        ({"batch_size": 0}, "schedule: expected batch_size 1 or more, got 0"),
        ({"warm_up": -0.1}, "schedule: expected warm_up from 0 to 1, got -0.1"),
        ({"warm_up": 1.1}, "schedule: expected warm_up from 0 to 1, got 1.1"),
    ],
)
def test_impossible_schedules_are_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        Schedule(**{"epochs": 1, "learning_rate": 0.1, **fields})


def test_rate_rises_linearly_and_falls_as_a_cosine():
    schedule = Schedule(epochs=1, learning_rate=0.1, warm_up=0.2)
    found = [schedule.factor(step, 20) for step in range(20)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    assert found[12] == pytest.approx(0.5, abs=1e-12)
    assert found[8] == pytest.approx(0.5 * (1.0 + math.cos(math.pi / 4)), abs=1e-12)
    assert schedule.factor(20, 20) == pytest.approx(0.0, abs=1e-12)
    assert Schedule(epochs=1, learning_rate=0.1).factor(0, 1) == 1.0


LOGITS = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [4.0, 0, 0], [0, 0, 4.0], [0, 4.0, 0]])
LABELS = torch.tensor([0, 0, 0, 1, 1])


def test_accuracy_and_loss_in_closed_form():
    result = Evaluation(LOGITS, LABELS)
    assert (result.accuracy(0), result.accuracy(1)) == (2 / 3, 0.5)
    assert result.accuracy(0, 1) == 3 / 5
    norm = math.log(math.exp(4.0) + 2.0)
    assert result.loss(0) == pytest.approx((3 * norm - 8.0) / 3, rel=1e-6)
    assert result.loss(1, 0) == pytest.approx((5 * norm - 12.0) / 5, rel=1e-6)


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.modes = nn.Linear(4, 3), []

    def forward(self, images):
        self.modes.append(self.training)
        return self.linear(images.flatten(1))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_looks_in_evaluation_mode_and_puts_the_mode_back(training):
    model = Affine().train(training)
    result = Evaluation.of(model, faces(2))
    assert model.modes == [False]
    assert model.training is model.linear.training is training
    assert not result.logits.requires_grad


def faces(count):
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    images = torch.rand(count, 1, 2, 2, generator=generator)
    return FaceImages(images=images, labels=labels, photos=torch.arange(count))


def people():
    return FaceData(
        train=faces(10), validation=faces(6), test=faces(6), learnt=(0, 1), forgotten=0, new=2
    )


def entropy(model, images, labels, *, progress=0.0):
    return nn.functional.cross_entropy(model(images), labels)


@pytest.mark.parametrize("scores", [[1.0, 3.0, 2.0], [3.0, 2.0, 1.0], [1.0, 2.0, 2.0]])
def test_best_epoch_is_restored_and_later_ones_win_ties(tmp_path, scores):
    schedule = Schedule(epochs=3, learning_rate=0.1, batch_size=4)
    model, left, seen = Affine(), list(scores), []

    def score(_):
        seen.append(model.linear.weight.detach().clone())
        return left.pop(0)

    trainee = Trainee(model, entropy, schedule, score=score)
    fit(trainee, people().train, people(), schedule, log=tmp_path / "log", callbacks=[])
    trainee.restore_best()
    best = max(range(3), key=lambda epoch: (scores[epoch], epoch))
    assert [torch.equal(model.linear.weight, weight) for weight in seen] == [
        epoch == best for epoch in range(3)
    ]


def test_without_a_score_the_last_epoch_stays(tmp_path):
    schedule = Schedule(epochs=2, learning_rate=0.1, batch_size=None)
    model, steps = Affine(), []
    after = lambda: steps.append(model.linear.weight.detach().clone())  # noqa: E731
    trainee = Trainee(model, entropy, schedule, after_step=after)
    fit(trainee, people().train, people(), schedule, log=tmp_path / "log", callbacks=[])
    trainee.restore_best()
    assert len(steps) == 2
    assert torch.equal(model.linear.weight, steps[-1])


def test_recorder_keeps_each_step_and_evaluates_at_the_end_of_epochs(tmp_path):
    chip, ledger = al.chips.get("rm-180nm"), al.Ledger()
    ledger.add(Counts({"set_pulses": 1000}), phase="program", layer="")
    schedule = Schedule(epochs=2, learning_rate=0.1, batch_size=4)
    taken = []

    def write():
        taken.append(len(taken) + 1)
        ledger.add(Counts({"set_pulses": taken[-1], "reset_pulses": 1}), phase="t", layer="")

    def evaluate():
        ledger.add(Counts({"set_pulses": 7}), phase="validate", layer="")
        return {"retain_accuracy": len(taken) / 10}

    recorder = StepRecorder(ledger, chip, evaluate)
    trainee = Trainee(Affine(), entropy, schedule, after_step=write)
    data = people()
    fit(trainee, data.train, data, schedule, log=tmp_path / "log", callbacks=[recorder])
    assert [step.step for step in recorder.steps] == [1, 2, 3, 4, 5, 6]
    assert [step.pulses for step in recorder.steps] == [2, 3, 4, 5, 6, 7]
    cost = [al.price(Counts({"set_pulses": n, "reset_pulses": 1}), chip) for n in taken]
    assert [step.energy_j for step in recorder.steps] == [c.energy_j.value for c in cost]
    metrics = [dict(step.metrics) for step in recorder.steps]
    assert metrics == [{}, {}, {"retain_accuracy": 0.3}, {}, {}, {"retain_accuracy": 0.6}]
