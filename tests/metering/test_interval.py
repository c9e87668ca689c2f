"""Intervals: order, sums, multiples and quotients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Interval

# Multiples of 1/8 up to 2^20 add up exactly.
eighths = st.integers(0, 2**23).map(lambda n: n / 8)
intervals = st.lists(eighths, min_size=3, max_size=3).map(
    lambda ends: Interval(sorted(ends)[1], min(ends), max(ends))
)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        (1.0, 2.0, 3.0),
        (3.0, 1.0, 2.0),
        (1.0, -1.0, 2.0),
        (math.nan, 0.0, 1.0),
        (1.0, 0.0, math.nan),
    ],
)
def test_ends_out_of_order_are_refused(value: float, low: float, high: float) -> None:
    with pytest.raises(ConfigurationError, match="expected 0 <= low <= value <= high, got low"):
        Interval(value, low, high)


def test_a_negative_factor_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected 0 <= low"):
        Interval(2.0, 1.0, 3.0) * -1


@given(st.lists(intervals, max_size=6))
def test_a_sum_adds_values_and_ends(parts: list[Interval]) -> None:
    assert Interval.sum(parts) == Interval(
        math.fsum(part.value for part in parts),
        math.fsum(part.low for part in parts),
        math.fsum(part.high for part in parts),
    )


@given(intervals, intervals, intervals)
def test_addition_does_not_depend_on_the_order(a: Interval, b: Interval, c: Interval) -> None:
    sums = [(a + b) + c, a + (b + c), Interval.sum(iter((c, b, a)))]
    assert all(first == second for first, second in pairwise(sums))


def test_the_sum_of_nothing_is_zero() -> None:
    assert Interval.sum(()) == Interval(0.0, 0.0, 0.0)


@given(intervals, st.integers(0, 100))
def test_a_multiple_is_a_repeated_sum(interval: Interval, factor: int) -> None:
    assert interval * factor == Interval.sum([interval] * factor)


def test_a_quotient_spans_the_extremes_of_independent_ends() -> None:
    quotient = Interval(6.0, 4.0, 8.0) / Interval(2.0, 1.0, 4.0)
    assert quotient == Interval(3.0, 1.0, 8.0)


def test_a_denominator_that_reaches_zero_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"expected a denominator above 0, got one from 0"):
        Interval(1.0, 1.0, 1.0) / Interval(1.0, 0.0, 2.0)


def test_to_dict_names_the_numbers() -> None:
    assert Interval(2.0, 1.0, 3.0).to_dict() == {"value": 2.0, "low": 1.0, "high": 3.0}
