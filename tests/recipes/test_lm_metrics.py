"""TOFU's metrics on cases whose answer is known in closed form, and against scipy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from aihwkit_lora.errors import DataError
from aihwkit_lora.recipes.lm_metrics import (
    answer_probability,
    choice_probability,
    forget_quality,
    model_utility,
    rouge_l_recall,
    truth_ratio,
    truthfulness,
)


def test_probability_is_the_geometric_mean_over_tokens():
    chances = torch.tensor([0.5, 0.25, 0.125], dtype=torch.double)
    found = answer_probability(-chances.log().sum(), torch.tensor(3))
    assert float(found) == pytest.approx(float(chances.prod()) ** (1 / 3), rel=1e-12)


def test_the_length_of_an_answer_does_not_matter():
    one = answer_probability(torch.tensor([math.log(4)]), torch.tensor([1]))
    ten = answer_probability(torch.tensor([10 * math.log(4)]), torch.tensor([10]))
    torch.testing.assert_close(one, ten)


def test_a_model_that_knows_nothing_chooses_by_chance():
    even = torch.full((2,), 0.3)
    torch.testing.assert_close(
        choice_probability(even, even[:, None].repeat(1, 3)), torch.full((2,), 0.25)
    )


def test_truth_ratio_is_one_for_a_model_that_knows_nothing_and_zero_for_one_that_knows():
    wrong = torch.tensor([[0.3, 0.3, 0.3], [0.0, 0.0, 0.0], [0.1, 0.2, 0.6]])
    ratios = truth_ratio(torch.tensor([0.3, 0.9, 0.1]), wrong)
    torch.testing.assert_close(ratios, torch.tensor([1.0, 0.0, 3.0]))
    torch.testing.assert_close(truthfulness(ratios), torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize(
    ("reference", "answer", "recall"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "d c b a", 0.25),
        ("a b c d", "x a y c z d", 0.75),
        ("a b c d", "", 0.0),
        ("a a b", "a b a", 2 / 3),
        ("a", "b a b a", 1.0),
    ],
)
def test_rouge_l_is_the_part_of_the_reference_that_is_there_in_order(reference, answer, recall):
    assert rouge_l_recall(reference.split(), answer.split()) == pytest.approx(recall)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc")))
def test_rouge_l_agrees_with_trying_all_subsequences(reference, answer):
    def found_in(part):
        rest = iter(answer)
        return all(word in rest for word in part)

    best = max(
        sum(keep)
        for code in range(2 ** len(reference))
        if found_in([w for i, w in enumerate(reference) if code >> i & 1])
        for keep in [[code >> i & 1 for i in range(len(reference))]]
    )
    assert rouge_l_recall(reference, answer) == pytest.approx(best / len(reference))


def test_rouge_l_needs_a_reference():
    with pytest.raises(DataError, match="reference of at least one word, found none"):
        rouge_l_recall([], ["a"])


def test_utility_is_a_harmonic_mean():
    assert model_utility([0.25, 0.5, 1.0]) == pytest.approx(3 / (4 + 2 + 1))
    assert model_utility([0.9, 0.9, 0.0]) == 0.0
    with pytest.raises(DataError, match="values of 0 or more, found none"):
        model_utility([])
    with pytest.raises(DataError, match=r"values of 0 or more, found \[-1\.0, 0\.5\]"):
        model_utility([0.5, -1.0])


def test_forget_quality_of_equal_and_of_separate_samples():
    same = [0.1 * i for i in range(7)]
    assert forget_quality(same, same) == 1.0
    # Of all orders of 7 + 5 values, two put all of one sample first.
    other = [2.0 + i for i in range(5)]
    assert forget_quality(same, other) == pytest.approx(2 / math.comb(12, 5), rel=1e-12)


def test_forget_quality_stays_exact_where_it_is_tiny():
    low, high = [0.001 * i for i in range(60)], [1.0 + i for i in range(60)]
    assert forget_quality(low, high) == pytest.approx(2 / math.comb(120, 60), rel=1e-12)


values = st.lists(st.floats(0, 10), min_size=1, max_size=12, unique=True)


@given(values, values)
def test_forget_quality_is_the_exact_two_sample_test(one, other):
    # With ties, scipy's exact p-value ignores them in the same way.
    expected = ks_2samp(one, other, method="exact").pvalue
    assert forget_quality(one, other) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_forget_quality_needs_both_samples():
    with pytest.raises(DataError, match="truth ratios of both models, found 0 and 1"):
        forget_quality([], [1.0])
