"""Sizes of the mixer, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.metering.macs import counter_of
from aihwkit_lora.recipes.mixer import LORA_TARGETS, MlpMixer, patches_of


def forward_macs(model: nn.Module) -> int:
    total = 0

    def count(layer, _, output):
        nonlocal total
        total += counter_of(layer)(layer, output).forward

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(count)
    model(torch.zeros(1, 1, 16, 16))
    return total


def test_weights_and_macs_are_those_of_the_workload():
    model = MlpMixer()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert sum(layer.weight.numel() for layer in linear) == 5048
    assert all(layer.bias is None for layer in linear)
    assert sum(p.numel() for p in model.parameters()) == 5148
    assert forward_macs(model) == 87_160


@pytest.mark.parametrize(("rank", "parameters", "macs"), [(6, 1404, 20_124), (8, 1872, 26_832)])
def test_adapters_have_the_size_of_the_workload(rank, parameters, macs):
    model = MlpMixer()
    plain = forward_macs(model)
    adapter = LoraConfig(r=rank, target_modules=LORA_TARGETS)
    wrapped = get_peft_model(MlpMixer(), adapter)
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == parameters
    assert forward_macs(wrapped) - plain == macs


def test_all_linear_layers_are_converted():
    model = al.convert(MlpMixer(), al.chips.get("rm-180nm"))
    frozen = al.freeze_(model, programmed_by="test")
    assert len(al.target_modules(frozen)) == 10


@pytest.mark.parametrize(
    "size", ["image_size", "patch_size", "channels", "hidden", "blocks", "outputs"]
)
def test_sizes_below_one_are_refused(size):
    with pytest.raises(ConfigurationError, match=r"every size of the mixer .* at least 1, found 0"):
        MlpMixer(**{size: 0})


def test_patches_that_do_not_tile_the_image_are_refused():
    with pytest.raises(ConfigurationError, match="found patch_size=5 and image_size=16"):
        MlpMixer(patch_size=5)


@pytest.mark.parametrize("shape", [(2, 1, 15, 16), (2, 3, 16, 16), (1, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(DataError, match=r"expected images of shape \(n, 1, 16, 16\), found"):
        MlpMixer()(torch.zeros(shape))


def test_patches_are_cut_in_reading_order():
    images = 0.5 + 0.25 * torch.arange(16.0).view(1, 1, 4, 4)
    patches = patches_of(images, 2)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert patches[0].tolist() == expected
