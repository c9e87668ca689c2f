"""The reference: the same model, bit for bit, without what is being trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora import StageError
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.unlearning.reference import adapters_in_training, reference
from aihwkit_lora.unlearning.seal import seal_

CHIP = replace(al.chips.get("rm-180nm"), rows=8, columns=4)
UNIT = al.DigitalUnit(bits=8, sram_kib=4)
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))


def frozen(*, dropout=0.0):
    torch.manual_seed(0)
    layers = (nn.Linear(10, 12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 3))
    return al.freeze_(al.convert(nn.Sequential(*layers), CHIP), programmed_by="test")


def config(model, **options):
    targets = [name for name in al.target_modules(model) if "lora" not in name]
    defaults = {"r": 2, "target_modules": targets, "init_lora_weights": False}
    return LoraConfig(**(defaults | options))


def outputs(model):
    with torch.no_grad():
        return model(X)


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("on_unit", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_one_adapter_off_is_the_model_before_it_bit_for_bit(on_unit, options):
    model = frozen().eval()
    before = outputs(model)
    model = get_peft_model(model, config(model, **options))
    if on_unit:
        al.digitize_(model, UNIT)
    with_adapter = outputs(model)
    with reference(model):
        assert torch.equal(outputs(model), before)
    assert torch.equal(outputs(model), with_adapter)
    assert not torch.equal(with_adapter, before)


@pytest.mark.parametrize("on_unit", [False, True])
def test_earlier_adapters_stay_in_force(on_unit):
    model = add_adapter_(frozen().eval(), "first", config(frozen()))
    model = add_adapter_(model, "second", config(frozen()))
    if on_unit:
        al.digitize_(model, UNIT)
    before = outputs(model)
    model = add_adapter_(model, "third", config(frozen()))
    assert adapters_in_training(model) == {"third"}
    wanted = flags(model)
    with reference(model):
        assert torch.equal(outputs(model), before)
        assert flags(model) == wanted
    assert flags(model) == wanted
    assert model.base_model.model[0].active_adapters == ["first", "second", "third"]


@pytest.mark.parametrize("on_unit", [False, True])
def test_sealed_adapters_stay_in_force(on_unit):
    model = add_adapter_(frozen().eval(), "forget", config(frozen()))
    if on_unit:
        al.digitize_(model, UNIT)
    seal_(model, "forget", request="person 2")
    before = outputs(model)
    model = add_adapter_(model, "learn", config(frozen()))
    with reference(model):
        assert torch.equal(outputs(model), before)
    assert not torch.equal(outputs(model), before)


def test_an_adapter_counts_as_trained_if_any_of_its_parameters_is():
    model = get_peft_model(frozen().eval(), config(frozen()))
    before = outputs(model.base_model.model[0].base_layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("3.lora_B" in name)
    with reference(model):
        assert torch.equal(outputs(model.base_model.model[0]), before)


def test_what_modules_to_save_trains_is_off_too():
    net = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 3)).eval()
    before = outputs(net)
    model = get_peft_model(
        net, LoraConfig(target_modules=["0"], modules_to_save=["1"], init_lora_weights=False)
    )
    nn.init.zeros_(net[1].modules_to_save["default"].weight)
    with reference(model):
        assert torch.equal(outputs(model), before)
    assert not outputs(model).equal(before)


def test_no_second_copy_no_random_numbers_and_the_same_parameters():
    model = get_peft_model(frozen(), config(frozen()))
    before = [(name, id(each), each.data_ptr()) for name, each in model.named_parameters()]
    modules = [id(module) for module in model.modules()]
    state = torch.get_rng_state()
    with reference(model):
        inside = [(name, id(each), each.data_ptr()) for name, each in model.named_parameters()]
        assert inside == before
        assert [id(module) for module in model.modules()] == modules
    assert torch.equal(torch.get_rng_state(), state)


def test_the_reference_neither_drops_out_nor_learns_statistics():
    model = get_peft_model(frozen(dropout=0.5), config(frozen())).train()
    model.base_model.model[1].eval()
    modes = [module.training for module in model.modules()]
    with reference(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(outputs(model), outputs(model))
    assert [module.training for module in model.modules()] == modes


def test_everything_is_restored_after_an_error_and_when_nested():
    model = get_peft_model(frozen(), config(frozen()))
    layer, modes = model.base_model.model[0], [module.training for module in model.modules()]
    with reference(model):
        with pytest.raises(ValueError, match="stop"), reference(model):
            raise ValueError("stop")
        assert layer.active_adapters == []
    assert layer.active_adapters == ["default"]
    assert [module.training for module in model.modules()] == modes


def test_gradients_of_other_passes_are_not_disturbed():
    model = get_peft_model(frozen(), config(frozen()))
    loss = model(X).square().mean()
    with torch.no_grad(), reference(model):
        model(X)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_reads_are_counted_and_no_adapter_runs():
    model = get_peft_model(frozen().eval(), config(frozen()))
    al.digitize_(model, UNIT)
    counts = {}
    for phase in ("plain", "reference"):
        ledger = al.Ledger()
        with al.observe(model, ledger, phase=phase, mapping=CHIP.mapping):
            if phase == "plain":
                outputs(model)
            else:
                with reference(model):
                    outputs(model)
        counts[phase] = ledger.total()
    assert counts["reference"]["tile_reads"] == counts["plain"]["tile_reads"] > 0
    assert counts["reference"]["forward_macs_int8"] == 0 < counts["plain"]["forward_macs_int8"]


def test_the_sram_keeps_what_it_holds():
    model = get_peft_model(frozen().eval(), config(frozen()))
    al.digitize_(model, UNIT)
    with reference(model):
        outputs(model)
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="after", mapping=CHIP.mapping):
        outputs(model)
    assert ledger.total()["adapter_loads"] == 0


def test_a_model_without_adapters_has_no_reference():
    with (
        pytest.raises(StageError, match="a model with adapters, got a Linear"),
        reference(nn.Linear(2, 1)),
    ):
        pass


def test_frozen_adapters_only_have_no_reference():
    model = get_peft_model(frozen(), config(frozen())).requires_grad_(False)
    with pytest.raises(StageError, match="being trained, got only frozen ones"), reference(model):
        pass
    assert adapters_in_training(model) == frozenset()


def test_a_merged_adapter_cannot_be_left_out():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    model.merge_adapter()
    with pytest.raises(StageError, match=r"layer '0'.*'default' merged"), reference(model):
        pass
