"""Multiply–accumulates of digital layers: closed forms, and how types of layers are told apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.macs import Macs, count_macs, counter_of


def forward_macs(model: nn.Module, x: Tensor) -> int:
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer"):
        model(x)
    return ledger.total()["forward_macs"]


def test_a_linear_layer_takes_one_mac_per_weight_and_vector() -> None:
    layer = nn.Linear(7, 3)
    counter = counter_of(layer)
    assert counter is not None
    expected = 5 * 2 * 7 * 3
    assert counter(layer, layer(torch.ones(5, 2, 7))) == Macs(
        forward=expected, input_gradient=expected, weight_gradient=expected
    )


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        # images × out_channels × positions of the kernel × in_channels / groups × kernel
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 6 * 8 * 4 * 3),
        (nn.Conv1d(4, 6, 1, bias=False), (4, 10), 6 * 10 * 4),
        (nn.Conv2d(3, 8, (3, 5), stride=2, padding=1), (2, 3, 9, 11), 2 * 8 * 5 * 5 * 3 * 15),
        (nn.Conv2d(6, 9, 3, groups=3), (1, 6, 7, 8), 1 * 9 * 5 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4, dilation=2), (3, 4, 9, 9), 3 * 4 * 5 * 5 * 1 * 9),
        (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 6), 2 * 3 * 3 * 4 * 5 * 2 * 8),
    ],
)
def test_a_convolution_takes_its_kernel_at_every_position(
    layer: nn.Module, shape: tuple[int, ...], expected: int
) -> None:
    assert forward_macs(layer, torch.ones(shape)) == expected


def test_a_type_has_one_counter() -> None:
    with pytest.raises(ConfigurationError, match="expected types without a counter, got Linear"):
        count_macs(nn.Linear)

    class Plain(nn.Module):
        pass

    with pytest.raises(ConfigurationError, match=r"got Conv2d, Linear\. Derive a class"):
        count_macs(Plain, nn.Conv2d, nn.Linear)
    assert counter_of(Plain()) is None


def test_a_subclass_uses_its_parents_counter_until_it_has_its_own() -> None:
    class Twice(nn.Linear):
        pass

    class Thrice(Twice):
        pass

    parent = counter_of(nn.Linear(1, 1))
    assert parent is not None
    assert counter_of(Thrice(2, 3)) is counter_of(Twice(2, 3)) is parent

    @count_macs(Twice)
    def twice(layer: Twice, output: Tensor) -> Macs:
        macs = 2 * output.numel() * layer.in_features
        return Macs(forward=macs, input_gradient=macs, weight_gradient=macs)

    assert counter_of(Thrice(2, 3)) is counter_of(Twice(2, 3)) is twice
    assert counter_of(nn.Linear(2, 3)) is parent
    assert forward_macs(nn.Sequential(Thrice(2, 3), nn.Linear(3, 1)), torch.ones(4, 2)) == 48 + 12


def test_layers_without_products_have_no_counter() -> None:
    for layer in (nn.ReLU(), nn.LayerNorm(3), nn.RMSNorm(3), nn.Sequential(), nn.Dropout()):
        assert counter_of(layer) is None
