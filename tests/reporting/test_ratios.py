"""Ratios: the range over a box of prices, against trying every corner of the box."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts, Interval, Level, PriceList, Quantity, Status
from aihwkit_lora.reporting import (
    Case,
    Ratio,
    case_ratio,
    deployment_energy_ratio,
    deployment_time_ratio,
    energy_ratio,
    inference_energy_ratio,
    parameter_ratio,
    price_ratio,
    rtx_4090,
    training_energy_ratio,
    update_count_ratio,
    update_energy_ratio,
)

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


def priced(low: float, value: float, high: float, source: str = "drawn") -> Quantity:
    return Quantity(value=value, low=low, high=high, unit="J", source=source, status=Status.ASSUMED)


def drawn(event: str) -> st.SearchStrategy[Quantity]:
    """A price with a source of its own: the same price from the same source is one price."""
    found = ends if event == "set_pulses" else ends_from_zero
    return found.map(lambda e: priced(*e, source=event))


prices = st.fixed_dictionaries({event: drawn(event) for event in EVENTS})


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
    one, other = priced(1.0, 2.0, 4.0), priced(1.0, 2.0, 4.0, source="another ADC")
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


def case(chip: Any, name: str = "case", **happened: int) -> Case:
    return Case(name=name, counts=Counts(happened), chip=chip)


def test_a_ratio_on_one_chip_shares_its_prices_and_one_of_two_machines_does_not() -> None:
    def machine(low: float, value: float, high: float) -> Any:
        prices = PriceList(energy={"forward_macs": priced(low, value, high)}, latency={})
        return SimpleNamespace(name="machine", prices=prices)

    one, other = machine(1.0, 2.0, 4.0), machine(2.0, 4.0, 8.0)
    above, below = case(one, forward_macs=6), case(one, forward_macs=2)
    same = case_ratio("energy", above, below, includes="MACs")
    apart = case_ratio("energy", above, replace(below, chip=other), includes="MACs")
    assert (same.value, same.low, same.high) == (3.0, 3.0, 3.0)
    assert (apart.value, apart.low, apart.high) == (1.5, 6 / 16, 24 / 4)


def test_a_ratio_of_two_machines_names_what_either_has_no_price_for(chip: Any) -> None:
    gpu = rtx_4090(utilisation=0.5)
    above = case(gpu, "card", forward_macs=1, sram_write_bits=8)
    below = case(chip, "hybrid", set_pulses=1, activation_functions=1)
    ratio = case_ratio("energy", above, below, includes="all")
    assert ratio.name == "energy, card ÷ hybrid"
    assert ratio.includes == "all; without activation_functions, sram_write_bits: no price"


def test_a_ratio_says_how_sure_its_counts_are(chip: Any) -> None:
    sure = case(chip, set_pulses=4)
    unsure = replace(sure, counts=Counts({"set_pulses": 2}, level=Level.SIMULATED))
    assert case_ratio("x", sure, sure, includes="pulses").includes == "pulses"
    assert case_ratio("x", unsure, sure, includes="pulses").includes == "pulses; counts: simulated"


def test_named_ratios_say_what_they_divide(chip: Any) -> None:
    full = replace(case(chip, "full", set_pulses=30, optimizer_updates=10), detail="3 steps")
    hybrid = case(chip, "hybrid", optimizer_updates=5)
    for named, quantity in (
        (update_count_ratio, "update count"),
        (update_energy_ratio, "update energy"),
        (training_energy_ratio, "training energy"),
        (deployment_energy_ratio, "deployment energy"),
        (inference_energy_ratio, "inference energy"),
    ):
        ratio = named(full, hybrid)
        assert ratio.name == f"{quantity}, full ÷ hybrid"
        assert (ratio.numerator, ratio.denominator) == ("full: 3 steps", "hybrid")


def test_parameters_are_counted_exactly() -> None:
    ratio = parameter_ratio(336_384, 13_408)
    assert ratio.value == ratio.low == ratio.high == 336_384 / 13_408
    assert (ratio.numerator, ratio.denominator) == ("all weights: 336,384", "adapters: 13,408")


def test_update_energy_leaves_out_passes_and_training_energy_does_not(chip: Any) -> None:
    updates = {"set_pulses": 30, "verify_reads": 31, "optimizer_updates": 10}
    full = case(chip, "full", **updates, forward_macs=1000, adc_conversions=1000)
    hybrid = case(chip, optimizer_updates=10, adc_conversions=500)
    energy = chip.prices.energy
    spent = sum(count * energy[event].value for event, count in updates.items())
    passes = 1000 * (energy["forward_macs"].value + energy["adc_conversions"].value)
    update = 10 * energy["optimizer_updates"].value
    reads = 500 * energy["adc_conversions"].value
    assert update_energy_ratio(full, hybrid).value == pytest.approx(spent / update, rel=1e-12)
    whole = (spent + passes) / (update + reads)
    assert training_energy_ratio(full, hybrid).value == pytest.approx(whole, rel=1e-12)


def test_deployment_says_whether_anything_comes_from_off_the_chip(chip: Any) -> None:
    written, loaded = case(chip, set_pulses=1), case(chip, sram_read_bits=8)
    assert "no transfer" in deployment_energy_ratio(written, loaded).includes
    fetched = case(chip, sram_read_bits=8, offchip_read_bits=8)
    assert "off-chip reads" in deployment_energy_ratio(written, fetched).includes


def test_deployment_time_rounds_up_to_whole_accesses(chip: Any) -> None:
    written, loaded = case(chip, set_pulses=65), case(chip, sram_write_bits=65)
    ratio = deployment_time_ratio(written, loaded, port_bits=64, cycle_s=1e-9)
    assert ratio.value == pytest.approx(65e-6 / 2e-9, rel=1e-12)
    assert "SRAM writes of 64 bit in 1e-09 s" in ratio.includes
    unpriced = case(chip, set_pulses=65, optimizer_updates=1)
    ratio = deployment_time_ratio(unpriced, loaded, port_bits=64, cycle_s=1e-9)
    assert ratio.includes.endswith("without optimizer_updates: no price")


@pytest.mark.parametrize(("port_bits", "cycle_s"), [(0, 1e-9), (64, 0.0), (64, -1.0)])
def test_a_port_that_cannot_write_is_refused(chip: Any, port_bits: int, cycle_s: float) -> None:
    loaded = case(chip, sram_write_bits=65)
    with pytest.raises(ConfigurationError, match="expected port_bits of 1 or more and"):
        deployment_time_ratio(loaded, loaded, port_bits=port_bits, cycle_s=cycle_s)


def test_ratios_to_nothing_are_refused(chip: Any) -> None:
    nothing, something = case(chip), case(chip, optimizer_updates=1, sram_write_bits=1)
    with pytest.raises(ConfigurationError, match="denominator of 1 or more adapted scalars, got 0"):
        parameter_ratio(5, 0)
    with pytest.raises(ConfigurationError, match="denominator of 1 or more optimizer_updates, got"):
        update_count_ratio(something, nothing)
    with pytest.raises(ConfigurationError, match="denominator of 1 or more sram_write_bits, got 0"):
        deployment_time_ratio(something, nothing, port_bits=64, cycle_s=1e-9)
    with pytest.raises(ConfigurationError, match="expected a denominator that costs something"):
        training_energy_ratio(something, nothing)


def test_a_price_that_follows_another_varies_with_it() -> None:
    forwards = Quantity(
        value=2.0, low=1.0, high=4.0, unit="J", source="a paper", status=Status.CITED
    )
    backwards = replace(
        forwards, source="as forwards", status=Status.ASSUMED, follows="adc_conversions"
    )
    above, below = Counts({"transposed_adc_conversions": 30}), Counts({"adc_conversions": 10})
    together = {"adc_conversions": forwards, "transposed_adc_conversions": backwards}
    assert price_ratio(above, below, together) == Interval(3.0, 3.0, 3.0)
    apart = together | {"transposed_adc_conversions": replace(backwards, follows=None)}
    assert price_ratio(above, below, apart) == Interval(3.0, 0.75, 12.0)
    # Whoever reprices one of them parts the two.
    repriced = together | {"adc_conversions": replace(forwards, low=2.0)}
    assert price_ratio(above, below, repriced) == Interval(3.0, 0.75, 6.0)
