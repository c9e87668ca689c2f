"""Rendered letters and folders of photographs, split and with cells left out."""

import pytest
import torch

from aihwkit_lora.errors import ConfigurationError, DataError, UnknownNameError
from aihwkit_lora.recipes.image_data import ImageDataConfig, Pictures, load_images

from .styled_folder import OBJECTS, STYLES, folder_of


@pytest.fixture(scope="module")
def letters():
    return load_images(ImageDataConfig(copies=10))


def test_letters_are_split_by_cell_and_between_minus_one_and_one(letters):
    assert (len(letters.train), len(letters.test)) == (14 * 26 * 8, 14 * 26 * 2)
    for pictures, each in ((letters.train, 8), (letters.test, 2)):
        cells = pictures.styles * 26 + pictures.objects
        assert torch.equal(cells.bincount(), torch.full((14 * 26,), each))
        assert pictures.images.shape[1:] == (1, 20, 20)
        assert pictures.images.abs().max() <= 1.0
        # Background black, strokes visible.
        assert pictures.images.mean() < -0.5
        assert (pictures.images.flatten(1).amax(dim=1) > 0).all()


def test_copies_of_a_letter_differ(letters):
    for style in range(14):
        copies = letters.train.of(style).images[:8].flatten(1)
        assert (torch.pdist(copies) > 0.05).all()


def test_unseen_cells_are_left_out_of_kept_styles_only(letters):
    assert letters.styles[letters.forgotten] == "fraktur"
    assert letters.styles[letters.new] == "italic"
    assert len(letters.kept) == 12
    left_out = letters.unseen.sum(dim=1)
    assert left_out[list(letters.kept)].tolist() == [2] * 12
    assert left_out[[letters.forgotten, letters.new]].tolist() == [0, 0]
    # No letter is missing in two styles, so each is seen in eleven others at least.
    assert letters.unseen.sum(dim=0).max() == 1
    seen = letters.seen(*letters.learnt)
    assert len(seen) == (13 * 26 - 24) * 8
    assert not letters.unseen[seen.styles, seen.objects].any()
    assert letters.new not in seen.styles


def test_rendering_follows_the_seed():
    first, again, other = (
        load_images(ImageDataConfig(copies=5, seed=seed)).train.images for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def of_folder(path, **options):
    settings = {"data": "folder", "folder": str(path), "forgotten": "ink", "new": "pixel"}
    return ImageDataConfig(**settings | {"unseen": 1, "image_size": 16} | options)


def test_folders_are_read_as_colour_pixels(tmp_path):
    data = load_images(of_folder(folder_of(tmp_path)))
    assert (data.styles, data.objects) == (STYLES, OBJECTS)
    assert data.train.images.shape == (4 * 3 * 4, 3, 16, 16)
    assert len(data.test) == 4 * 3
    means = [float(data.train.of(style).images.mean()) for style in range(4)]
    expected = [(60 * style + 9.5) / 127.5 - 1 for style in range(4)]
    assert means == pytest.approx(expected, abs=0.02)
    assert int(data.unseen.sum()) == 2


def test_missing_folders_and_images_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a folder with style/object/\*.jpg, found ''"):
        load_images(of_folder(""))
    folder_of(tmp_path / "few", count=4)
    with pytest.raises(DataError, match=r"cat': expected at least 5 images .* found 4"):
        load_images(of_folder(tmp_path / "few"))
    folder_of(tmp_path / "three", styles=STYLES[:3])
    with pytest.raises(ConfigurationError, match=r"new: expected a style .* found 'pixel'"):
        load_images(of_folder(tmp_path / "three"))
    with pytest.raises(ConfigurationError, match="expected at least 4 styles, found cubist, ink"):
        load_images(of_folder(tmp_path / "three", new="pastel"))
    with pytest.raises(ConfigurationError, match="at most a third of the 3 objects, found 2"):
        load_images(of_folder(folder_of(tmp_path / "all"), unseen=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 7}, "image_size of at least 8, found 7"),
        ({"image_size": 22}, "image_size that 4 divides, found 22"),
        ({"copies": 4}, "copies of at least 5, found 4"),
        ({"unseen": -1}, "unseen of at least 0, found -1"),
        ({"forgotten": "sans", "new": "sans"}, "two styles, found 'sans' for both"),
    ],
)
def test_numbers_are_checked(options, message):
    with pytest.raises(ConfigurationError, match=message):
        ImageDataConfig(**options)


def test_unknown_sets_and_styles_get_suggestions():
    with pytest.raises(UnknownNameError, match=r"image set 'letter'\. Did you mean 'letters'"):
        ImageDataConfig(data="letter")
    with pytest.raises(ConfigurationError, match=r"found 'fractur'\. Did you mean 'fraktur'"):
        load_images(ImageDataConfig(copies=5, forgotten="fractur"))


def test_pictures_are_chosen_by_style():
    styles = torch.tensor([0, 1, 2, 1])
    pictures = Pictures(images=torch.arange(4.0), styles=styles, objects=styles)
    assert pictures.of(1, 2).images.tolist() == [1.0, 2.0, 3.0]
