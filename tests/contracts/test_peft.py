"""What PEFT reads and writes on a base layer, how it finds and names layers, what it saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from aihwkit.nn import AnalogConv2d, AnalogLinear
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

FROZEN_LAYERS = "frozen layers, which show PEFT a weight and a bias as torch has them"


class Shown(nn.Linear):
    """A linear layer that holds its weights elsewhere and shows what ``show`` makes of them."""

    def __init__(self, show=Tensor.clone, bias=True):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.show = 3, 2, show
        self.register_buffer("held", torch.randn(2, 3))
        self.register_parameter("bias", nn.Parameter(torch.zeros(2)) if bias else None)

    @property
    def weight(self):
        return self.show(self.held)

    def forward(self, x):
        return nn.functional.linear(x, self.held, self.bias)


def adapted(*layers, **options):
    options = {"target_modules": ["0"], "r": 1} | options
    return get_peft_model(nn.Sequential(*layers), LoraConfig(**options))


def first_of(model):
    return model.base_model.model[0]


# ------------------------------------------------------------------ what PEFT reads


def test_adapters_go_to_the_device_of_weight(peft_fact):
    fact = peft_fact(
        "LoraModel._replace_module moves an adapter to child.weight.device",
        FROZEN_LAYERS,
        "see what PEFT asks for the device now, and give the frozen layers that",
    )
    wrapper = first_of(adapted(Shown(show=lambda held: held.to("meta"))))
    assert wrapper.lora_A["default"].weight.device.type == "meta", fact
    assert wrapper.lora_B["default"].weight.device.type == "meta", fact


def test_a_layer_without_weight_cannot_be_wrapped(peft_fact):
    fact = peft_fact(
        "a base layer whose weight is None raises AttributeError",
        FROZEN_LAYERS,
        "PEFT may wrap unfrozen aihwkit layers now: refuse that or say what it means",
    )
    with fact.raises(AttributeError, "'NoneType' object has no attribute 'device'"):
        adapted(Shown(show=lambda held: None))


def test_the_first_parameter_is_asked_for_the_device(peft_fact):
    fact = peft_fact(
        "get_peft_model asks next(model.parameters()) for the device, so that a model without "
        "parameters raises StopIteration",
        "the device_anchor of frozen layers without bias",
        "if models without parameters work now, the anchor can go",
    )
    with fact.raises(StopIteration, ""):
        adapted(Shown(bias=False))
    frozen = nn.Sequential(Shown(bias=False))
    frozen[0].register_parameter("anchor", nn.Parameter(torch.empty(0), requires_grad=False))
    model = get_peft_model(frozen, LoraConfig(target_modules=["0"], r=1))
    assert type(first_of(model)) is Linear, fact


def test_fresh_adapters_add_nothing(peft_fact):
    fact = peft_fact(
        "a fresh LoRA adapter has lora_B = 0 and adds nothing",
        "attaching adapters without a change of function, and reprogram_, which starts over so",
        "set lora_B to zero ourselves",
    )
    base = Shown()
    model = adapted(base)
    x = torch.randn(4, 3)
    assert not bool(first_of(model).lora_B["default"].weight.any()), fact
    assert torch.equal(model(x), base(x)), fact


# ------------------------------------------------------------------ what PEFT writes


def test_merging_adds_into_the_storage_of_weight(peft_fact):
    fact = peft_fact(
        "merge_adapter does base_layer.weight.data += delta, into the same storage",
        "ReadOnlyTensor, which refuses that write",
        "see how merging writes now, and that ReadOnlyTensor refuses it",
    )
    model = adapted(nn.Linear(3, 2), init_lora_weights=False)
    wrapper = first_of(model)
    weight, delta = wrapper.base_layer.weight, wrapper.get_delta_weight("default")
    before, place = weight.detach().clone(), weight.data_ptr()
    model.merge_adapter()
    assert wrapper.base_layer.weight is weight, fact
    assert weight.data_ptr() == place, fact
    assert torch.equal(weight, before + delta), fact
    assert wrapper.merged_adapters == ["default"], fact


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_a_copy_loses_the_adapter_silently(safe, peft_fact):
    fact = peft_fact(
        "where weight returns a copy, merge_adapter writes into it, calls the adapter merged and "
        "leaves it out of the output, without an error",
        "ReadOnlyTensor, which raises instead",
        "if PEFT notices now, ReadOnlyTensor stays for whoever else writes",
    )
    base = Shown(show=Tensor.clone)
    model = adapted(base, init_lora_weights=False)
    x = torch.randn(4, 3)
    assert not torch.allclose(model(x), base(x)), fact
    model.merge_adapter(safe_merge=safe)
    assert first_of(model).merged, fact
    assert torch.equal(model(x), base(x)), fact


@pytest.mark.parametrize(
    ("initialisation", "rewrites"),
    [(True, False), (False, False), ("gaussian", False), ("pissa", True), ("olora", True)],
)
def test_which_initialisations_rewrite_the_base(initialisation, rewrites, peft_fact):
    fact = peft_fact(
        f"init_lora_weights={initialisation!r} {'rewrites' if rewrites else 'leaves'} the base",
        "ReadOnlyTensor, which refuses initialisations that write the array",
        "see that one that writes is refused before anything moves, then correct this list",
    )
    base = nn.Linear(4, 4)
    before = base.weight.detach().clone()
    adapted(base, r=2, init_lora_weights=initialisation)
    assert torch.equal(base.weight, before) != rewrites, fact


def test_adalora_clears_the_gradient_flag_of_weight(peft_fact):
    fact = peft_fact(
        "AdaLoRA sets base_layer.weight.requires_grad = False",
        "ReadOnlyTensor, which lets exactly that pass",
        "if nothing sets the flag any more, ReadOnlyTensor can refuse it",
    )
    seen = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func == Tensor.requires_grad.__set__:
                seen.append(args[1])
            return super().__torch_function__(func, types, args, kwargs or {})

    base = Shown(show=lambda held: held.as_subclass(Watched))
    get_peft_model(nn.Sequential(base), AdaLoraConfig(target_modules=["0"], total_step=10))
    assert seen == [False], fact


# ------------------------------------------------------------------ what becomes trainable


def trainable(model):
    return {
        name.removeprefix("base_model.model.").replace(".default", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


ADAPTER = {"0.lora_A.weight", "0.lora_B.weight"}


@pytest.mark.parametrize(
    ("bias", "also"),
    [
        ("none", set()),
        ("lora_only", {"0.base_layer.bias"}),
        ("all", {"0.base_layer.bias", "1.bias"}),
    ],
)
def test_which_biases_become_trainable(bias, also, peft_fact):
    fact = peft_fact(
        f"LoraConfig(bias={bias!r}) makes {sorted(also) or 'no bias'} trainable beside the adapter",
        "the digital bias of frozen layers, an ordinary parameter that starts frozen",
        "correct what the guide says of trainable biases",
    )
    assert trainable(adapted(nn.Linear(3, 2), nn.Linear(2, 2), bias=bias)) == ADAPTER | also, fact


def test_a_bias_that_is_a_bool_breaks_lora_only(peft_fact):
    fact = peft_fact(
        "bias='lora_only' sets base_layer.bias.requires_grad",
        "frozen layers, whose bias is a tensor or None and no bool as in aihwkit",
        "see what PEFT expects of a bias now",
    )
    base = Shown(bias=False)
    base.register_parameter("anchor", nn.Parameter(torch.empty(0)))
    del base._parameters["bias"]
    base.bias = True
    with fact.raises(AttributeError, "'bool' object has no attribute 'requires_grad'"):
        adapted(base, bias="lora_only")


# ------------------------------------------------------------------ how layers are found and named


def test_all_linear_takes_subclasses_of_linear(peft_fact):
    fact = peft_fact(
        "target_modules='all-linear' takes every subclass of nn.Linear, AnalogLinear included, "
        "and no other analogue layer",
        "AnalogLoraConfig, and frozen linear layers, which derive from nn.Linear",
        "see how 'all-linear' recognises layers now",
    )
    config = TorchInferenceRPUConfig()
    model = nn.Sequential(
        nn.Linear(3, 2),
        nn.ReLU(),
        Shown(),
        AnalogLinear(3, 2, rpu_config=config),
        AnalogConv2d(3, 2, 1, rpu_config=config),
        nn.Conv2d(3, 2, 1),
    )
    wanted = LoraConfig(target_modules="all-linear")
    assert _maybe_include_all_linear_layers(wanted, model).target_modules == {"0", "2", "3"}, fact


def test_target_names_match_the_ends_of_full_names(peft_fact):
    fact = peft_fact(
        "target_modules=['0'] also takes every layer whose full name ends in '.0'",
        "full names in target_modules(), and tiles that are children named otherwise",
        "tiles may be named by numbers again",
    )
    nested = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(2, 2))})
    assert adapted(nn.Linear(3, 2), nested).targeted_module_names == ["0", "1.inner.0"], fact


@pytest.mark.parametrize(
    ("targets", "name", "taken"),
    [
        (["0"], "0", True),
        (["0"], "1.inner.0", True),
        (["0"], "10", False),
        (["a.b"], "x.a.b", True),
        (["a.b"], "xa.b", False),
        ("a.b", "x.a.b", False),
        (r".*\.q", "layer.q", True),
    ],
)
def test_a_target_is_checked_by_name_alone(targets, name, taken, peft_fact):
    fact = peft_fact(
        "check_target_module_exists(config, name) tells from names alone whether a layer is taken",
        "AnalogLoraConfig, which counts the memory of adapters before PEFT makes them",
        "find what PEFT decides by now, or the memory is counted for the wrong layers",
    )
    config = LoraConfig(target_modules=targets)
    assert bool(check_target_module_exists(config, name)) == taken, fact


def test_ranks_of_a_pattern_go_to_the_first_key_that_ends_a_name(peft_fact):
    fact = peft_fact(
        "rank_pattern gives a layer the rank of get_pattern_key(keys, name), the first key that "
        "matches the end of its name, else r",
        "AnalogLoraConfig, which counts the memory of adapters before PEFT makes them",
        "find what PEFT decides by now, or the memory is counted for the wrong ranks",
    )
    keys = ["q", "0.q", "k"]
    assert get_pattern_key(keys, "layer.0.q") == "q", fact
    assert get_pattern_key(keys, "layer.0.v") == "layer.0.v", fact
    model = adapted(
        nn.Linear(3, 2), nn.Linear(2, 2), target_modules=["0", "1"], rank_pattern={"1": 2}
    )
    layers = model.base_model.model
    assert [layers[i].lora_A["default"].out_features for i in (0, 1)] == [1, 2], fact


def test_names_of_wrapped_layers(peft_fact):
    fact = peft_fact(
        "PEFT puts 'base_model.model.' before and '.base_layer' behind the name of a layer",
        "plain_name, which takes both off again",
        "adapt plain_name, or ledgers and reports name layers differently with adapters",
    )
    model = adapted(nn.Linear(3, 2))
    names = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    inner = {name for name in names if "lora_" not in name}
    assert inner == {"base_model.model.0.base_layer"}, fact


def test_what_consolidating_reads_of_a_wrapper(peft_fact):
    fact = peft_fact(
        "lora.Linear has active_adapters, disable_adapters, lora_variant, lora_A, lora_B, scaling, "
        "get_base_layer() and get_delta_weight(), which is scaling · B · A",
        "reprogram_, which writes base plus adapters into the arrays",
        "adapt how adapters are read, or they are consolidated wrongly",
    )
    wrapper = first_of(adapted(nn.Linear(3, 2), r=2, lora_alpha=6, init_lora_weights=False))
    assert type(wrapper) is Linear, fact
    assert isinstance(wrapper, BaseTunerLayer), fact
    assert wrapper.active_adapters == ["default"], fact
    assert wrapper.disable_adapters is False, fact
    assert wrapper.lora_variant == {}, fact
    assert wrapper.scaling == {"default": 3.0}, fact
    down, up = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    assert (down.shape, up.shape) == ((2, 3), (2, 2)), fact
    assert torch.allclose(wrapper.get_delta_weight("default"), 3.0 * up @ down), fact
    assert type(wrapper.get_base_layer()) is nn.Linear, fact
    dora = first_of(adapted(nn.Linear(3, 2), use_dora=True))
    assert list(dora.lora_variant) == ["default"], fact


# ------------------------------------------------------------------ what is saved


def test_saved_adapters_hold_the_adapter_only(peft_fact, tmp_path: Path):
    fact = peft_fact(
        "a saved adapter holds lora_A and lora_B by the full name of their layer, nothing else",
        "adapters that are handed on without the weights they sit on",
        "check what an adapter's file gives away of the base",
    )
    model = adapted(nn.Linear(3, 2), nn.BatchNorm1d(2))
    names = {f"base_model.model.{name}" for name in ADAPTER}
    assert set(get_peft_model_state_dict(model)) == names, fact
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == names, fact
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}, fact


def test_custom_modules_are_forgotten_on_saving(peft_fact, tmp_path: Path):
    fact = peft_fact(
        "layer types given to _register_custom_module are not saved: a reloaded adapter silently "
        "sits on stock LoRA layers",
        "needing no custom types for frozen layers",
        "custom types are an option now",
    )

    class Custom(Linear):
        pass

    config = LoraConfig(target_modules=["0"], r=1)
    config._register_custom_module({nn.Linear: Custom})
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), config)
    assert type(first_of(model)) is Custom, fact
    assert "_custom_modules" not in config.to_dict(), fact
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 2)), tmp_path)
    assert type(first_of(loaded)) is Linear, fact


# ------------------------------------------------------------------ which methods there are

METHODS = """
    ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA
    GRALORA HIRA HRA IA3 LILY LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT
    POLY PREFIX_TUNING PROMPT_TUNING PSOFT PVERA P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING
    TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT XLORA
"""


def test_every_method_is_known(peft_fact):
    found, known = {method.name for method in PeftType}, set(METHODS.split())
    fact = peft_fact(
        f"PeftType has exactly the known methods (new: {sorted(found - known)}, "
        f"gone: {sorted(known - found)})",
        "the table of methods that work on frozen layers, and those that are refused",
        "try a new method on a frozen model, classify it in that table (does it only read the "
        "base's weights, or write them, or move the adapter's work into the array?), then add it "
        "here",
    )
    assert found == known, fact
