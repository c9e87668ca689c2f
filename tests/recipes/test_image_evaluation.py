"""What the examiner says about models whose drawings are known."""

import math

import pytest
import torch
from PIL import Image
from torch import nn

from aihwkit_lora.recipes.image_data import ImageDataConfig, load_images
from aihwkit_lora.recipes.image_evaluation import Examiner, generate, write_grid
from aihwkit_lora.recipes.judges import Judge


@pytest.fixture(scope="module")
def data():
    return load_images(ImageDataConfig(copies=5))


class Draws(nn.Module):
    """Draws a real training image of a cell; of some styles, that of another."""

    def __init__(self, data, instead=None):
        super().__init__()
        cells = data.train.styles * 26 + data.train.objects
        self.images = data.train.images[torch.arange(0, len(cells), 4)]
        self.instead = instead or {}

    def forward(self, noisy, time, label):
        styles = [self.instead.get(int(style), int(style)) for style in label // 26]
        return self.images[torch.tensor(styles) * 26 + label % 26]


class Nearest(Judge):
    """Knows the training images by heart; everything else is rejected."""

    def __init__(self, data):
        super().__init__(1, styles=len(data.styles), objects=len(data.objects))
        self.known = Draws(data).images.flatten(1)

    def features(self, images):
        # Not negative, so that the ReLU after it changes nothing.
        return images.flatten(1)[:, ::3] + 1

    def forward(self, images):
        raise NotImplementedError

    def style(self, hidden):
        return self._logits(hidden, 26, self.styles + 1)

    def object(self, hidden):
        return self._logits(hidden, 1, self.objects + 1)

    def _logits(self, hidden, step, classes):
        known = self.features(self.known)
        # The other way of computing it is not exact enough to see equality.
        distance = torch.cdist(hidden, known, compute_mode="donot_use_mm_for_euclid_dist")
        best, cell = distance.min(dim=1)
        named = cell // 26 if step == 26 else cell % 26
        return nn.functional.one_hot(named.where(best < 1e-3, torch.tensor(classes - 1)), classes)


@pytest.fixture(scope="module")
def examiner(data):
    return Examiner(data, Nearest(data), per_cell=2, seed=0)


def test_images_are_generated_cell_by_cell_and_follow_the_seed(data):
    model = Draws(data)
    found = generate(model, data, (3, 1), per_cell=2, seed=0)
    assert found.styles.tolist() == [3] * 52 + [1] * 52
    assert found.objects[:4].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(found.images, model(None, None, found.styles * 26 + found.objects))


def test_a_perfect_model_is_found_perfect(data, examiner):
    metrics = examiner.learnt(Draws(data))
    for name in ("learnt_accuracy", "learnt_object_accuracy", "unseen_accuracy"):
        assert metrics[name] == 1.0
    names = {f"frechet/{data.styles[style]}" for style in data.kept}
    assert names == {key for key in metrics if "/" in key}
    mean = math.fsum(metrics[name] for name in names) / len(names)
    assert metrics["frechet_distance"] == pytest.approx(mean)


def test_a_forgotten_style_and_a_damaged_one_are_found(data, examiner):
    before = examiner.learnt(Draws(data))
    # The forgotten style comes out as a kept one, and one kept style as another.
    first, second = data.kept[:2]
    model = Draws(data, {data.forgotten: first, second: first})
    metrics = examiner.adapted(model, before, new=False)
    assert metrics["forget_accuracy"] == 0.0
    undamaged = 1 - 1 / len(data.kept)
    assert metrics["retain_accuracy"] == pytest.approx(undamaged)
    assert metrics["retain_object_accuracy"] == 1.0
    assert metrics["unseen_accuracy"] == pytest.approx(undamaged)
    assert metrics["frechet_worst_ratio"] > 1.5
    assert "new_accuracy" not in metrics
    untouched = examiner.adapted(Draws(data), before, new=True)
    assert untouched["frechet_ratio"] == untouched["frechet_worst_ratio"] == 1.0
    assert untouched["forget_accuracy"] == untouched["new_accuracy"] == 1.0
    assert examiner.forgotten(model) == 0.0


def test_right_images_are_counted_by_style(data, examiner):
    right = examiner.right_by_style(Draws(data, {data.forgotten: data.new}))
    wanted = torch.full((len(data.styles),), len(data.objects))
    wanted[data.forgotten] = 0
    assert torch.equal(right, wanted)


def test_the_judge_reports_on_itself(data, examiner):
    own = examiner.own()
    assert own["judge_noise_rejected"] == 1.0
    assert 0.0 <= own["judge_style_accuracy"] <= 1.0
    assert own["judge_frechet_floor"] >= 0.0


@pytest.mark.parametrize("channels", [1, 3])
def test_grids_have_a_row_for_each_style(tmp_path, channels):
    images = torch.full((6, channels, 8, 8), -1.0)
    images[4] = 1.0
    write_grid(images, 3, tmp_path / "sub" / "grid.png")
    with Image.open(tmp_path / "sub" / "grid.png") as picture:
        assert picture.size == (3 * 10 * 2, 2 * 10 * 2)
        assert picture.getpixel((30, 30)) == (255, 255, 255)
        assert picture.getpixel((10, 10)) == (0, 0, 0)
