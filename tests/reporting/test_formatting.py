"""Numbers for people, at the edges of prefixes and digits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.metering import Interval
from aihwkit_lora.reporting import format_interval, format_si
from aihwkit_lora.reporting.formatting import format_number

SCALES = {"f": -15, "p": -12, "n": -9, "µ": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12}


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0 J"),
        (2.375e-9, "2.38 nJ"),
        (153e-12, "153 pJ"),
        (999.4e-6, "999 µJ"),
        (999.6e-6, "1.00 mJ"),
        (1.0, "1.00 J"),
        (12.34e3, "12.3 kJ"),
        (3e-18, "0.00300 fJ"),
        (5.5e15, "5,500 TJ"),
        (math.inf, "inf J"),
    ],
)
def test_format_si(value: float, written: str) -> None:
    assert format_si(value, "J") == written


@given(st.floats(1e-15, 1e14))
def test_what_is_written_is_what_was_meant(value: float) -> None:
    number, unit = format_si(value, "J").split()
    read = float(number) * 10.0 ** SCALES[unit.removesuffix("J")]
    assert read == pytest.approx(value, rel=0.0051)
    assert len(number.replace(".", "")) == 3


@pytest.mark.parametrize(
    ("number", "written"),
    [(0.0, "0"), (1.0, "1.00"), (99.96, "100"), (48_731.0, "48,700"), (0.0321, "0.0321")],
)
def test_format_number(number: float, written: str) -> None:
    assert format_number(number) == written


@pytest.mark.parametrize(
    ("interval", "written"),
    [
        (Interval(153e-12, 0.6e-12, 312e-12), "153 pJ [0.600, 312]"),
        (Interval(2e-9, 2e-9, 2e-9), "2.00 nJ"),
        (Interval(2e-9, 0.0, 3e-6), "2.00 nJ [0, 3,000]"),
    ],
)
def test_format_interval(interval: Interval, written: str) -> None:
    assert format_interval(interval, "J") == written
