"""HERMES: what Le Gallo et al., 2023, published for the chip is what the counts of a core cost."""

from __future__ import annotations

import pytest
import torch
from aihwkit.inference import GlobalDriftCompensation, HermesNoiseModel
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.metering import Status

CHIP = al.chips.get("hermes-14nm")
ENERGY = {event: quantity.value for event, quantity in CHIP.prices.energy.items()}
OPERATIONS = 2 * 256 * 256


def test_a_product_of_a_core_takes_13_4_nj_and_133_ns() -> None:
    """63.1 TOPS of 64 cores at 9.76 TOPS/W in one phase; 16.1 TOPS at 2.48 TOPS/W in four."""
    torch.manual_seed(0)
    model = al.convert(nn.Sequential(nn.Linear(256, 256, bias=False)), CHIP)
    al.freeze_(model, programmed_by="example")
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer", mapping=CHIP.mapping):
        model(torch.rand(1, 256))
    assert ledger.total()["cell_reads"] == 4 * 256 * 256
    report = al.price(ledger.total(), CHIP)
    assert report.energy_j.value == pytest.approx(13.43e-9, rel=0.001)
    assert report.latency_s.value == pytest.approx(133e-9, rel=0.001)
    assert OPERATIONS / report.energy_j.value == pytest.approx(9.76e12, rel=1e-9)
    assert OPERATIONS / report.energy_j.high == pytest.approx(2.48e12, rel=1e-9)
    assert 64 * OPERATIONS / report.latency_s.value == pytest.approx(63.1e12, rel=1e-9)
    assert 64 * OPERATIONS / report.latency_s.high == pytest.approx(16.1e12, rel=1e-9)
    assert report.energy_j.value / 256**2 == pytest.approx(0.205e-12, rel=0.001)
    assert report.energy_j.high / 256**2 == pytest.approx(0.806e-12, rel=0.001)
    assert report.unpriced_energy == ()


def test_conversions_carry_the_whole_product() -> None:
    conversion = CHIP.prices.energy["adc_conversions"].interval
    assert (conversion.value, conversion.high) == pytest.approx((52.5e-12, 206e-12), rel=0.005)
    lumped = {
        "row_drive_bits", "active_row_drive_bits", "cell_read_x2g", "shift_adds",
        "transposed_row_drive_bits", "transposed_cell_read_x2g", "transposed_shift_adds",
        "verify_reads",
    }  # fmt: skip
    assert lumped <= CHIP.prices.energy_free
    # Why they are free stands among the facts.
    reasons = [name for name, fact in CHIP.facts.items() if fact.unit == "J" and fact.value == 0]
    assert any("row drive" in name and "cell" in name for name in reasons)
    assert any("verification" in name for name in reasons)


def test_a_cell_written_with_the_mean_takes_0_52_nj() -> None:
    # 20 pulses, half of them SET, each followed by a verification; a hundred cells of them
    hundred = al.Counts(
        {
            "set_pulses": 1000, "reset_pulses": 1000, "set_slots": 1000, "reset_slots": 1000,
            "verify_reads": 2000, "verify_conversions": 2000, "verify_slots": 2000,
        }
    )  # fmt: skip
    report = al.price(hundred, CHIP)
    assert report.energy_j.value / 100 == pytest.approx(0.52e-9, rel=0.01)
    # I·V·t by hand: 150 µA, 1 V, 150 ns and 300 µA, 1.6 V, 40 ns; 5 pJ for a verification
    expected = 10 * (150e-6 * 1.0 * 150e-9 + 300e-6 * 1.6 * 40e-9) + 20 * 5e-12
    assert report.energy_j.value / 100 == pytest.approx(expected, rel=1e-9)
    # 512 ns is the read time of aihwkit's noise model.
    time = 10 * (150e-9 + 40e-9) + 20 * HermesNoiseModel().t_read
    assert report.latency_s.value / 100 == pytest.approx(time, rel=1e-9)


def test_all_that_is_said_of_writing_is_marked_as_assumed() -> None:
    statistics = [name for name in CHIP.facts if name.startswith("pulses of a cell")]
    assert len(statistics) == 3
    for name in statistics:
        assert CHIP.facts[name].status is Status.ASSUMED
        assert "UNCONFIRMED" in CHIP.facts[name].source
    for event in ("set_pulses", "reset_pulses", "verify_conversions"):
        assert CHIP.prices.energy[event].status is Status.ASSUMED


def test_the_log_normal_distribution_has_the_assumed_mean() -> None:
    statistics = CHIP.write_policy.statistics
    mean = statistics.median_pulses * torch.tensor(statistics.sigma_ln**2 / 2).exp()
    assert float(mean) == pytest.approx(statistics.mean_pulses, rel=0.005)


def test_two_devices_in_parallel_have_the_window_that_aihwkit_gives_for_both() -> None:
    facts = {name: quantity.value for name, quantity in CHIP.facts.items()}
    single, double = HermesNoiseModel(num_devices=1), HermesNoiseModel(num_devices=2)
    assert CHIP.mapping.pairs == 2
    assert CHIP.mapping.g_max_siemens * 1e6 == pytest.approx(single.g_max, rel=1e-12)
    both = facts["upper end, two devices in parallel"]
    assert both == pytest.approx(2 * CHIP.mapping.g_max_siemens, rel=1e-12)
    assert both * 1e6 == pytest.approx(double.g_max, rel=1e-12)
    assert facts["rows and columns"] == CHIP.rows == CHIP.columns == 256
    assert facts["bits of an input and of an output"] == CHIP.dac_bits == CHIP.adc_bits == 8


def test_its_cells_drift_as_hermes_devices_do_and_the_drift_is_compensated() -> None:
    config = CHIP.rpu_config()
    assert isinstance(config.noise_model, HermesNoiseModel)
    assert (config.noise_model.num_devices, config.noise_model.t_0) == (1, 200.0)
    assert isinstance(config.drift_compensation, GlobalDriftCompensation)


def test_digital_prices_are_those_of_the_libraries_at_14_nm() -> None:
    assert (ENERGY["forward_macs_int8"], ENERGY["forward_macs"]) == (0.152e-12, 0.54e-12)
    assert (ENERGY["sram_read_bits"], ENERGY["sram_write_bits"]) == (0.020e-12, 0.022e-12)
    assert ENERGY["offchip_read_bits"] == 8e-12
