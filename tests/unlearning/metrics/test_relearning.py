"""Relearning works on a copy and counts steps as an explicit loop does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.errors import ConfigurationError, DataError, SealError
from aihwkit_lora.unlearning.metrics import RelearnCurve, relearn_curve, relearn_time_ratio
from aihwkit_lora.unlearning.seal import seal_

Batch = tuple[Tensor, Tensor]


def samples(seed: int, size: int = 24) -> Batch:
    """Two classes that a line separates."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(size) % 2
    inputs = torch.randn(size, 4, generator=generator)
    inputs[:, 0] += 3.0 * (2 * target - 1)
    return inputs, target


def suppressed() -> nn.Module:
    """A frozen model with an adapter; neither has learnt anything."""
    torch.manual_seed(0)
    model = al.convert(nn.Sequential(nn.Linear(4, 2)), al.chips.get("rm-180nm"))
    al.freeze_(model, programmed_by="test")
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))


def state(model: nn.Module) -> list[object]:
    return [
        *(value.clone() for value in model.state_dict().values()),
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
    ]


def same(before: list[object], after: list[object]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


def test_the_curve_is_that_of_an_explicit_loop():
    torch.manual_seed(1)
    model, (inputs, target), (held_out, truth) = nn.Linear(4, 2), samples(0, 8), samples(1)
    expected, twin = [], copy.deepcopy(model)
    for step in range(7):
        accuracy = (twin(held_out).argmax(dim=1) == truth).double().mean().item()
        expected.append((step, accuracy))
        loss = -twin(inputs).log_softmax(dim=1)[range(8), target].mean()
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    curve = relearn_curve(
        *(model, (inputs, target), (held_out, truth)),
        steps=6,
        learning_rate=0.1,
        optimizer=torch.optim.SGD,
    )
    assert curve.points == tuple(expected)


def test_the_model_and_random_numbers_stay_as_they_were():
    model = suppressed()
    before, random = state(model), torch.get_rng_state()
    curve = relearn_curve(model, samples(0, 8), samples(1), steps=15, learning_rate=0.1)
    assert same(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    assert curve.points[-1][1] > curve.points[0][1]


def test_the_same_seed_gives_the_same_curve_on_a_noisy_chip():
    model = suppressed()
    curves = [relearn_curve(model, samples(0, 8), samples(1), steps=3) for _ in range(2)]
    assert curves[0] == curves[1]


def test_adapters_are_trained_even_where_nothing_wants_a_gradient():
    model = suppressed().requires_grad_(False)
    curve = relearn_curve(model, samples(0, 8), samples(1), steps=15, learning_rate=0.1)
    assert curve.points[-1][1] > curve.points[0][1]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_sealed_adapter_stays_sealed_and_another_one_is_trained():
    model = suppressed()
    seal_(model, "default", request="person 2")
    with pytest.raises(SealError, match="ask for gradients"):
        relearn_curve(model, samples(0, 8), samples(1))
    add_adapter_(model, "attack", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    curve = relearn_curve(model, samples(0, 8), samples(1), steps=15, learning_rate=0.1)
    assert curve.points[-1][1] > curve.points[0][1]


def test_the_caller_says_what_is_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    seen: list[int] = []

    def optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        seen.append(sum(parameter.numel() for parameter in parameters))
        return torch.optim.SGD(parameters, lr=lr)

    relearn_curve(
        *(model, samples(0), samples(1)),
        steps=1,
        optimizer=optimizer,
        trainable=lambda name: name.startswith("1."),
    )
    assert seen == [8]


def test_evaluations_are_as_often_as_asked_for_and_at_the_end():
    curve = relearn_curve(nn.Linear(4, 2), samples(0), samples(1), steps=7, every=3)
    assert [step for step, _ in curve.points] == [0, 3, 6, 7]


def test_steps_to_an_accuracy():
    curve = RelearnCurve(points=((0, 0.1), (2, 0.6), (4, 0.5), (6, 0.9)))
    assert [curve.steps_to(value) for value in (0.0, 0.6, 0.7, 0.95)] == [0, 2, 6, None]


@pytest.mark.parametrize("points", [(), ((1, 0.5),), ((0, 0.1), (0, 0.2)), ((0, 0.1), (-1, 0.2))])
def test_a_curve_starts_at_no_step_and_rises(points):
    with pytest.raises(DataError, match="expected steps that rise from 0"):
        RelearnCurve(points=points)


def test_nothing_to_train():
    with pytest.raises(ConfigurationError, match=r"found none among 2\. Attach an adapter"):
        relearn_curve(nn.Linear(4, 2).requires_grad_(False), samples(0), samples(1))


@pytest.mark.parametrize("option", ["steps", "every"])
def test_no_step(option):
    with pytest.raises(ConfigurationError, match="steps and every of 1 or more"):
        relearn_curve(nn.Linear(4, 2), samples(0), samples(1), **{option: 0})


def rises_at(step: int) -> RelearnCurve:
    return RelearnCurve(points=(*((s, 0.0) for s in range(step)), (step, 0.9)))


@pytest.mark.parametrize(("steps", "ratio"), [(0, 0.0), (2, 0.5), (4, 1.0), (8, 2.0)])
def test_the_ratio_of_times(steps, ratio):
    assert relearn_time_ratio(rises_at(steps), rises_at(4), 1.0) == ratio


def test_a_model_that_never_relearns_takes_for_ever():
    never = RelearnCurve(points=((0, 0.0), (9, 0.89)))
    assert relearn_time_ratio(never, rises_at(4), 1.0) == math.inf
    assert relearn_time_ratio(never, rises_at(4), 1.0, margin=0.2) == 9 / 4


@pytest.mark.parametrize(
    ("retrained", "message"),
    [
        (rises_at(0), "got it there from the start"),
        (RelearnCurve(points=((0, 0.0),)), "one that never does"),
    ],
)
def test_a_reference_that_measures_nothing_is_refused(retrained, message):
    with pytest.raises(DataError, match=message):
        relearn_time_ratio(rises_at(2), retrained, 1.0)


def test_a_margin_is_a_fraction():
    with pytest.raises(ConfigurationError, match="margin: expected from 0 to less than 1"):
        relearn_time_ratio(rises_at(2), rises_at(2), 1.0, margin=1.0)
