"""Adapters add up; all but the newest are fixed, whatever an optimiser is given."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.continual.composition import (
    Composition,
    active_adapters,
    add_adapter_,
    train_only_,
)
from aihwkit_lora.errors import ConfigurationError, SealError
from aihwkit_lora.unlearning.adapter_digest import adapter_digest
from aihwkit_lora.unlearning.reference import adapters_in_training
from aihwkit_lora.unlearning.seal import seal_, verify_seals

NAMES = ("forget-1", "learn-2", "forget-2")


def layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A")]


def by_hand(layer, x):
    """``W x + Σ s B A x``, branch by branch, in the order in which they were added."""
    y = layer.get_base_layer()(x)
    for name in NAMES:
        y = y + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
    return y


def test_layers_are_the_sum_of_their_branches(stacked):
    model = stacked(*NAMES, lora_alpha=3)
    for layer in layers(model):
        x = torch.randn(5, layer.in_features)
        assert torch.equal(layer(x), by_hand(layer, x))
    assert active_adapters(model) == NAMES


def test_a_fresh_adapter_adds_nothing_and_copies_nothing(stacked, config, batch):
    model, x = stacked("first"), batch()["new"][0]
    before, mark = model(x), al.fingerprint(model)
    places = [layer.analog_module for _, layer in al.frozen_layers(model)]
    assert add_adapter_(model, "second", config(model, init_lora_weights=True)) is model
    assert torch.equal(model(x), before)
    now = [layer.analog_module for _, layer in al.frozen_layers(model)]
    assert all(a is b for a, b in zip(places, now, strict=True))
    assert al.fingerprint(model) == mark


def test_earlier_adapters_do_not_move_under_weight_decay(stacked, config, batch):
    model = stacked("forget-1", "learn-2")
    x, y = batch()["new"]
    nn.functional.cross_entropy(model(x), y).backward()  # leaves gradients behind
    add_adapter_(model, "forget-2", config(model))
    before = {name: adapter_digest(model, name) for name in NAMES}
    arrays = al.fingerprint(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(5):
        # The order of a beginner: the first step sees what the last task has left.
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), y).backward()
    moved = {name for name in NAMES if adapter_digest(model, name) != before[name]}
    assert moved == {"forget-2"}
    assert al.fingerprint(model) == arrays
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    assert all(".forget-2." in name for name in grads)
    assert adapters_in_training(model) == {"forget-2"}


def test_the_same_seed_gives_the_same_adapter(stacked):
    first, second = stacked(*NAMES), stacked(*NAMES)
    for name in NAMES:
        assert adapter_digest(first, name) == adapter_digest(second, name)


def test_an_adapter_that_was_off_is_on_again(stacked, config):
    model = stacked("a1", "b1")
    model.set_adapter("b1")
    add_adapter_(model, "c1", config(model))
    assert active_adapters(model) == ("a1", "b1", "c1")


def test_adapters_on_different_layers_all_run(frozen, config):
    model = add_adapter_(frozen(), "first", config(frozen(), target_modules=["0"]))
    add_adapter_(model, "second", config(model, target_modules=["2"]))
    assert active_adapters(model) == ("first", "second")
    assert adapters_in_training(model) == {"second"}


def test_on_a_digital_unit_new_adapters_run_on_the_unit(stacked, config, batch):
    ledger, mapping = al.Ledger(), al.chips.get("rm-180nm").mapping
    model = al.digitize_(stacked("first"), al.DigitalUnit(bits=8, sram_kib=64))
    add_adapter_(model, "second", config(model))
    with al.observe(model, ledger, phase="learn", mapping=mapping):
        model(batch()["new"][0])
    assert ledger.total()["adapter_loads"] == 2  # of the second one, in both layers


def test_sealed_adapters_stay_and_hold(stacked, config, batch):
    model, (x, y) = stacked("forget-1"), batch()["new"]
    seal_(model, "forget-1", request="class 1")
    before = model(x)
    add_adapter_(model, "learn-3", config(model, init_lora_weights=True))
    assert active_adapters(model) == ("forget-1", "learn-3")
    assert adapters_in_training(model) == {"learn-3"}
    assert torch.equal(model(x), before)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    verify_seals(model)
    assert not torch.equal(model(x), before)


def test_newest_leaves_earlier_ones_out(stacked, config, batch):
    model, x = stacked("forget-1"), batch()["new"][0]
    bare = model.get_base_model()
    with model.disable_adapter():
        without = bare(x)
    new = config(model, init_lora_weights=True)
    add_adapter_(model, "learn-3", new, composition="newest")
    assert active_adapters(model) == ("learn-3",)
    assert torch.equal(model(x), without)
    assert Composition.NEWEST.meaning.endswith("undone.")


def test_newest_is_refused_beside_a_seal_before_anything_is_added(stacked, config):
    model = stacked("forget-1")
    seal_(model, "forget-1", request="class 1")
    with pytest.raises(SealError, match=r"without sealed adapters, got adapter 'forget-1'.*sum"):
        add_adapter_(model, "learn-3", config(model), composition="newest")
    assert list(model.peft_config) == ["forget-1"]
    verify_seals(model)


def test_disabled_adapters_are_not_active(stacked):
    model = stacked("first")
    with model.disable_adapter():
        assert active_adapters(model) == ()


def test_train_only_changes_who_is_trained_and_nothing_else(stacked):
    model = stacked(*NAMES)
    train_only_(model, "learn-2")
    assert adapters_in_training(model) == {"learn-2"}
    assert active_adapters(model) == NAMES


def test_unknown_names_are_refused(stacked, config):
    model = stacked("first")
    with pytest.raises(ConfigurationError, match=r"unknown composition 'summ'. Did you mean 'sum'"):
        add_adapter_(model, "second", config(model), composition="summ")
    with pytest.raises(ConfigurationError, match=r"adapter 'firt'.*Did you mean 'first'"):
        train_only_(model, "firt")
    with pytest.raises(ConfigurationError, match=r"adapter 'first': .* not used yet, got one of"):
        add_adapter_(model, "first", config(model))
    assert list(model.peft_config) == ["first"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "lora_only"}, r"expected bias='none', got bias='lora_only'"),
        ({"modules_to_save": ["2"]}, r"expected no modules_to_save, got 2.*grow_head_"),
    ],
)
def test_what_changes_more_than_a_branch_is_refused(stacked, config, options, message):
    model = stacked("first")
    with pytest.raises(ConfigurationError, match=message):
        add_adapter_(model, "second", config(model, **options))


def test_only_lora_adds_up(frozen):
    with pytest.raises(ConfigurationError, match="expected a LoraConfig, got IA3Config"):
        add_adapter_(frozen(), "first", IA3Config(target_modules=["0"], feedforward_modules=[]))


def test_a_model_of_stock_peft_is_taken_as_it_is(frozen, config):
    base = frozen()
    model = get_peft_model(base, config(base))
    add_adapter_(model, "second", config(model))
    assert active_adapters(model) == ("default", "second")
