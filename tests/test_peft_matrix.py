"""Every method of PEFT on every kind of tile: the coverage table, and how it finds out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.recipes.coverage.peft_methods import (
    TILE_KINDS,
    Method,
    Verdict,
    methods,
    rows,
    try_method,
)
from aihwkit_lora.recipes.coverage.peft_trials import (
    FAMILIES,
    batch,
    digital_model,
    frozen_model,
)
from aihwkit_lora.tiles.layers import FrozenLinear

pytestmark = [
    # PEFT 0.21 and transformers 5 about themselves; see also the filters in try_method.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

METHODS = methods()
WORKING = [m for m in METHODS if m.expected not in (Verdict.REFUSED, Verdict.NOT_APPLICABLE)]
FAILING = [m for m in METHODS if m not in WORKING]
FIRST = next(iter(TILE_KINDS))


@functools.cache
def chips(family: str, kind: str) -> Callable[[], nn.Module]:
    return frozen_model(family, TILE_KINDS[kind]())


def cases() -> list[Any]:
    """Language models on the first kind of tile only, but for the slow tests."""
    return [
        pytest.param(
            method,
            kind,
            id=f"{method.name}-{kind}",
            marks=[pytest.mark.slow] if method.family.startswith("lang") and kind != FIRST else [],
        )
        for method in METHODS
        for kind in TILE_KINDS
    ]


def named(chosen: list[Method]) -> list[Any]:
    return [pytest.param(method, id=method.name) for method in chosen]


@pytest.mark.parametrize(("method", "kind"), cases())
def test_a_method_does_what_the_table_says(method: Method, kind: str) -> None:
    twin = functools.partial(digital_model, method.family)
    outcome = try_method(method, chips(method.family, kind), batch(method.family), twin)
    assert outcome.verdict is method.expected, outcome.error
    assert outcome.unchanged
    if method in FAILING:
        assert outcome.error
        return
    assert outcome.losses[-1] < outcome.losses[0]
    assert outcome.reloaded is method.reloads
    assert outcome.merge == method.merge
    assert outcome.kept


def test_the_table_has_every_type_of_peft_once_or_more() -> None:
    assert {method.peft_type for method in METHODS} == {str(kind.value) for kind in PeftType}
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    assert {method.family for method in METHODS} == set(FAMILIES)


def test_every_layer_of_the_little_models_is_several_tiles() -> None:
    for family in FAMILIES:
        for kind in TILE_KINDS:
            layers = [layer for _, layer in al.frozen_layers(chips(family, kind)())]
            assert len(layers) >= 3
            assert all(layer.analog_module.blocks.tiles >= 2 for layer in layers)


@pytest.mark.parametrize("method", named(FAILING))
def test_what_is_refused_works_on_an_ordinary_model_and_what_is_not_applicable_does_not(
    method: Method,
) -> None:
    model, names = digital_model(method.family), ["body.0", "body.2", "head"]

    def attach() -> None:
        config = method.config(names)
        if method.prepare is not None:
            method.prepare(model, config, batch(method.family))
        get_peft_model(model, config)

    if method.expected is Verdict.REFUSED:
        attach()
    else:
        with pytest.raises(ValueError, match="bitsandbytes is not available"):
            attach()


@pytest.mark.parametrize("method", named([m for m in FAILING if m.expected is Verdict.REFUSED]))
def test_refusals_say_why(method: Method) -> None:
    from_peft = {
        "GLoRA": r"ValueError: Target module FrozenLinear",
        "LoRA, target_parameters": r"NoMatchingPeftModuleError: No `target_modules` passed",
    }
    ours = "FrozenConductanceError: layer 'body.0': expected the frozen weight to be read, got "
    outcome = try_method(method, chips("linear", FIRST), batch("linear"))
    assert outcome.verdict is Verdict.REFUSED
    assert outcome.error.startswith(from_peft.get(method.name, ours))


@pytest.mark.parametrize("method", named([m for m in WORKING if m.family != "language model"]))
def test_adapters_come_and_go(method: Method) -> None:
    """A second adapter, switching, disabling and unloading: the arrays compute as ever."""
    x, family = batch(method.family), FAMILIES[method.family]
    base = chips(method.family, FIRST)().eval()
    fingerprint, plain = al.fingerprint(base), seeded(family.call, base, x)
    adapted = attached(method, base, x)
    first = seeded(family.call, adapted, x)
    biased = "bias=" in method.name  # trained biases are the layer's own and stay
    with adapted.disable_adapter():
        assert biased or torch.equal(seeded(family.call, adapted, x), plain)
    assert torch.equal(seeded(family.call, adapted, x), first)
    if not biased and method.peft_type != "ADALORA":  # PEFT allows one of these
        adapted.add_adapter("second", method.config(al.target_modules(adapted)))
        assert torch.equal(seeded(family.call, adapted.eval(), x), first)
        adapted.set_adapter("second")
        assert not torch.equal(seeded(family.call, adapted, x), first)
        adapted.set_adapter("default")
        adapted.delete_adapter("second")
        assert torch.equal(seeded(family.call, adapted, x), first)
    unloaded = adapted.unload()
    assert biased or torch.equal(seeded(family.call, unloaded, x), plain)
    assert al.fingerprint(unloaded) == fingerprint
    assert not [module for module in unloaded.modules() if isinstance(module, BaseTunerLayer)]
    al.verify(unloaded)


def attached(method: Method, base: nn.Module, x: Tensor) -> PeftModel:
    """Attach a method and give its adapter other than initial values."""
    torch.manual_seed(3)
    adapted: PeftModel = get_peft_model(base, method.config(al.target_modules(base)))
    if method.finish is not None:
        method.finish(adapted, x)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return adapted.eval()


def seeded(call: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return call(model, x).detach()


PLAIN = METHODS[0]


def test_the_trial_notices_a_merge_that_gets_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were ``weight`` a writable copy, merging would pass and the adapter would be gone."""
    weight = property(lambda layer: layer.analog_module.logical_weight().clone())
    monkeypatch.setattr(FrozenLinear, "weight", weight)
    outcome = try_method(PLAIN, chips("linear", FIRST), batch("linear"))
    assert outcome.verdict is Verdict.YES
    assert outcome.merge == "digital"
    assert not outcome.kept


def test_the_trial_notices_an_attach_that_changes_the_model() -> None:
    def prepare(model: nn.Module, config: Any, x: Tensor) -> None:
        model.stem.weight.data.add_(1.0)
        raise ValueError("after the fact")

    def config(names: list[str]) -> LoraConfig:
        return LoraConfig(target_modules=names)

    late = Method(name="late", peft_type="LORA", config=config, prepare=prepare)
    outcome = try_method(late, chips("linear", FIRST), batch("linear"))
    assert outcome.error == "ValueError: after the fact"
    assert not outcome.unchanged


def test_x_lora_loses_its_classifier_on_an_ordinary_model_too(tmp_path: Any) -> None:
    method = next(method for method in METHODS if method.peft_type == "XLORA")
    assert not method.reloads
    x, call = batch(method.family), FAMILIES[method.family].call
    adapted = get_peft_model(digital_model(method.family), method.config([])).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(digital_model(method.family), tmp_path).eval()
    assert not torch.equal(seeded(call, loaded, x), seeded(call, adapted, x))


def test_rows_are_strings_and_point_out_what_was_not_expected() -> None:
    pissa = next(method for method in METHODS if "PiSSA" in method.name)
    wrong = Method(name="wrong", peft_type="LORA", config=pissa.config, note="a note")
    table = rows({"small": TILE_KINDS[FIRST]}, [PLAIN, pissa, wrong])
    assert table == [
        ["method", "PEFT type", "small", "merging", "note"],
        ["LoRA, plain", "LORA", "yes", "refused", ""],
        ["LoRA, PiSSA start", "LORA", "refused", "", "starts by rewriting the weights"],
        ["wrong", "LORA", "refused (expected: yes)", "refused", "a note"],
    ]
