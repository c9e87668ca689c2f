"""The ledger: totals by phase, layer and side, snapshots and checkpoints."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import EVENTS, Counts, Ledger, Level, Side

values = st.dictionaries(st.sampled_from(EVENTS.names()), st.integers(0, 2**80), max_size=4)
counts = st.builds(Counts, values, st.sampled_from(list(Level)))
places = st.tuples(st.sampled_from(("program", "forget", "new")), st.sampled_from("abc"))
entries = st.lists(st.tuples(counts, places), max_size=8)
Entries = list[tuple[Counts, tuple[str, str]]]


def filled(added: Entries) -> Ledger:
    ledger = Ledger()
    for part, (phase, layer) in added:
        ledger.add(part, phase=phase, layer=layer)
    return ledger


@given(entries)
def test_parts_add_up_to_the_total(added: Entries) -> None:
    ledger = filled(added)
    total = Counts.sum(part for part, _ in added)
    assert ledger.total() == total
    assert Counts.sum(ledger.total(phase=phase) for phase in ledger.phases()) == total
    assert Counts.sum(ledger.by_layer().values()) == total
    assert Counts.sum(ledger.total(side=side) for side in Side) == total


@given(entries, places)
def test_a_total_picks_phase_and_layer(added: Entries, place: tuple[str, str]) -> None:
    ledger, (phase, layer) = filled(added), place
    expected = Counts.sum(part for part, at in added if at == place)
    assert ledger.total(phase=phase, layer=layer) == expected
    assert ledger.by_layer(phase).get(layer, Counts()) == expected


@given(entries, entries, st.sampled_from((None, "program", "forget")))
def test_since_gives_what_came_later(before: Entries, after: Entries, phase: str | None) -> None:
    ledger = filled(before)
    snapshot = ledger.total(phase=phase)
    for part, (at, layer) in after:
        ledger.add(part, phase=at, layer=layer)
    later = Counts.sum(part for part, (at, _) in after if phase in (None, at))
    assert dict(ledger.since(snapshot, phase=phase)) == dict(later)


@given(entries, entries)
def test_a_checkpoint_goes_on_as_if_nothing_happened(before: Entries, after: Entries) -> None:
    restored = filled(after)
    restored.load_state_dict(json.loads(json.dumps(filled(before).state_dict())))
    for part, (phase, layer) in after:
        restored.add(part, phase=phase, layer=layer)
    assert restored.state_dict() == filled(before + after).state_dict()


def test_phases_and_layers_keep_the_order_of_their_first_entry() -> None:
    one = Counts({"tile_reads": 1})
    ledger = filled([(one, ("new", "b")), (one, ("forget", "a")), (one, ("new", "c"))])
    assert ledger.phases() == ("new", "forget")
    assert ledger.layers() == ("b", "a", "c")


def test_a_snapshot_of_another_ledger_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Take the snapshot from the same ledger"):
        Ledger().since(Counts({"tile_reads": 1}))
