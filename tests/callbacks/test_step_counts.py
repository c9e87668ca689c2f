"""Cutting a ledger into steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.callbacks import StepCounts
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts, Ledger, Level

EVENTS = ("set_pulses", "tile_reads", "forward_macs")
ENTRIES = st.tuples(
    st.sampled_from(EVENTS),
    st.integers(0, 10**20),
    st.sampled_from(("train", "validate", "test")),
    st.sampled_from(("0", "2", "")),
)


@given(steps=st.lists(st.lists(ENTRIES, max_size=5), max_size=5))
def test_each_step_is_what_was_added_outside_the_left_out_phase(steps):
    ledger = Ledger()
    ledger.add(Counts({"set_pulses": 5}), phase="train", layer="0")
    cut = StepCounts(ledger, without=("validate",))
    for entries in steps:
        for event, value, phase, layer in entries:
            ledger.add(Counts({event: value}), phase=phase, layer=layer)
        found = cut.next()
        for event in EVENTS:
            kept = [v for e, v, phase, _ in entries if e == event and phase != "validate"]
            assert found[event] == sum(kept)


def test_step_keeps_how_sure_its_counts_are():
    ledger = Ledger()
    cut = StepCounts(ledger)
    ledger.add(Counts({"set_pulses": 2}, level=Level.SIMULATED), phase="train", layer="0")
    ledger.add(Counts({"tile_reads": 3}), phase="train", layer="0")
    step = cut.next()
    assert step.level_of("set_pulses") is Level.SIMULATED
    assert step.level_of("tile_reads") is Level.EXACT


def test_ledger_that_shrinks_between_steps_is_refused():
    ledger = Ledger()
    ledger.add(Counts({"tile_reads": 3}), phase="train", layer="0")
    cut = StepCounts(ledger)
    ledger.load_state_dict(Ledger().state_dict())
    with pytest.raises(ConfigurationError, match="expected an earlier total, got one with more"):
        cut.next()
