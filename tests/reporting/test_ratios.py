"""Ratios: the range over a box of prices, against trying every corner of the box."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts, Interval, PriceList, Quantity, Status
from aihwkit_lora.reporting import Ratio, energy_ratio, price_ratio

EVENTS = (
    "set_pulses",
    "reset_pulses",
    "verify_reads",
    "adc_conversions",
    "forward_macs",
    "sram_read_bits",
)
numbers = st.integers(0, 10**6)
counts = st.dictionaries(st.sampled_from(EVENTS), numbers).map(Counts)
# A denominator always holds a SET pulse, and that always costs something.
denominators = counts.map(lambda found: found + Counts({"set_pulses": 1}))
costs = st.floats(1e-15, 1e3)
ends = st.lists(costs, min_size=3, max_size=3).map(sorted)
ends_from_zero = st.lists(st.just(0.0) | costs, min_size=3, max_size=3).map(sorted)


def priced(low: float, value: float, high: float) -> Quantity:
    return Quantity(
        value=value, low=low, high=high, unit="J", source="drawn", status=Status.ASSUMED
    )


prices = st.fixed_dictionaries(
    {
        event: (ends if event == "set_pulses" else ends_from_zero).map(lambda e: priced(*e))
        for event in EVENTS
    }
)


def cost(of: Counts, corner: dict[str, float]) -> Fraction:
    return sum((of[event] * Fraction(price) for event, price in corner.items()), Fraction(0))


@given(counts, denominators, prices)
def test_the_range_is_that_over_all_corners_of_the_prices(
    above: Counts, below: Counts, listed: dict[str, Quantity]
) -> None:
    boxes = [(q.interval.low, q.interval.high) for q in listed.values()]
    corners = [dict(zip(listed, corner, strict=True)) for corner in product(*boxes)]
    tried = [cost(above, corner) / cost(below, corner) for corner in corners]
    best = {event: q.value for event, q in listed.items()}

    found = price_ratio(above, below, listed)

    assert (found.low, found.high) == (float(min(tried)), float(max(tried)))
    assert found.value == float(cost(above, best) / cost(below, best))


@given(denominators, prices, st.integers(1, 9))
def test_a_multiple_of_the_same_counts_has_no_range(
    below: Counts, listed: dict[str, Quantity], factor: int
) -> None:
    found = price_ratio(below.scaled(factor), below, listed)
    assert (found.value, found.low, found.high) == (factor, factor, factor)


def test_the_same_price_on_both_sides_narrows_the_range() -> None:
    listed = {"set_pulses": priced(1.0, 2.0, 4.0), "forward_macs": priced(1.0, 1.0, 1.0)}
    above = Counts({"set_pulses": 10, "forward_macs": 10})
    below = Counts({"set_pulses": 1, "forward_macs": 10})
    found = price_ratio(above, below, listed)
    assert (found.value, found.low, found.high) == (30 / 12, 20 / 11, 50 / 14)


def test_events_of_one_price_vary_together() -> None:
    one, other = priced(1.0, 2.0, 4.0), priced(1.0, 2.0, 4.0)
    there, back = Counts({"adc_conversions": 6}), Counts({"transposed_adc_conversions": 2})
    shared = {"adc_conversions": one, "transposed_adc_conversions": one}
    apart = {"adc_conversions": one, "transposed_adc_conversions": other}
    assert price_ratio(there, back, shared) == Interval(3.0, 3.0, 3.0)
    assert price_ratio(there, back, apart) == Interval(3.0, 0.75, 12.0)


def test_a_numerator_of_nothing_is_zero_times_the_denominator() -> None:
    found = price_ratio(Counts(), Counts({"set_pulses": 3}), {"set_pulses": priced(1.0, 2.0, 4.0)})
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "below",
    [
        Counts(),
        Counts({"failed_cells": 5}),
        pytest.param(Counts({"forward_macs": 5}), id="free at its lowest price"),
    ],
)
def test_a_denominator_that_may_cost_nothing_is_refused(below: Counts) -> None:
    listed = {"set_pulses": priced(1.0, 1.0, 1.0), "forward_macs": priced(0.0, 1.0, 1.0)}
    with pytest.raises(ConfigurationError, match="expected a denominator that costs something"):
        price_ratio(Counts({"set_pulses": 1}), below, listed)


def test_energy_ratio_says_what_it_compares(chip: Any) -> None:
    ratio = energy_ratio(
        "write energy",
        Counts({"set_pulses": 30}),
        Counts({"set_pulses": 10}),
        chip,
        above="reprogram",
        below="hybrid",
        includes="pulses",
    )
    assert ratio == Ratio(
        name="write energy",
        value=3.0,
        low=3.0,
        high=3.0,
        numerator="reprogram",
        denominator="hybrid",
        includes="pulses",
    )


def test_energy_ratio_names_what_has_no_price(chip: Any) -> None:
    ratio = energy_ratio(
        "write energy",
        Counts({"set_pulses": 30, "offchip_read_bits": 8}),
        Counts({"set_pulses": 10, "sram_write_bits": 8, "failed_cells": 1}),
        chip,
        above="reprogram",
        below="hybrid",
        includes="pulses",
    )
    assert ratio.value == 3.0
    assert ratio.includes == "pulses; without offchip_read_bits, sram_write_bits: no price"


def test_energy_ratio_takes_energy_prices_only() -> None:
    class Free:
        name = "free"
        prices = PriceList(energy={}, latency={})

    with pytest.raises(ConfigurationError, match=r"got 0 from the counts \{'set_pulses': 1\}"):
        energy_ratio(
            "x",
            Counts({"set_pulses": 1}),
            Counts({"set_pulses": 1}),
            Free(),
            above="a",
            below="b",
            includes="c",
        )
