"""Units with prefixes, and prices that follow from others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aihwkit_lora.chips import ConductanceMapping, Maker
from aihwkit_lora.chips.quantities import (
    backwards,
    cell_energy_j,
    digital_prices,
    quantity,
    to_si,
    x2g_energy_j,
)
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Status
from aihwkit_lora.metering.events import X2G_STEPS


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.1, "pJ", (1e-13, "J")),
        (18.2, "pJ", (1.82e-11, "J")),
        (2, "nJ", (2e-9, "J")),
        (37.2, "fJ", (3.72e-14, "J")),
        (1e-3, "µs", (1e-9, "s")),
        (3, "us", (3e-6, "s")),
        (40, "μS", (4e-5, "S")),
        (10.35, "uS", (1.035e-5, "S")),
        (5, "ms", (5e-3, "s")),
        (5, "m", (5.0, "m")),
        (5, "mm", (5e-3, "m")),
        (64, "MHz", (64e6, "Hz")),
        (8.52, "1", (8.52, "1")),
        (7, "op/J", (7.0, "op/J")),
        (7, "J", (7.0, "J")),
        (7, "", (7.0, "")),
    ],
)
def test_prefixes_come_off_without_a_rounding_error(
    value: float, unit: str, expected: tuple[float, str]
) -> None:
    assert to_si(value, unit) == expected


def test_a_quantity_takes_its_range_along() -> None:
    made = quantity(153, "pJ", "here", Status.CITED, low=0.6, high=312.5)
    assert (made.value, made.low, made.high, made.unit) == (153e-12, 0.6e-12, 312.5e-12, "J")
    assert quantity(1, "1", "here", Status.CITED).interval.high == 1.0
    with pytest.raises(ConfigurationError, match="expected a source, got none"):
        quantity(1, "pJ", " ", Status.CITED)


def test_energy_of_cells_is_v2gt_and_that_of_a_full_scale_cell_is_the_same() -> None:
    voltage, time = quantity(0.2, "V", "x", Status.CITED), quantity(100, "ns", "x", Status.CITED)
    conductance = quantity(50, "µS", "x", Status.CITED)
    assert cell_energy_j(voltage, conductance, time) == pytest.approx(0.2e-12, rel=1e-12)
    count = X2G_STEPS**2 * 50_000_000
    assert count * x2g_energy_j(voltage, time) == pytest.approx(0.2e-12, rel=1e-12)


def test_a_price_backwards_is_the_same_number_but_assumed() -> None:
    forwards = quantity(2, "pJ", "a paper", Status.CITED, low=1, high=3)
    back = backwards(forwards, "adc_conversions")
    assert (back.interval, back.status) == (forwards.interval, Status.ASSUMED)
    assert back.follows == "adc_conversions"
    assert back.source.endswith("a paper")


def test_an_update_is_assumed_if_a_part_of_it_is() -> None:
    part = quantity(1, "pJ", "a paper", Status.CITED)
    parts = dict.fromkeys(
        ("mac_fp16", "mac_int8", "mac_int16", "addition", "sram_read", "sram_write", "offchip"),
        part,
    )
    update = digital_prices(**parts)["optimizer_updates"]
    assert (update.value, update.status) == (pytest.approx(50e-12), Status.DERIVED)
    guessed = replace(part, status=Status.ASSUMED)
    for name in ("mac_fp16", "sram_read", "sram_write"):
        prices = digital_prices(**{**parts, name: guessed})
        assert prices["optimizer_updates"].status is Status.ASSUMED


def test_makers_compare_by_what_they_make() -> None:
    window = ConductanceMapping(g_min_siemens=0.0, g_max_siemens=1e-5, pairs=1)
    assert Maker(dict, {"a": 1}) == Maker(dict, {"a": 1}) != Maker(dict, {"a": 2})
    assert Maker(dict, {"a": 1})() == {"a": 1}
    assert Maker(dict, {}, window)()["g_converter"].g_max == pytest.approx(10.0)
