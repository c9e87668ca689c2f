"""Writing frozen arrays on purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al

CHIP = al.chips.get("rm-180nm")


def frozen(*shape):
    torch.manual_seed(0)
    model = al.convert(nn.Sequential(nn.Linear(*shape, bias=False)), CHIP)
    al.program_(model, CHIP, seed=0)
    return al.freeze_(model)


def logical(model):
    return torch.as_tensor(model[0].weight).clone()


def test_the_same_targets_cost_reads_and_no_pulses():
    model, ledger = frozen(150, 40), al.Ledger()
    wanted = 0.5 * logical(model)
    first = al.reprogram_(model, CHIP, {"0": wanted}, seed=1)
    before = al.fingerprint(model)
    again = al.reprogram_(model, CHIP, {"0": wanted}, ledger=ledger, phase="again", seed=2)
    assert first.pulses > 0
    assert (again.pulses, again.counts["verify_reads"]) == (0, 150 * 40)
    assert ledger.total(phase="again") == again.counts
    assert al.fingerprint(model) == before
    al.verify(model)


def test_only_cells_out_of_tolerance_are_pulsed():
    model = frozen(20, 10)
    wanted = logical(model)
    wanted[3, 4] = 0.0
    report = al.reprogram_(model, CHIP, {"0": wanted}, seed=1)
    assert report.counts["pulsed_cells"] == 1
    assert report.counts["verify_reads"] == 200 + report.pulses


def test_new_weights_are_within_tolerance_but_for_failed_cells():
    model = frozen(150, 40)
    wanted = logical(model).flip(0)
    report = al.reprogram_(model, CHIP, {"0": wanted}, seed=1)
    scale = torch.repeat_interleave(model[0].analog_module.scale[:, 0, :1].flatten(), 75)
    per_full_scale = CHIP.tolerance_siemens / CHIP.mapping.half_width_siemens
    beyond = (logical(model) - wanted).abs() > per_full_scale * scale * 1.001
    assert int(beyond.sum()) == report.counts["failed_cells"]


def test_weights_beyond_the_window_map_their_tile_anew():
    model = frozen(150, 40)
    wanted = logical(model)
    wanted[:, :75] *= 3.0
    before = model[0].analog_module.scale.clone()
    al.reprogram_(model, CHIP, {"0": wanted}, seed=1)
    after = model[0].analog_module.scale
    largest = wanted[:, :75].abs().max()
    torch.testing.assert_close(after[0], largest.expand_as(after[0]))
    assert torch.equal(after[1], before[1])


@pytest.mark.filterwarnings("ignore:.*did not reach their target")
def test_failed_cells_are_left_alone_until_their_goal_moves():
    model = frozen(30, 10)
    hasty = replace(CHIP.write_policy, max_pulses=1)
    wanted = logical(model).flip(0)
    first = al.reprogram_(model, CHIP, {"0": wanted}, seed=1, policy=hasty)
    assert first.counts["failed_cells"] > 10
    again = al.reprogram_(model, CHIP, {"0": wanted}, seed=2, policy=hasty)
    assert (again.pulses, again.counts["verify_reads"]) == (0, 300)
    assert again.counts["failed_cells"] == first.counts["failed_cells"]
    assert again.layers[0].rms_error_siemens == pytest.approx(first.layers[0].rms_error_siemens)
    moved = al.reprogram_(model, CHIP, {"0": 0.5 * wanted}, seed=3, policy=hasty)
    assert moved.pulses > 0


def test_adapters_are_consolidated_and_start_over():
    model = frozen(40, 30)
    x = torch.rand(4, 40)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name="one")
    adapted.add_adapter("two", config)
    adapted.base_model.set_adapter(["one", "two"])
    wrapper = adapted.base_model.model[0]
    wanted = logical_of(wrapper) + wrapper.get_delta_weight("one") + wrapper.get_delta_weight("two")
    report = al.reprogram_(adapted, CHIP, seed=1)
    assert report.layers[0].layer == "0"
    assert not wrapper.lora_B["one"].weight.any()
    assert not wrapper.lora_B["two"].weight.any()
    assert torch.equal(adapted(x), wrapper.get_base_layer()(x))
    wanted = wanted.detach()
    error = (logical_of(wrapper) - wanted).abs() / wanted.abs().max()
    assert int((error > 1.001 / 30).sum()) == report.counts["failed_cells"]


def logical_of(wrapper):
    return torch.as_tensor(wrapper.get_base_layer().weight).clone()


def test_dora_is_not_consolidated_and_nothing_is_written():
    model = frozen(8, 6)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    before = al.fingerprint(adapted)
    with pytest.raises(al.UnsupportedTileError, match=r"layer '0', adapter 'default'.*plain LoRA"):
        al.reprogram_(adapted, CHIP)
    assert al.fingerprint(adapted) == before


def test_without_adapters_there_is_nothing_to_consolidate():
    with pytest.raises(al.StageError, match="expected active LoRA adapters to consolidate"):
        al.reprogram_(frozen(8, 6), CHIP)


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        ({"1": torch.zeros(6, 8)}, al.StageError, r"got '1'\. Known: 0"),
        ({"0": torch.zeros(8, 6)}, al.ConfigurationError, r"'0'.*\(6, 8\), got \(8, 6\)"),
    ],
)
def test_targets_that_do_not_fit_are_named(targets, error, match):
    model = frozen(8, 6)
    before = al.fingerprint(model)
    with pytest.raises(error, match=match):
        al.reprogram_(model, CHIP, targets)
    assert al.fingerprint(model) == before


def test_arrays_programmed_elsewhere_cannot_be_rewritten():
    model = al.convert(nn.Sequential(nn.Linear(8, 6)), CHIP)
    al.freeze_(model, programmed_by="chip 7")
    with pytest.raises(al.StageError, match=r"expected cells that program_ has.*'chip 7'"):
        al.reprogram_(model, CHIP, {"0": torch.zeros(6, 8)})


def test_layers_where_many_cells_fail_are_warned_of():
    model = al.convert(nn.Sequential(nn.Linear(40, 30)), CHIP)
    with pytest.warns(UserWarning, match=r"layer '0': \d+ of 1200 cells did not reach"):
        al.program_(model, CHIP, seed=0, policy=replace(CHIP.write_policy, max_pulses=1))
