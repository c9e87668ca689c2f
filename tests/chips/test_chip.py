"""Chips and conductance windows: what is refused, and what aihwkit is told about a chip."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.chips import Chip, ConductanceMapping, chips
from aihwkit_lora.errors import ConductanceWindowError, ConfigurationError, UnknownNameError

CHIP = chips.get("rm-180nm")
WINDOW = ConductanceMapping(g_min_siemens=20e-6, g_max_siemens=80e-6)


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (80e-6, 20e-6, "80 µS to 20 µS"),
        (50e-6, 50e-6, "50 µS to 50 µS"),
        (-1e-6, 50e-6, "-1 µS to 50 µS"),
        (math.nan, 50e-6, "nan µS to 50 µS"),
    ],
)
def test_a_window_without_room_is_refused(low: float, high: float, found: str) -> None:
    match = rf"expected 0 <= g_min_siemens < g_max_siemens, got {found}\. Swap or correct"
    with pytest.raises(ConductanceWindowError, match=match):
        ConductanceMapping(g_min_siemens=low, g_max_siemens=high)


def test_weights_fill_the_window_around_its_middle() -> None:
    conductances = WINDOW.to_siemens(torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64))
    expected = torch.tensor([20e-6, 50e-6, 65e-6, 80e-6], dtype=torch.float64)
    torch.testing.assert_close(conductances, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weights", [[], [-1.0, 1.0], [-1.0000005, 1.0000005], [0.3]])
def test_weights_within_the_window_fit(weights: list[float]) -> None:
    WINDOW.require_fits(torch.tensor(weights, dtype=torch.float64), "head")


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ([-1.5, 0.0, 0.5], r"got -1\.5 to 0\.5"),
        ([0.0, 1.00001], r"got 0 to 1"),
        ([0.0, math.nan, 0.5], r"got nan to nan"),
        ([math.inf, 0.0], r"got 0 to inf"),
    ],
)
def test_weights_beyond_the_window_are_refused(weights: list[float], found: str) -> None:
    match = rf"layer 'head': .* the window of 20 to 80 µS, {found}\. Call the layer's remap"
    with pytest.raises(ConductanceWindowError, match=match):
        WINDOW.require_fits(torch.tensor(weights, dtype=torch.float64), "head")


def test_a_model_scaled_for_another_window_cannot_be_programmed() -> None:
    model = al.convert(nn.Sequential(nn.Linear(3, 2, bias=False)), CHIP)
    tile = next(iter(model.analog_tiles()))
    tile.set_weights(torch.full((2, 3), 2.0), None, apply_weight_scaling=False)
    with pytest.raises(ConductanceWindowError, match=r"layer '0': .*got 2 to 2"):
        al.program_(model, CHIP, seed=0)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rows", 0, "1 or more"),
        ("columns", -128, "1 or more"),
        ("scaling", "row", "'tile' or 'column'"),
        ("dac_bits", 1, "2 or more"),
        ("adc_bits", 1, "2 or more"),
        ("adc_full_scale", 0.0, "above 0"),
        ("adc_full_scale", math.nan, "above 0"),
    ],
)
def test_fields_out_of_range_are_refused(field: str, value: float, expected: str) -> None:
    match = f"chip 'rm-180nm': expected {field} {expected}, got {value!r}"
    with pytest.raises(ConfigurationError, match=match):
        replace(CHIP, **{field: value})


def test_fields_at_the_ends_of_their_ranges_are_accepted() -> None:
    smallest = replace(CHIP, rows=1, columns=1, dac_bits=2, adc_bits=2)
    config = smallest.rpu_config()
    assert (config.mapping.max_input_size, config.mapping.max_output_size) == (1, 1)
    # Two bits, sign included, are the three codes -1, 0 and 1.
    assert (config.forward.inp_res, config.forward.out_res) == (0.5, 0.5)


def test_a_chip_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'rows'"):
        CHIP.rows = 64  # type: ignore[misc]


def test_aihwkit_is_told_size_converters_and_scaling() -> None:
    chip = replace(CHIP, rows=64, columns=32, dac_bits=6, adc_bits=10, adc_full_scale=5.0)
    config = chip.rpu_config()
    assert type(config) is TorchInferenceRPUConfig
    mapping, forward = config.mapping, config.forward
    assert (mapping.max_input_size, mapping.max_output_size) == (64, 32)
    assert (mapping.weight_scaling_omega, mapping.digital_bias) == (1.0, True)
    assert (forward.inp_res, forward.inp_bound) == (1 / 62, 1.0)
    assert (forward.out_res, forward.out_bound) == (1 / 1022, 5.0)
    assert (forward.out_noise, forward.w_noise, forward.inp_noise) == (0.0, 0.0, 0.0)
    assert forward.noise_management == NoiseManagementType.ABS_MAX
    assert forward.bound_management == BoundManagementType.NONE


def test_each_configuration_is_its_own() -> None:
    CHIP.rpu_config().mapping.max_input_size = 7
    assert CHIP.rpu_config().mapping.max_input_size == 128


def test_a_converted_layer_has_the_chips_tiles() -> None:
    chip = replace(CHIP, rows=8, columns=4)
    model = al.convert(nn.Sequential(nn.Linear(20, 9)), chip)
    sizes = [(tile.in_size, tile.out_size) for tile in model.analog_tiles()]
    assert len(sizes) == 3 * 3
    assert max(sizes) <= (8, 4)
    assert sum(rows * columns for rows, columns in sizes) == 20 * 9
    # Nothing exceeds the window, and the largest weight fills it.
    largest = [float(tile.tile.get_weights().abs().max()) for tile in model.analog_tiles()]
    assert max(largest) == pytest.approx(1.0, abs=1e-6)


def test_a_chip_of_ones_own_is_found_once_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chips, "_entries", {CHIP.name: CHIP})
    mine = replace(CHIP, name="mine")
    al.chips.add("mine", mine)
    assert al.chips.get("mine") is mine
    assert al.chips.names() == ("mine", "rm-180nm")
    with pytest.raises(ConfigurationError, match="chip 'mine' is registered already"):
        al.chips.add("mine", CHIP)


def test_an_unknown_chip_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown chip 'rm-180'. Did you mean 'rm-180nm'"):
        al.chips.get("rm-180")


def test_every_registered_chip_carries_its_own_name() -> None:
    for name in chips:
        chip = chips.get(name)
        assert isinstance(chip, Chip)
        assert chip.name == name
        assert chip.title
