"""The judge of generated images, what it shall reject, and the Fréchet distance."""

import pytest
import torch

from aihwkit_lora.recipes import judges
from aihwkit_lora.recipes.image_data import ImageDataConfig, load_images
from aihwkit_lora.recipes.judges import (
    Judge,
    frechet_distance,
    judge_images,
    rejects,
    train_judge,
)


@pytest.fixture(scope="module")
def letters():
    return load_images(ImageDataConfig(copies=5))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(mean, deviations, count=40_000, seed=0):
    drawn = torch.randn(count, len(mean), generator=generator(seed), dtype=torch.float64)
    return torch.tensor(mean) + drawn * torch.tensor(deviations)


def test_frechet_distance_of_gaussians_with_known_moments():
    # (1-4)² + (2-2)² + (1-2)² + (3-1)², up to the errors of 40,000 samples.
    first, second = normal([1.0, 2.0], [1.0, 3.0]), normal([4.0, 2.0], [2.0, 1.0], seed=1)
    assert frechet_distance(first, second) == pytest.approx(14.0, rel=0.03)


def test_frechet_distance_is_a_symmetric_distance_that_rotations_keep():
    first, second = normal([0.0, 1.0, 2.0], [1.0, 2.0, 0.1], 50), normal([1.0] * 3, [1.0] * 3, 60)
    there = frechet_distance(first, second)
    assert frechet_distance(second, first) == pytest.approx(there, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator(), dtype=torch.float64)).Q
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(there, rel=1e-9)


def test_frechet_distance_of_fewer_samples_than_features_is_finite():
    few = torch.randn(4, 32, generator=generator())
    assert frechet_distance(few, few + 1.0) == pytest.approx(32.0, rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_rejects_have_all_kinds_and_no_real_image(letters, channels):
    real = letters.train
    if channels == 3:
        real = type(real)(
            images=real.images.expand(-1, 3, -1, -1), styles=real.styles, objects=real.objects
        )
    found = rejects(real, 103, generator())
    assert found.shape == (103, channels, 20, 20)
    assert found.abs().max() <= 1.0
    nearest = torch.cdist(found.flatten(1), real.images.flatten(1)).amin(dim=1)
    assert nearest.min() > 0.5
    assert torch.equal(found, rejects(real, 103, generator()))


def test_shuffled_images_keep_their_patches(letters):
    real = letters.train.where(torch.arange(7))
    found = judges.shuffled(real, letters.train, generator())
    assert torch.equal(found.flatten(1).sort().values, real.images.flatten(1).sort().values)
    assert not torch.equal(found, real.images)


def test_broken_images_mix_patches_of_two(letters):
    real = letters.train.where(torch.arange(200))
    found = judges.broken(real, letters.train, generator())
    changed = (judges._cut(found) != judges._cut(real.images)).any(dim=2).double().mean()
    # Of the 40 to 70 % that are replaced, empty ones are often replaced by empty ones.
    assert 0.2 < changed < 0.7


def test_verdicts_cut_off_what_no_image_has():
    judge = Judge(1, styles=2, objects=3).eval()
    images = torch.randn(5, 1, 20, 20)
    found, same = judge_images(judge, 3 * images), judge_images(judge, (3 * images).clamp(-1, 1))
    assert torch.equal(found.features, same.features)


def test_training_is_seeded_and_leaves_torch_s_generator_alone(letters):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again = (train_judge(letters, steps=2, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert not first.training
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_trained_judge_knows_real_letters_and_rejects_rubbish():
    data = load_images(ImageDataConfig())
    judge = train_judge(data, steps=1000, seed=0)
    verdict = judge_images(judge, data.test.images)
    assert (verdict.styles == data.test.styles).double().mean() >= 0.98
    assert (verdict.objects == data.test.objects).double().mean() >= 0.98
    pure = torch.randn(500, 1, 20, 20, generator=generator())
    for rubbish in (pure, pure.sign(), torch.zeros_like(pure), torch.ones_like(pure)):
        assert (judge_images(judge, rubbish).styles == judge.styles).double().mean() >= 0.95
