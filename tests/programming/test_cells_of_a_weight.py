"""Pairs of cells, levels, wear and column scaling, through program_ and reprogram_."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from aihwkit.inference.noise.custom import StateIndependentNoiseModel
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.presets import ReRamESPreset
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.chips import Chip, ConductanceMapping
from aihwkit_lora.metering import Quantity, Status
from aihwkit_lora.metering.events import X2G_STEPS
from aihwkit_lora.tiles.freeze import PROGRAMMING

ONE = al.chips.get("rm-180nm")


def paired(pairs: int, **changes: Any) -> Chip:
    window = ConductanceMapping(g_min_siemens=1e-6, g_max_siemens=40e-6, pairs=pairs)
    return replace(ONE, name=f"{pairs} pairs", mapping=window, rows=16, columns=12, **changes)


def converted(chip: Chip, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return al.convert(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 6)), chip)


def cells_of(model: nn.Module) -> list[Any]:
    found = [getattr(layer, PROGRAMMING, None) for layer in model.modules()]
    return [cell for programming in found if programming for cell in programming.cells]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([torch.as_tensor(model[i].weight).flatten() for i in (0, 2)])


@pytest.mark.parametrize("pairs", [0, 1, 2])
class TestPairs:
    def test_every_cell_is_programmed_and_verified(self, pairs: int) -> None:
        chip = paired(pairs)
        model = converted(chip)
        report = al.program_(model, chip, seed=1)
        cells = sum(20 * 30 + 30 * 6 for _ in range(chip.mapping.cells_per_weight))
        assert report.counts["programmed_cells"] == cells
        assert report.counts["verify_reads"] == report.pulses + cells
        for part in cells_of(model):
            off = (part.state.apparent - part.goal).abs()[~part.failed]
            assert float(off.max()) <= chip.write_policy.tolerance

    def test_reads_see_what_the_cells_hold(self, pairs: int) -> None:
        chip = paired(pairs)
        model = converted(chip)
        al.program_(model, chip, seed=1)
        held = [cells.weight for cells in cells_of(model)]
        tiles = [tile.tile.get_weights() for tile in model.analog_tiles()]
        assert all(torch.equal(a, b) for a, b in zip(held, tiles, strict=True))
        frozen = al.freeze_(model)
        first = frozen[0].analog_module
        for position, cells in zip(first.positions(), first.programming.cells, strict=True):
            tile = first.tensors.tile(first.blocks, position)
            assert torch.equal(tile.conductance[0].T, cells.weight)

    def test_only_cells_whose_weight_moves_are_pulsed(self, pairs: int) -> None:
        chip = paired(pairs)
        model = converted(chip)
        al.program_(model, chip, seed=1)
        al.freeze_(model)
        wanted = torch.as_tensor(model[0].weight).clone()
        wanted[3, 4] = -wanted[3, 4]
        report = al.reprogram_(model, chip, {"0": wanted}, seed=2)
        assert 1 <= report.counts["pulsed_cells"] <= chip.mapping.cells_per_weight
        wear = [cells.wear for cells in model[0].analog_module.programming.cells]
        assert report.layers[0].most_worn == max(int(part.max()) for part in wear)

    def test_reads_conduct_through_all_cells_of_a_weight(self, pairs: int) -> None:
        chip, ledger = paired(pairs), al.Ledger()
        model = al.convert(nn.Sequential(nn.Linear(3, 2, bias=False)), chip)
        al.program_(model, chip, seed=1)
        al.freeze_(model)
        with al.observe(model, ledger, phase="read"):
            model(torch.ones(1, 3))
        counts, cells = ledger.total(), model[0].analog_module.programming.cells[0]
        assert counts["cell_reads"] == 6 * chip.mapping.cells_per_weight
        # x is full scale in every row.
        picosiemens = (cells.siemens * 1e12).round().sum()
        assert counts["cell_read_x2g"] == int(picosiemens) * X2G_STEPS**2


def test_pulsed_tiles_bring_one_cell_per_weight_whatever_the_chip() -> None:
    chip = paired(1)
    net = nn.Sequential(nn.Linear(8, 6, bias=False))
    model = convert_to_analog(net, ReRamESPreset(), ensure_analog_root=False)
    report = al.program_(model, chip, seed=1, policy=replace(chip.write_policy, max_pulses=3000))
    assert report.counts["programmed_cells"] == 48
    assert getattr(model[0], PROGRAMMING).mapping == chip.mapping.single_ended()


class TestLevels:
    def test_each_count_says_how_it_came_about(self) -> None:
        for level in ("simulated", "sampled", "mean"):
            model = converted(ONE)
            report = al.program_(model, ONE, seed=1, level=level)
            assert str(report.counts.level) == level
            assert str(report.counts.level_of("set_pulses")) == level

    def test_the_mean_level_spends_the_mean_and_leaves_no_error(self) -> None:
        model = converted(ONE)
        before = [tile.tile.get_weights().clone() for tile in model.analog_tiles()]
        report = al.program_(model, ONE, seed=1, level="mean")
        mean = ONE.write_policy.statistics.mean_pulses
        per_tile = [int(cells.wear.sum()) for cells in cells_of(model)]
        moved = [int((cells.wear > 0).sum()) for cells in cells_of(model)]
        assert report.pulses == sum(per_tile)
        # Whole pulses: each tile's total is rounded down once.
        assert all(
            mean * n - 1 < total <= mean * n for n, total in zip(moved, per_tile, strict=True)
        )
        for tile, weight, cells in zip(model.analog_tiles(), before, cells_of(model), strict=True):
            off = (tile.tile.get_weights() - weight).abs()
            assert float(off[cells.wear[0] > 0].max()) < 1e-6

    def test_the_sampled_level_leaves_the_errors_of_the_chips_noise_model(self) -> None:
        chip = replace(
            ONE,
            programming_noise=lambda: StateIndependentNoiseModel(
                g_converter=ONE.mapping.converter(), prog_noise_scale=10.0
            ),
        )
        model = al.convert(nn.Sequential(nn.Linear(128, 100, bias=False)), chip)
        al.program_(model, chip, seed=1, level="sampled")
        cells = cells_of(model)[0]
        written = (cells.wear > 0) & ~cells.failed
        errors = (cells.state.apparent - cells.goal)[written] * cells.encoding.siemens_per_state
        # aihwkit's constant deviation is 0.2 µS, here times 10; 12,800 cells estimate a standard
        # deviation to 0.6 %, so five of these fail one run in two million.
        sigma = 1e6 * float(errors.double().std())
        assert sigma == pytest.approx(2.0, rel=5 * 0.0063)

    def test_the_same_seed_leaves_the_same_errors_and_torchs_generator_alone(self) -> None:
        chip = replace(
            ONE,
            programming_noise=lambda: StateIndependentNoiseModel(
                g_converter=ONE.mapping.converter()
            ),
        )
        models = [converted(chip), converted(chip)]
        before = torch.get_rng_state()
        for model in models:
            al.program_(model, chip, seed=1, level="sampled")
        assert torch.equal(torch.get_rng_state(), before)
        first, second = (al.fingerprint(al.freeze_(model)) for model in models)
        assert first == second

    def test_reprogramming_at_a_level(self) -> None:
        model = converted(ONE)
        al.program_(model, ONE, seed=1, level="mean")
        al.freeze_(model)
        wanted = 0.5 * torch.as_tensor(model[0].weight)
        report = al.reprogram_(model, ONE, {"0": wanted}, seed=1, level="mean")
        assert str(report.counts.level) == "mean"
        moved = report.counts["pulsed_cells"]
        mean = ONE.write_policy.statistics.mean_pulses
        assert report.pulses == int(mean * moved + 1e-9)

    @pytest.mark.parametrize("level", ["exact", "meen"])
    def test_an_unknown_level_is_refused(self, level: Any) -> None:
        with pytest.raises(al.ConfigurationError, match=rf"level: .* got '{level}'.*simulated"):
            al.program_(converted(ONE), ONE, level=level)


class TestWear:
    def test_pulses_of_all_writings_add_up_cell_by_cell(self) -> None:
        model = converted(ONE)
        al.program_(model, ONE, seed=1)
        al.freeze_(model)
        array = model[0].analog_module
        expected = [cells.wear.clone() for cells in array.programming.cells]
        total = sum(int(part.sum()) for part in expected)
        for seed in (2, 3):
            wanted = -torch.as_tensor(model[0].weight)
            total += al.reprogram_(model, ONE, {"0": wanted}, seed=seed).pulses
        wear = [cells.wear for cells in model[0].analog_module.programming.cells]
        assert sum(int(part.sum()) for part in wear) == total
        assert all(bool((a >= b).all()) for a, b in zip(wear, expected, strict=True))

    def test_the_cells_of_a_pulsed_tile_keep_theirs_others_are_new(self) -> None:
        policy = replace(ONE.write_policy, max_pulses=3000)
        net = nn.Sequential(nn.Linear(8, 6, bias=False))
        model = convert_to_analog(net, ReRamESPreset(), ensure_analog_root=False)
        pulses = [al.program_(model, ONE, seed=s, policy=policy).pulses for s in (1, 2)]
        assert sum(int(cells.wear.sum()) for cells in cells_of(model)) == sum(pulses)
        fresh = converted(ONE)
        pulses = [al.program_(fresh, ONE, seed=s).pulses for s in (1, 2)]
        assert sum(int(cells.wear.sum()) for cells in cells_of(fresh)) == pulses[1]

    def test_cells_beyond_their_endurance_are_warned_of(self) -> None:
        endurance = Quantity(value=50.0, unit="1", source="test", status=Status.ASSUMED)
        chip = replace(ONE, endurance_pulses=endurance)
        with pytest.warns(UserWarning, match=r"layer '\d': a cell has taken \d+ pulses, more than"):
            report = al.program_(converted(chip), chip, seed=1)
        assert report.endurance_used is not None
        assert report.endurance_used > 1.0


class TestScaling:
    def test_each_column_fills_the_window(self) -> None:
        chip = replace(ONE, scaling="column")
        model = converted(chip)
        for tile in model.analog_tiles():
            torch.testing.assert_close(
                tile.tile.get_weights().abs().amax(1), torch.ones(tile.out_size)
            )

    def test_only_the_column_that_no_longer_fits_is_mapped_anew(self) -> None:
        chip = replace(ONE, scaling="column")
        model = converted(chip)
        al.program_(model, chip, seed=1)
        al.freeze_(model)
        before = model[0].analog_module.scale.clone()[0, 0]
        wanted = torch.as_tensor(model[0].weight).clone()
        wanted[7] *= 3.0
        al.reprogram_(model, chip, {"0": wanted}, seed=2)
        after = model[0].analog_module.scale[0, 0]
        changed = (after != before).nonzero().flatten().tolist()
        assert changed == [7]
        torch.testing.assert_close(after[7], wanted[7].abs().max())
