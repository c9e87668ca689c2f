"""U-LiRA against explicit loops with scipy, theory, and nothing to find."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, ttest_1samp
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.unlearning.metrics import scaled_confidence, u_lira
from aihwkit_lora.unlearning.metrics.lira import lira_scores


def phi(seed: int, models: int, samples: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + torch.randn(models, samples, generator=generator, dtype=torch.float64)


def slow_scores(
    unlearned: np.ndarray, retrained: np.ndarray, shared: bool
) -> tuple[np.ndarray, np.ndarray]:
    models, samples = unlearned.shape
    scores = np.zeros((2, models, samples))
    for model in range(models):
        others = [m for m in range(models) if m != model]
        sds = np.array(
            [[np.std(g[others, i], ddof=1) for i in range(samples)] for g in (unlearned, retrained)]
        )
        if shared:
            sds[:] = np.sqrt(np.mean(sds**2, axis=1, keepdims=True))
        for i in range(samples):
            with_it = norm(unlearned[others, i].mean(), sds[0, i])
            without = norm(retrained[others, i].mean(), sds[1, i])
            for side, group in enumerate((unlearned, retrained)):
                value = group[model, i]
                scores[side, model, i] = with_it.logpdf(value) - without.logpdf(value)
    return scores[0], scores[1]


@pytest.mark.parametrize("shared", [False, True])
def test_scores_and_rates_are_those_of_explicit_loops(shared):
    unlearned, retrained = phi(0, 6, 8, 1.0), phi(1, 6, 8)
    expected = slow_scores(unlearned.numpy(), retrained.numpy(), shared)
    found = lira_scores(unlearned, retrained, shared_variance=shared)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9)

    labels = np.repeat([1, 0], 48)
    scores = np.concatenate([side.flatten() for side in expected])
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    rates = (0.0, 0.05, 0.25, 1.0)
    result = u_lira(unlearned, retrained, false_positive_rates=rates, shared_variance=shared)
    assert result.auc == pytest.approx(roc_auc_score(labels, scores))
    assert result.tpr_at_fpr == pytest.approx({r: tpr[fpr <= r].max() for r in rates})
    right = np.mean(expected[0] > 0), np.mean(expected[1] < 0)
    assert result.accuracy == pytest.approx(np.mean(right))


def test_two_normal_distributions_are_told_apart_as_theory_says():
    # Two apart: Phi(1) are on the right side, and at a false-positive rate f the true-positive rate
    # is Phi(2 - z(1 - f)). With 200 models the fits cost less than 0.01; 4 standard errors of
    # 20,000 scores are below 0.012.
    found = u_lira(phi(0, 200, 50, 2.0), phi(1, 200, 50), false_positive_rates=[0.1])
    assert found.accuracy == pytest.approx(norm.cdf(1.0), abs=0.02)
    assert found.auc == pytest.approx(norm.cdf(math.sqrt(2.0)), abs=0.02)
    assert found.tpr_at_fpr[0.1] == pytest.approx(norm.cdf(2.0 - norm.ppf(0.9)), abs=0.03)


@pytest.mark.parametrize("models", [3, 12])
@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_found_where_there_is_nothing(models, shared):
    # Exactly 0.5 in expectation, because both sides leave out a model. 40 independent data sets,
    # 4 standard errors of their mean: 1 failure in 3,000 seeds.
    accuracies = [
        u_lira(phi(2 * s, models, 40), phi(2 * s + 1, models, 40), shared_variance=shared).accuracy
        for s in range(40)
    ]
    assert abs(ttest_1samp(accuracies, 0.5).statistic) < 4.0


def test_a_signal_in_a_tenth_of_the_samples_shows_at_a_low_false_positive_rate():
    # One sample in ten is remembered for certain; an average would hide it, the rate does not.
    unlearned, retrained = phi(0, 32, 100), phi(1, 32, 100)
    unlearned[:, :10] += 12.0
    found = u_lira(unlearned, retrained, false_positive_rates=[0.001])
    assert found.accuracy < 0.6
    assert found.tpr_at_fpr[0.001] > 0.09


def test_models_that_agree_exactly_say_nothing():
    found = u_lira(torch.zeros(3, 4), torch.zeros(3, 4), false_positive_rates=[0.0, 1.0])
    assert (found.accuracy, found.auc) == (0.5, 0.5)
    assert found.tpr_at_fpr == {0.0: 0.0, 1.0: 1.0}


def test_deterministic_collapse_is_found():
    # Unlearned models that all answer alike, far less spread than retrained ones.
    assert u_lira(torch.zeros(8, 20), phi(0, 8, 20)).accuracy > 0.95


def test_scaled_confidence_is_the_logit_of_the_confidence():
    logits = torch.tensor([[1.0, -0.5, 0.25], [0.0, 2.0, 1.0]], dtype=torch.float64)
    p = logits.softmax(dim=1)[[0, 1], [2, 1]]
    expected = (p / (1 - p)).log()
    torch.testing.assert_close(scaled_confidence(logits, torch.tensor([2, 1])), expected)


def test_scaled_confidence_survives_certainty():
    assert float(scaled_confidence(torch.tensor([[200.0, 0.0]]), torch.tensor([0]))) == 200.0


def test_infinite_logits_are_refused():
    with pytest.raises(DataError, match="logits: expected finite numbers"):
        scaled_confidence(torch.tensor([[torch.inf, 0.0]]), torch.tensor([0]))


def test_two_models_are_too_few():
    with pytest.raises(DataError, match=r"unlearned: .* length of 3 or more"):
        u_lira(torch.zeros(2, 5), torch.zeros(2, 5))


def test_both_sides_have_as_many_models():
    with pytest.raises(DataError, match=r"retrained: expected the shape of unlearned, \(3, 5\)"):
        u_lira(torch.zeros(3, 5), torch.zeros(4, 5))


def test_rates_are_fractions():
    with pytest.raises(ConfigurationError, match="rates from 0 to 1, got 5"):
        u_lira(torch.zeros(3, 5), torch.zeros(3, 5), false_positive_rates=[0.1, 5])
