"""From torch layers to tiles of a chip."""

from __future__ import annotations

import pytest
import torch
from aihwkit.nn import AnalogLinear
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


def test_a_layer_without_tiles_of_a_linear_layer_is_refused() -> None:
    with pytest.raises(al.UnsupportedTileError, match=r"'fc': expected an AnalogLinear, got Lin"):
        TileGrid(nn.Linear(2, 2), "fc")


@pytest.mark.parametrize(
    ("net", "exclude", "match"),
    [
        (nn.Sequential(nn.ReLU()), None, r"Sequential: expected layers that can be analogue"),
        (Own(), ["body.0", "head"], r"Own: expected .* got none\. Check exclude_modules"),
        (al.convert(Own(), CHIP), None, r"'body\.0': expected a digital layer, got AnalogLinear"),
    ],
)
def test_models_that_cannot_be_converted(
    net: nn.Module, exclude: list[str] | None, match: str
) -> None:
    with pytest.raises(al.StageError, match=match):
        al.convert(net, CHIP, exclude_modules=exclude)
