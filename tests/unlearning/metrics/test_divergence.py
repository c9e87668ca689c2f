"""Distances to a retrained model, against scipy and scikit-learn."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from sklearn.metrics import jaccard_score
from torch import Tensor

from aihwkit_lora.errors import DataError
from aihwkit_lora.unlearning.metrics import (
    activation_distance,
    completeness,
    divergence_floor,
    js_divergence,
    kl_divergence,
    zrf,
)

TWO_MODELS = [js_divergence, kl_divergence, activation_distance, zrf]
SURE, OTHER = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def probabilities(seed: int, samples: int = 20, classes: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(dim=1)


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(2, 6))
def test_divergences_are_what_scipy_finds_sample_by_sample(seed, samples, classes):
    p, q = (probabilities(s, samples, classes) for s in (seed, seed + 1))
    pairs = list(zip(p.numpy(), q.numpy(), strict=True))
    js = np.mean([jensenshannon(a, b, base=math.e) ** 2 for a, b in pairs])
    assert float(js_divergence(p, q)) == pytest.approx(js, rel=1e-9)
    assert float(kl_divergence(p, q)) == pytest.approx(np.mean([entropy(a, b) for a, b in pairs]))
    assert float(zrf(p, q)) == pytest.approx(1 - js, rel=1e-9)
    distances = [math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))) for a, b in pairs]
    assert float(activation_distance(p, q)) == pytest.approx(np.mean(distances))


def test_extremes():
    assert float(js_divergence(SURE, OTHER)) == pytest.approx(math.log(2), rel=1e-15)
    assert float(activation_distance(SURE, OTHER)) == pytest.approx(math.sqrt(2), rel=1e-15)
    assert float(zrf(SURE, OTHER)) == pytest.approx(1 - math.log(2), rel=1e-15)
    assert float(kl_divergence(SURE, OTHER)) == math.inf
    for same in (js_divergence, kl_divergence, activation_distance):
        assert float(same(probabilities(0), probabilities(0))) == 0.0


@given(st.integers(0, 10_000))
def test_js_is_symmetric_and_bounded(seed):
    p, q = probabilities(seed), probabilities(seed + 1)
    assert js_divergence(p, q) == js_divergence(q, p)
    assert 0.0 <= float(js_divergence(p, q)) <= math.log(2)


def test_binned_normal_distributions_have_the_divergence_of_the_textbook():
    # KL(N(0, 1), N(1, 2^2)) = ln 2 + (1 + 1) / (2 * 4) - 1/2; bins of 0.001 are fine enough.
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    narrow = (-x.square() / 2).softmax(dim=0)[None]
    wide = (-(x - 1).square() / 8).softmax(dim=0)[None]
    assert float(kl_divergence(narrow, wide)) == pytest.approx(math.log(2) - 0.25, rel=1e-6)


def test_the_floor_is_the_mean_over_all_pairs():
    models = [probabilities(seed) for seed in range(4)]
    expected = np.mean(
        [
            np.mean([jensenshannon(a, b) ** 2 for a, b in zip(p.numpy(), q.numpy(), strict=True)])
            for p, q in combinations(models, 2)
        ]
    )
    assert float(divergence_floor(models)) == pytest.approx(expected, rel=1e-9)


def test_one_retrained_model_has_no_floor():
    with pytest.raises(DataError, match="two retrained models or more, got 1"):
        divergence_floor([SURE])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_completeness_is_the_jaccard_score_of_scikit_learn(pairs):
    ours, theirs = torch.tensor(pairs).unbind(dim=1)
    expected = jaccard_score(theirs.numpy(), ours.numpy(), average="micro")
    assert float(completeness(ours, theirs)) == pytest.approx(expected)


def test_completeness_takes_scores():
    assert float(completeness(torch.eye(3), torch.eye(3)[[0, 1, 1]])) == 0.5


@pytest.mark.parametrize("metric", TWO_MODELS)
def test_logits_are_refused(metric):
    with pytest.raises(DataError, match=r"unlearned: expected probabilities.*softmax"):
        metric(torch.tensor([[4.0, -2.0]]), SURE)


@pytest.mark.parametrize("metric", TWO_MODELS)
def test_rows_that_do_not_add_up_are_refused(metric):
    with pytest.raises(DataError, match=r"sums from 0\.5 to 0\.5"):
        metric(SURE, torch.tensor([[0.25, 0.25]]))


@pytest.mark.parametrize("metric", TWO_MODELS)
def test_values_that_are_no_numbers_are_refused(metric):
    with pytest.raises(DataError, match="expected probabilities, 0 or more"):
        metric(torch.tensor([[math.nan, 0.5]]), SURE)


@pytest.mark.parametrize("metric", TWO_MODELS)
def test_samples_have_to_be_the_same_ones(metric):
    with pytest.raises(DataError, match=r"retrained: expected the shape of unlearned, \(1, 2\)"):
        metric(SURE, torch.eye(2))


@pytest.mark.parametrize("metric", TWO_MODELS)
def test_no_samples_are_refused(metric):
    with pytest.raises(DataError, match=r"expected probabilities of one sample or more"):
        metric(torch.zeros(0, 2), torch.zeros(0, 2))


def test_half_precision_is_good_enough():
    p, q = probabilities(0), probabilities(1)
    exact, rounded = js_divergence(p, q), js_divergence(p.bfloat16(), q.bfloat16())
    assert float(rounded) == pytest.approx(float(exact), rel=0.02)
