"""From torch layers to tiles of a chip."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from aihwkit.nn import AnalogConv1d, AnalogConv2d, AnalogConv3d, AnalogLinear, AnalogSequential
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.tiles.grid import TileGrid, analog_layers

CHIP = al.chips.get("rm-180nm")


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(300, 130), nn.ReLU())
        self.head = nn.Linear(130, 3, bias=False)


def test_the_original_stays_and_the_copy_keeps_its_class() -> None:
    net = Own()
    weight = net.head.weight.detach().clone()
    model = al.convert(net, CHIP)
    assert type(model) is Own
    assert type(net.head) is nn.Linear
    model.head.set_weights(torch.zeros(3, 130))
    assert torch.equal(net.head.weight, weight)


def test_layers_are_cut_into_the_chips_arrays() -> None:
    layers = dict(analog_layers(al.convert(Own(), CHIP)))
    assert list(layers) == ["body.0", "head"]
    blocks = {name: TileGrid(layer, name).blocks for name, layer in layers.items()}
    assert blocks["body.0"].in_sizes == (100, 100, 100)
    assert blocks["body.0"].out_sizes == (65, 65)
    assert (blocks["head"].in_sizes, blocks["head"].out_sizes) == ((65, 65), (3,))


def test_weights_fill_the_window_and_multiply_as_before() -> None:
    net = Own()
    model = al.convert(net, CHIP)
    for name in ("body.0", "head"):
        layer, digital = model.get_submodule(name), net.get_submodule(name)
        weight, bias = layer.get_weights()
        torch.testing.assert_close(weight, digital.weight.detach(), rtol=0, atol=1e-7)
        assert (bias is None) == (digital.bias is None)
        for tile in layer.analog_tiles():
            assert float(tile.tile.get_weights().abs().max()) == pytest.approx(1.0, abs=1e-6)


def test_excluded_layers_stay_digital() -> None:
    model = al.convert(Own(), CHIP, exclude_modules=["head"])
    assert isinstance(model.body[0], AnalogLinear)
    assert type(model.head) is nn.Linear


def test_a_layer_without_tiles_is_refused() -> None:
    with pytest.raises(al.UnsupportedTileError, match=r"'fc': expected a layer made of tiles, got"):
        TileGrid(nn.Linear(2, 2), "fc")


def test_a_single_layer_is_converted_and_keeps_its_mode() -> None:
    assert isinstance(al.convert(nn.Linear(3, 2), CHIP), AnalogLinear)
    assert not al.convert(nn.Linear(3, 2).eval(), CHIP).training


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv1d(3, 4, 3), AnalogConv1d),
        (nn.Conv2d(3, 4, 3, stride=2, bias=False), AnalogConv2d),
        (nn.Conv3d(3, 4, 3, padding=1), AnalogConv3d),
    ],
)
def test_convolutions_are_converted(layer: nn.Module, kind: type[nn.Module]) -> None:
    weight, bias = al.convert(layer, CHIP).get_weights()
    torch.testing.assert_close(weight, layer.weight.detach().flatten(1), rtol=0, atol=1e-7)
    assert (bias is None) == (layer.bias is None)
    assert isinstance(al.convert(nn.Sequential(layer), CHIP)[0], kind)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"groups": 2}, r"'0\.conv': expected .* groups=2, .*\['0\.conv', '1'\]"),
        ({"padding_mode": "reflect"}, r"'0\.conv': expected .* padding_mode='reflect'"),
        ({"padding": "same"}, r"'0\.conv': expected .* padding='same'\. Change it, or keep"),
    ],
)
def test_convolutions_without_an_analogue_form_are_all_named(
    options: dict[str, Any], match: str
) -> None:
    settings = {"padding": 1} | options
    net = nn.Sequential(
        nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 4, 3, **settings))),
        nn.Conv2d(4, 4, 3, **settings),
        nn.Conv2d(4, 2, 1),
    )
    with pytest.raises(al.UnsupportedTileError, match=match):
        al.convert(net, CHIP)
    model = al.convert(net, CHIP, exclude_modules=["0.conv", "1"])
    assert [name for name, _ in analog_layers(model)] == ["2"]


def test_sequential_models_keep_repeated_activations_mode_and_hooks() -> None:
    calls, activation = [], nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 3), activation, nn.Linear(3, 3), activation).eval()
    net.register_forward_hook(lambda *_: calls.append("called"))
    model = al.convert(net, CHIP)
    assert type(model) is AnalogSequential
    assert len(list(model.analog_tiles())) == 2
    assert model[1] is model[3]
    assert not any(module.training for module in model.modules())
    assert float(model(torch.randn(4, 3)).detach().min()) >= 0
    assert calls == ["called"]
    assert type(net) is nn.Sequential


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.rest = nn.Sequential(nn.ReLU(), self.first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(x))


def test_excluding_one_name_of_a_shared_layer_excludes_it_everywhere() -> None:
    net = nn.ModuleDict({"shared": Shared(), "other": nn.Linear(2, 2)})
    model = al.convert(net, CHIP, exclude_modules=["shared.rest"])
    assert [name for name, _ in analog_layers(model)] == ["other"]


def test_a_layer_used_in_two_places_gets_one_set_of_tiles() -> None:
    model = al.convert(Shared(), CHIP)
    assert isinstance(model.first, AnalogLinear)
    assert model.first is model.rest[1]
    report = al.program_(model, CHIP, seed=0)
    assert [layer.layer for layer in report.layers] == ["first"]
    assert [name for name, _ in al.frozen_layers(al.freeze_(model))] == ["first"]
    assert model.first is model.rest[1]


def test_layers_of_containers_and_below_excluded_ones() -> None:
    net = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)]), "b": nn.Sequential(Own())})
    model = al.convert(net, CHIP)
    names = [name for name, _ in analog_layers(model)]
    assert names == ["a.0", "b.0.body.0", "b.0.head"]
    assert type(model["b"]) is AnalogSequential
    partly = al.convert(net, CHIP, exclude_modules=["b"])
    assert [name for name, _ in analog_layers(partly)] == ["a.0"]
    assert type(partly["b"]) is nn.Sequential
    inner = al.convert(net, CHIP, exclude_modules=("b.0.body", "a"))
    assert [name for name, _ in analog_layers(inner)] == ["b.0.head"]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("haed", r"exclude_modules: .*got 'haed'\. Did you mean 'head'"),
        ("0", r"got '0'\. Known: body\.0\."),
        ("transformer", r"got 'transformer'\. Known: body, head\."),
        ("", r"got ''\. Known: body, head\."),
    ],
)
def test_excluded_names_have_to_exist(name: str, match: str) -> None:
    with pytest.raises(al.ConfigurationError, match=match):
        al.convert(Own(), CHIP, exclude_modules=["head", name])


def test_heads_are_digital_or_analogue() -> None:
    with pytest.raises(al.ConfigurationError, match=r"heads: expected 'digital' .* got 'analog'"):
        al.convert(Own(), CHIP, heads="analog")
    for heads in ("digital", "analogue"):
        layers = analog_layers(al.convert(Own(), CHIP, heads=heads))
        assert [name for name, _ in layers] == ["body.0", "head"]


def test_frozen_models_keep_their_class_through_copies() -> None:
    model = al.freeze_(al.convert(Own(), CHIP), programmed_by="test").eval()
    x = torch.randn(2, 300)
    expected = model.head(model.body(x))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is Own
        assert torch.equal(other.head(other.body(x)), expected)


def test_neither_transformers_nor_peft_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("transformers", "peft")]:
        monkeypatch.delitem(sys.modules, name)
    assert len(list(analog_layers(al.convert(Own(), CHIP)))) == 2
    assert "transformers" not in sys.modules
    assert "peft" not in sys.modules


def test_adapters_come_after_conversion() -> None:
    adapted = get_peft_model(Own(), LoraConfig(r=2, target_modules=["head"]))
    match = r"'base_model\.model\.head': expected a model without adapters, got Linear of PEFT\. .*"
    with pytest.raises(al.StageError, match=match + "program and freeze .* first; then call get_p"):
        al.convert(adapted, CHIP)
    with pytest.raises(al.StageError, match=r"'head': .* PeftModel\.from_pretrained"):
        al.convert(adapted.base_model.model, CHIP)


@pytest.mark.parametrize(
    ("net", "exclude", "match"),
    [
        (nn.Sequential(nn.ReLU()), None, r"Sequential: expected layers that can be analogue"),
        (Own(), ["body.0", "head"], r"Own: expected .* got none\. Check exclude_modules"),
        (al.convert(Own(), CHIP), None, r"'body\.0': expected a digital layer, got AnalogLinear"),
        (AnalogLinear(2, 2), None, r"the whole model: expected a digital layer, got AnalogLinear"),
    ],
)
def test_models_that_cannot_be_converted(
    net: nn.Module, exclude: list[str] | None, match: str
) -> None:
    with pytest.raises(al.StageError, match=match):
        al.convert(net, CHIP, exclude_modules=exclude)
