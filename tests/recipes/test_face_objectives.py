"""Objectives in closed form, bounded, and with gradients where they belong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aihwkit_lora.recipes.face_objectives import continuing, forgetting, hinge, learning, varied

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
