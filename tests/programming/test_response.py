"""State of a cell array: reset, setting, pulses, write noise, and the cells of existing tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aihwkit.simulator.configs import (
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    SingleRPUConfig,
    TorchInferenceRPUConfig,
    UnitCellRPUConfig,
)
from aihwkit.simulator.configs.compounds import VectorUnitCell
from aihwkit.simulator.configs.devices import (
    ConstantStepDevice,
    IdealDevice,
    PulsedDevice,
    SoftBoundsDevice,
)
from aihwkit.simulator.presets.devices import (
    PCMPresetDevice,
    ReRamArrayHfO2PresetDevice,
    ReRamArrayOMPresetDevice,
    ReRamESPresetDevice,
)
from aihwkit.simulator.tiles import AnalogTile
from scipy.stats import ks_2samp
from torch import Generator, Tensor

from aihwkit_lora.errors import UnsupportedTileError
from aihwkit_lora.programming.response import CellState, PulseResponse

# Rejection level of each two-sample test, of which there are 8 here.
ALPHA = 1e-5
SHAPE = (50, 40)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def everywhere(value: bool, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.full(shape, value)


def drawn(device: PulsedDevice, **settings: Any) -> tuple[PulseResponse, CellState, Generator]:
    generator = seeded()
    cells = PulseResponse.draw(device, SHAPE, generator, **settings)
    return cells, cells.fresh(generator), generator


@pytest.mark.parametrize(
    "make", [ReRamArrayOMPresetDevice, ReRamESPresetDevice, PCMPresetDevice, SoftBoundsDevice]
)
def test_fresh_cells_are_where_the_reference_tile_s_reset_leaves_them(
    make: Callable[[], PulsedDevice],
) -> None:
    tile = AnalogTile(*SHAPE, SingleRPUConfig(device=make()))
    tile.reset()
    ours = PulseResponse.from_tile(tile).fresh(seeded())
    theirs = CellState.from_tile(tile)
    for mine, reference in ((ours.persistent, theirs.persistent), (ours.apparent, theirs.apparent)):
        assert ks_2samp(mine.flatten(), reference.flatten()).pvalue > ALPHA


def test_held_weights_are_what_set_weights_leaves() -> None:
    weight = torch.linspace(-1.5, 1.5, 2000).view(SHAPE)
    tile = AnalogTile(*SHAPE, SingleRPUConfig(device=ReRamArrayHfO2PresetDevice()))
    tile.set_weights(weight)
    held = PulseResponse.from_tile(tile).hold(weight, seeded())
    torch.testing.assert_close(held.persistent, CellState.from_tile(tile).persistent)
    device = ReRamArrayHfO2PresetDevice(apply_write_noise_on_set=False)
    exact = PulseResponse(device, PulseResponse.from_tile(tile).parameters).hold(weight, seeded())
    assert torch.equal(exact.apparent, held.persistent)


def test_pulses_lead_to_the_bounds_and_not_beyond() -> None:
    device = ReRamArrayOMPresetDevice(write_noise_std=0.0, dw_min_std=0.0, corrupt_devices_prob=0.1)
    cells, state, generator = drawn(device)
    lower, upper = cells.bounds
    assert lower.shape == upper.shape == cells.shape == SHAPE
    for up, bound in ((True, upper), (False, lower)):
        for _ in range(2000):
            state = cells.pulse(state, everywhere(up), generator)
        torch.testing.assert_close(state.persistent, bound, atol=0.02, rtol=0.0)
        assert bool((state.persistent >= lower).all())
        assert bool((state.persistent <= upper).all())


def test_corrupt_cells_do_not_move() -> None:
    device = ReRamESPresetDevice(corrupt_devices_prob=1.0, corrupt_devices_range=0.3)
    cells, state, generator = drawn(device)
    assert float(state.persistent.abs().max()) <= 0.3
    after = cells.pulse(state, everywhere(True), generator)
    assert torch.equal(after.persistent, state.persistent)
    assert torch.equal(after.apparent, state.apparent)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 2000)])
def test_the_corrupt_share_is_exact_at_its_ends(probability: float, expected: int) -> None:
    cells, _, _ = drawn(ConstantStepDevice(corrupt_devices_prob=probability))
    assert int((cells.parameters["dwmin_up"] == 0.0).sum()) == expected


def test_write_noise_hides_the_persistent_weight_and_is_a_multiple_of_the_step() -> None:
    cells, state, generator = drawn(ReRamArrayOMPresetDevice())
    after = cells.pulse(state, everywhere(True), generator)
    spread = (after.apparent - after.persistent).std()
    # Standard error of a standard deviation of n normals: sigma / sqrt(2 n); 5 of them.
    sigma = 1.4113 * 0.0949
    assert float(spread) == pytest.approx(sigma, abs=5 * sigma / 4000**0.5)


def test_without_write_noise_there_is_one_weight_only() -> None:
    cells, state, generator = drawn(ConstantStepDevice())
    assert cells.pulse(state, everywhere(True), generator).persistent is not state.persistent
    assert state.persistent is state.apparent


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_strength_scales_the_step(strength: float) -> None:
    cells, state, _ = drawn(ReRamArrayOMPresetDevice(write_noise_std=0.0, w_max=50.0, w_min=-50.0))
    one = cells.pulse(state, everywhere(True), seeded(5)).persistent - state.persistent
    scaled = cells.pulse(state, everywhere(True), seeded(5), strength=strength)
    torch.testing.assert_close(scaled.persistent - state.persistent, strength * one)


def test_an_abrupt_reset_erases_a_cell_with_one_pulse() -> None:
    cells, state, generator = drawn(PCMPresetDevice(), abrupt_reset=True)
    for _ in range(20):
        state = cells.pulse(state, everywhere(True), generator)
    assert float(state.persistent.mean()) > 0.5
    erased = cells.pulse(state, everywhere(False), generator).persistent
    assert ks_2samp(erased.flatten(), cells.fresh(seeded(1)).persistent.flatten()).pvalue > ALPHA


def test_one_seed_gives_one_array() -> None:
    one, two = (drawn(ReRamArrayHfO2PresetDevice()) for _ in range(2))
    for name, value in one[0].parameters.items():
        assert torch.equal(value, two[0].parameters[name])
    pulsed = [cells.pulse(state, everywhere(True), g).apparent for cells, state, g in (one, two)]
    assert torch.equal(*pulsed)


def test_selected_cells_keep_their_own_parameters() -> None:
    device = ReRamESPresetDevice(dw_min_std=0.0, write_noise_std=0.0)
    cells, state, generator = drawn(device)
    mask = torch.rand(SHAPE, generator=generator) < 0.3
    whole = cells.pulse(state, everywhere(True), generator).persistent
    some = cells.select(mask).pulse(state.select(mask), everywhere(True)[mask], generator)
    assert torch.equal(some.persistent, whole[mask])
    part = (
        cells.flat()
        .span(10, 20)
        .pulse(state.flat().span(10, 20), everywhere(True, (10,)), generator)
    )
    assert torch.equal(part.persistent, whole.flatten()[10:20])


def test_pulsing_changes_neither_the_old_state_nor_the_cells() -> None:
    cells, state, generator = drawn(ReRamArrayOMPresetDevice())
    before = state.persistent.clone()
    parameters = {name: value.clone() for name, value in cells.parameters.items()}
    cells.pulse(state, everywhere(False), generator)
    assert torch.equal(state.persistent, before)
    assert all(torch.equal(cells.parameters[name], value) for name, value in parameters.items())


def test_a_tile_keeps_its_own_weights_when_its_state_is_copied() -> None:
    tile = AnalogTile(*SHAPE, SingleRPUConfig(device=ConstantStepDevice()))
    weight = tile.tile.get_weights().clone()
    CellState.from_tile(tile).apparent.zero_()
    assert torch.equal(tile.tile.get_weights(), weight)


@pytest.mark.parametrize(
    "config",
    [
        SingleRPUConfig(device=IdealDevice()),
        FloatingPointRPUConfig(),
        InferenceRPUConfig(),
        TorchInferenceRPUConfig(),
        UnitCellRPUConfig(device=VectorUnitCell([ConstantStepDevice(), ConstantStepDevice()])),
    ],
)
def test_tiles_without_a_single_pulsed_device_are_refused(config: Any) -> None:
    tile = config.tile_class(2, 3, config)
    with pytest.raises(UnsupportedTileError, match=r"single pulsed device, got .*Tile with"):
        PulseResponse.from_tile(tile)
