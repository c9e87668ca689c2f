"""AnalogLoraConfig: it names the frozen layers, fits the SRAM, and saves an ordinary LoRA."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.adapters import AnalogLoraConfig, DigitalUnit, digitize_


class Net(nn.Module):
    """Frozen layers of three shapes, a digital one, and a digital one with a similar name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.body = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16, bias=False))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 4, 3)
        self.two = nn.Conv2d(4, 6, (3, 2))
        self.head = nn.Linear(6, 4)


FROZEN = {"body.0", "body.2", "head"}
WEIGHTS = 16 + 12 + 12 + 16 + 16 + 4
"""Of adapters on them, per rank."""


def frozen(net: nn.Module | None = None, digital: tuple[str, ...] = ("embed",)) -> nn.Module:
    torch.manual_seed(0)
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = config.mapping.max_output_size = 8
    model = convert_to_analog(
        net or Net(), config, ensure_analog_root=False, exclude_modules=list(digital)
    )
    return al.freeze_(model, programmed_by="test")


def kib(weights: int, bits: int) -> float:
    return weights * bits / 8 / 1024


def size_kib(adapted: nn.Module, bits: int) -> float:
    """Of all that PEFT has created; magnitudes are not in fixed point."""
    widths = [
        (parameter.numel(), 16 if "magnitude" in name else bits)
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    ]
    return sum(kib(weights, width) for weights, width in widths)


def test_importing_the_package_does_not_import_peft() -> None:
    code = "import sys, aihwkit_lora.adapters; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_the_package_has_no_other_attributes() -> None:
    import aihwkit_lora.adapters as package

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_all_frozen_layers_and_only_these_are_adapted() -> None:
    model = frozen()
    config = AnalogLoraConfig.for_model(model, r=3)
    assert config.target_modules == FROZEN
    adapted = get_peft_model(model, config)
    assert set(adapted.base_model.targeted_module_names) == FROZEN
    assert adapted.get_nb_trainable_parameters()[0] == 3 * WEIGHTS


def test_targets_that_are_given_stay() -> None:
    assert AnalogLoraConfig.for_model(frozen(), target_modules=["head"]).target_modules == {"head"}
    config = AnalogLoraConfig.for_model(frozen(), target_modules=r"body\..*")
    assert config.target_modules == r"body\..*"


def test_a_digital_layer_whose_name_ends_alike_is_left_out() -> None:
    """PEFT takes the name 'head' for 'decoder.head', too."""
    net = Net()
    net.decoder = nn.ModuleDict({"head": nn.Linear(4, 4)})
    model = frozen(net, digital=("embed", "decoder.head"))
    config = AnalogLoraConfig.for_model(model, r=1)
    assert config.target_modules == r"body\.0|body\.2|head"
    adapted = get_peft_model(model, config)
    assert set(adapted.base_model.targeted_module_names) == FROZEN


def test_a_second_adapter_finds_the_layers_below_the_first() -> None:
    adapted = get_peft_model(frozen(), AnalogLoraConfig.for_model(model := frozen(), r=1))
    config = AnalogLoraConfig.for_model(adapted, r=2)
    assert config.target_modules == FROZEN
    adapted.add_adapter("second", config)
    assert adapted.base_model.model.head.r == {"default": 1, "second": 2}
    partly = get_peft_model(model, LoraConfig(target_modules=["head"]))
    assert AnalogLoraConfig.for_model(partly).target_modules == FROZEN


def test_without_a_model_targets_have_to_be_named() -> None:
    with pytest.raises(al.ConfigurationError, match=r"got none.*AnalogLoraConfig\.for_model\(mod"):
        AnalogLoraConfig(r=2)
    assert AnalogLoraConfig(r=2, target_modules=["head"]).target_modules == {"head"}


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(3, 2)), nn.Linear(3, 2)])
def test_a_model_without_frozen_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(al.StageError, match=r"got none\. Call freeze_\(model\) first"):
        AnalogLoraConfig.for_model(model)


@pytest.mark.parametrize("bits", [0, -8])
def test_widths_are_positive(bits: int) -> None:
    with pytest.raises(al.ConfigurationError, match=f"expected bits of at least 1, got {bits}"):
        AnalogLoraConfig(target_modules=["head"], bits=bits)


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan")])
def test_memory_is_positive(size: float) -> None:
    with pytest.raises(al.ConfigurationError, match=f"expected sram_kib above 0, got {size} KiB"):
        AnalogLoraConfig(target_modules=["head"], sram_kib=size)


@pytest.mark.parametrize("bits", [1, 6, 8, 16, 32])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_budget_is_exact(bits: int, rank: int) -> None:
    model, enough = frozen(), kib(rank * WEIGHTS, bits)
    AnalogLoraConfig.for_model(model, r=rank, bits=bits, sram_kib=enough)
    needed = rf"{enough:.4g} KiB for 3 layers at rank {rank} and {bits} bits"
    hint = rf"largest rank that fits is r={rank - 1}\." if rank > 1 else "No rank fits"
    with pytest.raises(al.ConfigurationError, match=rf"{needed}.*{hint}"):
        AnalogLoraConfig.for_model(model, r=rank, bits=bits, sram_kib=enough - kib(1, 1))


def test_the_error_says_what_is_needed_available_and_possible() -> None:
    with pytest.raises(al.ConfigurationError) as error:
        AnalogLoraConfig.for_model(frozen(), r=64, sram_kib=1.5)
    assert str(error.value) == (
        "AnalogLoraConfig: expected adapters that fit 1.5 KiB of SRAM, got 9.5 KiB for 3 layers "
        "at rank 64 and 16 bits. The largest rank that fits is r=10."
    )
    AnalogLoraConfig.for_model(frozen(), r=10, sram_kib=1.5)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3},
    "rank by layer": {"r": 3, "rank_pattern": {"head": 5, r"body\.2": 1}},
    "rank by pattern": {"r": 3, "rank_pattern": {r"body\..": 2}},
    "alpha by layer": {"r": 3, "alpha_pattern": {"head": 64}},
    "some layers": {"r": 3, "target_modules": ["head", "0"]},
    "pattern": {"r": 3, "target_modules": r"body\.[02]"},
    "all linear": {"r": 3, "target_modules": "all-linear"},
    "all but": {"r": 3, "exclude_modules": ["head"]},
    "digital too": {"r": 3, "target_modules": ["embed", "head"]},
    "magnitudes": {"r": 3, "use_dora": True},
    "bias in B": {"r": 3, "lora_bias": True, "target_modules": ["body.0", "head"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_budget_counts_what_peft_creates(options: dict[str, Any]) -> None:
    model = frozen()
    adapted = get_peft_model(model, AnalogLoraConfig.for_model(model, **options))
    enough = size_kib(adapted, 8)
    AnalogLoraConfig.for_model(frozen(), sram_kib=enough, bits=8, **options)
    with pytest.raises(al.ConfigurationError, match="expected adapters that fit"):
        AnalogLoraConfig.for_model(frozen(), sram_kib=enough - kib(1, 1), bits=8, **options)


@pytest.mark.parametrize("options", [{"r": 3}, {"r": 4, "use_dora": True}])
def test_the_budget_counts_kernels(options: dict[str, Any]) -> None:
    model = frozen(ConvNet(), digital=())
    adapted = get_peft_model(model, AnalogLoraConfig.for_model(model, **options))
    enough = size_kib(adapted, 8)
    again = frozen(ConvNet(), digital=())
    AnalogLoraConfig.for_model(again, sram_kib=enough, bits=8, **options)
    with pytest.raises(al.ConfigurationError, match="expected adapters that fit"):
        AnalogLoraConfig.for_model(again, sram_kib=enough - kib(1, 1), bits=8, **options)


ON_UNIT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank by layer": {"rank_pattern": {"head": 5, r"body\.2": 1}},
    "magnitudes": {"use_dora": True},
    "bias in B": {"lora_bias": True, "target_modules": ["body.0", "head"]},
}


@pytest.mark.parametrize("options", ON_UNIT.values(), ids=ON_UNIT.keys())
@pytest.mark.parametrize("bits", [5, None])
def test_the_budget_is_that_of_the_unit(options: dict[str, Any], bits: int | None) -> None:
    adapted = get_peft_model(model := frozen(), AnalogLoraConfig.for_model(model, r=3, **options))
    size = size_kib(adapted, bits or 16)
    enough = DigitalUnit(bits=bits, sram_kib=size)
    AnalogLoraConfig.for_model(frozen(), unit=enough, r=3, **options)
    digitize_(adapted, enough)
    short = DigitalUnit(bits=bits, sram_kib=size - kib(1, 1))
    with pytest.raises(al.ConfigurationError, match="AnalogLoraConfig: expected adapters that"):
        AnalogLoraConfig.for_model(frozen(), unit=short, r=3, **options)
    with pytest.raises(al.ConfigurationError, match="digital unit: expected active adapters"):
        digitize_(adapted, short)


@pytest.mark.parametrize("also", [{"bits": 8}, {"sram_kib": 1.0}, {"bits": 8, "sram_kib": 1.0}])
def test_memory_is_given_by_the_unit_or_by_itself(also: dict[str, Any]) -> None:
    unit = DigitalUnit(bits=4, sram_kib=2.0)
    config = AnalogLoraConfig.for_model(frozen(), unit=unit)
    assert (config.bits, config.sram_kib) == (4, 2.0)
    both = " and ".join(sorted(also))
    with pytest.raises(al.ConfigurationError, match=f"expected a unit or {both}, got both"):
        AnalogLoraConfig.for_model(frozen(), unit=unit, **also)


def test_the_largest_rank_leaves_layers_with_a_rank_of_their_own_alone() -> None:
    # 5 * (16 + 4) weights of the head, and r * (28 + 28) of the others.
    budget = kib(5 * 20 + 7 * 56, 16)
    options = {"rank_pattern": {"head": 5}, "sram_kib": budget}
    with pytest.raises(al.ConfigurationError, match=r"largest rank that fits is r=7\."):
        AnalogLoraConfig.for_model(frozen(), r=9, **options)
    AnalogLoraConfig.for_model(frozen(), r=7, **options)
    only = {"rank_pattern": {"head": 5, "body.*": 100}, "sram_kib": budget}
    with pytest.raises(al.ConfigurationError, match=r"No rank fits: .* lower rank_pattern"):
        AnalogLoraConfig.for_model(frozen(), r=1, **only)


def test_adapters_in_place_share_the_memory() -> None:
    model = frozen()
    adapted = get_peft_model(model, AnalogLoraConfig.for_model(model, r=2))
    both = kib(5 * WEIGHTS, 16)
    AnalogLoraConfig.for_model(adapted, r=3, sram_kib=both)
    with pytest.raises(al.ConfigurationError, match=r"beside 0\.2969 KiB of adapters.*r=3\."):
        AnalogLoraConfig.for_model(adapted, r=4, sram_kib=both)


def test_targets_that_cannot_be_counted_are_named() -> None:
    net = Net()
    net.lookup = nn.Embedding(3, 4)
    model = frozen(net)
    options = {"target_modules": ["head", "lookup"]}
    AnalogLoraConfig.for_model(model, **options)
    with pytest.raises(al.ConfigurationError, match=r"layer 'lookup': .* got Embedding, whose"):
        AnalogLoraConfig.for_model(model, sram_kib=64, **options)


@pytest.mark.parametrize(("wanted", "layer"), [("head", "head"), ("body", r"body\.0")])
def test_a_frozen_layer_cannot_be_trained_whole(wanted: str, layer: str) -> None:
    model = frozen()
    fingerprint = al.fingerprint(model)
    with pytest.raises(al.ConfigurationError, match=rf"layer '{layer}': .* got '{wanted}'"):
        AnalogLoraConfig.for_model(model, modules_to_save=[wanted])
    adapted = get_peft_model(model, AnalogLoraConfig.for_model(model, modules_to_save=["embed"]))
    assert al.fingerprint(adapted) == fingerprint


def same(config: AnalogLoraConfig) -> AnalogLoraConfig:
    return config


@pytest.mark.parametrize("copied", [same, copy.deepcopy, lambda config: replace(config, r=3)])
def test_what_is_saved_is_an_ordinary_lora(
    copied: Callable[[AnalogLoraConfig], AnalogLoraConfig], tmp_path: Path
) -> None:
    model = frozen()
    config = copied(AnalogLoraConfig.for_model(model, r=3, sram_kib=64, bits=8))
    assert (config.sram_kib, config.bits) == (64, 8)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    ordinary = LoraConfig(r=3, target_modules=sorted(FROZEN))
    assert set(saved) == set(ordinary.to_dict())
    assert saved["peft_type"] == "LORA"
    assert set(saved["target_modules"]) == FROZEN
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    loaded = PeftModel.from_pretrained(frozen(), tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig


DIGITAL = """
import sys, warnings
import torch
from peft import PeftConfig, PeftModel
from torch import nn

warnings.simplefilter("error")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.body = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16, bias=False))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(self.embed(x)))


folder, result = sys.argv[1:]
config = PeftConfig.from_pretrained(folder)
net = Net()
net.load_state_dict(torch.load(folder + "/net.pt"))
model = PeftModel.from_pretrained(net, folder)
torch.save(model(torch.ones(2, 6)).detach(), result)
assert not [name for name in sys.modules if name.startswith("aihwkit")]
print(type(config).__name__, sorted(config.target_modules))
"""


def test_stock_peft_loads_it_onto_an_ordinary_model_without_this_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    model = frozen(copy.deepcopy(net))
    options = {"rank_pattern": {"head": 2}, "init_lora_weights": False}
    config = AnalogLoraConfig.for_model(model, r=3, sram_kib=64, bits=8, **options)
    get_peft_model(model, config).save_pretrained(tmp_path)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    done = subprocess.run(
        [sys.executable, "-c", DIGITAL, str(tmp_path), str(tmp_path / "y.pt")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LoraConfig ['body.0', 'body.2', 'head']"
    expected = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path).eval()(torch.ones(2, 6))
    assert torch.equal(torch.load(tmp_path / "y.pt"), expected)
    assert not torch.equal(net(torch.ones(2, 6)), expected)
