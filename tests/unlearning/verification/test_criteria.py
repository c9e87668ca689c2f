"""Intervals and criteria."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import aihwkit_lora as al
from aihwkit_lora.unlearning.verification import Criteria, Verdict
from aihwkit_lora.unlearning.verification.intervals import bootstrap, wilson

PASS, FAIL, OPEN = Verdict.PASS, Verdict.FAIL, Verdict.NOT_JUDGED


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts: tuple[int, int]) -> None:
    expected = stats.binomtest(*counts).proportion_ci(method="wilson")
    assert wilson(*counts) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("counts", [(0, 0), (3, 2), (-1, 2)])
def test_impossible_shares_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(al.DataError, match="expected 0 to n right of n samples"):
        wilson(*counts)


def test_the_bootstrap_of_a_mean_is_about_the_normal_interval() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap([values], lambda means: means[0], seed=1)
    half = 1.96 * float(values.std()) / 20
    # 1000 resamples leave each end uncertain by about 9 % of half the interval; four times that.
    assert low == pytest.approx(float(values.mean()) - half, abs=0.36 * half)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.36 * half)


def test_the_bootstrap_resamples_each_group_by_itself_and_pairs_together() -> None:
    pair = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    assert bootstrap([pair], lambda means: means[0][:, 0] - means[0][:, 1]) == (0.0, 0.0)
    constant = [torch.full((5,), 2.0), torch.full((3,), 3.0)]
    assert bootstrap(constant, lambda means: means[0] * means[1]) == (6.0, 6.0)


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(al.DataError, match="expected one sample or more in each group"):
        bootstrap([torch.zeros(0)], lambda means: means[0])


@pytest.mark.parametrize(
    ("value", "retrained", "verdict"),
    [
        (0.0, [0.0, 0.0], PASS),
        (0.05, [0.0], PASS),
        (0.06, [0.0], FAIL),
        (0.06, [0.0, 0.02], PASS),
        (0.80, [0.9], FAIL),
        (0.86, [0.9, 0.95], PASS),
        (0.5, [], OPEN),
    ],
)
def test_accuracies_are_judged_by_the_range_of_retrained_models(
    value: float, retrained: list[float], verdict: Verdict
) -> None:
    assert Criteria().near(value, retrained)[1] == verdict


def test_an_attack_is_judged_from_above_only() -> None:
    assert Criteria().at_most(0.0, [0.9])[1] == PASS
    assert Criteria().at_most(0.96, [0.9])[1] == FAIL
    assert Criteria().at_most(0.96, []) == ("no reference", OPEN)


def test_a_blind_attacker_is_not_judged() -> None:
    assert Criteria().near_membership(0.9, [0.1], sight=0.55)[1] == OPEN
    assert Criteria().near_membership(0.9, [0.1], sight=0.6)[1] == FAIL
    assert Criteria().near_membership(0.15, [0.1], sight=0.6)[1] == PASS
    assert Criteria().near_membership(0.15, [], sight=0.5)[0] == "no reference"


def test_divergence_and_tug_of_war_are_judged_by_pairs_of_retrained_models() -> None:
    assert Criteria().near_floor(0.15, [0.05, 0.1])[1] == PASS
    assert Criteria().near_floor(0.16, [0.05, 0.1])[1] == FAIL
    assert Criteria().near_floor(0.0, [])[1] == OPEN
    assert Criteria().near_ceiling(0.90, [0.94, 0.99])[1] == PASS
    assert Criteria().near_ceiling(0.88, [0.94, 0.99])[1] == FAIL
    assert Criteria().near_ceiling(1.0, [])[1] == OPEN


@pytest.mark.parametrize(
    ("steps", "retrained", "verdict"),
    [
        (5, [10, 20], PASS),
        (4, [10, 20], FAIL),
        (None, [10], PASS),
        (None, [None], PASS),
        (30, [None, None], FAIL),
        (5, [None, 10], PASS),
        (0, [0], OPEN),
        (3, [], OPEN),
    ],
)
def test_relearning_is_judged_by_the_fastest_retrained_model(
    steps: int | None, retrained: list[int | None], verdict: Verdict
) -> None:
    assert Criteria().slow_enough(steps, retrained)[1] == verdict


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"accuracy": -0.1}, r"expected accuracy of 0 to 1, got -0.1"),
        ({"relearn": 1.5}, r"expected relearn of 0 to 1, got 1.5"),
        ({"divergence": 0.9}, r"expected divergence of 1 or more, got 0.9"),
        ({"divergence": float("inf")}, r"expected divergence of 1 or more, got inf"),
    ],
)
def test_impossible_criteria_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(al.ConfigurationError, match=match):
        Criteria(**options)
