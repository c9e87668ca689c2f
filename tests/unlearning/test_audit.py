"""Audits: seals are lifted on the record, and everything is as before afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, SealError
from aihwkit_lora.unlearning.auditing import audit
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_, verify_seals

Make = Callable[..., PeftModel]


@pytest.fixture(params=[False, True], ids=["floats", "unit"])
def sealed(request: pytest.FixtureRequest, two_adapters: Make) -> PeftModel:
    model = two_adapters()
    if request.param:
        al.digitize_(model, al.DigitalUnit(bits=8))
    seal_(model, "forget", request="person 2")
    return model


def state(model: PeftModel) -> dict[str, object]:
    return {
        "active": (model.active_adapter, [*model.active_adapters], model._adapters_disabled),
        "flags": {name: each.requires_grad for name, each in model.named_parameters()},
        "layers": [
            (list(m.active_adapters), m.disable_adapters, dict(m.scaling))
            for m in model.modules()
            if hasattr(m, "lora_A")
        ],
        "forget": [
            each.detach().numpy().tobytes()
            for name, each in model.named_parameters()
            if ".forget." in name
        ],
    }


def off(model: PeftModel, x: Tensor) -> None:
    with model.disable_adapter():
        model(x)


def trained_further(model: PeftModel, x: Tensor) -> None:
    parameters = [each for name, each in model.named_parameters() if ".forget." in name]
    for each in parameters:
        each.requires_grad_(True)
    model(x).sum().backward()
    torch.optim.SGD(parameters, lr=0.1).step()


def swapped(model: PeftModel, x: Tensor) -> None:
    layer = model.base_model.model[0]
    layer.lora_B["forget"] = nn.Linear(2, 12, bias=False)
    layer.lora_dropout["forget"] = nn.Dropout(0.5)
    model(x)


def written(model: PeftModel, x: Tensor) -> None:
    model.base_model.model[0].lora_B["forget"].weight.data.zero_()
    model.base_model.model[3].lora_B["forget"].half()


def first_factor(model: PeftModel) -> Tensor:
    factor: Tensor = model.base_model.model[0].lora_A["forget"].weight
    return factor


INSIDE = {
    "disable_adapter": off,
    "disable_adapter_layers": lambda m, x: m.disable_adapter_layers(),
    "set_adapter": lambda m, x: m.set_adapter("learn"),
    "scale_layer": lambda m, x: m.base_model.model[0].scale_layer(0.0),
    "set_scale": lambda m, x: m.base_model.model[0].set_scale("forget", 0.0),
    "set_requires_grad": lambda m, x: m.set_requires_grad("forget"),
    "direct": lambda m, x: setattr(m.base_model.model[0], "_disable_adapters", True),
    "adapter_names": lambda m, x: m(x, adapter_names=["__base__"] * len(x)),
    "training": trained_further,
    "swapping": swapped,
    "writing": written,
    "requires_grad": lambda m, x: first_factor(m).requires_grad_(True),
}


@pytest.mark.parametrize("what", INSIDE)
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before_afterwards(
    sealed: PeftModel, inputs: Tensor, what: str, fails: bool
) -> None:
    before, expected = state(sealed), sealed(inputs)
    try:
        with audit(sealed, reason="yearly check") as model:
            INSIDE[what](model, inputs)
            assert not fails
    except AssertionError:
        assert fails
    assert state(sealed) == before
    assert torch.equal(sealed(inputs), expected)
    verify_seals(sealed)


def test_inside_the_base_shows(sealed: PeftModel, inputs: Tensor) -> None:
    plain = copy.deepcopy(sealed.base_model.model)
    bare = nn.Sequential(*(getattr(each, "base_layer", each) for each in plain))
    with audit(sealed, reason="yearly check"), sealed.disable_adapter():
        assert torch.equal(sealed(inputs), bare(inputs))
    assert not torch.equal(sealed(inputs), bare(inputs))


@pytest.mark.parametrize(
    "attempt",
    [
        lambda m: m.delete_adapter("forget"),
        lambda m: m.unload(),
        lambda m: m.merge_adapter(),
        lambda m: m.merge_and_unload(),
        lambda m: m.base_model.model[0].merge(),
        lambda m: m.base_model.model[0].delete_adapter("forget"),
        lambda m: m.add_weighted_adapter(["forget"], [1.0], "copy", combination_type="linear"),
        lambda m: m.load_adapter("anywhere", "forget"),
    ],
)
def test_sealed_adapters_stay_in_audits_too(
    sealed: PeftModel, attempt: Callable[..., None]
) -> None:
    with audit(sealed, reason="check"), pytest.raises(SealError, match="stays for good, in audits"):
        attempt(sealed)
    verify_seals(sealed)


def test_each_seal_has_each_audit_in_its_log(two_adapters: Make) -> None:
    model, first, second = two_adapters(), RequestLog(None), RequestLog(None)
    seal_(model, "forget", request="person 2", log=first)
    seal_(model, "learn", request="person 4", log=second)
    with audit(model, reason="yearly check"):
        assert [entry.kind for entry in first.entries()] == ["seal", "audit-start"]
    with pytest.raises(KeyError), audit(nn.ModuleDict({"inner": model}), reason="again"):
        raise KeyError
    for log, request in ((first, "person 2"), (second, "person 4")):
        kinds = [(e.kind, e.fields.get("reason"), e.fields.get("outcome")) for e in log.entries()]
        assert kinds == [
            ("seal", None, None),
            ("audit-start", "yearly check", None),
            ("audit-end", "yearly check", "finished"),
            ("audit-start", "again", None),
            ("audit-end", "again", "stopped by KeyError"),
        ]
        assert {entry.request for entry in log.entries()} == {request}
        assert log.verify() == 5


def test_audits_nest(sealed: PeftModel, inputs: Tensor) -> None:
    with audit(sealed, reason="outer"):
        with audit(sealed, reason="inner"):
            sealed.disable_adapter_layers()
        with sealed.disable_adapter():
            sealed(inputs)
    verify_seals(sealed)
    with pytest.raises(SealError, match="disable_adapter"):
        sealed.disable_adapter()


def test_copies_made_inside_are_sealed(sealed: PeftModel) -> None:
    with audit(sealed, reason="check"):
        twin = copy.deepcopy(sealed)
    with pytest.raises(SealError, match="disable_adapter"):
        twin.disable_adapter()


def test_nothing_is_sealed_during_an_audit(sealed: PeftModel) -> None:
    with (
        audit(sealed, reason="check"),
        pytest.raises(SealError, match="expected seals that are in force, got a running audit"),
    ):
        seal_(sealed, "learn", request="person 4")


@pytest.mark.parametrize("reason", ["", "x" * 201])
def test_without_a_short_reason_nothing_is_lifted(sealed: PeftModel, reason: str) -> None:
    with (
        pytest.raises(ConfigurationError, match="'reason': expected"),
        audit(sealed, reason=reason),
    ):
        pass
    with pytest.raises(SealError, match="disable_adapter"):
        sealed.disable_adapter()


def test_there_has_to_be_a_seal(two_adapters: Make) -> None:
    with (
        pytest.raises(SealError, match="expected sealed adapters to audit, got none"),
        audit(two_adapters(), reason="check"),
    ):
        pass
