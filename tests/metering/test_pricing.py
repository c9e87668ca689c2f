"""Pricing: sources, units, linearity, and that nothing is free because nobody has priced it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.chips import Chip, chips
from aihwkit_lora.errors import ConfigurationError, UnknownNameError
from aihwkit_lora.metering import (
    EVENTS,
    Counts,
    EnergyReport,
    Interval,
    Level,
    PriceList,
    Quantity,
    Side,
    Status,
    price,
)


def cost(value: float, unit: str, low: float | None = None, high: float | None = None) -> Quantity:
    return Quantity(
        value=value, unit=unit, source="made up", status=Status.ASSUMED, low=low, high=high
    )


@dataclass(frozen=True)
class TinyChip:
    name: str
    prices: PriceList


TINY = TinyChip(
    name="tiny",
    prices=PriceList(
        energy={
            "set_pulses": cost(2.0, "J", low=1.0, high=4.0),
            "forward_macs": cost(0.5, "J"),
            "sram_read_bits": cost(0.25, "J", high=0.5),
            "shift_adds": cost(0.0, "J"),
        },
        latency={"set_pulses": cost(3.0, "s")},
        energy_free=frozenset({"failed_cells"}),
        latency_free=frozenset({"failed_cells", "forward_macs"}),
    ),
)
counts = st.dictionaries(st.sampled_from(EVENTS.names()), st.integers(0, 10**15)).map(Counts)


def test_price_adds_up_what_each_event_costs() -> None:
    happened = Counts({"set_pulses": 10, "forward_macs": 4, "failed_cells": 1}, Level.SIMULATED)
    assert price(happened, TINY) == EnergyReport(
        chip="tiny",
        energy_by_event={
            "set_pulses": Interval(20.0, 10.0, 40.0),
            "forward_macs": Interval(2.0, 2.0, 2.0),
        },
        latency_by_event={"set_pulses": Interval(30.0, 30.0, 30.0)},
        unpriced_energy=(),
        unpriced_latency=(),
        level=Level.SIMULATED,
    )


def test_totals_and_sides_add_up_the_bill() -> None:
    report = price(Counts({"set_pulses": 1, "forward_macs": 2, "sram_read_bits": 4}), TINY)
    assert report.energy_j == Interval(4.0, 3.0, 7.0)
    assert report.latency_s == Interval(3.0, 3.0, 3.0)
    assert report.energy_on(Side.ANALOG) == Interval(2.0, 1.0, 4.0)
    assert report.energy_on(Side.DIGITAL) == Interval(1.0, 1.0, 1.0)
    assert report.energy_on(Side.MEMORY) == Interval(1.0, 1.0, 2.0)


@given(counts, counts)
def test_price_is_linear(a: Counts, b: Counts) -> None:
    together, apart = price(a + b, TINY), (price(a, TINY), price(b, TINY))
    for total in ("energy_j", "latency_s"):
        whole = getattr(together, total).to_dict()
        parts = Interval.sum(getattr(part, total) for part in apart).to_dict()
        assert whole == pytest.approx(parts, rel=1e-12)


@given(counts, st.integers(0, 1000))
def test_repeating_everything_repeats_the_price(a: Counts, factor: int) -> None:
    repeated = price(a.scaled(factor), TINY).energy_j.to_dict()
    assert repeated == pytest.approx((price(a, TINY).energy_j * factor).to_dict(), rel=1e-12)


def test_nothing_costs_nothing() -> None:
    report = price(Counts(), TINY)
    assert report.energy_j == report.latency_s == Interval(0.0, 0.0, 0.0)
    assert report.unpriced_energy == report.unpriced_latency == ()


@given(counts)
def test_an_event_is_priced_or_free_or_named_as_unpriced(happened: Counts) -> None:
    report, listed = price(happened, TINY), TINY.prices
    for unpriced, prices, free in (
        (report.unpriced_energy, listed.energy, listed.energy_free),
        (report.unpriced_latency, listed.latency, listed.latency_free),
    ):
        assert len(set(unpriced)) == len(unpriced)
        assert set(unpriced) == set(happened) - set(prices) - free


def test_only_what_happened_and_costs_is_on_the_bill() -> None:
    report = price(Counts({"shift_adds": 7, "set_pulses": 1}), TINY)
    assert set(report.energy_by_event) == {"set_pulses"}
    assert report.unpriced_energy == ()


@pytest.mark.parametrize("source", ["", "  "])
def test_a_quantity_without_source_is_refused(source: str) -> None:
    with pytest.raises(ConfigurationError, match=r"quantity of 2.0 J: expected a source, got none"):
        Quantity(value=2.0, unit="J", source=source, status=Status.CITED)


@pytest.mark.parametrize(("low", "high"), [(3.0, None), (None, 1.0), (-1.0, None)])
def test_a_quantity_outside_its_range_is_refused(low: float | None, high: float | None) -> None:
    with pytest.raises(ConfigurationError, match="expected 0 <= low <= value <= high"):
        cost(2.0, "J", low=low, high=high)


def test_a_quantity_without_range_is_exact() -> None:
    assert cost(2.0, "J").interval == Interval(2.0, 2.0, 2.0)
    assert cost(2.0, "J", high=3.0).interval == Interval(2.0, 2.0, 3.0)


def test_prices_in_a_wrong_unit_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="energy price of 'set_pulses': expected the unit J, got s"
    ):
        PriceList(energy={"set_pulses": cost(1.0, "s")}, latency={})
    with pytest.raises(
        ConfigurationError, match="latency price of 'set_pulses': expected the unit s, got J"
    ):
        PriceList(energy={}, latency={"set_pulses": cost(1.0, "J")})


def test_prices_of_unknown_events_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown event 'set_pulse'"):
        PriceList(energy={"set_pulse": cost(1.0, "J")}, latency={})
    with pytest.raises(UnknownNameError, match="unknown event 'fail'"):
        PriceList(energy={}, latency={}, latency_free=frozenset({"fail"}))


def test_an_event_that_is_priced_and_free_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="energy prices: expected events to be priced or free, got both"
    ):
        PriceList(
            energy={"set_pulses": cost(1.0, "J")},
            latency={},
            energy_free=frozenset({"set_pulses"}),
        )


def test_a_price_list_does_not_follow_the_dict_it_was_made_of() -> None:
    energy = {"set_pulses": cost(1.0, "J")}
    listed = PriceList(energy=energy, latency={})
    energy["forward_macs"] = cost(1.0, "J")
    assert set(listed.energy) == {"set_pulses"}
    with pytest.raises(TypeError, match="does not support item assignment"):
        listed.energy["forward_macs"] = cost(1.0, "J")  # type: ignore[index]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda chip: pickle.loads(pickle.dumps(chip))])
def test_chips_can_be_copied_and_sent(again: Callable[[Chip], Chip]) -> None:
    chip = chips.get("rm-180nm")
    other = again(chip)
    assert other.prices == chip.prices
    assert price(Counts({"set_pulses": 3}), other) == price(Counts({"set_pulses": 3}), chip)
