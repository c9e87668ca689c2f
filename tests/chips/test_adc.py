"""Energy of a conversion: the regression's own numbers, and where it ends."""

from __future__ import annotations

import math

import pytest

from aihwkit_lora.chips.adc import adc_energy, adc_rate_limit
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Status

# hwcomponents-adc 1.0.21, ADC(bits, node, throughput).get_energy() at 0.1 to 100 MS/s, in pJ
TABLE = {
    180: ("23.8", "27.4", "44.1", "85.1"),
    130: ("12.9", "14.9", "23.9", "46.2"),
    65: ("3.50", "4.04", "6.49", "12.5"),
    45: ("1.75", "2.02", "3.25", "6.28"),
    32: ("0.92", "1.07", "1.71", "3.31"),
    28: ("0.72", "0.83", "1.33", "2.57"),
    22: ("0.46", "0.53", "0.85", "1.64"),
    14: ("0.20", "0.23", "0.36", "0.70"),
}
BITS = (4, 6, 8, 10)
SPOTS = [
    (bits, node, printed)
    for node, row in TABLE.items()
    for bits, printed in zip(BITS, row, strict=True)
]


@pytest.mark.parametrize(("bits", "node", "printed"), SPOTS)
def test_spot_values_agree_to_their_last_digit(bits: int, node: int, printed: str) -> None:
    digits = len(printed.partition(".")[2])
    assert f"{adc_energy(bits, node * 1e-9).value * 1e12:.{digits}f}" == printed


@pytest.mark.parametrize("node", TABLE)
@pytest.mark.parametrize("bits", range(4, 13))
def test_the_library_itself_agrees(bits: int, node: int) -> None:
    library = pytest.importorskip("hwcomponents_adc")
    slow = library.ADC(bits, node * 1e-9, 1e5).get_energy()
    assert adc_energy(bits, node * 1e-9).value == pytest.approx(slow, rel=1e-9)
    at_limit = library.ADC(bits, node * 1e-9, 0.999 * adc_rate_limit(bits)).get_energy()
    beyond = library.ADC(bits, node * 1e-9, 1.1 * adc_rate_limit(bits)).get_energy()
    assert at_limit == pytest.approx(slow, rel=1e-9)
    assert beyond > 1.01 * slow


def test_it_names_its_source_and_has_no_status_but_the_librarys() -> None:
    energy = adc_energy(8, 130e-9)
    assert "arXiv:2404.06553" in energy.source
    assert "8 bit at 130 nm" in energy.source
    assert (energy.status, energy.unit) == (Status.LIBRARY, "J")


def test_fewer_than_4_bits_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"expected bits of 4 or more, got 3\. The regr"):
        adc_energy(3, 130e-9)


@pytest.mark.parametrize("node", [130, 0.0, -130e-9, math.nan])
def test_a_node_that_is_no_length_in_metres_is_refused(node: float) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a technology node in metres, such as"):
        adc_energy(8, node)
