"""Counts: laws of exact sums, levels, storage and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.errors import ConfigurationError, UnknownNameError
from aihwkit_lora.metering import EVENTS, Counts, Level
from aihwkit_lora.metering.events import Side, define

# Beyond 2^64, so that a fixed-width or floating-point counter would show.
values = st.dictionaries(st.sampled_from(EVENTS.names()), st.integers(0, 2**80), max_size=6)
one_level = st.builds(Counts, values, st.sampled_from(list(Level)))
counts = st.lists(one_level, max_size=3).map(Counts.sum)


@given(st.lists(counts, max_size=8), st.integers(0, 8))
def test_a_sum_does_not_depend_on_where_it_is_split(parts: list[Counts], cut: int) -> None:
    assert Counts.sum(parts[:cut]) + Counts.sum(parts[cut:]) == Counts.sum(parts)


@given(st.lists(counts, max_size=5))
def test_a_sum_holds_the_sum_of_each_event_and_its_least_sure_level(parts: list[Counts]) -> None:
    total = Counts.sum(parts)
    for event in EVENTS:
        assert total[event] == sum(part[event] for part in parts)
        ranks = [part.level_of(event).rank for part in parts]
        assert total.level_of(event).rank == max(ranks, default=0)


@given(counts, counts)
def test_minus_undoes_plus(first: Counts, second: Counts) -> None:
    assert dict((first + second).minus(first)) == dict(second)


@given(counts, st.integers(0, 5))
def test_scaling_repeats(part: Counts, factor: int) -> None:
    assert part.scaled(factor) == Counts.sum([part] * factor)


@given(counts)
def test_json_keeps_everything(part: Counts) -> None:
    restored = Counts.from_dict(json.loads(json.dumps(part.to_dict())))
    assert restored == part
    assert hash(restored) == hash(part)


def test_the_level_of_all_is_that_of_the_least_sure() -> None:
    total = Counts.sum(
        [
            Counts({"tile_reads": 1}),
            Counts({"set_pulses": 1}, Level.SAMPLED),
            Counts({"reset_pulses": 1}, Level.SIMULATED),
        ]
    )
    assert total.level == Level.SAMPLED
    assert total.level_of("tile_reads") == Level.EXACT
    assert repr(total) == "Counts(reset_pulses=1, set_pulses=1, tile_reads=1; sampled)"


def test_zeros_leave_no_trace() -> None:
    nothing = Counts({"tile_reads": 0}, Level.BOUND)
    assert (len(nothing), nothing["tile_reads"], nothing.level) == (0, 0, Level.EXACT)
    assert nothing == Counts()
    assert nothing != {}


@pytest.mark.parametrize("value", [-1, 1.0, True, "1", None])
def test_values_that_are_not_whole_numbers_are_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="a whole number of 0 or more for 'tile_reads'"):
        Counts({"tile_reads": value})


@pytest.mark.parametrize("factor", [-1, 0.5])
def test_factors_that_are_not_whole_numbers_are_refused(factor: Any) -> None:
    with pytest.raises(ConfigurationError, match="a whole number of 0 or more for 'factor'"):
        Counts({"tile_reads": 1}).scaled(factor)


def test_unknown_events_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown event 'tile_read'. Did you mean"):
        Counts({"tile_read": 1})
    with pytest.raises(UnknownNameError, match=r"unknown event 'tile_read'. Did you mean"):
        Counts()["tile_read"]


def test_a_later_total_cannot_be_taken_off() -> None:
    with pytest.raises(ConfigurationError, match=r"expected an earlier total.*tile_reads"):
        Counts({"tile_reads": 1}).minus(Counts({"tile_reads": 2}))


def test_an_event_cannot_be_defined_twice() -> None:
    with pytest.raises(ConfigurationError, match="event 'tile_reads' is registered already"):
        define("tile_reads", Side.ANALOG, "one more")


def test_every_event_says_what_one_count_is() -> None:
    for name in EVENTS:
        event = EVENTS.get(name)
        assert event.name == name
        assert event.meaning
        assert event.side in Side


def test_only_keeps_values_and_levels_of_what_is_asked_for() -> None:
    both = Counts({"set_pulses": 3}, level=Level.SIMULATED) + Counts({"tile_reads": 2})
    kept = both.only(("set_pulses", "reset_pulses"))
    assert kept == Counts({"set_pulses": 3}, level=Level.SIMULATED)
    assert both.only(("tile_reads",)).level is Level.EXACT


def test_pulses_are_those_of_both_polarities() -> None:
    assert Counts({"set_pulses": 3, "reset_pulses": 4, "verify_reads": 9}).pulses == 7
