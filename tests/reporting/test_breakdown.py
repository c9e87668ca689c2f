"""The parts of a bill are the whole bill."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.metering import EVENTS, EnergyReport, Interval, Level
from aihwkit_lora.reporting import energy_by_group
from aihwkit_lora.reporting.breakdown import GROUPS, OTHER


def bill(joules: dict[str, float]) -> EnergyReport:
    return EnergyReport(
        chip="tiny",
        energy_by_event={event: Interval(j, j / 2, j * 2) for event, j in joules.items()},
        latency_by_event={},
        unpriced_energy=(),
        unpriced_latency=(),
        level=Level.EXACT,
    )


@given(st.dictionaries(st.sampled_from(EVENTS.names()), st.integers(1, 2**20).map(float)))
def test_groups_add_up_to_the_whole(joules: dict[str, float]) -> None:
    energy = bill(joules)
    groups = energy_by_group(energy)
    assert Interval.sum(groups.values()) == energy.energy_j
    assert list(groups) == [group for group in (*GROUPS, OTHER) if group in groups]


def test_every_event_is_in_one_group() -> None:
    placed = Counter(event for events in GROUPS.values() for event in events)
    assert placed == Counter(EVENTS.names())


def test_events_of_other_packages_are_not_lost() -> None:
    assert energy_by_group(bill({"photons": 3.0, "set_pulses": 1.0})) == {
        "programming": Interval(1.0, 0.5, 2.0),
        OTHER: Interval(3.0, 1.5, 6.0),
    }


@pytest.mark.parametrize(
    ("event", "group"),
    [
        ("reset_pulses", "programming"),
        ("verify_reads", "verify reads"),
        ("transposed_adc_conversions", "analogue: ADC"),
        ("weight_gradient_macs", "digital MACs"),
        ("offchip_read_bits", "off-chip memory"),
    ],
)
def test_events_are_where_people_look_for_them(event: str, group: str) -> None:
    assert list(energy_by_group(bill({event: 1.0}))) == [group]
