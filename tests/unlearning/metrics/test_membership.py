"""Attacks find what is planted and nothing where there is nothing.

Seeds are fixed; where a bound is statistical, the test says how often other seeds would fail.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, ttest_1samp
from sklearn.metrics import roc_auc_score
from torch import Tensor

from aihwkit_lora.errors import DataError
from aihwkit_lora.unlearning.metrics import (
    auc,
    loss_membership,
    svc_membership,
    true_class_confidence,
)

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=20)


def normal(seed: int, samples: int, mean: float = 0.0, sd: float = 1.0) -> Tensor:
    return mean + sd * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@given(SCORES, SCORES)
def test_auc_is_that_of_scikit_learn_with_ties(positive, negative):
    labels = [1] * len(positive) + [0] * len(negative)
    expected = roc_auc_score(labels, positive + negative)
    assert auc(torch.tensor(positive), torch.tensor(negative)) == pytest.approx(expected)


def test_confidence_is_that_of_the_true_class():
    rows = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    assert true_class_confidence(rows, torch.tensor([1, 0])).tolist() == [0.75, 0.5]


def test_a_symmetric_problem_splits_in_the_middle():
    # Groups that mirror each other around 0.5 have the boundary there, whatever the kernel.
    retain, test = torch.linspace(0.8, 1.0, 60), torch.linspace(0.0, 0.2, 60)
    forget = torch.tensor([0.05, 0.45, 0.49, 0.51, 0.55, 0.6, 0.7, 0.95])
    found = svc_membership(forget.double(), retain.double(), test.double())
    assert (found.value, found.attacker_accuracy, found.auc) == (3 / 8, 1.0, 1.0)
    assert found.samples == 60


@pytest.mark.parametrize(("mean", "low", "high"), [(0.9, 0.0, 0.1), (0.3, 0.9, 1.0)])
def test_forgotten_samples_are_called_what_they_look_like(mean, low, high):
    retain, test = normal(0, 300, 0.9, 0.05), normal(1, 200, 0.3, 0.1)
    found = svc_membership(normal(2, 100, mean, 0.05), retain, test)
    assert low <= found.value <= high
    assert found.attacker_accuracy > 0.95


def test_the_blind_svc_attacker_is_at_chance():
    # 30 independent data sets; 4 standard errors of their mean, so 1 failure in 2,000 seeds.
    accuracies = [
        svc_membership(
            normal(3 * seed, 10), normal(3 * seed + 1, 90), normal(3 * seed + 2, 60)
        ).attacker_accuracy
        for seed in range(30)
    ]
    assert abs(ttest_1samp(accuracies, 0.5).statistic) < 4.0
    assert np.std(accuracies) > 0.01


def test_the_attack_on_two_normal_losses_reaches_what_theory_says():
    # Equal variances, means 2 apart: Phi(1) of samples are on the right side of the middle, and
    # Phi(sqrt 2) of pairs in the right order; 4 standard errors with 2 x 3000 samples.
    found = loss_membership(normal(0, 3000), normal(1, 3000, 2.0))
    assert found.value == pytest.approx(norm.cdf(1.0), abs=4 * np.sqrt(0.84 * 0.16 / 6000))
    assert found.auc == pytest.approx(norm.cdf(np.sqrt(2.0)), abs=0.02)
    assert found.attacker_accuracy == found.value


def test_the_scale_of_losses_does_not_matter():
    forget, unseen = normal(0, 80).double(), normal(1, 80, 1.0).double()
    small = loss_membership(1e-6 * forget, 1e-6 * unseen)
    assert small == loss_membership(forget, unseen)
    assert small.value > 0.6


def test_the_blind_loss_attacker_is_at_chance():
    # As above: 30 independent data sets, 4 standard errors.
    accuracies = [
        loss_membership(normal(2 * seed, 70), normal(2 * seed + 1, 50)).value for seed in range(30)
    ]
    assert abs(ttest_1samp(accuracies, 0.5).statistic) < 4.0


def test_too_much_forgetting_is_conspicuous_too():
    found = loss_membership(normal(0, 100, 5.0), normal(1, 100))
    assert found.value > 0.95
    assert found.auc < 0.05


@settings(max_examples=10)
@given(st.permutations(range(40)))
def test_the_order_of_samples_does_not_matter(order):
    forget, unseen = normal(0, 40), normal(1, 25, 1.0)
    assert loss_membership(forget[order], unseen) == loss_membership(forget, unseen)


def test_classes_are_balanced():
    # 900 members and 30 strangers alike: an unbalanced attacker would be right 97 % of the time.
    found = loss_membership(normal(0, 900), normal(1, 30))
    assert found.samples == 30
    assert found.value < 0.8


def test_two_samples_of_each_are_enough():
    assert loss_membership(torch.tensor([0.0, 0.1]), torch.tensor([1.0, 1.1])).value == 1.0


@pytest.mark.parametrize("group", ["forget", "retain", "test"])
def test_svc_needs_samples_in_each_group(group):
    groups = {name: torch.linspace(0, 1, 4) for name in ("forget", "retain", "test")}
    with pytest.raises(DataError, match=f"{group}: expected 1 dimension"):
        svc_membership(**(groups | {group: torch.zeros(0)}))


@pytest.mark.parametrize("group", ["forget", "unseen"])
def test_loss_attack_needs_two_samples_in_each_group(group):
    groups = {name: torch.linspace(0, 1, 4) for name in ("forget", "unseen")}
    with pytest.raises(DataError, match=f"{group}: .* length of 2 or more"):
        loss_membership(**(groups | {group: torch.zeros(1)}))


def test_infinite_losses_are_refused():
    with pytest.raises(DataError, match="unseen: expected finite numbers, got 1"):
        loss_membership(torch.zeros(2), torch.tensor([0.0, torch.inf]))
