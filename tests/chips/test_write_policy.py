"""Settings of the write–verify loop: what is accepted, and what is refused with which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice

from aihwkit_lora.chips.write_policy import PulseStatistics, WritePolicy
from aihwkit_lora.errors import ConfigurationError


def policy(**settings: Any) -> WritePolicy:
    return WritePolicy(**{"device": ReRamArrayOMPresetDevice, "tolerance": 0.05} | settings)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("tolerance", 0.0, "above 0"),
        ("tolerance", -0.1, "above 0"),
        ("tolerance", math.nan, "above 0"),
        ("max_pulses", -1, "0 or more"),
        ("verify_averages", 0, "1 or more"),
        ("verify_discarded", -1, "0 or more"),
        ("verify_noise", -0.1, "0 or more"),
        ("verify_noise", math.inf, "0 or more"),
        ("verify_with", "eye", "'adc' or 'comparator'"),
        ("ramp_increment", -0.5, "0 or more"),
        ("ramp_limit", 0.9, "1 or more"),
        ("start", "blank", "'reset' or 'as is'"),
        ("order", "column", "'cell', 'row' or 'array'"),
        ("together", "column", "'cell', 'row' or 'array'"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=f"WritePolicy.{field}: expected {expected}, got"):
        policy(**{field: value})


EXTENTS = ("cell", "row", "array")


@pytest.mark.parametrize("order", EXTENTS)
@pytest.mark.parametrize("together", EXTENTS)
def test_only_cells_that_take_turns_can_share_a_pulse(order: str, together: str) -> None:
    if EXTENTS.index(together) <= EXTENTS.index(order):
        assert policy(order=order, together=together).together == together
        return
    allowed = {"cell": "'cell'", "row": "'cell' or 'row'"}[order]
    words = (
        rf"WritePolicy\.together: expected {allowed}, as only .*order='{order}'.*got '{together}'"
    )
    with pytest.raises(ConfigurationError, match=words):
        policy(order=order, together=together)


def test_by_default_one_cell_is_finished_after_the_other() -> None:
    assert (policy().order, policy().together, policy().verify_with) == ("cell", "cell", "adc")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("mean_pulses", -1.0, "0 or more"),
        ("mean_pulses", math.inf, "0 or more"),
        ("median_pulses", 0.0, "above 0"),
        ("median_pulses", math.nan, "above 0"),
        ("sigma_ln", -0.1, "0 or more"),
        ("sigma_ln", math.inf, "0 or more"),
    ],
)
def test_statistics_out_of_range_are_refused(field: str, value: float, expected: str) -> None:
    words = rf"PulseStatistics\.{field}: expected {expected}, got {value}"
    with pytest.raises(ConfigurationError, match=words):
        PulseStatistics(**{field: value})


def test_values_at_the_ends_of_their_ranges_are_accepted() -> None:
    assert policy(max_pulses=0, verify_noise=0.0, ramp_increment=0.0, ramp_limit=1.0).tolerance
    assert PulseStatistics(mean_pulses=0.0, sigma_ln=0.0).median_pulses == 5.0


def test_discarded_reads_count() -> None:
    # NeuRRAM averages 8 reads of which the first 3 are dropped (program_array of its chip code).
    assert policy(verify_averages=5, verify_discarded=3).reads_per_verify == 8
