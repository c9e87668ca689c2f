"""Adapters off, and how far they move each layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import (
    ConfigurationError,
    DataError,
    SealError,
    UnsupportedTileError,
)
from aihwkit_lora.unlearning.auditing import audit
from aihwkit_lora.unlearning.metrics import (
    adapter_off_accuracy,
    layer_distance,
    model_accuracy,
)
from aihwkit_lora.unlearning.seal import seal_

CHIP = replace(al.chips.get("rm-180nm"), rows=8, columns=4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 3, 2), nn.Linear(12, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.head(self.body(x).relu().flatten(start_dim=1)))


def adapted(seed: int = 0, **options: object) -> PeftModel:
    torch.manual_seed(seed)
    model = al.freeze_(al.convert(Net(), CHIP), programmed_by="test")
    options = {"r": 2, "lora_alpha": 8, "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(target_modules=["body", "head"], **options))


@pytest.fixture
def model() -> PeftModel:
    return adapted()


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 3, 3, generator=generator), torch.arange(n) % 4) for n in (20, 13)]


def test_off_means_the_frozen_model_alone(model, batches):
    with model.disable_adapter():
        known = [(x, model(x).argmax(dim=1)) for x, _ in batches]
    assert model_accuracy(model, known) < 1.0
    # The reads are noisy, so a few samples near a boundary may flip.
    assert adapter_off_accuracy(model, known) > 0.8
    assert adapter_off_accuracy(model, known) == adapter_off_accuracy(model, known)


def test_accuracy_is_right_answers_over_samples_of_all_batches():
    batches = [(torch.eye(2), torch.tensor([0, 0])), (torch.eye(2)[:1], torch.tensor([0]))]
    assert model_accuracy(nn.Identity(), batches) == 2 / 3


def test_no_batches_are_refused():
    with pytest.raises(DataError, match="one batch or more, got none"):
        model_accuracy(nn.Identity(), [])


def test_gradients_and_modes_are_wanted_as_before(model, batches):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("body" in name and "lora_" in name)
    model.train()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    adapter_off_accuracy(model, batches)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.training
    assert not any(getattr(m, "disable_adapters", False) for m in model.modules())


def test_the_audit_is_around_the_switch(model, batches):
    order: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        order.append(f"{name} on")
        yield
        order.append(f"{name} off")

    adapter_off_accuracy(model, batches, off=lambda: noted("off"), audit=lambda: noted("audit"))
    assert order == ["audit on", "off on", "off off", "audit off"]


def test_a_sealed_model_wants_an_audit(model, batches):
    expected = adapter_off_accuracy(model, batches)
    seal = seal_(model, "default", request="person 2")
    with pytest.raises(SealError, match=r"switch|disable"):
        adapter_off_accuracy(model, batches)
    found = adapter_off_accuracy(model, batches, audit=lambda: audit(model, reason="adapter off"))
    assert found == expected
    assert [entry.kind for entry in seal.log.entries()] == ["seal", "audit-start", "audit-end"]


def test_logits_may_come_in_an_object(batches):
    class Wrapped(Net):
        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(x))

    torch.manual_seed(0)
    plain, wrapped = Net(), Wrapped()
    wrapped.load_state_dict(plain.state_dict())
    assert model_accuracy(wrapped, batches) == model_accuracy(plain, batches)


def test_a_model_without_a_switch_is_refused(batches):
    with pytest.raises(ConfigurationError, match=r"Net: expected a PEFT model.*Pass off="):
        adapter_off_accuracy(Net(), batches)


def relative(delta: torch.Tensor, weight: torch.Tensor) -> float:
    return float(np.sqrt((delta.numpy() ** 2).sum()) / np.sqrt((weight.numpy() ** 2).sum()))


def product(model: PeftModel, layer: str, adapter: str = "default") -> torch.Tensor:
    """Scale times B times A, by hand; alpha over r is 4."""
    lora = model.base_model.model.get_submodule(layer)
    down, up = (m[adapter].weight.detach().double().flatten(1) for m in (lora.lora_A, lora.lora_B))
    return 4.0 * (up @ down)


def base(model: PeftModel, layer: str) -> torch.Tensor:
    weight = model.base_model.model.get_submodule(layer).get_base_layer().weight
    return torch.tensor(weight.detach().tolist(), dtype=torch.float64).flatten(1)


def test_distances_are_those_of_the_products_by_hand(model):
    expected = {
        name: relative(product(model, name), base(model, name)) for name in ("body", "head")
    }
    assert layer_distance(model) == pytest.approx(expected, rel=1e-5)


def test_active_adapters_add_up_and_others_do_not_count(model):
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=8, target_modules=["head"]))
    nn.init.ones_(model.base_model.model.head.lora_B["second"].weight)
    alone = layer_distance(model)
    assert alone["head"] == pytest.approx(relative(product(model, "head"), base(model, "head")))
    model.base_model.set_adapter(["default", "second"])
    both = product(model, "head") + product(model, "head", "second")
    expected = {"body": alone["body"], "head": relative(both, base(model, "head"))}
    assert layer_distance(model) == pytest.approx(expected, rel=1e-5)


def test_on_the_unit_it_is_the_rounded_branch_that_counts(model):
    exact = layer_distance(model)
    al.digitize_(model, al.DigitalUnit(bits=3))
    rounded = layer_distance(model)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.5)


def test_two_models_are_compared_layer_by_layer(model):
    other = adapted(seed=3)
    whole = [
        {name: base(m, name) + product(m, name) for name in ("body", "head")}
        for m in (model, other)
    ]
    expected = {n: relative(whole[0][n] - whole[1][n], whole[1][n]) for n in ("body", "head")}
    assert layer_distance(model, other) == pytest.approx(expected | {"norm": 0.0}, rel=1e-5)


def test_a_hybrid_model_is_compared_with_a_digital_one(model):
    torch.manual_seed(3)
    retrained = Net()
    found = layer_distance(model, retrained)
    ours = base(model, "head") + product(model, "head")
    theirs = retrained.head.weight.detach().double()
    assert found["head"] == pytest.approx(relative(ours - theirs, theirs), rel=1e-5)


def test_a_model_is_no_distance_from_itself(model):
    assert set(layer_distance(model, model).values()) == {0.0}


def test_models_of_other_shapes_are_refused(model):
    with pytest.raises(DataError, match=r"got 'head' with \(4, 12\) and no weight"):
        layer_distance(model, nn.ModuleDict({"body": nn.Conv2d(1, 3, 2), "norm": nn.LayerNorm(4)}))


def test_a_model_without_adapters_is_refused():
    with pytest.raises(DataError, match="expected a model with LoRA layers, found none"):
        layer_distance(Net())


def test_adapters_that_do_not_add_to_the_weight_are_refused():
    with pytest.raises(UnsupportedTileError, match=r"body': expected LoRA branches that add"):
        layer_distance(adapted(use_dora=True))
    scaled = get_peft_model(Net(), IA3Config(target_modules=["head"], feedforward_modules=[]))
    with pytest.raises(UnsupportedTileError, match=r"head': .* got a Linear with \['default'\]"):
        layer_distance(scaled)
