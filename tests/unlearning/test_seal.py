"""Seals: what is sealed acts in every pass, and whoever goes around it is told."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.errors import ConfigurationError, SealError, StageError, UnknownNameError
from aihwkit_lora.unlearning.levels import ForgettingLevel
from aihwkit_lora.unlearning.reference import reference
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_, seals, verify_seals

Make = Callable[..., PeftModel]
UNIT = al.DigitalUnit(bits=8)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def trained(model: nn.Module) -> set[str]:
    return {name for name, each in model.named_parameters() if each.requires_grad}


def sealed_on_unit(model: PeftModel) -> PeftModel:
    seal_(model, "forget", request="person 2")
    return al.digitize_(model, UNIT)


def unit_then_sealed(model: PeftModel) -> PeftModel:
    seal_(al.digitize_(model, UNIT), "forget", request="person 2")
    return model


def sealed_off_unit(model: PeftModel) -> PeftModel:
    return al.undigitize_(unit_then_sealed(model))


def sealed_only(model: PeftModel) -> PeftModel:
    seal_(model, "forget", request="person 2")
    return model


WAYS = [sealed_only, sealed_on_unit, unit_then_sealed, sealed_off_unit]


@pytest.fixture(params=[sealed_only, unit_then_sealed])
def sealed(request: pytest.FixtureRequest, two_adapters: Make) -> PeftModel:
    model: PeftModel = request.param(two_adapters())
    return model


# --- what a seal is -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_seal_changes_no_output(
    two_adapters: Make, inputs: Tensor, way: Callable[..., Any]
) -> None:
    plain, sealed = two_adapters(), way(two_adapters())
    if way in (sealed_on_unit, unit_then_sealed):
        al.digitize_(plain, UNIT)
    assert torch.equal(sealed(inputs), plain(inputs))
    assert list(sealed.state_dict()) == list(plain.state_dict())
    assert trained(sealed) == trained(plain)
    verify_seals(sealed)


def test_the_record_says_what_was_sealed(two_adapters: Make) -> None:
    model, log = two_adapters(), RequestLog(None)
    seal = seal_(model, "forget", request="person 2", log=log)
    assert (seal.adapter, seal.request, seal.level) == ("forget", "person 2", "suppressed")
    assert seal.level is ForgettingLevel.SUPPRESSED
    assert seal.base_fingerprint == al.fingerprint(model)
    assert len(seal.adapter_sha256) == 64
    assert seals(nn.ModuleDict({"inner": model})) == (seal,)
    (entry,) = log.entries()
    assert (entry.kind, entry.request, entry.time) == ("seal", "person 2", seal.date)
    assert entry.fields["adapter_sha256"] == seal.adapter_sha256


def test_without_a_log_there_is_one_in_memory(two_adapters: Make) -> None:
    model = two_adapters()
    seal_(model, "forget", request="person 2")
    seal_(model, "learn", request="person 4")
    first, second = seals(model)
    assert first.log is second.log
    assert [entry.request for entry in first.log.entries()] == ["person 2", "person 4"]


def test_a_seal_activates_fixes_and_ends_dropout(two_adapters: Make, inputs: Tensor) -> None:
    model = two_adapters(lora_dropout=0.9)
    expected = model(inputs)
    model.base_model.set_adapter("learn")
    before = trained(model)
    seal_(model, "forget", request="person 2")
    assert model.active_adapters == ["learn", "forget"]
    assert trained(model) == before
    torch.testing.assert_close(model.train()(inputs), expected)


def test_hashes_tell_adapters_apart(two_adapters: Make) -> None:
    model, again, other = two_adapters(), two_adapters(), two_adapters(lora_alpha=3)
    found = [seal_(each, "forget", request="r").adapter_sha256 for each in (model, again, other)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("adapter", "options", "error", "message"),
    [
        ("forgot", {}, UnknownNameError, "unknown adapter 'forgot'. Did you mean 'forget'"),
        ("forget", {"level": "exact-adapter"}, ConfigurationError, "expected level 'suppressed' "),
        ("forget", {"level": "gone"}, ConfigurationError, "got 'gone'"),
        ("forget", {"request": ""}, ConfigurationError, "'request': expected a text"),
    ],
)
def test_what_cannot_be_sealed(
    two_adapters: Make, adapter: str, options: Any, error: Any, message: str
) -> None:
    model = two_adapters()
    with pytest.raises(error, match=message):
        seal_(model, adapter, **{"request": "person 2", **options})
    assert seals(model) == ()
    with model.disable_adapter():
        pass


def test_a_seal_is_not_sealed_again(sealed: PeftModel) -> None:
    with pytest.raises(SealError, match="expected an adapter without a seal"):
        seal_(sealed, "forget", request="person 3")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda peft: peft.base_model.disable_adapter_layers(), "adapters that are switched off"),
        (lambda peft: layers(peft)[0].merged_adapters.append("learn"), r"merged adapters \['learn"),
    ],
)
def test_a_branch_that_does_not_act_is_not_sealed(
    two_adapters: Make, damage: Any, message: str
) -> None:
    model = two_adapters()
    damage(model)
    with pytest.raises(SealError, match=f"layer '0', adapter 'forget': .* got {message}"):
        seal_(model, "forget", request="person 2")


def test_other_parts_than_branches_are_not_sealed(
    frozen_model: Callable[..., nn.Module], branch: Callable[..., LoraConfig]
) -> None:
    model = nn.Sequential(frozen_model(), nn.Linear(3, 3))
    for options in ({"modules_to_save": ["1"]}, {"bias": "lora_only"}):
        peft = get_peft_model(copy.deepcopy(model), branch(["0.0"], **options))
        name = next(iter(options))
        with pytest.raises(SealError, match=f"adapter 'default': expected {name}="):
            seal_(peft, "default", request="person 2")


def test_other_adapters_than_lora_are_not_sealed(frozen_model: Callable[..., nn.Module]) -> None:
    model = get_peft_model(frozen_model(), LoHaConfig(target_modules=["0"]))
    with pytest.raises(SealError, match="expected LoRA, got LoHaModel"):
        seal_(model, "default", request="person 2")


def test_merging_attention_is_not_sealed() -> None:
    class Attends(nn.Module):
        def __init__(self, frozen: nn.Module) -> None:
            super().__init__()
            self.frozen, self.attention = frozen, nn.MultiheadAttention(4, 1)

    torch.manual_seed(0)
    frozen = al.freeze_(
        al.convert(nn.Sequential(nn.Linear(3, 2)), al.chips.get("rm-180nm")), programmed_by="test"
    )
    model = get_peft_model(Attends(frozen), LoraConfig(target_modules=["attention"]))
    with pytest.raises(SealError, match="got attention that PEFT merges in every pass"):
        seal_(model, "default", request="person 2")


def test_the_base_has_to_be_frozen_and_wrapped(frozen_model: Callable[..., nn.Module]) -> None:
    digital = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    with pytest.raises(StageError, match="expected frozen layers, got none"):
        seal_(digital, "default", request="person 2")
    with pytest.raises(StageError, match="expected one model of PEFT, got 0"):
        seal_(frozen_model(), "default", request="person 2")


# --- going around it ------------------------------------------------------------------------------


def first(model: PeftModel) -> Any:
    return model.base_model.model[0]


def enter(context: AbstractContextManager[Any]) -> None:
    with context:
        pass


ATTEMPTS: dict[str, Callable[[PeftModel, Tensor], Any]] = {
    "disable_adapter": lambda m, x: enter(m.disable_adapter()),
    "disable_adapter_layers": lambda m, x: m.disable_adapter_layers(),
    "tuner disable_adapter_layers": lambda m, x: m.base_model.disable_adapter_layers(),
    "set_adapter": lambda m, x: m.set_adapter("learn"),
    "set_adapter, a list": lambda m, x: m.set_adapter(["learn"]),
    "tuner set_adapter": lambda m, x: m.base_model.set_adapter(["learn"]),
    "tuner set_adapter, none": lambda m, x: m.base_model.set_adapter([]),
    "delete_adapter": lambda m, x: m.delete_adapter("forget"),
    "tuner delete_adapter": lambda m, x: m.base_model.delete_adapter("forget"),
    "unload": lambda m, x: m.unload(),
    "tuner unload": lambda m, x: m.base_model.unload(),
    "merge_adapter": lambda m, x: m.merge_adapter(),
    "merge_adapter, others": lambda m, x: m.merge_adapter(["learn"]),
    "merge_and_unload": lambda m, x: m.merge_and_unload(),
    "add_weighted_adapter": lambda m, x: m.add_weighted_adapter(["forget"], [-1.0], "anti"),
    "set_requires_grad": lambda m, x: m.set_requires_grad("forget"),
    "load_adapter": lambda m, x: m.load_adapter("anywhere", "forget"),
    "inject_adapter": lambda m, x: m.base_model.inject_adapter(m.base_model.model, "forget"),
    "adapter_names, base": lambda m, x: m(x, adapter_names=["__base__"] * len(x)),
    "adapter_names, other": lambda m, x: m(x, adapter_names=["learn"] * len(x)),
    "save_pretrained": lambda m, x: m.save_pretrained("x", selected_adapters=["learn"]),
    "layer enable_adapters": lambda m, x: first(m).enable_adapters(False),
    "layer merge": lambda m, x: first(m).merge(),
    "layer delete_adapter": lambda m, x: first(m).delete_adapter("forget"),
    "layer set_adapter": lambda m, x: first(m).set_adapter("learn"),
    "layer set_scale": lambda m, x: first(m).set_scale("forget", 0.0),
    "layer scale_layer": lambda m, x: first(m).scale_layer(0.0),
    "layer unscale_layer": lambda m, x: first(m).unscale_layer(2.0),
    "layer update_layer": lambda m, x: first(m).update_layer("forget", 2, 2, config=None),
    "layer set_requires_grad": lambda m, x: first(m).set_requires_grad("forget"),
    "layer unloading": lambda m, x: first(m).unload_and_optionally_merge_module(False, False, []),
    "layer adapter_names": lambda m, x: first(m)(x, adapter_names=["__base__"] * len(x)),
    "bare layer enable_adapters": lambda m, x: layers(m)[1].enable_adapters(False),
    "rewriting": lambda m, x: first(m).refuse_rewriting("reprogram_"),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_going_around_raises_and_changes_nothing(
    sealed: PeftModel, inputs: Tensor, attempt: str
) -> None:
    expected, flags, config = sealed(inputs), trained(sealed), list(sealed.peft_config)
    with pytest.raises(SealError, match=r"sealed adapter 'forget' \(request 'person 2'\): exp"):
        ATTEMPTS[attempt](sealed, inputs)
    assert torch.equal(sealed(inputs), expected)
    assert (trained(sealed), list(sealed.peft_config)) == (flags, config)
    assert (sealed.active_adapters, sealed.active_adapter) == (["forget", "learn"], "forget")
    verify_seals(sealed)


def write(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1e-3)


def step(model: PeftModel) -> None:
    factor = first(model).lora_B["forget"].weight.requires_grad_(True)
    factor.grad = torch.ones_like(factor)
    torch.optim.SGD([factor], lr=0.1).step()
    factor.requires_grad_(False)


TAMPERING: dict[str, tuple[Callable[[PeftModel], Any], str]] = {
    "scale": (lambda m: first(m).scaling.update(forget=0.0), "scale 0.0 instead of"),
    "no scale": (lambda m: setattr(first(m), "scaling", {}), "scale None instead of"),
    "active": (lambda m: setattr(first(m), "_active_adapter", ["learn"]), r"adapters \['learn'\]"),
    "active, a string": (lambda m: setattr(first(m), "_active_adapter", "learn"), r"\['learn'\]"),
    "twice": (lambda m: setattr(first(m), "_active_adapter", ["forget"] * 2), "'forget', 'forget'"),
    "disabled": (lambda m: setattr(first(m), "_disable_adapters", True), "switched off"),
    "merged": (lambda m: first(m).merged_adapters.append("learn"), r"merged adapters \['learn'\]"),
    "dropout": (
        lambda m: first(m).lora_dropout.update({"forget": nn.Dropout(1.0)}),
        "dropout Dropout",
    ),
    "in place": (lambda m: write(first(m).lora_B["forget"].weight), "other tensors"),
    "data swapped": (
        lambda m: setattr(
            first(m).lora_B["forget"].weight,
            "data",
            torch.zeros_like(first(m).lora_B["forget"].weight),
        ),
        "other tensors",
    ),
    "optimiser": (step, "other tensors"),
    "factor swapped": (
        lambda m: first(m).lora_B.update({"forget": nn.Linear(2, 12, bias=False)}),
        "parameters that ask for gradients",
    ),
    "half precision": (lambda m: first(m).lora_B["forget"].half(), "other tensors"),
    "training": (
        lambda m: first(m).lora_A["forget"].requires_grad_(True),
        "parameters that ask for gradients",
    ),
    "arrays": (
        lambda m: setattr(
            first(m).base_layer, "analog_module", copy.deepcopy(rewritten(first(m).base_layer))
        ),
        "other arrays beside it",
    ),
}


def rewritten(layer: Any) -> Any:
    array = layer.analog_module
    held = array.programmed
    return array.rewritten(held.conductance * 0.5, held.scale.clone(), array.programming)


@pytest.mark.parametrize("what", TAMPERING)
def test_tampering_is_found_in_the_next_pass(sealed: PeftModel, inputs: Tensor, what: str) -> None:
    sealed(inputs)
    tamper, found = TAMPERING[what]
    tamper(sealed)
    message = rf"layer '0', sealed adapter 'forget' .*expected to act in every pass, got .*{found}"
    with pytest.raises(SealError, match=message):
        sealed(inputs)
    with pytest.raises(SealError, match=message):
        verify_seals(sealed)


def test_writes_that_torch_does_not_see_are_found_by_hashing(sealed: PeftModel) -> None:
    first(sealed).lora_B["forget"].weight.data.add_(1e-3)
    with pytest.raises(SealError, match=r"layer '0', sealed .* got other tensors"):
        verify_seals(sealed)


def test_written_conductances_are_found_by_hashing(sealed: PeftModel) -> None:
    first(sealed).base_layer.analog_module.programmed.conductance.mul_(0.5)
    with pytest.raises(SealError, match="expected arrays with fingerprint"):
        verify_seals(sealed)


def test_a_layer_that_was_taken_off_is_found_by_hashing(sealed: PeftModel) -> None:
    sealed.base_model.model[0] = first(sealed).base_layer
    with pytest.raises(SealError, match="expected the layers that were sealed, got others"):
        verify_seals(sealed)


def test_without_a_seal_there_is_nothing_to_verify(two_adapters: Make) -> None:
    with pytest.raises(SealError, match="expected sealed adapters, got none"):
        verify_seals(two_adapters())


def test_consolidating_is_refused_before_a_cell_is_written() -> None:
    chip = al.chips.get("rm-180nm")
    torch.manual_seed(0)
    model = al.convert(nn.Sequential(nn.Linear(10, 3)), chip)
    al.program_(model, chip, seed=0)
    model = get_peft_model(
        al.freeze_(model), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    seal_(model, "default", request="person 2")
    before = al.fingerprint(model)
    with pytest.raises(SealError, match="sealed adapter 'default'"):
        al.reprogram_(model, chip, seed=1)
    assert al.fingerprint(model) == before


def test_thawing_is_refused(sealed: PeftModel) -> None:
    for part in (sealed, sealed.base_model.model):
        with pytest.raises(StageError, match="expected a model without adapters"):
            al.thaw_(part)


# --- what goes on as before -----------------------------------------------------------------------


def trained_step(model: PeftModel, inputs: Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(inputs).square().sum().backward()
    optimizer.step()


def test_others_are_activated_trained_and_deleted(sealed: PeftModel, inputs: Tensor) -> None:
    before = sealed(inputs)
    sealed.set_adapter("forget")
    assert trained(sealed) == set()
    sealed.set_adapter(["forget", "learn"])
    assert trained(sealed) == {n for n, _ in sealed.named_parameters() if ".learn." in n}
    first(sealed).set_scale("learn", 0.5)
    trained_step(sealed, inputs)
    assert not torch.equal(sealed(inputs), before)
    verify_seals(sealed)
    sealed.delete_adapter("learn")
    assert sealed.active_adapters == ["forget"]
    sealed(inputs)
    verify_seals(sealed)


def test_later_adapters_act_beside_it(
    sealed: PeftModel, branch: Callable[..., LoraConfig], inputs: Tensor
) -> None:
    before = sealed(inputs)
    add_adapter_(sealed, "later", branch(["0", "2", "3"], init_lora_weights=True))
    assert sealed.active_adapters == ["forget", "learn", "later"]
    assert torch.equal(sealed(inputs), before)
    trained_step(sealed, inputs)
    assert not torch.equal(sealed(inputs), before)
    with reference(sealed):
        assert torch.equal(sealed(inputs), before)
    assert trained(sealed) == {n for n, _ in sealed.named_parameters() if ".later." in n}
    verify_seals(sealed)


def test_new_layers_of_later_adapters_are_guarded_too(
    frozen_model: Callable[..., nn.Module], branch: Callable[..., LoraConfig], inputs: Tensor
) -> None:
    for digital in (False, True):
        model = get_peft_model(frozen_model(), branch(["3"]), adapter_name="forget")
        seal_(model, "forget", request="person 2")
        if digital:
            al.digitize_(model, UNIT)
        model.add_adapter("later", branch(["0"]))
        model.set_adapter(["forget", "later"])
        assert type(first(model)) is type(model.base_model.model[3])
        with pytest.raises(SealError, match="merge"):
            first(model).merge()
        model(inputs)
        verify_seals(model)


def test_composition_newest_is_refused(
    sealed: PeftModel, branch: Callable[..., LoraConfig]
) -> None:
    with pytest.raises(SealError, match="without sealed adapters"):
        add_adapter_(sealed, "later", branch(["0"]), composition="newest")


def test_several_seals_hold_together(sealed: PeftModel, inputs: Tensor) -> None:
    expected = sealed(inputs)
    seal_(sealed, "learn", request="person 4")
    assert trained(sealed) == set()
    assert torch.equal(sealed(inputs), expected)
    with pytest.raises(SealError, match=r"sealed adapter 'learn' \(request 'person 4'\)"):
        sealed.set_adapter("forget")
    with pytest.raises(SealError, match=r"'person 2'\), adapter 'learn' \(request 'person 4'\)"):
        sealed.disable_adapter()
    verify_seals(sealed)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}])
def test_other_kinds_of_lora_are_sealed(
    two_adapters: Make, inputs: Tensor, options: dict[str, bool]
) -> None:
    plain, model = two_adapters(**options), unit_then_sealed(two_adapters(**options))
    assert torch.equal(model(inputs), al.digitize_(plain, UNIT)(inputs))
    copy.deepcopy(model)(inputs)
    verify_seals(model)
    if "use_dora" in options:
        write(first(model).lora_magnitude_vector["forget"].weight)
        with pytest.raises(SealError, match="other tensors"):
            model(inputs)


def through_a_file(model: PeftModel) -> PeftModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: PeftModel = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file]
)
def test_copies_are_sealed(
    sealed: PeftModel, inputs: Tensor, copied: Callable[[PeftModel], PeftModel]
) -> None:
    twin = copied(sealed)
    assert torch.equal(twin(inputs), sealed(inputs))
    assert seals(twin) == seals(sealed)
    verify_seals(twin)
    with pytest.raises(SealError, match="disable_adapter"):
        twin.disable_adapter()
    write(first(twin).lora_A["forget"].weight)
    with pytest.raises(SealError, match="other tensors"):
        twin(inputs)
    verify_seals(sealed)


# --- states ---------------------------------------------------------------------------------------


def altered(state: dict[str, Tensor], adapter: str) -> dict[str, Tensor]:
    return {key: value + 0.1 if f".{adapter}." in key else value for key, value in state.items()}


@pytest.mark.parametrize("assign", [False, True])
def test_states_with_altered_seals_are_refused(
    sealed: PeftModel, inputs: Tensor, assign: bool
) -> None:
    state, expected = sealed.state_dict(), sealed(inputs)
    sealed.load_state_dict(copy.deepcopy(state), assign=assign)
    wrapped = nn.ModuleDict({"inner": sealed})
    outer = {f"inner.{key}": value for key, value in altered(state, "forget").items()}
    for model, bad in ((sealed, altered(state, "forget")), (wrapped, outer)):
        with pytest.raises(
            SealError, match=r"layer '0', sealed .*got other tensors in a state_dict"
        ):
            model.load_state_dict(bad, assign=assign)
    assert torch.equal(sealed(inputs), expected)
    sealed.load_state_dict(altered(state, "learn"), assign=assign)
    assert not torch.equal(sealed(inputs), expected)
    sealed.load_state_dict({}, strict=False)
    verify_seals(sealed)


def test_pefts_own_loader_is_refused_too(sealed: PeftModel) -> None:
    zeros = {
        f"base_model.model.{name}.lora_B.weight": torch.zeros(rows, 2)
        for name, rows in (("0", 12), ("3", 3))
    }
    with pytest.raises(SealError, match="got other tensors in a state_dict"):
        set_peft_model_state_dict(sealed, zeros, adapter_name="forget")


def test_peft_saves_sealed_adapters_along(sealed: PeftModel, tmp_path: Path) -> None:
    sealed.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"forget", "learn"}


def test_digital_layers_are_sealed_too(
    frozen_model: Callable[..., nn.Module], branch: Callable[..., LoraConfig], inputs: Tensor
) -> None:
    model = nn.Sequential(nn.Linear(10, 10), frozen_model())
    peft = get_peft_model(model, branch(["0", "1.0"]), adapter_name="forget")
    seal_(peft, "forget", request="person 2")
    with pytest.raises(SealError, match="merge_adapter"):
        peft.merge_adapter()
    first(peft).scaling["forget"] = -1.0
    with pytest.raises(SealError, match=r"scale -1\.0"):
        peft(inputs)
