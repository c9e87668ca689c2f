"""The linear probe reads what is there, and collecting features leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.unlearning.metrics import collect_features, linear_probe


def features(seed: int, size: int, signal: float) -> tuple[Tensor, Tensor]:
    """Three classes; each pushes its own one of six features."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 3
    return torch.randn(size, 6, generator=generator) + signal * torch.eye(6)[labels], labels


def test_a_planted_signal_is_read():
    assert linear_probe(*features(0, 150, 8.0), *features(1, 90, 8.0)) == 1.0


def test_another_linear_classifier_agrees():
    train, test = features(0, 300, 2.0), features(1, 300, 2.0)
    other = LinearSVC(C=0.1).fit(*(part.numpy() for part in train))
    # Two linear classifiers near the optimum differ in a few samples only.
    expected = other.score(*(part.numpy() for part in test))
    assert linear_probe(*train, *test) == pytest.approx(expected, abs=0.03)


def test_no_signal_gives_chance():
    # 30 independent data sets with 3 classes, 4 standard errors: 1 failure in 2,000 seeds.
    found = [
        linear_probe(*features(2 * s, 60, 0.0), *features(2 * s + 1, 60, 0.0)) for s in range(30)
    ]
    assert abs(ttest_1samp(found, 1 / 3).statistic) < 4.0
    assert np.std(found) > 0.01


def test_the_scale_of_features_does_not_matter():
    train, test = features(0, 60, 1.0), features(1, 60, 1.0)
    scaled = linear_probe(1e-5 * train[0], train[1], 1e-5 * test[0], test[1])
    assert scaled == linear_probe(*train, *test)


def test_forgotten_classes_alone_can_be_asked_about():
    train, (test, labels) = features(0, 150, 8.0), features(1, 90, 8.0)
    assert linear_probe(*train, test[labels == 2], labels[labels == 2]) == 1.0


def test_one_class_is_not_enough():
    with pytest.raises(DataError, match="two classes or more, got only 1"):
        linear_probe(torch.eye(2), torch.ones(2), torch.eye(2), torch.ones(2))


def test_labels_have_to_fit():
    with pytest.raises(DataError, match=r"test_labels: expected shape \(2,\)"):
        linear_probe(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(3))


def test_features_have_to_be_as_many():
    with pytest.raises(DataError, match=r"test_features: expected 2 features.*got 3"):
        linear_probe(torch.eye(2), torch.arange(2), torch.eye(3), torch.arange(3))


def test_no_test_samples_are_refused():
    with pytest.raises(DataError, match="test_features: expected 2 dimension"):
        linear_probe(torch.eye(2), torch.arange(2), torch.zeros(0, 2), torch.zeros(0))


class Net(nn.Module):
    """Takes two arguments, and has a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Conv1d(1, 3, 2), nn.Dropout(), nn.Linear(12, 2)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return self.head(self.drop(self.body(x + shift)).flatten(start_dim=1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


BATCHES = [(torch.randn(3, 1, 5), torch.tensor([0, 1, 0])), (torch.randn(1, 1, 5), torch.ones(1))]


def test_features_are_the_output_of_the_layer_over_all_batches(net):
    found, labels = collect_features(net, "body", BATCHES)
    expected = torch.cat([net.body(x).flatten(start_dim=1) for x, _ in BATCHES])
    assert torch.equal(found, expected.detach())
    assert labels.tolist() == [0, 1, 0, 1]


def test_or_what_goes_into_it(net):
    found, _ = collect_features(net, "head", BATCHES, inputs=True)
    assert torch.equal(found, collect_features(net, "body", BATCHES)[0])


@pytest.mark.parametrize(
    "pack", [lambda x: (x, 1.0), lambda x: [x, 1.0], lambda x: {"x": x, "shift": 1.0}]
)
def test_inputs_are_positional_or_keyword_arguments(net, pack):
    found, _ = collect_features(net, "body", [(pack(x), y) for x, y in BATCHES])
    expected, _ = collect_features(net, "body", [(x + 1.0, y) for x, y in BATCHES])
    assert torch.equal(found, expected)


def test_the_first_of_several_outputs_is_taken():
    layer = nn.LSTM(2, 3, batch_first=True)
    found, _ = collect_features(layer, "", [(torch.zeros(2, 4, 2), torch.zeros(2))])
    assert found.shape == (2, 12)


def test_no_trace_is_left_even_after_an_error(net):
    net.drop.eval()
    before = [module.training for module in net.modules()]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        collect_features(net, "body", [(torch.zeros(1, 1, 9), torch.zeros(1))])
    assert [module.training for module in net.modules()] == before
    assert not net.body._forward_hooks
    assert torch.is_grad_enabled()


def test_unknown_layers_are_refused_with_the_nearest(net):
    with pytest.raises(ConfigurationError, match=r"layer 'bode': .* Did you mean 'body'"):
        collect_features(net, "bode", BATCHES)


@pytest.mark.parametrize(("layer", "batches"), [("idle", BATCHES), ("body", [])])
def test_a_layer_that_gives_nothing_is_refused(net, layer, batches):
    with pytest.raises(DataError, match=f"layer '{layer}': .* got nothing from {len(batches)}"):
        collect_features(net, layer, batches)
