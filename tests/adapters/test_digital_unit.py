"""The digital unit's description, and what its SRAM has room for."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aihwkit_lora as al
from aihwkit_lora.adapters import DigitalUnit
from aihwkit_lora.adapters.budget import Footprint, largest_rank, largest_width, total_bits

FOOTPRINTS = st.lists(
    st.builds(
        Footprint,
        rank=st.integers(1, 64),
        per_rank=st.integers(1, 200),
        biases=st.integers(0, 20),
        magnitudes=st.integers(0, 20),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 1),
        ("bits", 17),
        ("bits", 8.0),
        ("bits", True),
        ("sram_kib", 0.0),
        ("sram_kib", -1.0),
        ("sram_kib", float("nan")),
        ("sram_kib", float("inf")),
        ("macs_per_cycle", 0),
        ("clock_hz", 0.0),
        ("clock_hz", float("inf")),
        ("reuse", "layer"),
    ],
)
def test_fields_out_of_range_are_refused(field: str, value: Any) -> None:
    speed = {"macs_per_cycle": 1, "clock_hz": 1e6}
    with pytest.raises(
        al.ConfigurationError, match=rf"digital unit: expected {field} .* got {value!r}"
    ):
        DigitalUnit(**({"bits": 8} | speed | {field: value}))


@pytest.mark.parametrize("speed", [{"macs_per_cycle": 4}, {"clock_hz": 1e6}])
def test_a_latency_needs_both_rate_and_clock(speed: dict[str, Any]) -> None:
    with pytest.raises(al.ConfigurationError, match="macs_per_cycle and clock_hz together, got"):
        DigitalUnit(**speed)
    with pytest.raises(
        al.ConfigurationError, match="expected macs_per_cycle and clock_hz, got Non"
    ):
        DigitalUnit().seconds(1)


@given(st.integers(0, 10**9), st.integers(1, 4096), st.integers(1, 10**9))
def test_seconds_are_cycles_over_clock(macs: int, rate: int, clock: int) -> None:
    seconds = DigitalUnit(macs_per_cycle=rate, clock_hz=float(clock)).seconds(macs)
    assert seconds == pytest.approx(float(Fraction(macs, rate * clock)), rel=1e-15)


@pytest.mark.parametrize(("bits", "stored"), [(2, 2), (8, 8), (16, 16), (None, 16)])
def test_the_memory_is_used_to_the_last_bit(bits: int | None, stored: int) -> None:
    unit = DigitalUnit(bits=bits, sram_kib=1.5)
    assert (unit.stored_bits, unit.capacity_bits) == (stored, 12_288)
    assert unit.fits(12_288 // stored)
    assert not unit.fits(12_288 // stored + 1)


@given(FOOTPRINTS, st.integers(0, 200_000), st.integers(2, 16))
def test_the_largest_rank_is_the_largest(parts: list[Footprint], room: int, width: int) -> None:
    rank = largest_rank(parts, room, width)

    def bits(at: int) -> int:
        return total_bits([replace(part, rank=at) for part in parts], width)

    assert rank == 0 or bits(rank) <= room
    assert bits(rank + 1) > room


@given(FOOTPRINTS, st.integers(0, 200_000))
def test_the_largest_width_is_the_largest(parts: list[Footprint], room: int) -> None:
    fitting = [width for width in range(2, 17) if total_bits(parts, width) <= room]
    assert largest_width(parts, room) == max(fitting, default=0)


def test_no_rank_fits_layers_without_a_rank() -> None:
    assert largest_rank([], room=100, width=8) == 0
