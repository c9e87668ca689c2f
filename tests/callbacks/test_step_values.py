"""From the counts of a step to what is logged, and the table that documents it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.metering import EVENTS, Counts, Part, PriceList, Quantity, Side, Status
from aihwkit_lora.metering.pricing import unpriced_events
from aihwkit_lora.metering.step_values import (
    LOGGED,
    Wear,
    energy_values,
    key_table,
    pulse_values,
    writes,
)

PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"


class Tiny:
    """One event of each part and of each side has a price: a power of two."""

    name = "tiny"
    prices = PriceList(
        energy={
            event: Quantity(value=value, unit="J", source="round", status=Status.ASSUMED)
            for event, value in {
                "set_pulses": 1.0,
                "adc_conversions": 2.0,
                "forward_macs": 4.0,
                "transposed_tile_reads": 8.0,
                "weight_gradient_macs": 16.0,
                "optimizer_updates": 32.0,
                "sram_read_bits": 64.0,
            }.items()
        },
        latency={
            event: Quantity(value=value, unit="s", source="round", status=Status.ASSUMED)
            for event, value in {
                "set_pulses": 1.0,
                "adc_conversions": 2.0,
                "transposed_tile_reads": 4.0,
                "optimizer_updates": 8.0,
                "sram_read_bits": 16.0,
            }.items()
        },
        latency_free=frozenset({"forward_macs", "weight_gradient_macs"}),
    )


STEP = Counts(dict.fromkeys(Tiny.prices.energy, 1))


def test_energy_and_time_of_each_part_and_side():
    total = STEP + Counts({"set_pulses": 100})
    assert energy_values(STEP, total, Tiny(), optimizer_steps=3) == {
        "optimizer_steps": 3.0,
        "energy_j": 127.0,
        "energy_j/write": 1.0,
        "energy_j/forward": 6.0,
        "energy_j/backward": 24.0,
        "energy_j/optimizer": 32.0,
        "energy_j/transfer": 64.0,
        "energy_j/analog": 11.0,
        "energy_j/digital": 52.0,
        "energy_j/memory": 64.0,
        "latency_s": 31.0,
        "latency_s/write": 1.0,
        "latency_s/forward": 2.0,
        "latency_s/backward": 4.0,
        "latency_s/optimizer": 8.0,
        "latency_s/transfer": 16.0,
        "energy_total_j": 227.0,
        "unpriced_events": 0.0,
    }


def test_values_are_floats_even_where_nothing_happened():
    for values in (energy_values(Counts(), Counts(), Tiny()), pulse_values(Counts(), Counts())):
        assert {type(value) for value in values.values()} == {float}


def test_events_without_a_price_are_told():
    """The first two lack both prices, the third has a price of time only by being free."""
    step = STEP + Counts({"tile_reads": 5, "verify_reads": 7})
    assert energy_values(step, step, Tiny())["unpriced_events"] == 2.0
    assert set(unpriced_events(step, Tiny())) == {"tile_reads", "verify_reads"}


def test_parts_and_sides_are_all_of_the_energy(lab):
    counts = Counts(dict.fromkeys(EVENTS, 3))
    values = energy_values(counts, counts, lab.chip)
    for kinds in (Part, Side):
        parts = sum(values[f"energy_j/{kind}"] for kind in kinds)
        assert parts == pytest.approx(values["energy_j"], rel=1e-12)
    parts = sum(values[f"latency_s/{part}"] for part in Part)
    assert parts == pytest.approx(values["latency_s"], rel=1e-12)


def test_pulses_of_a_step():
    step = Counts(
        {
            "set_pulses": 5,
            "reset_pulses": 2,
            "verify_reads": 11,
            "pulsed_cells": 3,
            "failed_cells": 1,
            "tile_reads": 99,
        }
    )
    expected = {
        "optimizer_steps": 1.0,
        "pulses": 7.0,
        "set_pulses": 5.0,
        "reset_pulses": 2.0,
        "verify_reads": 11.0,
        "pulsed_cells": 3.0,
        "failed_cells": 1.0,
        "pulses_total": 107.0,
    }
    total = step + Counts({"reset_pulses": 100})
    assert pulse_values(step, total) == expected
    assert pulse_values(step, total, most_worn=40) == expected | {"most_worn": 40.0}


def test_writes_are_the_events_of_that_part():
    counts = Counts(dict.fromkeys(EVENTS, 1))
    expected = {event for event in EVENTS if EVENTS.get(event).part is Part.WRITE}
    assert set(writes(counts)) == expected
    assert {"set_pulses", "verify_conversions", "reset_slots"} < expected
    assert not {"tile_reads", "optimizer_updates", "adapter_loads"} & expected


def test_each_key_is_logged_by_whom_the_table_says():
    pulses = pulse_values(STEP, STEP, most_worn=1).keys()
    energy = energy_values(STEP, STEP, Tiny()).keys() | {"energy_uj"}
    by = {value.key: value.source for value in LOGGED}
    assert {key for key, source in by.items() if "PulseCounter" in source} == pulses
    assert {key for key, source in by.items() if "EnergyMeter" in source} == energy
    assert len(LOGGED) == len(by)


def test_the_page_holds_the_table_as_generated():
    assert f"\n\n{key_table()}\n" in PAGE.read_text(encoding="utf-8")


def test_breakdowns_are_explained_for_every_part_and_side():
    keys = {value.key for value in LOGGED}
    assert {f"energy_j/{part}" for part in Part} <= keys
    assert {f"latency_s/{part}" for part in Part} <= keys
    assert {f"energy_j/{side}" for side in Side} <= keys


# ------------------------------------------------------------------ wear


def programmed(lab):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    model = al.convert(layers, lab.chip)
    report = al.program_(model, lab.chip, seed=0)
    return al.freeze_(model), report


def test_the_most_worn_cell_of_all_layers_is_found_and_followed(lab):
    model, report = programmed(lab)
    wear = Wear(model)
    assert wear.most() == max(layer.most_worn for layer in report.layers)
    for seed in (1, 2, 3):
        target = {"2": (0.5 + 0.1 * seed) * torch.as_tensor(model[2].weight)}
        al.reprogram_(model, lab.chip, target, seed=seed)
        cells = [
            tile for _, a in al.frozen_layers(model) for tile in a.analog_module.programming.cells
        ]
        assert wear.most() == max(int(tile.wear.max()) for tile in cells)


def test_wear_is_unknown_where_cells_are(lab):
    assert Wear(lab.tiny()).most() is None
    assert Wear(nn.Linear(2, 1)).most() is None
    both = nn.ModuleList([lab.tiny(), programmed(lab)[0]])
    assert Wear(both).most() == Wear(both[1]).most()


def test_arrays_that_were_not_written_are_not_looked_at_again(lab, monkeypatch):
    model, _ = programmed(lab)
    wear = Wear(model)
    most = wear.most()
    monkeypatch.setattr(torch.Tensor, "max", lambda *_: pytest.fail("looked again"))
    assert wear.most() == most
