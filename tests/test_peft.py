"""Plain PEFT on frozen layers: the configuration as it is, and no way to write the base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.tiles.layers import FrozenLinear

CHIP = al.chips.get("rm-180nm")


class Net(nn.Module):
    """A digital first layer, then a frozen encoder and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.encoder = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 8, bias=False))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x)))


def frozen() -> nn.Module:
    torch.manual_seed(0)
    model = al.convert(Net(), CHIP, exclude_modules=["embed"])
    al.program_(model, CHIP, seed=0)
    return al.freeze_(model)


def lora(model: nn.Module, **options: Any) -> LoraConfig:
    defaults = {"r": 2, "target_modules": al.target_modules(model), "init_lora_weights": False}
    return LoraConfig(**(defaults | options))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_names_are_the_same_on_wrapped_and_unwrapped_models() -> None:
    model = frozen()
    names = ["encoder.0", "encoder.2", "head"]
    assert al.target_modules(model) == names
    assert al.target_modules(get_peft_model(model, lora(model))) == names
    partly = frozen()
    assert al.target_modules(get_peft_model(partly, lora(partly, target_modules=["head"]))) == names


def test_fresh_adapters_change_nothing(x: torch.Tensor) -> None:
    model = frozen()
    plain, fingerprint = model(x), al.fingerprint(model)
    adapted = get_peft_model(model, lora(model, init_lora_weights=True)).eval()
    assert torch.equal(adapted(x), plain)
    assert al.fingerprint(adapted) == fingerprint
    wrapped = adapted.base_model.model
    assert isinstance(wrapped.head.base_layer, FrozenLinear)
    assert not hasattr(wrapped.embed, "lora_A")


def test_trainable_parameters_are_those_of_the_adapters_only() -> None:
    adapted = get_peft_model(model := frozen(), lora(model))
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 6
    assert all("lora_" in name for name in trainable)
    assert adapted.get_nb_trainable_parameters()[0] == 2 * (10 + 12 + 12 + 8 + 8 + 3)


def test_an_adapter_learns_while_the_base_stays(x: torch.Tensor) -> None:
    adapted = get_peft_model(model := frozen(), lora(model, init_lora_weights=True))
    fingerprint, goal = al.fingerprint(adapted), torch.ones(4, 3)
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (adapted(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert al.fingerprint(adapted) == fingerprint
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), frozen()(x))


def test_saved_adapters_hold_no_base_weight_and_load_into_an_equal_chip(
    tmp_path: Path, x: torch.Tensor
) -> None:
    adapted = get_peft_model(model := frozen(), lora(model)).eval()
    adapted.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 6
    assert all("lora_" in name for name in stored)
    loaded = PeftModel.from_pretrained(frozen(), tmp_path).eval()
    assert torch.equal(loaded(x), adapted(x))
    assert not torch.equal(loaded(x), frozen()(x))
    assert al.fingerprint(loaded) == al.fingerprint(adapted)


def test_a_second_adapter_adds_to_the_first_which_stays_in_force(x: torch.Tensor) -> None:
    adapted = get_peft_model(model := frozen(), lora(model, target_modules=["head"])).eval()
    hidden = adapted.base_model.model.embed(x)
    hidden = adapted.base_model.model.encoder(hidden)
    head = adapted.base_model.model.head
    for name, rank in (("second", 1), ("third", 3)):
        adapted.add_adapter(name, lora(adapted, target_modules=["head"], r=rank))
    adapted.base_model.set_adapter(["default", "second", "third"])
    branches = [
        head.lora_B[name](head.lora_A[name](hidden)) * head.scaling[name]
        for name in ("default", "second", "third")
    ]
    expected = head.base_layer(hidden) + sum(branches)
    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-5)
    assert all(bool(branch.any()) for branch in branches)
    adapted.delete_adapter("second")
    torch.testing.assert_close(adapted(x), expected - branches[1], rtol=0, atol=1e-5)


def merge_two(adapted: PeftModel) -> None:
    adapted.base_model.merge_adapter(["default"])


@pytest.mark.parametrize(
    "merge",
    [
        lambda m: m.merge_adapter(),
        lambda m: m.merge_adapter(safe_merge=True),
        lambda m: m.merge_and_unload(),
        lambda m: m.merge_and_unload(safe_merge=True),
        merge_two,
    ],
    ids=["merge_adapter", "safe merge_adapter", "merge_and_unload", "safe unload", "by name"],
)
def test_merging_is_refused_and_the_adapter_stays_in_force(
    merge: Callable[[PeftModel], Any], x: torch.Tensor
) -> None:
    adapted = get_peft_model(model := frozen(), lora(model)).eval()
    expected, fingerprint = adapted(x), al.fingerprint(adapted)
    with pytest.raises(al.FrozenConductanceError, match=r"layer 'encoder\.0': .*reprogram_"):
        merge(adapted)
    assert torch.equal(adapted(x), expected)
    assert al.fingerprint(adapted) == fingerprint
    assert not adapted.base_model.model.head.merged


@pytest.mark.parametrize("initialisation", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_rewrite_the_base_are_refused(
    initialisation: str, x: torch.Tensor
) -> None:
    model = frozen()
    expected, fingerprint = model(x), al.fingerprint(model)
    with pytest.raises(al.FrozenConductanceError, match=r"layer 'encoder\.0': .*initialisation"):
        get_peft_model(model, lora(model, init_lora_weights=initialisation))
    assert al.fingerprint(model) == fingerprint
    al.verify(model)
    untouched = copy.deepcopy(frozen())
    assert torch.equal(untouched(x), expected)


@pytest.mark.parametrize(
    "config",
    [
        lambda names: LoraConfig(target_modules=names, use_dora=True),
        lambda names: LoraConfig(target_modules=names, use_rslora=True, lora_dropout=0.1),
        lambda names: LoraConfig(target_modules=names, init_lora_weights="gaussian"),
        lambda names: LoraConfig(target_modules=names, init_lora_weights="orthogonal"),
        lambda names: AdaLoraConfig(target_modules=names, total_step=10),
        lambda names: IA3Config(target_modules=names, feedforward_modules=[]),
    ],
    ids=["dora", "rslora", "gaussian", "orthogonal", "adalora", "ia3"],
)
def test_other_adapters_that_leave_the_base_alone_train(
    config: Callable[[list[str]], Any], x: torch.Tensor
) -> None:
    model = frozen()
    fingerprint = al.fingerprint(model)
    adapted = get_peft_model(model, config(al.target_modules(model)))
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.05)
    before = [p.detach().clone() for p in trainable]
    for _ in range(2):
        adapted(x).square().sum().backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainable, strict=True))
    assert al.fingerprint(adapted) == fingerprint
    al.verify(adapted)


def test_unloading_gives_the_frozen_model_back(x: torch.Tensor) -> None:
    model = frozen()
    expected = model(x)
    unloaded = get_peft_model(model, lora(model)).unload()
    assert isinstance(unloaded.head, FrozenLinear)
    assert torch.equal(unloaded(x), expected)


def two_adapters(**options: Any) -> PeftModel:
    adapted = get_peft_model(model := frozen(), lora(model, **options))
    adapted.add_adapter("second", lora(adapted, **options))
    return adapted.eval()


def with_adapter(adapted: PeftModel, name: str, x: torch.Tensor) -> torch.Tensor:
    adapted.set_adapter(name)
    return adapted(x)


def test_rows_of_one_batch_may_use_different_adapters(x: torch.Tensor) -> None:
    adapted = two_adapters()
    alone = {name: with_adapter(adapted, name, x) for name in ("default", "second")}
    with adapted.disable_adapter():
        alone["__base__"] = adapted(x)
    names = ["second", "__base__", "default", "second"]
    mixed = adapted(x, adapter_names=names)
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(alone["default"], alone["second"])


COMBINATIONS = ["linear", "svd", "cat"]
SPARSE = ["ties", "dare_ties", "dare_linear", "magnitude_prune"]
SPARSE += [f"{combination}_svd" for combination in SPARSE]


@pytest.mark.parametrize("combination", COMBINATIONS + SPARSE)
def test_a_weighted_sum_of_adapters_leaves_the_arrays_alone(
    combination: str, x: torch.Tensor
) -> None:
    adapted = two_adapters()
    before = {name: with_adapter(adapted, name, x) for name in ("default", "second")}
    fingerprint = al.fingerprint(adapted)
    adapted.add_weighted_adapter(
        ["default", "second"], [0.5, 2.0], "both", combination,
        **({"density": 0.5} if combination in SPARSE else {}),
    )  # fmt: skip
    for name, expected in before.items():
        assert torch.equal(with_adapter(adapted, name, x), expected)
    both = with_adapter(adapted, "both", x)
    assert bool(both.isfinite().all())
    assert not torch.equal(both, before["default"])
    assert al.fingerprint(adapted) == fingerprint
    if combination == "cat":
        head = adapted.base_model.model.head
        delta = 0.5 * head.get_delta_weight("default") + 2.0 * head.get_delta_weight("second")
        torch.testing.assert_close(head.get_delta_weight("both"), delta)


def test_a_digital_layer_may_be_trained_and_saved_whole(tmp_path: Path, x: torch.Tensor) -> None:
    model = frozen()
    fingerprint, config = al.fingerprint(model), lora(model, modules_to_save=["embed"])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        adapted.base_model.model.embed.modules_to_save["default"].weight.mul_(2.0)
    adapted.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(frozen(), tmp_path).eval()
    assert torch.equal(loaded(x), adapted(x))
    assert al.fingerprint(adapted) == al.fingerprint(loaded) == fingerprint


def test_a_frozen_layer_among_modules_to_save_shows_in_the_fingerprint() -> None:
    """PEFT copies it, and a copy is one more array. AnalogLoraConfig refuses this beforehand."""
    model = frozen()
    fingerprint = al.fingerprint(model)
    config = lora(model, target_modules=["encoder.0"], modules_to_save=["head"])
    assert al.fingerprint(get_peft_model(model, config)) != fingerprint


@pytest.mark.parametrize(
    ("bias", "trained"), [("all", {"embed", "encoder.0", "head"}), ("lora_only", {"encoder.0"})]
)
def test_digital_biases_may_be_trained(bias: str, trained: set[str]) -> None:
    model = frozen()
    targets = ["encoder.0", "encoder.2"]
    fingerprint = al.fingerprint(model)
    adapted = get_peft_model(model, lora(model, target_modules=targets, bias=bias))
    names = {name for name, p in adapted.named_parameters() if p.requires_grad and "bias" in name}
    plain = {name.removeprefix("base_model.model.").removesuffix(".bias") for name in names}
    assert {name.removesuffix(".base_layer") for name in plain} == trained
    assert al.fingerprint(adapted) == fingerprint


def test_methods_of_different_kinds_compute_together(x: torch.Tensor) -> None:
    model = frozen()
    fingerprint, plain = al.fingerprint(model), model(x)
    mixed = get_peft_model(model, lora(model), adapter_name="first", mixed=True)
    mixed.add_adapter("second", LoHaConfig(target_modules=["head"], r=2, init_weights=False))
    mixed.eval().set_adapter(["first", "second"])
    together = mixed(x)
    mixed.set_adapter("first")
    assert not torch.equal(mixed(x), together)
    with pytest.raises(al.FrozenConductanceError, match=r"layer 'encoder\.0'"):
        mixed.merge_adapter()
    unloaded = mixed.unload()
    assert torch.equal(unloaded(x), plain)
    assert al.fingerprint(unloaded) == fingerprint


def test_a_second_adapter_that_is_refused_leaves_the_first_in_force(x: torch.Tensor) -> None:
    adapted = get_peft_model(model := frozen(), lora(model)).eval()
    expected, fingerprint = adapted(x), al.fingerprint(adapted)
    with pytest.raises(al.FrozenConductanceError, match="initialisation"):
        adapted.add_adapter("second", lora(adapted, init_lora_weights="pissa"))
    assert torch.equal(adapted(x), expected)
    assert al.fingerprint(adapted) == fingerprint
    assert list(adapted.peft_config) == ["default"]
    adapted.add_adapter("second", lora(adapted))
    assert torch.equal(adapted.eval()(x), expected)
    assert not torch.equal(with_adapter(adapted, "second", x), expected)


def test_merging_where_digital_layers_come_first_keeps_the_function(x: torch.Tensor) -> None:
    """PEFT merges layer by layer, so digital ones are merged before the first frozen one raises.

    Nothing is lost: what is merged is in force through the weights, and can be taken out again.
    """
    adapted = get_peft_model(model := frozen(), lora(model, target_modules="all-linear")).eval()
    expected, fingerprint = adapted(x), al.fingerprint(adapted)
    with pytest.raises(al.FrozenConductanceError, match=r"layer 'encoder\.0'"):
        adapted.merge_adapter()
    net = adapted.base_model.model
    assert net.embed.merged
    assert not net.head.merged
    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-5)
    net.embed.unmerge()
    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-5)
    assert al.fingerprint(adapted) == fingerprint


def test_adapters_load_without_being_initialised_first(tmp_path: Path, x: torch.Tensor) -> None:
    adapted = get_peft_model(model := frozen(), lora(model)).eval()
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(frozen(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(loaded(x), adapted(x))


def test_adalora_moves_its_ranks_around_and_no_weight() -> None:
    model = frozen()
    fingerprint = al.fingerprint(model)
    config = AdaLoraConfig(
        target_modules=al.target_modules(model), init_r=4, target_r=2, total_step=6, tinit=1
    )
    adapted = get_peft_model(model, config)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        adapted(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        adapted.base_model.update_and_allocate(step)
    assert al.fingerprint(adapted) == fingerprint
    al.verify(adapted)
