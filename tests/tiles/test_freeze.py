"""Freezing, thawing and proofs: what each accepts, and that errors leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from aihwkit.inference import PCMLikeNoiseModel
from aihwkit.nn import AnalogLinear
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import (
    InferenceRPUConfig,
    SingleRPUConfig,
    TorchInferenceRPUConfig,
)
from aihwkit.simulator.presets import ReRamESPreset
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.tiles.freeze import PROGRAMMING, plain_name
from aihwkit_lora.tiles.layers import FrozenLinear

CHIP = al.chips.get("rm-180nm")
# The fine steps of ES cells.
PATIENT = replace(CHIP.write_policy, max_pulses=3000)


def converted(config=None, *, perfect: bool = True) -> nn.Module:
    """Three analogue layers, one of them deeper in the model."""
    config = config or CHIP.rpu_config()
    config.mapping.max_input_size = config.mapping.max_output_size = 8
    config.forward.is_perfect = perfect
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 10), nn.Sequential(nn.ReLU(), nn.Linear(10, 20)), nn.Linear(20, 3, bias=False)
    )
    return convert_to_analog(net, config, ensure_analog_root=False).eval()


def programmed(config=None, **options: bool) -> nn.Module:
    model = converted(config, **options)
    pulsed = isinstance(config, SingleRPUConfig)
    al.program_(model, CHIP, seed=0, policy=PATIENT if pulsed else None)
    return model


def kinds(model: nn.Module) -> list[type]:
    return [type(model[0]), type(model[1][1]), type(model[2])]


@pytest.mark.parametrize("config", [TorchInferenceRPUConfig, InferenceRPUConfig, CHIP.rpu_config])
@pytest.mark.parametrize("perfect", [True, False])
def test_outputs_are_equal_before_while_and_after_frozen(
    config: Callable[[], object], perfect: bool
) -> None:
    configured = config()
    # Converters without steps: coarse ones tip sums that lie on the edge between two codes.
    configured.forward.out_noise, configured.forward.out_res = 0.0, -1.0
    configured.forward.inp_res = -1.0
    model, x = programmed(configured, perfect=perfect), torch.randn(6, 6)
    before = model(x).detach()
    assert float(before.abs().max()) > 0.05
    frozen = al.freeze_(model)(x).detach()
    thawed = al.thaw_(model).eval()(x).detach()
    again = al.freeze_(model)(x).detach()
    torch.testing.assert_close(frozen, before, rtol=0, atol=1e-5)
    torch.testing.assert_close(thawed, before, rtol=0, atol=1e-5)
    assert torch.equal(again, frozen)


def test_freezing_again_after_thawing_knows_the_same_cells() -> None:
    model = al.freeze_(programmed())
    fingerprint = al.fingerprint(model)
    cells = model[0].analog_module.programming.cells
    al.thaw_(model)
    assert kinds(model) == [AnalogLinear] * 3
    assert al.fingerprint(al.freeze_(model)) == fingerprint
    assert model[0].analog_module.programming.cells is cells
    assert model[0].analog_module.programming.source == "rm-180nm"
    targets = {"0": torch.as_tensor(model[0].weight)}
    assert al.reprogram_(model, CHIP, targets, seed=1).counts["programmed_cells"] == 60


def test_a_thawed_layer_that_was_changed_is_not_programmed() -> None:
    model = al.thaw_(al.freeze_(programmed()))
    model[2].set_weights(torch.zeros(3, 20))
    with pytest.raises(al.StageError, match=r"layer '2': expected the weights that program_ left"):
        al.freeze_(model)
    assert kinds(model) == [AnalogLinear] * 3


def test_a_thawed_layer_that_was_programmed_elsewhere_is_not_programmed() -> None:
    model = al.thaw_(al.freeze_(converted(), programmed_by="chip 7"))
    with pytest.raises(al.StageError, match=r"layer '0': expected a programmed layer"):
        al.freeze_(model)


def test_pulsed_cells_come_back_with_their_hidden_parameters() -> None:
    model = programmed(ReRamESPreset())
    before = [dict(t.get_hidden_parameters()) for t in model[1][1].analog_tiles()]
    al.thaw_(al.freeze_(model))
    after = [dict(t.get_hidden_parameters()) for t in model[1][1].analog_tiles()]
    assert len(before) == 6
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert "persistent_weights" in new
        for name, values in new.items():
            if name != "hidden_weights":
                assert torch.equal(values, old[name]), name


def test_the_last_layer_decides_before_the_first_is_replaced() -> None:
    model = programmed()
    model[2].set_weights(torch.zeros(3, 20))
    with pytest.raises(al.StageError, match=r"layer '2': expected the weights"):
        al.freeze_(model)
    assert kinds(model) == [AnalogLinear] * 3


def test_saying_how_it_was_programmed_covers_what_program_did_not_see() -> None:
    model = programmed()
    model[2].set_weights(torch.zeros(3, 20))
    al.freeze_(model, programmed_by="read back from chip 7")
    sources = [layer.analog_module.programming.source for _, layer in al.frozen_layers(model)]
    assert sources == ["rm-180nm", "rm-180nm", "read back from chip 7"]
    assert not torch.as_tensor(model[2].weight).any()


def test_names_of_nested_layers() -> None:
    model = al.freeze_(programmed())
    assert al.target_modules(model) == ["0", "1.1", "2"]
    assert [layer.layer_name for _, layer in al.frozen_layers(model)] == ["0", "1.1", "2"]
    assert plain_name("base_model.model.1.1.base_layer") == "1.1"
    assert plain_name("1.1") == "1.1"


def test_training_mode_goes_over_to_the_new_layers() -> None:
    model = programmed()
    assert not al.freeze_(model)[0].training
    assert al.thaw_(model.train())[0].training


def test_aihwkits_drift_compensation_is_part_of_the_frozen_scale() -> None:
    config = InferenceRPUConfig(noise_model=PCMLikeNoiseModel(g_max=25.0))
    model = converted(config)
    torch.manual_seed(0)
    model[0].program_analog_weights()
    model[0].drift_analog_weights(1e6)
    x = torch.randn(5, 6)
    expected = model[0](x).detach()
    alphas = {float(tile.alpha) for tile in model[0].analog_tiles()}
    assert all(alpha > 1.05 for alpha in alphas)
    frozen = al.freeze_(model[0])
    torch.testing.assert_close(frozen(x), expected, rtol=0, atol=1e-5)
    assert frozen.analog_module.programming.source == "aihwkit program_weights"


def test_mapping_changed_after_freezing_stops_the_thaw() -> None:
    model = al.freeze_(programmed())
    model[1][1].analog_module.rpu_config.mapping.max_input_size = 4
    with pytest.raises(
        al.UnsupportedTileError, match=r"layer '.*': expected tiles Blocks.*mapping"
    ):
        al.thaw_(model)
    assert kinds(model) == [FrozenLinear] * 3


def test_adapters_stop_the_thaw_before_anything_is_replaced() -> None:
    model = al.freeze_(programmed())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["2"]))
    with pytest.raises(al.StageError, match=r"layer '.*2\.base_layer': .*adapters.*unload\(\)"):
        al.thaw_(adapted)
    assert kinds(model)[:2] == [FrozenLinear] * 2


def test_fingerprints_tell_any_change_of_conductance_or_scale() -> None:
    model = al.freeze_(programmed())
    found = {al.fingerprint(model)}
    held = model[1][1].analog_module.programmed
    held.conductance[1, 0, 0] = torch.nextafter(held.conductance[1, 0, 0], torch.tensor(2.0))
    found.add(al.fingerprint(model))
    held.scale[0, 2, 0] *= 1.5
    found.add(al.fingerprint(model))
    assert len(found) == 3
    with pytest.raises(al.FrozenConductanceError, match=r"'1\.1', tile \(input 0, output 2\)"):
        al.verify(model)


def test_padding_and_bias_do_not_count_as_conductances() -> None:
    model = al.freeze_(programmed())
    fingerprint = al.fingerprint(model)
    array = model[1][1].analog_module
    columns = array.blocks.columns
    assert array.blocks.out_sizes[-1] == columns - 1
    array.programmed.conductance[0, 0, -1] = 1.0
    model[0].bias.data.zero_()
    assert al.fingerprint(model) == fingerprint
    al.verify(model)


def test_nothing_is_left_over_from_programming_in_a_thawed_stranger() -> None:
    layer = al.thaw_(al.freeze_(converted(), programmed_by="chip 7"))[0]
    assert not hasattr(layer, PROGRAMMING)


def test_a_copy_that_peft_trains_is_no_array() -> None:
    model = al.freeze_(programmed())
    config = LoraConfig(target_modules=["1.1"], modules_to_save=["2"])
    adapted = get_peft_model(model, config)
    match = r"layer '2\.modules_to_save.*': expected the array .*got a copy that PEFT"
    with pytest.raises(al.FrozenConductanceError, match=match):
        al.verify(adapted)
