"""The 180 nm macro: every number has a source, and its figures follow from its prices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
from torch import Generator, nn

import aihwkit_lora as al
from aihwkit_lora.metering import EVENTS, Status
from aihwkit_lora.programming.response import CellState, PulseResponse
from aihwkit_lora.programming.write_verify import write_verify

CHIP = al.chips.get("rm-180nm")
DIGITAL = {name for name in EVENTS if EVENTS.get(name).side != "analog"}


def test_every_number_has_a_source() -> None:
    prices = CHIP.prices
    for unit, listed in (("J", prices.energy), ("s", prices.latency)):
        for event, quantity in listed.items():
            assert quantity.unit == unit, event
            assert quantity.source.strip(), event
            assert isinstance(quantity.status, Status)
            assert quantity.interval.high > 0.0, event
    assert all(fact.source.strip() and fact.unit for fact in CHIP.facts.values())


def test_every_event_is_priced_or_free_and_only_digital_times_are_unknown() -> None:
    report = al.price(al.Counts(dict.fromkeys(EVENTS, 1)), CHIP)
    assert report.unpriced_energy == ()
    # Digital layers run beside the arrays, with a parallelism that no source gives.
    assert set(report.unpriced_latency) == DIGITAL - {"shift_adds"}


def test_energy_that_is_free_is_bookkeeping_or_paid_for_by_another_event() -> None:
    assert CHIP.prices.energy_free == {
        "programmed_cells", "pulsed_cells", "failed_cells",  # of which pulses and reads are paid
        "array_cycles", "tile_reads", "active_row_drives", "cell_reads",
        "transposed_array_cycles", "transposed_tile_reads",
    }  # fmt: skip


def test_a_cell_written_with_the_published_mean_takes_2_38_nj_and_17_us() -> None:
    # 8.52 pulses, half of them SET, each followed by a verification; a hundred cells of them
    hundred = al.Counts({"set_pulses": 426, "reset_pulses": 426, "verify_reads": 852})
    report = al.price(hundred, CHIP)
    assert report.energy_j.value / 100 == pytest.approx(2.38e-9, rel=0.01)
    assert report.latency_s.value / 100 == pytest.approx(17e-6, rel=0.01)
    # V²·G·t by hand: 1.75 V and 2.5 V at 50 µS for 1 µs; 0.2 V and a conversion of 44.1 pJ
    pulses = 4.26 * (1.75**2 + 2.5**2) * 50e-12
    assert report.energy_j.value / 100 == pytest.approx(pulses + 8.52 * 46.1e-12, rel=1e-9)


def test_a_full_read_of_a_tile_takes_11_3_nj_and_1_us() -> None:
    model = al.convert(nn.Sequential(nn.Linear(128, 128, bias=False)), CHIP)
    next(iter(model.analog_tiles())).set_weights(torch.zeros(128, 128), None)
    al.freeze_(model, programmed_by="zeros: every cell at 50 µS")
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer", mapping=CHIP.mapping):
        model(torch.ones(1, 128))
    counts = ledger.total()
    assert counts["cell_read_x2g"] == 2**32 * 128 * 128 * 50_000_000
    report = al.price(counts, CHIP)
    assert report.energy_j.value == pytest.approx(11.3e-9, rel=0.01)
    assert report.latency_s.value == pytest.approx(1e-6, rel=1e-9)
    # 0.2 V, 50 µS, 100 ns
    cells = report.energy_by_event["cell_read_x2g"].value
    assert cells == pytest.approx(128 * 128 * 0.2**2 * 50e-6 * 100e-9, rel=1e-9)


def test_an_optimiser_update_is_two_macs_and_48_bits() -> None:
    energy = {event: quantity.value for event, quantity in CHIP.prices.energy.items()}
    traffic = 24 * energy["sram_read_bits"] + 24 * energy["sram_write_bits"]
    expected = 2 * energy["forward_macs"] + traffic
    assert energy["optimizer_updates"] == pytest.approx(expected, rel=1e-9)


def test_cells_are_accepted_within_1_us() -> None:
    assert CHIP.tolerance_siemens == pytest.approx(1e-6, rel=1e-12)
    assert CHIP.facts["accepted error of a cell"].value == 1e-6


def test_facts_and_fields_agree() -> None:
    facts = {name: quantity.value for name, quantity in CHIP.facts.items()}
    assert facts["rows and columns"] == CHIP.rows == CHIP.columns == 128
    assert facts["lower end of the window"] == CHIP.mapping.g_min_siemens == 20e-6
    assert facts["upper end of the window"] == CHIP.mapping.g_max_siemens == 80e-6
    assert facts["pulses before a cell fails"] == CHIP.write_policy.max_pulses
    assert facts["cell state of a full-scale weight"] == CHIP.state_full_scale
    assert facts["column sum at which the ADC clips"] == CHIP.adc_full_scale
    assert facts["mean conductance"] == pytest.approx(CHIP.mapping.middle_siemens)
    assert (CHIP.dac_bits, CHIP.adc_bits) == (8, 8)


def test_programmed_cells_are_within_1_us_or_failed() -> None:
    torch.manual_seed(0)
    model = al.convert(nn.Sequential(nn.Linear(100, 40, bias=False)), CHIP)
    wanted = next(iter(model.analog_tiles())).tile.get_weights().clone()
    report = al.program_(model, CHIP, seed=0)
    found = next(iter(model.analog_tiles())).tile.get_weights()
    errors = (CHIP.mapping.to_siemens(found) - CHIP.mapping.to_siemens(wanted)).abs()
    # one part in a thousand for float32
    assert int((errors > 1.001e-6).sum()) == report.counts["failed_cells"]


def test_the_loop_takes_as_many_pulses_as_the_notes_say_without_write_noise() -> None:
    """8.7 pulses a cell that verifies, from 0, targets uniform over 43 % of each cell's range.

    The standard error of the mean is 0.07 pulses; the distribution of targets is that which
    tests/programming/test_write_verify.py finds behind the figures of the notes.
    """
    generator, shape = Generator().manual_seed(0), (40_000,)
    device = replace(CHIP.write_policy.device(), write_noise_std=0.0)
    assert isinstance(device, ReRamArrayOMPresetDevice)
    cells = PulseResponse.draw(device, shape, generator)
    lower, upper = cells.bounds
    place = 2.0 * torch.rand(shape, generator=generator) - 1.0
    target = 0.43 * torch.where(place > 0, place * upper, -place * lower)
    state = CellState(torch.zeros(shape), torch.zeros(shape))
    result = write_verify(target, state, cells, CHIP.write_policy, generator)
    pulses = result.pulses[~result.failed].double()
    assert float(pulses.mean()) == pytest.approx(8.7, abs=0.35)
