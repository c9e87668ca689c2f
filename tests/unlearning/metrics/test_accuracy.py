"""Accuracies of groups, gaps and Tug-of-War."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.unlearning.metrics import (
    accuracy_gap,
    average_gap,
    forget_retain_accuracy,
    tug_of_war,
)
from aihwkit_lora.unlearning.metrics.accuracy import group_accuracies

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
RETRAINED = {"forget_accuracy": 0.0, "retain_accuracy": 1.0, "test_accuracy": 0.9}


@given(LABELS, st.sets(st.integers(0, 3), min_size=1))
def test_groups_are_what_scikit_learn_finds_in_them(pairs, forgotten):
    predicted, target = torch.tensor(pairs).unbind(dim=1)
    found = forget_retain_accuracy(predicted, target, forgotten=forgotten)
    mask = np.array([label in forgotten for label in target.tolist()])
    expected = {
        name: accuracy_score(target.numpy()[rows], predicted.numpy()[rows])
        for name, rows in (("forget_accuracy", mask), ("retain_accuracy", ~mask))
        if rows.any()
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)


def test_scores_and_masks_are_taken_as_well_as_labels_and_classes():
    scores, target = torch.eye(3), torch.tensor([0, 1, 0])
    found = forget_retain_accuracy(scores, target, forget=torch.tensor([True, True, False]))
    assert found == {"forget_accuracy": 1.0, "retain_accuracy": 0.0}


def test_a_group_without_samples_is_absent():
    found = forget_retain_accuracy(torch.tensor([0]), torch.tensor([0]), forgotten=[2])
    assert list(found) == ["retain_accuracy"]


def test_counts_above_2_to_24_divide_exactly():
    found = group_accuracies(torch.tensor([[2**25, 2**25 + 1], [0, 0]]))
    assert float(found["forget_accuracy"]) == 2**25 / (2**25 + 1) < 1.0


@pytest.mark.parametrize("mask", [{}, {"forgotten": [1], "forget": torch.tensor([True])}])
def test_classes_and_mask_exclude_each_other(mask):
    with pytest.raises(ConfigurationError, match="either the forgotten classes or a mask"):
        forget_retain_accuracy(torch.tensor([0]), torch.tensor([0]), **mask)


@pytest.mark.parametrize("mask", [torch.tensor([1]), torch.tensor([True, False])])
def test_a_mask_is_one_boolean_for_each_sample(mask):
    with pytest.raises(DataError, match=r"forget: expected booleans of shape \(1,\)"):
        forget_retain_accuracy(torch.tensor([0]), torch.tensor([0]), forget=mask)


def test_no_samples_are_refused():
    with pytest.raises(DataError, match=r"target: expected labels of one sample or more"):
        forget_retain_accuracy(torch.zeros(0, 3), torch.zeros(0), forgotten=[1])


def test_predictions_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"expected shape \(2, classes\) or \(2,\).*got \(3,\)"):
        forget_retain_accuracy(torch.zeros(3), torch.zeros(2), forgotten=[1])


def test_gaps_keep_their_sign_and_their_mean_does_not():
    unlearned = {"forget_accuracy": 0.25, "retain_accuracy": 0.5}
    gaps = accuracy_gap(unlearned, RETRAINED)
    assert gaps == {"forget_accuracy_gap": 0.25, "retain_accuracy_gap": -0.5}
    assert average_gap(unlearned, RETRAINED) == 0.375


@pytest.mark.parametrize("unlearned", [{}, {"speed": 1.0}])
def test_gaps_need_the_same_values_of_both(unlearned):
    with pytest.raises(DataError, match="each also of the retrained model"):
        accuracy_gap(unlearned, RETRAINED)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 1.0),
        ({"forget_accuracy": 1.0}, 0.0),
        ({"forget_accuracy": 0.5, "retain_accuracy": 0.5}, 0.25),
        ({"test_accuracy": 1.0}, 0.9),
    ],
)
def test_tug_of_war_of_cases_worked_out_by_hand(changed, expected):
    assert tug_of_war(RETRAINED | changed, RETRAINED) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_tug_of_war_is_a_fraction_and_symmetric(values):
    names = list(RETRAINED)
    ours, theirs = (dict(zip(names, values[i : i + 3], strict=True)) for i in (0, 3))
    assert 0.0 <= tug_of_war(ours, theirs) <= 1.0
    assert tug_of_war(ours, theirs) == tug_of_war(theirs, ours)


@pytest.mark.parametrize(("value", "found"), [(98.0, "got 98.0"), (None, "got nothing")])
def test_tug_of_war_wants_three_fractions(value, found):
    accuracies = {k: v for k, v in RETRAINED.items() if k != "test_accuracy"}
    accuracies |= {} if value is None else {"test_accuracy": value}
    with pytest.raises(DataError, match=f"'test_accuracy' as a fraction.*{found}"):
        tug_of_war(accuracies, RETRAINED)
