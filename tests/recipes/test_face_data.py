"""Data of the face recipe: what is refused, how photos are split, what is random."""

from __future__ import annotations

import pytest
import torch

from aihwkit_lora.errors import ConfigurationError, DataError, UnknownNameError
from aihwkit_lora.recipes.face_data import (
    Augmentation,
    FaceDataConfig,
    FaceImages,
    augment,
    data_folder,
    load_faces,
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"copies": -1}, "copies of at least 0, found -1"),
        ({"copies": 1, "rotation_degrees": -0.5}, "rotation_degrees from 0 to 180, found -0.5"),
        ({"copies": 1, "rotation_degrees": 181.0}, "rotation_degrees from 0 to 180, found 181"),
        ({"copies": 1, "crop_area": (0.0, 1.0)}, r"0 < smallest <= 1 .* found \(0.0, 1.0\)"),
        ({"copies": 1, "crop_area": (0.9, 0.8)}, r"smallest <= largest, found \(0.9, 0.8\)"),
        ({"copies": 1, "crop_area": (1.1, 1.2)}, r"found \(1.1, 1.2\)"),
        ({"copies": 1, "crop_aspect": 0.9}, "crop_aspect of at least 1, found 0.9"),
    ],
)
def test_impossible_augmentation_is_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        Augmentation(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learnt": (2,)}, r"at least two people in learnt, each once, found \(2,\)"),
        ({"learnt": (1, 2, 2)}, r"each once, found \(1, 2, 2\)"),
        ({"forgotten": 7}, r"forgotten to be one of the learnt people \(0, 1, 2, 3, 4\), found 7"),
        ({"new": 4}, r"new to be none of the learnt people .*, found 4"),
        ({"photos_per_person": 0}, "photos_per_person of at least 1, found 0"),
        ({"image_size": 3}, "image_size of at least 4 pixels, found 3"),
        ({"people": 1}, "people of at least 2, found 1"),
        ({"people": 9, "learnt": (1, 2)}, r"found both: people=9 and learnt=\(1, 2\). Leave one"),
        (
            {"people": 9, "new": 5},
            "people .*, found 5. Name somebody else, or leave new out",
        ),
        ({"people": 2}, r"forgotten to be one of the learnt people \(0, 1\), found 2"),
    ],
)
def test_people_who_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        FaceDataConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "olivetty"}, "unknown data set 'olivetty'. Did you mean 'olivetti'"),
        ({"split": "sauce"}, "unknown split 'sauce'. Did you mean 'source'"),
    ],
)
def test_unknown_names_come_with_the_nearest(fields, message):
    with pytest.raises(UnknownNameError, match=message):
        FaceDataConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "everybody"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"people": 5}, (0, 1, 2, 3, 4, 5)),
        ({"people": 3}, (0, 1, 2, 5)),
        ({"people": 9}, tuple(range(10))),
        ({"people": 7, "new": 9}, (0, 1, 2, 3, 4, 5, 6, 9)),
        ({"learnt": (7, 5, 2)}, (7, 5, 2, 0)),
        ({"learnt": (0, 2, 5, 1)}, (0, 2, 5, 1, 3)),
        ({"data": "olivetti", "people": 39}, tuple(range(40))),
    ],
)
def test_any_number_of_people_can_be_learnt_and_somebody_else_joins(fields, everybody):
    config = FaceDataConfig(**fields)
    assert config.everybody == everybody
    assert config == FaceDataConfig(**vars(config))


def test_all_ten_digits_and_any_of_them_forgotten():
    data = load_faces(FaceDataConfig(people=9, forgotten=7, photos_per_person=5))
    assert (data.learnt, data.forgotten, data.new) == (tuple(range(9)), 7, 9)
    assert data.kept == (0, 1, 2, 3, 4, 5, 6, 8)
    assert data.train.labels.unique().tolist() == list(range(10))


def test_more_people_than_there_are_is_said_before_anything_is_learnt():
    expected = "people from 0 to 9 of data set 'digits', found 10. Learn fewer people, or change"
    with pytest.raises(DataError, match=expected):
        load_faces(FaceDataConfig(people=10))


@pytest.mark.parametrize("size", [8, 16, 64])
def test_images_have_the_size_that_was_asked_for(size):
    data = load_faces(FaceDataConfig(photos_per_person=4, image_size=size))
    assert data.train.images.shape[1:] == (1, size, size)
    assert 0.0 <= float(data.train.images.min()) <= float(data.train.images.max()) <= 1.0 + 1e-6


@pytest.mark.parametrize(
    "fields", [{"learnt": (0, 1, 12), "forgotten": 12}, {"new": 12}, {"learnt": (0, 2, 12)}]
)
def test_people_whom_the_data_lack_are_named(fields):
    expected = "expected people from 0 to 9 of data set 'digits', found 12"
    with pytest.raises(DataError, match=expected):
        load_faces(FaceDataConfig(**fields))


def test_too_few_photos_are_refused():
    with pytest.raises(DataError, match=r"label 0: expected at least 3 photos .* found 2. Raise"):
        load_faces(FaceDataConfig(photos_per_person=2))
    assert len(load_faces(FaceDataConfig(photos_per_person=3)).test.of(0)) == 3


def test_missing_photos_offline_name_the_variable_and_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("AIHWKIT_LORA_DATA", str(tmp_path))
    expected = rf"{tmp_path}/scikit_learn_data.* downloading is off.* set AIHWKIT_LORA_DATA"
    with pytest.raises(DataError, match=expected):
        load_faces(FaceDataConfig(data="olivetti", download=False))


def test_data_folder_is_the_variable_or_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AIHWKIT_LORA_DATA", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "named"
    monkeypatch.delenv("AIHWKIT_LORA_DATA")
    assert data_folder() == tmp_path / "cache" / "aihwkit-lora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / ".cache" / "aihwkit-lora"


def photos(faces: FaceImages) -> set[int]:
    return set(faces.photos.tolist())


@pytest.mark.parametrize("count", [3, 10, 40])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_source_split_keeps_all_images_of_a_photo_together(count, seed):
    data = load_faces(FaceDataConfig(photos_per_person=count, seed=seed))
    parts = (data.train, data.validation, data.test)
    assert len(photos(data.train) | photos(data.validation) | photos(data.test)) == 6 * count
    assert sum(len(photos(part)) for part in parts) == 6 * count
    assert sum(len(part) for part in parts) == 6 * count * 3
    for label in range(6):
        shares = [len(photos(part.of(label))) for part in parts]
        test, validation = max(1, round(0.2 * count)), max(1, round(0.1 * count))
        assert shares == [count - test - validation, validation, test]


def test_reference_split_leaks_photos_and_validates_on_the_test_images():
    data = load_faces(FaceDataConfig(split="reference", photos_per_person=20))
    assert photos(data.train) & photos(data.test)
    assert torch.equal(data.validation.images, data.test.images)
    assert torch.equal(data.validation.labels, data.test.labels)
    for label in range(6):
        assert (len(data.train.of(label)), len(data.test.of(label))) == (48, 12)
    trained = {row.numpy().tobytes() for row in data.train.images}
    assert not trained & {row.numpy().tobytes() for row in data.test.images}


@pytest.mark.parametrize("split", ["source", "reference"])
def test_a_seed_gives_the_same_images_and_leaves_torchs_random_numbers_alone(split):
    config = FaceDataConfig(split=split, photos_per_person=10, seed=3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_faces(config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = load_faces(config)
    other = load_faces(FaceDataConfig(split=split, photos_per_person=10, seed=4))
    for part in ("train", "validation", "test"):
        for field in ("images", "labels", "photos"):
            one, two = (getattr(getattr(data, part), field) for data in (first, second))
            assert torch.equal(one, two)
    assert not torch.equal(first.train.images, other.train.images)


def test_labels_follow_the_order_of_people():
    config = FaceDataConfig(learnt=(7, 3, 9), forgotten=9, new=1, photos_per_person=5)
    data = load_faces(config)
    assert (data.learnt, data.forgotten, data.kept, data.new) == ((0, 1, 2), 2, (0, 1), 3)
    plain = load_faces(FaceDataConfig(learnt=(9, 8), forgotten=8, new=1, photos_per_person=500))
    nines = photos(plain.train) | photos(plain.validation) | photos(plain.test)
    assert photos(data.train.of(2)) <= nines
    assert not photos(data.train.of(0, 1)) & nines


def test_images_are_chosen_by_label():
    labels = torch.tensor([0, 2, 1, 2, 3])
    faces = FaceImages(
        images=torch.arange(5.0).view(5, 1, 1, 1), labels=labels, photos=torch.arange(5)
    )
    assert faces.of(2, 0).photos.tolist() == [0, 1, 3]
    assert faces.without(2, 0).photos.tolist() == [2, 4]
    assert faces.take(labels == 1).images.flatten().tolist() == [2.0]
    assert faces.few(1).photos.tolist() == [0, 2, 1, 4]
    assert faces.few(2).labels.tolist() == [0, 1, 2, 2, 3]


def test_augmentation_that_changes_nothing_repeats_the_photos():
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = augment(images, Augmentation(copies=3), torch.Generator())
    torch.testing.assert_close(found, images.repeat(4, 1, 1, 1), rtol=0, atol=1e-5)


def test_mirrored_copies_are_mirrors():
    images = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = augment(images, Augmentation(copies=1, flip=True), torch.Generator().manual_seed(0))
    same = (found[40:] - images).abs().amax(dim=(1, 2, 3)) < 1e-4
    mirrored = (found[40:] - images.flip(-1)).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert bool((same ^ mirrored).all())
    # Of 40 fair coins, fewer than 5 or more than 35 heads: error rate 2e-7.
    assert 5 <= int(mirrored.sum()) <= 35


def test_augmented_images_stay_in_range_and_differ():
    config = Augmentation(
        copies=3, rotation_degrees=30.0, flip=True, crop_area=(0.8, 1.2), crop_aspect=4 / 3
    )
    images = torch.rand(5, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    found = augment(images, config, torch.Generator().manual_seed(0))
    assert found.shape == (20, 1, 16, 16)
    assert 0.0 <= float(found.min()) <= float(found.max()) <= 1.0 + 1e-6
    assert len({image.numpy().tobytes() for image in found}) == 20
