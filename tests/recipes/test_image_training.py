"""Noisy batches, the Lightning modules of the image recipe, and what they minimise."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from pytorch_lightning.utilities import CombinedLoader
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.recipes.diffusion import (
    LORA_TARGETS,
    DiffusionShape,
    DiffusionTransformer,
    interpolate,
)
from aihwkit_lora.recipes.image_data import Pictures
from aihwkit_lora.recipes.image_training import (
    Adapting,
    Denoiser,
    NoisyBatches,
    Regression,
    Taught,
    averaging,
    fit,
    loader,
    saturating,
)
from aihwkit_lora.unlearning import objectives

STYLES, OBJECTS = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
PICTURES = Pictures(
    images=torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    styles=STYLES,
    objects=OBJECTS,
)


def batches(count=4, size=64, seed=0):
    return NoisyBatches(PICTURES, objects=26, batch_size=size, batches=count, seed=seed)


def model():
    torch.manual_seed(0)
    return DiffusionTransformer(
        DiffusionShape(image_size=8, width=8, depth=1, heads=2, styles=3, objects=26)
    )


def test_batches_pair_images_with_their_labels_and_lie_between_noise_and_image():
    for (noisy, time, label), images in batches():
        index = label // 26
        assert torch.equal(label % 26, OBJECTS[index])
        assert torch.equal(images, PICTURES.images[index])
        noise = (noisy - time.view(-1, 1, 1, 1) * images) / (1 - time.view(-1, 1, 1, 1))
        torch.testing.assert_close(interpolate(images, noise, time), noisy)
        # 4096 standard normal numbers: five standard errors either way.
        assert abs(float(noise.mean())) < 5 / 64
        assert abs(float(noise.std()) - 1) < 5 / 90


def test_batches_follow_their_seed_and_start_over():
    same = batches(count=2)
    first, again = list(same), list(same)
    other = list(batches(count=2, seed=1))
    assert torch.equal(first[1][0][0], again[1][0][0])
    assert not torch.equal(first[0][0][0], first[1][0][0])
    assert not torch.equal(first[0][0][0], other[0][0][0])


def test_regression_counts_every_image_once():
    parts = {"new": next(iter(batches(1, 4))), "replay": next(iter(batches(1, 12, seed=1)))}
    objective, network = Regression(needs=frozenset(parts)), model()
    each = [F.mse_loss(network(*inputs), images) for inputs, images in parts.values()]
    expected = (4 * each[0] + 12 * each[1]) / 16
    torch.testing.assert_close(objective.loss(network, parts), expected)


def test_a_teacher_stands_in_for_the_model_without_its_adapter():
    network = model()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    (inputs, images), kept = next(iter(batches(1, 8))), next(iter(batches(1, 8, seed=1)))
    batch = {"forget": (inputs, images), "retain": kept}
    other = {int(label): int(label) + 1 for label in inputs[2]}
    taught = Taught(teacher=network, other=other).loss(network, batch)
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules=LORA_TARGETS))
    expected = objectives.get("pseudo_class")(other=other).loss(adapted, batch)
    torch.testing.assert_close(taught, expected)
    assert taught > F.mse_loss(network(*kept[0]), kept[1])


def test_weight_noise_shakes_the_loss_and_not_the_weights():
    network = model()
    before = [parameter.clone() for parameter in network.parameters()]
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight)
    before = [parameter.clone() for parameter in network.parameters()]
    batch = next(iter(batches()))
    still = Denoiser(network, steps=1, learning_rate=1e-3)
    shaken = Denoiser(network, steps=1, learning_rate=1e-3, weight_noise=0.1)
    still.log = shaken.log = lambda *_, **__: None
    torch.testing.assert_close(still.training_step(batch), still.training_step(batch))
    assert shaken.training_step(batch) != shaken.training_step(batch)
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_saturating_layers_give_what_arrays_give():
    # Weights of one sign add up to more than the ADC can tell; the chip itself says what it reads.
    torch.manual_seed(0)
    chip, layer = al.chips.get("rm-180nm"), nn.Linear(100, 6)
    with torch.no_grad():
        layer.weight.abs_()
        layer.weight[:3].neg_()
    array = al.freeze_(al.convert(nn.Sequential(layer), chip), programmed_by="test")
    x = torch.rand(50, 100)
    free = layer(x)
    with saturating(layer, chip):
        limited = layer(x)
    # One step of the ADC, and the steps of 100 DACs.
    units = x.abs().amax(-1, keepdim=True) * layer.weight.abs().max()
    assert ((free - limited).abs() > units).float().mean() > 0.9
    assert bool(((limited - array(x)).abs() < 0.1 * units).all())
    assert torch.equal(layer(x), free)


def test_nothing_saturates_without_a_chip_and_gradients_stop_where_it_does():
    layer, x = nn.Linear(100, 1, bias=False), torch.ones(1, 100)
    nn.init.ones_(layer.weight)
    with saturating(layer, None):
        assert layer(x).tolist() == [[100.0]]
    with saturating(layer, al.chips.get("rm-180nm")):
        layer(x).sum().backward()
    assert not layer.weight.grad.any()


def test_clipping_follows_each_step_and_leaves_biases_alone(tmp_path):
    network = model()
    nn.init.constant_(network.blocks[0].fc1.bias, 9.0)
    module = Denoiser(network, steps=2, learning_rate=1e-3, weight_clip=1.5)
    fit(module, loader(batches(2)), steps=2, log=tmp_path / "learn", callbacks=[])
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            # Clipping makes the deviation itself smaller, by a fifth at most for these weights.
            assert layer.weight.abs().max() <= 1.5 * 1.25 * layer.weight.std()
    assert network.blocks[0].fc1.bias.min() > 8.0


def test_what_no_image_asks_for_only_decays(tmp_path):
    network = model()
    undrawn = network.object.row(0)
    before = undrawn.detach().clone()
    module = Denoiser(network, steps=2, learning_rate=1e-2, weight_decay=0.5)
    fit(module, loader(batches(2)), steps=2, log=tmp_path / "learn", callbacks=[])
    # Both of two steps are at the peak of the rate.
    torch.testing.assert_close(undrawn.detach(), before * (1 - 1e-2 * 0.5) ** 2)


def test_rates_rise_then_fall_to_zero():
    from aihwkit_lora.recipes.image_training import _factor

    factors = [_factor(step, 100) for step in range(101)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[100] == pytest.approx(0.0)


def test_a_fit_takes_the_steps_it_is_given_and_learns(tmp_path):
    network = model()
    fixed = next(iter(batches(1, 64, seed=9)))
    before = F.mse_loss(network(*fixed[0]), fixed[1])
    module = Denoiser(network, steps=30, learning_rate=1e-2)
    fit(module, loader(batches(30)), steps=30, log=tmp_path / "learn", callbacks=[averaging(30)])
    assert module.global_step == 30
    assert F.mse_loss(network(*fixed[0]), fixed[1]) < 0.8 * before


def test_objectives_of_the_package_can_be_trained(tmp_path):
    network, steps = model(), 3
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    before = network.head.weight.clone()
    objective = objectives.get("gaussian_target")()
    module = Adapting(network, objective, steps=steps, learning_rate=1e-3)
    parts = {"forget": loader(batches(steps, 4)), "retain": loader(batches(steps, 12, seed=1))}
    fit(
        module,
        CombinedLoader(parts, "min_size"),
        steps=steps,
        log=tmp_path / "forget",
        callbacks=[],
    )
    assert not torch.equal(network.head.weight, before)
