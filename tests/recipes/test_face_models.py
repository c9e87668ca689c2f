"""Networks of the face recipe: shapes, names of layers, MACs, what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, DataError, UnknownNameError
from aihwkit_lora.recipes.face_models import (
    MODELS,
    AttentionProducts,
    VisionTransformer,
    build_model,
)
from aihwkit_lora.recipes.mixer import LORA_TARGETS, MlpMixer

CHIP = al.chips.get("rm-180nm")


@pytest.mark.parametrize("name", MODELS.names())
@pytest.mark.parametrize("image_size", [16, 32, 64])
def test_every_model_scores_images_of_every_size(name, image_size):
    torch.manual_seed(0)
    model = build_model(name, image_size=image_size, outputs=41)
    images = torch.rand(3, 1, image_size, image_size)
    logits = model(images)
    assert logits.shape == (3, 41)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS.names())
def test_adapters_find_both_layers_of_each_channel_mlp_and_the_head(name):
    model = build_model(name, image_size=64, outputs=6)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=LORA_TARGETS))
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trained == 2 * (2 * 2 * (64 + 128) + 64 + 6)


def test_the_workloads_own_mixer_is_what_a_small_image_gets():
    torch.manual_seed(1)
    found = build_model("mixer", image_size=16, outputs=6)
    torch.manual_seed(1)
    expected = MlpMixer()
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_all_linear_layers_of_the_transformer_become_arrays_and_positions_stay():
    model = al.convert(VisionTransformer(), CHIP)
    positions = model.positions.detach().clone()
    frozen = al.freeze_(model, programmed_by="test")
    # patches and head; queries with keys and values, projection and an MLP in each of 2 blocks
    assert len(al.target_modules(frozen)) == 2 + 2 * 4
    assert torch.equal(frozen.positions, positions)
    assert frozen(torch.rand(2, 1, 64, 64)).shape == (2, 6)


def test_attention_is_the_textbooks():
    torch.manual_seed(0)
    projected = torch.randn(3, 5, 24)
    query, key, value = projected.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.mT / 4**0.5).softmax(dim=-1)
    expected = (weights @ value).permute(0, 2, 1, 3).flatten(2)
    found = AttentionProducts(heads=2)(projected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_products_of_attention_are_counted_forwards_and_backwards():
    ledger, products = al.Ledger(), AttentionProducts(heads=2)
    projected = torch.randn(3, 5, 24, requires_grad=True)
    with al.observe(nn.Sequential(products), ledger, phase="learn"):
        products(projected).sum().backward()
    # Per image and head, two products of 5 × 4 by 5: 200 MACs; each has two gradients.
    counts = ledger.total()
    assert counts["forward_macs"] == 3 * 2 * 2 * 5 * 5 * 4
    assert counts["input_gradient_macs"] == 2 * counts["forward_macs"]
    assert counts["weight_gradient_macs"] == 0


@pytest.mark.parametrize(
    "size", ["image_size", "patch_size", "width", "heads", "hidden", "blocks", "outputs"]
)
def test_sizes_below_one_are_refused(size):
    with pytest.raises(ConfigurationError, match=r"size of the transformer .* at least 1, found 0"):
        VisionTransformer(**{size: 0})


def test_parts_that_do_not_divide_the_whole_are_refused():
    with pytest.raises(ConfigurationError, match="patch_size that divides image_size, found 7 and"):
        VisionTransformer(patch_size=7)
    with pytest.raises(ConfigurationError, match="heads that divide width, found 5 and 64"):
        VisionTransformer(heads=5)
    with pytest.raises(ConfigurationError, match=r"above 16 that 8 divides, found 60\. Take 32"):
        build_model("vit", image_size=60, outputs=6)


def test_images_of_another_shape_are_refused():
    with pytest.raises(DataError, match=r"expected images of shape \(n, 1, 64, 64\), found"):
        VisionTransformer()(torch.zeros(2, 1, 16, 16))


def test_unknown_models_come_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown model 'vitt'\. Did you mean 'vit'"):
        build_model("vitt", image_size=64, outputs=6)
