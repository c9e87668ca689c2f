"""Images in styles, for the image workload: rendered letters, or a folder of photographs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes.letters import LETTERS, TYPEFACES, glyphs
from aihwkit_lora.registry import Registry, nearest

PATCH = 4
"""Height and width of the patches that images are cut into, in pixels."""

_ENDINGS = (".jpg", ".jpeg", ".png")
_TEST_PART = 5
_SHIFT_PIXELS = 0.5
_SCALES = (0.97, 1.03)


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """Which images are learnt, forgotten and added.

    Args:
        data: ``"letters"`` (rendered; styles are typefaces, objects are letters) or ``"folder"``.
        folder: For ``"folder"``: where the files are, as ``style/object/*.jpg``.
        image_size: Height and width, in pixels; at least 8, and a multiple of 4.
        copies: For ``"letters"``: images of each letter in each typeface, at least 5. A fifth of
            all images is kept for testing.
        forgotten: Style that is forgotten.
        new: Style that joins afterwards; all others are learnt first.
        unseen: Objects that are left out of training in each style, other than ``forgotten`` and
            ``new``; other ones in each. The model can only draw them by combining what it knows.
        seed: Of all random numbers.
    Raises:
        ConfigurationError: A number is too small, or one style is to be forgotten and new.
        UnknownNameError: There is no such data set.

    Example:
        >>> ImageDataConfig(forgotten="script").new
        'italic'
    """

    data: str = "letters"
    folder: str = ""
    image_size: int = 20
    copies: int = 40
    forgotten: str = "fraktur"
    new: str = "italic"
    unseen: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        IMAGE_SETS.get(self.data)
        for name, least in (("image_size", 8), ("copies", _TEST_PART), ("unseen", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(
                    f"expected {name} of at least {least}, found {getattr(self, name)}."
                )
        if self.image_size % PATCH:
            raise ConfigurationError(
                f"expected image_size that {PATCH} divides, found {self.image_size}."
            )
        if self.forgotten == self.new:
            raise ConfigurationError(
                f"expected forgotten and new to be two styles, found '{self.new}' for both."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Images with what they show.

    Args:
        images: From -1 to 1, shape ``(n, channels, image_size, image_size)``.
        styles: Index of the style, shape ``(n,)``.
        objects: Index of the object, shape ``(n,)``.

    Example:
        >>> two = torch.tensor([0, 1])
        >>> pictures = Pictures(images=torch.zeros(2, 1, 8, 8), styles=two, objects=two)
        >>> len(pictures.where(two == 1))
        1
    """

    images: Tensor
    styles: Tensor
    objects: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def where(self, chosen: Tensor) -> Pictures:
        """Choose some: a mask or indices."""
        return Pictures(
            images=self.images[chosen], styles=self.styles[chosen], objects=self.objects[chosen]
        )

    def of(self, *styles: int) -> Pictures:
        """Choose those of some styles."""
        return self.where(torch.isin(self.styles, torch.tensor(styles)))


def joined(*parts: Pictures) -> Pictures:
    """Put pictures behind one another.

    Args:
        parts: At least one.

    Example:
        >>> one = torch.tensor([0])
        >>> pictures = Pictures(images=torch.zeros(1, 1, 8, 8), styles=one, objects=one)
        >>> len(joined(pictures, pictures, pictures))
        3
    """
    return Pictures(
        images=torch.cat([part.images for part in parts]),
        styles=torch.cat([part.styles for part in parts]),
        objects=torch.cat([part.objects for part in parts]),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """Everything the recipe knows about its images.

    Args:
        styles: Names.
        objects: Names.
        train: What may be trained on, unseen cells included; see :meth:`seen`.
        test: Other images of every cell.
        unseen: Which cells are left out of training; shape ``(styles, objects)``.
        forgotten: Index of the style to forget.
        new: Index of the style to add.
    """

    styles: tuple[str, ...]
    objects: tuple[str, ...]
    train: Pictures
    test: Pictures
    unseen: Tensor
    forgotten: int
    new: int

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.train.images.shape[1:])

    @property
    def kept(self) -> tuple[int, ...]:
        """Styles that are learnt and stay."""
        others = (self.forgotten, self.new)
        return tuple(style for style in range(len(self.styles)) if style not in others)

    @property
    def learnt(self) -> tuple[int, ...]:
        """Styles that are learnt first."""
        return tuple(style for style in range(len(self.styles)) if style != self.new)

    def seen(self, *styles: int) -> Pictures:
        """Training images of some styles, without the cells that are left out."""
        left_out = self.unseen[self.train.styles, self.train.objects]
        return self.train.where(~left_out).of(*styles)


IMAGE_SETS: Registry[Any] = Registry("image set")
"""How images are loaded, by name: from a configuration to names of styles, of objects, pictures."""


def load_images(config: ImageDataConfig) -> ImageData:
    """Load or render all images and split them.

    Args:
        config: Which.
    Raises:
        DataError: A folder is missing or holds no images.
        ConfigurationError: A style to forget or add is not there, or too many objects are unseen.

    Example:
        >>> data = load_images(ImageDataConfig(copies=5))
        >>> len(data.styles), len(data.train), len(data.test), int(data.unseen.sum())
        (14, 1456, 364, 24)
    """
    styles, objects, pictures = IMAGE_SETS.get(config.data)(config)
    forgotten, new = (_index(styles, config, field) for field in ("forgotten", "new"))
    if len(styles) < 4:
        raise ConfigurationError(f"expected at least 4 styles, found {', '.join(styles)}.")
    if 3 * config.unseen > len(objects):
        raise ConfigurationError(
            f"expected unseen of at most a third of the {len(objects)} objects, found "
            f"{config.unseen}. Lower unseen; 0 leaves nothing out."
        )
    test = _every_fifth(pictures)
    data = ImageData(
        styles=styles,
        objects=objects,
        train=pictures.where(~test),
        test=pictures.where(test),
        unseen=torch.zeros(len(styles), len(objects), dtype=torch.bool),
        forgotten=forgotten,
        new=new,
    )
    for place, style in enumerate(data.kept):
        for number in range(config.unseen):
            data.unseen[style, (place + number * len(data.kept)) % len(objects)] = True
    return data


def _index(styles: tuple[str, ...], config: ImageDataConfig, field: str) -> int:
    name: str = getattr(config, field)
    if name not in styles:
        raise ConfigurationError(
            f"{field}: expected a style of the images, found '{name}'. {nearest(name, styles)}"
        )
    return styles.index(name)


def _every_fifth(pictures: Pictures) -> Tensor:
    """Mark a fifth of each cell, its last ones first."""
    test = torch.zeros(len(pictures), dtype=torch.bool)
    cells = pictures.styles * (int(pictures.objects.max()) + 1) + pictures.objects
    for cell in cells.unique():
        inside = (cells == cell).nonzero().flatten()
        test[inside[_TEST_PART - 1 :: _TEST_PART]] = True
    return test


@IMAGE_SETS.register("letters")
def render(config: ImageDataConfig) -> tuple[tuple[str, ...], tuple[str, ...], Pictures]:
    """Render letters, each copy shifted by up to half a pixel and scaled by up to 3 %.

    Args:
        config: Size, number of copies and seed.
    """
    names = TYPEFACES.names()
    generator = torch.Generator().manual_seed(config.seed)
    ink = torch.cat([glyphs(name, config.image_size) for name in names])
    ink = ink.repeat_interleave(config.copies, dim=0)
    cells = torch.arange(len(names) * len(LETTERS)).repeat_interleave(config.copies)
    pictures = Pictures(
        images=_varied(ink, config.image_size, generator) * 2 - 1,
        styles=cells // len(LETTERS),
        objects=cells % len(LETTERS),
    )
    return names, tuple(LETTERS), pictures


def _varied(ink: Tensor, size: int, generator: Generator) -> Tensor:
    """Shift and scale fine images at random, then average them down to ``size``."""
    low, high = _SCALES
    count = len(ink)
    scale = low + (high - low) * torch.rand(count, generator=generator)
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * 2 * _SHIFT_PIXELS / size
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale
    matrix[:, :, 2] = shift
    fine = [
        F.grid_sample(part, F.affine_grid(m, list(part.shape), False), align_corners=False)
        for part, m in zip(ink.split(256), matrix.split(256), strict=True)
    ]
    return F.adaptive_avg_pool2d(torch.cat(fine), size)


@IMAGE_SETS.register("folder")
def read_folder(config: ImageDataConfig) -> tuple[tuple[str, ...], tuple[str, ...], Pictures]:
    """Read ``style/object/*.jpg`` (the layout of UnlearnCanvas, arXiv:2402.11846) as pixels.

    Images are cut to their middle square and scaled down.

    Args:
        config: Folder and size.
    Raises:
        DataError: The folder is missing, or a style lacks an object.
    """
    root = Path(config.folder)
    if not config.folder or not root.is_dir():
        raise DataError(
            f"expected a folder with style/object/*.jpg, found '{config.folder}'. Set folder, or "
            "data='letters'."
        )
    styles = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
    objects = tuple(sorted({entry.name for style in styles for entry in (root / style).iterdir()}))
    images, labels = [], []
    for index, style in enumerate(styles):
        for other, item in enumerate(objects):
            found = _read_cell(root / style / item, config.image_size)
            images += found
            labels += [(index, other)] * len(found)
    cells = torch.tensor(labels)
    return (
        styles,
        objects,
        Pictures(images=torch.stack(images), styles=cells[:, 0], objects=cells[:, 1]),
    )


def _read_cell(folder: Path, size: int) -> list[Tensor]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in _ENDINGS)
    if len(files) < _TEST_PART:
        raise DataError(
            f"'{folder}': expected at least {_TEST_PART} images of a style and object, so that one "
            f"is left for testing, found {len(files)}. Add images, or leave the object out."
        )
    return [_read(file, size) for file in files]


def _read(file: Path, size: int) -> Tensor:
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        square = ImageOps.fit(image.convert("RGB"), (size, size))
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1) / 127.5 - 1
