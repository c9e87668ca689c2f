"""Programming whole models: counts, residual errors, seeds, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from aihwkit.nn import AnalogLinear
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import InferenceRPUConfig, SingleRPUConfig
from aihwkit.simulator.configs.devices import PulsedDevice
from aihwkit.simulator.presets import ReRamESPreset, TikiTakaReRamESPreset
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.tiles.freeze import PROGRAMMING

CHIP = al.chips.get("rm-180nm")
CONFIGS = {"torch": CHIP.rpu_config, "inference": InferenceRPUConfig, "pulsed": ReRamESPreset}
SHAPES = [(140, 30), (30, 6)]


def policy(kind: str) -> WritePolicy:
    # ES cells take some hundred fine steps across the window.
    return replace(CHIP.write_policy, max_pulses=3000) if kind == "pulsed" else CHIP.write_policy


def converted(kind: str = "torch", tile: int = 128, seed: int = 0) -> nn.Module:
    config = CONFIGS[kind]()
    config.mapping.max_input_size = config.mapping.max_output_size = tile
    torch.manual_seed(seed)
    first, second = (nn.Linear(*shape, bias=i == 0) for i, shape in enumerate(SHAPES))
    return convert_to_analog(
        nn.Sequential(first, nn.ReLU(), second), config, ensure_analog_root=False
    )


def program(model: nn.Module, kind: str = "torch", **options: Any) -> al.ProgramReport:
    return al.program_(model, CHIP, policy=policy(kind), **({"seed": 5} | options))


def cells_of(model: nn.Module) -> list[Any]:
    return [
        cell
        for layer in model.modules()
        if isinstance(layer, AnalogLinear)
        for cell in getattr(layer, PROGRAMMING).cells
    ]


@pytest.mark.parametrize("tile", [128, 512])
@pytest.mark.parametrize("kind", CONFIGS)
class TestEveryConfiguration:
    def test_convert_program_freeze_adapt(self, kind: str, tile: int) -> None:
        model = converted(kind, tile)
        goals = [tile.tile.get_weights().clone() for tile in model.analog_tiles()]
        ledger = al.Ledger()
        report = program(model, kind, ledger=ledger, phase="initial")
        cells = cells_of(model)

        assert len(cells) == (3 if tile == 128 else 2)
        self.check_counts(report, ledger)
        self.check_errors(report, cells, goals, kind)

        frozen = al.freeze_(model)
        fingerprint = al.fingerprint(frozen)
        adapted = get_peft_model(
            frozen,
            LoraConfig(r=3, target_modules=al.target_modules(frozen), init_lora_weights=False),
        )
        adapted(torch.randn(4, 140)).square().sum().backward()
        gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
        assert len(gradients) == 4
        assert all(bool(g.any()) for g in gradients)
        assert al.fingerprint(adapted) == fingerprint
        al.verify(adapted)

    def check_counts(self, report: al.ProgramReport, ledger: al.Ledger) -> None:
        assert [layer.layer for layer in report.layers] == ["0", "2"]
        for layer, (rows, columns) in zip(report.layers, SHAPES, strict=True):
            counts = layer.counts
            assert counts["programmed_cells"] == rows * columns
            assert 0 < counts["pulsed_cells"] <= rows * columns
            assert counts["set_pulses"] > 0
            assert counts["reset_pulses"] > 0
            # The policy verifies with one read: once at first, once after every pulse.
            pulses = counts["set_pulses"] + counts["reset_pulses"]
            assert counts["verify_reads"] == pulses + rows * columns
        assert ledger.phases() == ("initial",)
        assert ledger.by_layer() == {layer.layer: layer.counts for layer in report.layers}
        assert ledger.total() == report.counts

    def check_errors(
        self, report: al.ProgramReport, cells: list[Any], goals: list[torch.Tensor], kind: str
    ) -> None:
        half_width, tolerance = CHIP.mapping.half_width_siemens, CHIP.tolerance_siemens
        if kind == "pulsed":
            # Their own cells' full scale is 1, so the same cell state is fewer siemens.
            tolerance *= CHIP.cell_states[1]
        largest = 0.0
        for cell, goal in zip(cells, goals, strict=True):
            torch.testing.assert_close(cell.wanted_weight, goal, rtol=1e-6, atol=1e-7)
            errors, failed = (cell.weight - goal).abs() * half_width, cell.failed[0]
            assert float(errors[~failed].max()) <= tolerance * (1 + 1e-5)
            assert not bool((errors[failed] <= tolerance * (1 - 1e-5)).any())
            largest = max(largest, float(errors.max()))
        assert max(e.max_error_siemens for e in report.layers) == pytest.approx(largest, rel=1e-5)
        failed = sum(int(cell.failed.sum()) for cell in cells)
        assert report.counts["failed_cells"] == failed

    def test_the_same_seed_gives_the_same_arrays(self, kind: str, tile: int) -> None:
        # Copies, because each new C++ tile draws other devices.
        model, seeds = converted(kind, tile), (7, 7, 8)
        models = [copy.deepcopy(model) for _ in seeds]
        reports = [program(m, kind, seed=seed) for m, seed in zip(models, seeds, strict=True)]
        weights = [torch.cat([c.weight.flatten() for c in cells_of(m)]) for m in models]
        hashes = [al.fingerprint(al.freeze_(m)) for m in models]
        assert reports[0].counts == reports[1].counts != reports[2].counts
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        assert hashes[0] == hashes[1] != hashes[2]


def test_the_tiles_hold_what_the_cells_hold() -> None:
    model = converted("inference")
    program(model, "inference")
    for tile, cell in zip(model.analog_tiles(), cells_of(model), strict=True):
        assert torch.equal(tile.tile.get_weights(), cell.weight)


def test_pulsed_tiles_keep_their_hidden_weights() -> None:
    model = converted("pulsed")
    program(model, "pulsed")
    for tile, cell in zip(model.analog_tiles(), cells_of(model), strict=True):
        hidden = tile.get_hidden_parameters()
        assert torch.equal(hidden["persistent_weights"], cell.state.persistent[0])
        assert torch.equal(hidden["max_bound"], cell.response.parameters["max_bound"][0])


def test_programming_again_starts_from_reset_cells_and_the_same_goals() -> None:
    model, ledger = converted(), al.Ledger()
    first = program(model, ledger=ledger)
    goals = [cell.goal.clone() for cell in cells_of(model)]
    second = program(model, seed=6, ledger=ledger)
    assert all(
        torch.allclose(cell.goal, goal, rtol=1e-6, atol=0)
        for cell, goal in zip(cells_of(model), goals, strict=True)
    )
    # Reset cells stand around zero, where few goals lie.
    assert second.counts["pulsed_cells"] > 0.5 * second.counts["programmed_cells"]
    assert ledger.total() == first.counts + second.counts
    al.verify(al.freeze_(model))


def test_compound_devices_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    model = convert_to_analog(net, TikiTakaReRamESPreset(), ensure_analog_root=False)
    with pytest.raises(al.UnsupportedTileError, match=r"layer '0'.*device TransferCompound"):
        al.program_(model, CHIP, seed=0)


def test_a_seed_leaves_torchs_generator_alone() -> None:
    model = converted()
    before = torch.get_rng_state()
    program(model, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_torchs_generator_decides() -> None:
    reports = []
    for seed in (1, 1, 2):
        model = converted()
        torch.manual_seed(seed)
        reports.append(program(model, seed=None).counts)
    assert reports[0] == reports[1] != reports[2]


def test_nothing_to_program() -> None:
    with pytest.raises(al.StageError, match=r"Sequential: expected analogue layers to program"):
        al.program_(nn.Sequential(nn.Linear(3, 2)), CHIP)


def test_a_frozen_layer_is_refused_before_anything_is_written() -> None:
    model = converted()
    model[2] = al.freeze_(model[2], programmed_by="test")
    held = [tile.tile.get_weights().clone() for tile in model[0].analog_tiles()]
    with pytest.raises(al.StageError, match=r"layer '2': expected an unfrozen layer.*reprogram_"):
        program(model)
    for tile, before in zip(model[0].analog_tiles(), held, strict=True):
        assert torch.equal(tile.tile.get_weights(), before)
    assert not hasattr(model[0], PROGRAMMING)


def test_weights_beyond_the_window_are_refused() -> None:
    model = converted()
    model[2].set_weights(torch.full((6, 30), 0.1), None)
    for tile in model[2].analog_tiles():
        tile.tile.set_weights(torch.full((6, 30), 1.5))
    with pytest.raises(al.ConductanceWindowError, match=r"layer '2'.*got 1.5 to 1.5"):
        program(model)
    assert not hasattr(model[0], PROGRAMMING)


def test_a_device_without_an_update_rule_is_refused() -> None:
    class Homemade(PulsedDevice):
        """A device that neither aihwkit nor anybody else has described."""

    model = convert_to_analog(
        nn.Sequential(nn.Linear(3, 2)), SingleRPUConfig(), ensure_analog_root=False
    )
    model[0].analog_module.rpu_config.device = Homemade()
    with pytest.raises(al.UnsupportedTileError, match=r"layer '0': .*got Homemade"):
        program(model)
    assert not hasattr(model[0], PROGRAMMING)


def test_many_failed_cells_give_a_warning() -> None:
    ledger = al.Ledger()
    hasty = replace(CHIP.write_policy, max_pulses=0)
    with pytest.warns(UserWarning, match=r"layer '(0|2)': \d+ of (4200|180) cells did not reach"):
        report = al.program_(converted(), CHIP, seed=0, policy=hasty, ledger=ledger)
    assert report.pulses == 0
    assert report.counts["verify_reads"] == 4380
    assert report.failed_fraction > 0.5
    assert ledger.total() == report.counts
