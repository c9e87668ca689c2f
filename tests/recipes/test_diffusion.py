"""The diffusion transformer, flow matching, and what of it can be an array."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, UnsupportedTileError
from aihwkit_lora.recipes.diffusion import (
    DIT_B2_CONVNEXT,
    LORA_TARGETS,
    DiffusionBlock,
    DiffusionShape,
    DiffusionTransformer,
    digital_modules,
    draw_times,
    interpolate,
    sample,
    time_features,
)

BLOCKS = ("attention", "convnext")


def small(block="attention", **sizes):
    options = {"width": 8, "depth": 2, "heads": 2, "styles": 3, "objects": 4} | sizes
    return DiffusionShape(block=block, **options)


def awake(shape):
    """A model whose gates are not zero."""
    torch.manual_seed(0)
    model = DiffusionTransformer(shape)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def test_lora_of_the_papers_network_has_368640_parameters():
    with torch.device("meta"):
        model = DiffusionTransformer(DIT_B2_CONVNEXT)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS)
    with torch.device("meta"):
        adapted = get_peft_model(model, config)
    trained = {n: p.numel() for n, p in adapted.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 368_640
    assert len(trained) == 12 * 2 * 2
    assert all(".fc1." in name or ".fc2." in name for name in trained)
    depthwise = sum(p.numel() for n, p in model.named_parameters() if "depthwise" in n)
    total = sum(p.numel() for p in model.parameters())
    assert depthwise / total < 0.01


@pytest.mark.parametrize("block", BLOCKS)
def test_a_fresh_model_predicts_zero_and_a_fresh_block_passes_on(block):
    shape = small(block)
    noisy, time, label = torch.randn(5, 1, 20, 20), torch.rand(5), torch.arange(5)
    assert not DiffusionTransformer(shape)(noisy, time, label).any()
    tokens = torch.randn(5, shape.patches, 8)
    assert torch.equal(DiffusionBlock(shape)(tokens, torch.randn(5, 8)), tokens)


@pytest.mark.parametrize("block", BLOCKS)
def test_patches_label_and_time_all_reach_the_image(block):
    model = awake(small(block))
    noisy, time, label = torch.randn(1, 1, 20, 20), torch.tensor([0.3]), torch.tensor([6])
    before = model(noisy, time, label)
    moved = noisy.clone()
    moved[..., 0, 0] += 1.0
    # The far corner sees a change of the near one: blocks mix patches.
    assert not torch.equal(model(moved, time, label)[..., 16:, 16:], before[..., 16:, 16:])
    for other in (5, 10):  # another object of the same style, the same object of another
        assert not torch.equal(model(noisy, time, torch.tensor([other])), before)
    assert not torch.equal(model(noisy, time + 0.1, label), before)


def test_an_object_map_changes_its_own_patch_of_its_own_object():
    torch.manual_seed(0)
    model = DiffusionTransformer(small(object_maps=True))
    # Fresh blocks pass on, so what is added to a patch only reaches that patch.
    nn.init.normal_(model.head.weight)
    inputs = torch.randn(1, 1, 20, 20).expand(2, -1, -1, -1), torch.rand(1).expand(2)
    label = torch.tensor([5, 6])  # objects 1 and 2 of the same style
    before = model._patches(model(*inputs, label))
    with torch.no_grad():
        model.object_maps.row(2)[3 * 8] += 1.0  # the first feature of the fourth patch
    changed = (model._patches(model(*inputs, label)) != before).any(dim=2)
    assert changed.nonzero().tolist() == [[1, 3]]


def test_patches_are_put_back_where_they_were():
    model = DiffusionTransformer(small(channels=3))
    images = torch.randn(2, 3, 20, 20)
    assert torch.equal(model._image(model._patches(images)), images)


def test_one_row_of_the_embedding_can_be_trained_alone():
    model = awake(small()).requires_grad_(False)
    model.style.rows[1].value.requires_grad_(True)
    label = torch.tensor([0, 5, 9])
    model(torch.randn(3, 1, 20, 20), torch.rand(3), label).sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == ["style.rows.1.value"]


class Knows(nn.Module):
    """Always predicts the same image."""

    def __init__(self, image):
        super().__init__()
        self.image = image
        self.times = []

    def forward(self, noisy, time, label):
        self.times.append(float(time[0]))
        return self.image.expand_as(noisy)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_steps_end_at_what_the_model_predicts(steps):
    image = torch.randn(1, 1, 8, 8)
    model = Knows(image).train()
    noise = torch.randn(3, 1, 8, 8)
    found = sample(model, torch.zeros(3, dtype=torch.long), noise=noise, steps=steps)
    torch.testing.assert_close(found, image.expand_as(noise))
    assert model.times == pytest.approx([step / steps for step in range(steps)])
    assert model.training


def test_the_first_euler_step_goes_along_the_straight_line():
    image, noise = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)

    class Stops(Knows):
        def forward(self, noisy, time, label):
            return super().forward(noisy, time, label) if time[0] == 0 else noisy

    found = sample(Stops(image), torch.zeros(1, dtype=torch.long), noise=noise, steps=4)
    assert torch.equal(found, interpolate(image, noise, torch.tensor([0.25])))


def test_times_lie_inside_and_follow_the_shifted_logistic_normal():
    times = draw_times(20_000, torch.Generator().manual_seed(0))
    assert times.min() > 0.0
    assert times.max() < 1.0
    logits = torch.logit(times)
    # Five standard errors: once in two million seeds.
    assert abs(float(logits.mean()) - 0.6) < 5 / math.sqrt(20_000)
    assert time_features(times).shape == (20_000, 64)


@pytest.mark.parametrize("block", BLOCKS)
def test_all_linear_layers_become_arrays(block):
    chip, model = al.chips.get("rm-180nm"), awake(small(block))
    digital = digital_modules(model)
    frozen = al.convert(model, chip, exclude_modules=digital)
    al.program_(frozen, chip, seed=0, level="mean")
    al.freeze_(frozen)
    linear = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    assert [name for name, _ in al.frozen_layers(frozen)] == linear
    assert digital == (
        [] if block == "attention" else [f"blocks.{i}.mixing.depthwise" for i in (0, 1)]
    )
    noisy, time, label = torch.randn(5, 1, 20, 20), torch.rand(5), torch.arange(5)
    with torch.no_grad():
        exact = model(noisy, time, label)
        # Cells without write errors: what is left is the rounding of inputs and outputs.
        assert 0 < (frozen(noisy, time, label) - exact).std() < 0.05 * exact.std()


def test_depthwise_convolutions_are_refused_as_arrays():
    with pytest.raises(UnsupportedTileError, match=r"exclude_modules=\['blocks\.0\.mixing"):
        al.convert(DiffusionTransformer(small("convnext")), al.chips.get("rm-180nm"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "expected width of at least 1, found 0"),
        (
            {"patch_size": 3},
            "patch_size to divide image_size, found patch_size=3 and image_size=20\\.",
        ),
        ({"heads": 5}, "heads to divide width, found heads=5 and width=96"),
        ({"block": "mamba"}, "block 'attention' or 'convnext', found 'mamba'"),
    ],
)
def test_sizes_are_checked(options, message):
    with pytest.raises(ConfigurationError, match=message):
        DiffusionShape(**options)
