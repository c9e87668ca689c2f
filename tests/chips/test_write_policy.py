"""Settings of the write-verify loop: what is accepted, and what is refused with which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice

from aihwkit_lora.chips.write_policy import WritePolicy
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
        ("ramp_increment", -0.5, "0 or more"),
        ("ramp_limit", 0.9, "1 or more"),
        ("start", "blank", "'reset' or 'as is'"),
        ("together", "column", "'cell', 'row' or 'array'"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=f"WritePolicy.{field}: expected {expected}, got"):
        policy(**{field: value})


def test_values_at_the_ends_of_their_ranges_are_accepted() -> None:
    assert policy(max_pulses=0, verify_noise=0.0, ramp_increment=0.0, ramp_limit=1.0).tolerance


def test_discarded_reads_count() -> None:
    # NeuRRAM averages 8 reads of which the first 3 are dropped (program_array of its chip code).
    assert policy(verify_averages=5, verify_discarded=3).reads_per_verify == 8
