"""Images of people for the face-recognition workload: data sets, augmentation, splits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import fetch_olivetti_faces, load_digits
from torch import Generator, Tensor

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes.face_augmentation import IMAGE_SIZE, Augmentation, augment
from aihwkit_lora.recipes.people import People
from aihwkit_lora.registry import Registry

FIRST_FIVE = (0, 1, 2, 3, 4)
"""People whom the workload learns first."""

SIXTH = 5
"""The person who joins them."""

DATA_VARIABLE = "AIHWKIT_LORA_DATA"
"""Environment variable that names the folder with real data sets."""


@dataclass(frozen=True, kw_only=True)
class FaceDataConfig:
    """Which people are learnt, forgotten and added, and how their photos are split.

    Args:
        data: ``"digits"`` (bundled with scikit-learn; a class of digits stands for a person) or
            ``"olivetti"`` (400 photos of 40 people; see :func:`data_folder`).
        split: ``"source"`` or ``"reference"``; see :data:`SPLITS`.
        people: How many people are learnt first, at least two: those with the lowest numbers. None
            to name them in ``learnt``. With the one who joins, digits have 10 and Olivetti 40.
        learnt: People who are learnt first, at least two.
        forgotten: The one of ``learnt`` who is forgotten.
        new: The person who joins afterwards. None for person 5 or, if that one is learnt, for the
            first one who is not.
        photos_per_person: How many photos to use of each person, or None for the data set's own
            default.
        image_size: Height and width of the images, in pixels, at least 4.
        seed: Seed of augmentation and split.
        download: Whether a missing data set may be fetched from the internet.
    Raises:
        ConfigurationError: The people do not fit together, or a number is too small.
        UnknownNameError: There is no such data set or split.

    Example:
        >>> FaceDataConfig(forgotten=3).new
        5
        >>> FaceDataConfig(data="olivetti", people=39, forgotten=17).new
        39
    """

    data: str = "digits"
    split: str = "source"
    people: int | None = None
    learnt: tuple[int, ...] = FIRST_FIVE
    forgotten: int = 2
    new: int | None = None
    photos_per_person: int | None = None
    image_size: int = IMAGE_SIZE
    seed: int = 0
    download: bool = True

    def __post_init__(self) -> None:
        DATA_SETS.get(self.data)
        SPLITS.get(self.split)
        if self.people is not None:
            object.__setattr__(self, "learnt", self._first(self.people))
        if self.new is None:
            candidates = (SIXTH, *range(len(self.learnt) + 1))
            newcomer = next(person for person in candidates if person not in self.learnt)
            object.__setattr__(self, "new", newcomer)
        if len(set(self.learnt)) < max(2, len(self.learnt)):
            raise ConfigurationError(
                f"expected at least two people in learnt, each once, found {self.learnt}."
            )
        if self.forgotten not in self.learnt:
            raise ConfigurationError(
                f"expected forgotten to be one of the learnt people {self.learnt}, found "
                f"{self.forgotten}. Choose one of them, or add {self.forgotten} to learnt."
            )
        if self.new in self.learnt:
            raise ConfigurationError(
                f"expected new to be none of the learnt people {self.learnt}, found {self.new}. "
                "Name somebody else, or leave new out."
            )
        if self.photos_per_person is not None and self.photos_per_person < 1:
            raise ConfigurationError(
                f"expected photos_per_person of at least 1, found {self.photos_per_person}."
            )
        if self.image_size < 4:
            raise ConfigurationError(
                f"expected image_size of at least 4 pixels, found {self.image_size}."
            )

    @property
    def everybody(self) -> tuple[int, ...]:
        """Learnt people and the new one, in the order of the model's outputs."""
        return (*self.learnt, SIXTH if self.new is None else self.new)

    def _first(self, people: int) -> tuple[int, ...]:
        """The people with the lowest numbers."""
        if people < 2:
            raise ConfigurationError(f"expected people of at least 2, found {people}.")
        first = tuple(range(people))
        if self.learnt not in (FIRST_FIVE, first):
            raise ConfigurationError(
                f"expected people or learnt, found both: people={people} and learnt={self.learnt}. "
                "Leave one of them out."
            )
        return first


@dataclass(frozen=True, kw_only=True, eq=False)
class FaceImages:
    """Labelled images, and the photo that each was made from.

    Args:
        images: Brightness in [0, 1], shape ``(n, 1, size, size)``.
        labels: Index of the model's output for the person, shape ``(n,)``.
        photos: Index of the source photo in the data set, shape ``(n,)``.

    Example:
        >>> two = torch.tensor([0, 1])
        >>> faces = FaceImages(images=torch.zeros(2, 1, 16, 16), labels=two, photos=two)
        >>> len(faces.of(1)), len(faces.without(1, 2))
        (1, 1)
    """

    images: Tensor
    labels: Tensor
    photos: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> Tensor:
        """What the model sees: the images."""
        return self.images

    def take(self, index: Tensor) -> FaceImages:
        """Return the images at ``index``, a mask or positions of shape ``(m,)``."""
        return FaceImages(
            images=self.images[index], labels=self.labels[index], photos=self.photos[index]
        )

    def of(self, *labels: int) -> FaceImages:
        """Return the images with one of these labels, in the same order."""
        return self.take(torch.isin(self.labels, torch.tensor(labels)))

    def few(self, each: int) -> FaceImages:
        """Return the first images of everybody, at most ``each`` of one person."""
        own = [(self.labels == label).nonzero().flatten()[:each] for label in self.labels.unique()]
        return self.take(torch.cat(own))

    def without(self, *labels: int) -> FaceImages:
        """Return the images with none of these labels, in the same order."""
        return self.take(~torch.isin(self.labels, torch.tensor(labels)))


class FaceData(People[FaceImages]):
    """Images of everybody. Under the reference split those of validation *are* the test images.

    Example:
        >>> data = load_faces(FaceDataConfig())
        >>> data.learnt, data.kept, data.new
        ((0, 1, 2, 3, 4), (0, 1, 3, 4), 5)
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class Photos:
    """Photos as they are: brightness ``(n, 1, height, width)`` in [0, 1], people ``(n,)``."""

    images: Tensor
    people: Tensor


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """How to get photos, how many of each person to use (None: all) and how to augment them."""

    load: Callable[[FaceDataConfig], Photos]
    photos_per_person: int | None
    augmentation: Augmentation


Split = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor, Tensor]]
"""From labels ``(n,)`` and photos ``(n,)`` to positions of training, validation and test images."""

DATA_SETS = Registry[DataSet]("data set")
"""Data sets by name."""

SPLITS = Registry[Split]("split")
"""Ways to split images into training, validation and test sets, by name."""


def data_folder() -> Path:
    """Return the folder with real data: ``$AIHWKIT_LORA_DATA``, or the user's cache folder.

    Example:
        >>> data_folder().is_absolute()
        True
    """
    if named := os.environ.get(DATA_VARIABLE):
        return Path(named).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).absolute() / "aihwkit-lora"


def load_faces(config: FaceDataConfig) -> FaceData:
    """Load, augment and split the images of the people in ``config``.

    Neither reads nor moves torch's global random state: the same config gives the same images.

    Args:
        config: People, data set, split and seed.
    Returns:
        Training, validation and test images of all learnt people and the new one.
    Raises:
        DataError: The data set is missing, lacks one of the people, or has too few photos.

    Example:
        >>> data = load_faces(FaceDataConfig(split="reference"))
        >>> data.train.images.shape[1:]
        torch.Size([1, 16, 16])
    """
    generator = Generator().manual_seed(config.seed)
    data_set = DATA_SETS.get(config.data)
    people = config.everybody
    limit = config.photos_per_person or data_set.photos_per_person
    everybody = data_set.load(config)
    chosen, labels = _choose(everybody.people, people, limit, config.data, generator)
    photos = chosen.repeat(1 + data_set.augmentation.copies)
    faces = FaceImages(
        images=augment(
            everybody.images[chosen], data_set.augmentation, generator, size=config.image_size
        ),
        labels=labels.repeat(1 + data_set.augmentation.copies),
        photos=photos,
    )
    train, validation, test = SPLITS.get(config.split)(faces.labels, faces.photos, generator)
    return FaceData(
        train=faces.take(train),
        validation=faces.take(validation),
        test=faces.take(test),
        learnt=tuple(range(len(config.learnt))),
        forgotten=config.learnt.index(config.forgotten),
        new=len(config.learnt),
    )


def _choose(
    people: Tensor, wanted: tuple[int, ...], limit: int | None, name: str, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Pick photos of the wanted people; return their positions and labels."""
    known = sorted(set(people.tolist()))
    positions, labels = [], []
    for label, person in enumerate(wanted):
        if person not in known:
            raise DataError(
                f"expected people from {known[0]} to {known[-1]} of data set '{name}', found "
                f"{person}. Learn fewer people, or change learnt, forgotten or new."
            )
        own = (people == person).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=generator)][:limit].sort().values
        positions.append(own)
        labels.append(torch.full_like(own, label))
    return torch.cat(positions), torch.cat(labels)


@SPLITS.register("source")
def _split_by_photo(
    labels: Tensor, photos: Tensor, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep all images of one photo together; of each person's photos 70 % train, 20 % test."""
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in labels.unique().tolist():
        own = photos[labels == label].unique()
        _at_least_three(label, len(own), "photos")
        shuffled = own[torch.randperm(len(own), generator=generator)]
        test = max(1, round(0.2 * len(own)))
        validation = max(1, round(0.1 * len(own)))
        parts[0].append(shuffled[test + validation :])
        parts[1].append(shuffled[test : test + validation])
        parts[2].append(shuffled[:test])
    chosen = [torch.isin(photos, torch.cat(part)).nonzero().flatten() for part in parts]
    return chosen[0], chosen[1], chosen[2]


@SPLITS.register("reference")
def _split_by_image(
    labels: Tensor, photos: Tensor, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Split as arXiv:2601.10037's code does: of each person's *augmented* images 80 % train.

    Leaky on purpose, for comparison only: copies of one photo sit on both sides, and the
    validation images, on which the best epoch is picked, are the test images themselves.
    """
    train, test = [], []
    for label in labels.unique().tolist():
        own = (labels == label).nonzero().flatten()
        _at_least_three(label, len(own), "images")
        shuffled = own[torch.randperm(len(own), generator=generator)]
        held_out = max(1, round(0.2 * len(own)))
        test.append(shuffled[:held_out])
        train.append(shuffled[held_out:])
    return (
        torch.cat(train).sort().values,
        torch.cat(test).sort().values,
        torch.cat(test).sort().values,
    )


def _at_least_three(label: int, found: int, what: str) -> None:
    if found < 3:
        raise DataError(
            f"label {label}: expected at least 3 {what} to train, validate and test, found "
            f"{found}. Raise photos_per_person."
        )


def _olivetti(config: FaceDataConfig) -> Photos:
    folder = data_folder() / "scikit_learn_data"
    try:
        faces = fetch_olivetti_faces(data_home=folder, download_if_missing=config.download)
    except OSError as error:
        raise DataError(
            f"expected the Olivetti faces in '{folder}' (olivetti_py3.pkz), found none, and "
            f"{'downloading failed' if config.download else 'downloading is off'}: {error}. "
            f"Connect to the internet and allow downloads, or set {DATA_VARIABLE} to a folder "
            "whose scikit_learn_data/ holds the file."
        ) from error
    return Photos(
        images=torch.from_numpy(faces.images).unsqueeze(1), people=torch.from_numpy(faces.target)
    )


def _digits(_: FaceDataConfig) -> Photos:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
    return Photos(images=images, people=torch.from_numpy(digits.target))


# The augmentation of arXiv:2601.10037's code: 29 copies of each of a person's ten photos.
DATA_SETS.add(
    "olivetti",
    DataSet(
        load=_olivetti,
        photos_per_person=None,
        augmentation=Augmentation(
            copies=29, rotation_degrees=30.0, flip=True, crop_area=(0.8, 1.2), crop_aspect=4 / 3
        ),
    ),
)
# A mirrored or strongly rotated digit is another digit.
DATA_SETS.add(
    "digits",
    DataSet(
        load=_digits,
        photos_per_person=100,
        augmentation=Augmentation(
            copies=2, rotation_degrees=10.0, crop_area=(0.9, 1.0), crop_aspect=1.1
        ),
    ),
)
