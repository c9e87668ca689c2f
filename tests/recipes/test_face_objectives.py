"""Objectives in closed form, bounded, and with gradients where they belong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.errors import ConfigurationError, UnknownNameError
from aihwkit_lora.recipes.face_objectives import (
    Registered,
    continuing,
    forgetting,
    forgetting_by,
    hinge,
    learning,
    needs_a_branch,
    require_usable,
    varied,
)
from aihwkit_lora.recipes.mixer import LORA_TARGETS, MlpMixer
from aihwkit_lora.unlearning import objectives

LOGITS = st.lists(st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4), min_size=1)


class Fixed(nn.Module):
    """Says the same whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        assert images.shape == (len(self.logits), 1, 16, 16)
        return self.logits * 1.0


@given(logits=LOGITS, output=st.integers(0, 3), margin=st.floats(0, 10, width=32))
def test_hinge_is_the_mean_shortfall(logits, output, margin):
    shortfalls = [
        max(0.0, margin + row[output] - max(row[:output] + row[output + 1 :])) for row in logits
    ]
    found = float(hinge(torch.tensor(logits), output, margin))
    assert found == pytest.approx(sum(shortfalls) / len(shortfalls), rel=1e-5, abs=1e-5)


def test_hinge_pushes_only_where_the_margin_is_not_kept():
    logits = torch.tensor([[0.0, 9.0, 1.0], [4.0, 3.0, 1.0]], requires_grad=True)
    hinge(logits, 0, 2.0).backward()
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0], [0.5, -0.5, 0.0]]


def test_forgetting_in_closed_form():
    model = Fixed([[1.0, 5.0, 2.0, 0.0], [3.0, 0.0, 2.0, 0.0]])
    images, labels = torch.rand(2, 1, 16, 16), torch.tensor([1, 0])
    loss = forgetting(forgotten=1, kept=(0, 2), margin=2.0)(model, images, labels)
    logs = F.log_softmax(model.logits.detach(), dim=1)
    entropy = -(0.5 * (logs[0, 0] + logs[0, 2]) + logs[1, 0]) / 2
    assert loss.item() == pytest.approx(entropy.item() + (5.0 + 0.0) / 2, rel=1e-6)


def test_forgetting_lowers_the_forgotten_output_and_raises_the_kept():
    model = Fixed([[1.0, 5.0, 2.0, 0.0]])
    loss = forgetting(forgotten=1, kept=(0, 2), margin=2.0)
    loss(model, torch.rand(1, 1, 16, 16), torch.tensor([1])).backward()
    downhill = -model.logits.grad[0]
    assert downhill[1] < 0 < min(downhill[0], downhill[2])


def test_forgetting_is_bounded_below_and_reaches_its_bound():
    # Nobody wins among the kept, everybody else is far below: log 2 is the least entropy.
    model = Fixed([[30.0, -30.0, 30.0, -30.0]])
    loss = forgetting(forgotten=1, kept=(0, 2), margin=5.0)
    found = loss(model, torch.rand(1, 1, 16, 16), torch.tensor([1]))
    assert found.item() == pytest.approx(math.log(2.0), abs=1e-6)


@given(logits=LOGITS, labels=st.lists(st.integers(0, 3), min_size=1))
def test_objectives_are_never_negative(logits, labels):
    count = min(len(logits), len(labels))
    model, images = Fixed(logits[:count]), torch.zeros(count, 1, 16, 16)
    targets = torch.tensor(labels[:count])
    for objective in (
        forgetting(forgotten=1, kept=(0, 2), margin=5.0),
        continuing(forgotten=1, margin=5.0),
    ):
        assert objective(model, images, targets).item() >= 0.0


@pytest.mark.parametrize("vary", [True, False])
def test_continuing_in_closed_form(vary):
    model = Fixed([[1.0, 5.0, 2.0, 0.0], [3.0, 0.0, 2.0, 0.0]])
    images, labels = torch.rand(2, 1, 16, 16), torch.tensor([3, 0])
    loss = continuing(forgotten=1, margin=2.0, vary=vary)(model, images, labels)
    entropy = F.cross_entropy(model.logits.detach(), labels)
    assert loss.item() == pytest.approx(entropy.item() + 2.5, rel=1e-6)


@pytest.mark.parametrize(("vary", "same"), [(True, False), (False, True)])
def test_continuing_varies_images_if_asked(vary, same):
    seen = []

    class Spy(nn.Module):
        def forward(self, images):
            seen.append(images)
            return torch.zeros(len(images), 3)

    images = torch.rand(2, 1, 16, 16)
    continuing(forgotten=0, margin=1.0, vary=vary)(Spy(), images, torch.tensor([1, 2]))
    assert torch.equal(seen[0], images) is same


def test_learning_shakes_weights_while_it_looks_and_leaves_them():
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 3, bias=False))
    images, labels = torch.full((4, 1, 16, 16), 0.5), torch.tensor([0, 1, 2, 0])
    before = model[1].weight.detach().clone()
    quiet, noisy = learning(weight_noise=0.0), learning(weight_noise=0.1)
    losses = {noisy(model, images, labels).item() for _ in range(3)}
    assert len(losses) == 3
    # A uniform image looks the same however it is turned.
    plain = F.cross_entropy(model(images), labels, label_smoothing=0.1)
    assert quiet(model, images, labels).item() == pytest.approx(plain.item(), rel=1e-5)
    assert torch.equal(model[1].weight, before)
    noisy(model, images, labels).backward()
    assert bool(model[1].weight.grad.abs().sum() > 0)


def test_varied_without_freedom_is_the_image():
    images = torch.rand(3, 1, 16, 16)
    found = varied(images, shift=0.0, rotation_degrees=0.0, zoom=0.0)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-5)


def test_varied_moves_by_no_more_than_the_shift():
    images = torch.zeros(200, 1, 16, 16)
    images[:, :, 8, 8] = 1.0
    found = varied(images, shift=1.0, rotation_degrees=0.0, zoom=0.0)
    assert float(found[:, :, 7:10, 7:10].sum(dim=(1, 2, 3)).min()) == pytest.approx(1.0, abs=1e-4)
    assert len({image.numpy().tobytes() for image in found}) == 200


OTHER_MODELS = ("esd", "gaussian_target", "pseudo_class", "uniform_target")
LANGUAGE = ("token_ga", "token_npo", "token_simnpo")
CLASSIFIERS = sorted({*objectives.names()} - {*OTHER_MODELS, *LANGUAGE})
KEPT = (0, 1, 3, 4)


@pytest.fixture(scope="module")
def adapted():
    torch.manual_seed(0)
    net = al.convert(MlpMixer(), al.chips.get("rm-180nm")).requires_grad_(False)
    net = al.freeze_(net, programmed_by="test")
    config = LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights=False)
    return add_adapter_(net, "forget", config)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_objective_for_classifiers_trains_the_adapter(adapted, name):
    require_usable(name)
    loss = forgetting_by(name, forgotten=2, kept=KEPT, margin=5.0)
    images, labels = torch.rand(8, 1, 16, 16), torch.arange(8) % 5
    adapted.zero_grad()
    loss(adapted, images, labels, progress=0.95).backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    moved = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained]
    # The head comes after the layer whose output this one is about.
    assert moved.count(False) == (2 if name == "rmu" else 0)


@pytest.mark.parametrize("name", OTHER_MODELS + LANGUAGE)
def test_objectives_for_other_models_are_refused(name):
    kind = "diffusion" if name in OTHER_MODELS else "language"
    expected = f"objective '{name}': expected one for classifiers, got one for {kind} models"
    with pytest.raises(ConfigurationError, match=expected):
        require_usable(name)


def test_unknown_objectives_are_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown objective 'npoo'\. Did you mean 'npo'"):
        require_usable("npoo")


def test_batches_are_split_by_who_is_forgotten():
    seen = {}

    class Spy(objectives.get("bounded_ga")):
        def loss(self, model, batch, *, progress=0.0):
            seen.update({part: labels.tolist() for part, (_, labels) in batch.items()})
            assert progress == 0.25
            return torch.zeros(())

    images, labels = torch.rand(5, 1, 16, 16), torch.tensor([2, 0, 2, 1, 3])
    Registered(Spy(), 2)(nn.Flatten(), images, labels, progress=0.25)
    assert seen == {"forget": [2, 2], "retain": [0, 1, 3]}


def test_a_batch_without_the_forgotten_person_moves_nothing(adapted):
    loss = forgetting_by("npo", forgotten=2, kept=KEPT, margin=5.0)
    adapted.zero_grad()
    found = loss(adapted, torch.rand(2, 1, 16, 16), torch.tensor([0, 1]))
    found.backward()
    assert found.item() == 0.0
    assert not any(bool(p.grad.any()) for p in adapted.parameters() if p.grad is not None)


def test_default_is_the_recipes_own_and_others_choose_among_the_kept():
    own = forgetting_by("kl_uniform", forgotten=2, kept=KEPT, margin=5.0)
    assert not isinstance(own, Registered)
    assert (
        forgetting_by("random_label", forgotten=2, kept=KEPT, margin=5.0).objective.outputs == KEPT
    )
    # One person is no choice.
    assert (
        forgetting_by("random_label", forgotten=1, kept=(0,), margin=5.0).objective.outputs is None
    )


def test_objectives_that_need_a_branch():
    assert [name for name in CLASSIFIERS if needs_a_branch(name)] == [
        "boundary_shrink", "masked_teacher", "negation", "npo", "rmu", "scrub",
    ]  # fmt: skip
