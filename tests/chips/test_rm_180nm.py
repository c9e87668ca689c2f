"""The 180 nm macro: its figures follow from its prices, and its prices from their sources."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
from torch import Generator, nn

import aihwkit_lora as al
from aihwkit_lora.chips.adc import adc_energy
from aihwkit_lora.metering import Status
from aihwkit_lora.metering.events import X2G_STEPS
from aihwkit_lora.programming.response import CellState, PulseResponse
from aihwkit_lora.programming.write_verify import write_verify

CHIP = al.chips.get("rm-180nm")
ENERGY = {event: quantity.value for event, quantity in CHIP.prices.energy.items()}


def test_a_cell_written_with_the_mean_takes_2_38_nj_and_17_us() -> None:
    # 8.52 pulses, half of them SET, each followed by a verification; a hundred cells of them
    hundred = al.Counts(
        {
            "set_pulses": 426, "reset_pulses": 426, "set_slots": 426, "reset_slots": 426,
            "verify_reads": 852, "verify_conversions": 852, "verify_slots": 852,
        }
    )  # fmt: skip
    report = al.price(hundred, CHIP)
    assert report.energy_j.value / 100 == pytest.approx(2.38e-9, rel=0.005)
    assert report.latency_s.value / 100 == pytest.approx(17.04e-6, rel=1e-9)
    # V²·G·t by hand: 1.75 V and 2.5 V at 50 µS for 1 µs; 0.2 V for a verification, and an ADC
    pulses, conversion = 4.26 * (1.75**2 + 2.5**2) * 50e-12, adc_energy(8, 180e-9).value
    expected = pulses + 8.52 * (0.2**2 * 50e-12 + conversion)
    assert report.energy_j.value / 100 == pytest.approx(expected, rel=1e-9)
    assert 0.2**2 * 50e-12 + conversion == pytest.approx(46e-12, rel=0.005)


def test_pulses_and_verifications_of_100_ns_would_leave_576_pj() -> None:
    cell = ENERGY["set_pulses"] + ENERGY["reset_pulses"] + 2 * ENERGY["verify_reads"]
    total = 4.26 * cell / 10 + 8.52 * ENERGY["verify_conversions"]
    assert total == pytest.approx(576e-12, rel=0.001)
    # Most of that are conversions.
    assert 8.52 * ENERGY["verify_conversions"] == pytest.approx(375e-12, rel=0.005)


def test_a_full_read_of_a_tile_takes_11_3_nj_and_1_us() -> None:
    model = al.convert(nn.Sequential(nn.Linear(128, 128, bias=False)), CHIP)
    next(iter(model.analog_tiles())).set_weights(torch.zeros(128, 128), None)
    al.freeze_(model, programmed_by="zeros: every cell at 50 µS")
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer", mapping=CHIP.mapping):
        model(torch.ones(1, 128))
    counts = ledger.total()
    assert counts["cell_read_x2g"] == X2G_STEPS**2 * 128 * 128 * 50_000_000
    report = al.price(counts, CHIP)
    assert report.energy_j.value == pytest.approx(11.3e-9, rel=0.005)
    assert report.energy_j.value / 128**2 == pytest.approx(0.69e-12, rel=0.005)
    assert 2 * 128**2 / report.energy_j.value == pytest.approx(2.9e12, rel=0.005)
    assert report.latency_s.value == pytest.approx(1e-6, rel=1e-9)
    # 0.2 V, 50 µS, 100 ns: 0.2 pJ a cell
    cells = report.energy_by_event["cell_read_x2g"].value
    assert cells == pytest.approx(128 * 128 * 0.2e-12, rel=1e-9)


def test_prices_of_the_periphery_are_those_of_the_libraries() -> None:
    assert ENERGY["active_row_drive_bits"] * 8 == pytest.approx(18.2e-12, rel=0.005)
    assert ENERGY["adc_conversions"] == adc_energy(8, 180e-9).value
    assert CHIP.prices.energy["adc_conversions"].low == 9.13e-12
    assert (ENERGY["forward_macs_int8"], ENERGY["forward_macs"]) == (4.8e-12, 24e-12)
    assert (ENERGY["sram_read_bits"], ENERGY["sram_write_bits"]) == (1.30e-12, 1.72e-12)
    assert (ENERGY["shift_adds"], ENERGY["offchip_read_bits"]) == (0.12e-12, 40e-12)


def test_rows_driven_with_zero_cost_nothing_which_is_assumed() -> None:
    counts = al.Counts({"row_drive_bits": 800, "active_row_drive_bits": 80})
    report = al.price(counts, CHIP)
    assert report.unpriced_energy == ()
    assert report.energy_j.value == pytest.approx(80 * 2.28e-12, rel=1e-9)
    assert CHIP.facts["energy of a row driven with zero"].status is Status.ASSUMED


def test_the_pulse_is_the_widest_interval() -> None:
    pulse = CHIP.prices.energy["set_pulses"].interval
    assert (pulse.low, pulse.value, pulse.high) == pytest.approx((0.6e-12, 153.125e-12, 312.5e-12))


def test_cells_are_accepted_within_1_us() -> None:
    assert CHIP.tolerance_siemens == pytest.approx(1e-6, rel=1e-12)
    assert CHIP.facts["accepted error of a cell"].value == 1e-6


def test_geometry_is_that_of_the_paper() -> None:
    assert CHIP.facts["rows and columns"].value == CHIP.rows == CHIP.columns == 128
    assert (CHIP.mapping.g_min_siemens, CHIP.mapping.g_max_siemens) == (20e-6, 80e-6)
    assert CHIP.facts["mean conductance"].value == pytest.approx(CHIP.mapping.middle_siemens)
    assert (CHIP.dac_bits, CHIP.adc_bits, CHIP.mapping.cells_per_weight) == (8, 8, 1)
    assert CHIP.facts["resolution of DAC and ADC"].value == 8


def test_sampled_cells_miss_by_1_us_as_in_the_papers_code() -> None:
    torch.manual_seed(0)
    assert CHIP.programming_noise is not None
    wanted = torch.full((200, 200), 0.3)
    held = CHIP.programming_noise().apply_programming_noise(wanted)[0]
    error = CHIP.mapping.to_siemens(held) - CHIP.mapping.to_siemens(wanted)
    # Standard errors of 40,000 samples: 5 nS of the mean, 0.35 % of the deviation.
    assert abs(float(error.mean())) < 25e-9
    assert float(error.std()) == pytest.approx(1e-6, rel=0.02)
    assert CHIP.noise_model is None


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
