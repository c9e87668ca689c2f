"""More images from each photo: rotated, mirrored and cropped at random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from aihwkit_lora.errors import ConfigurationError

IMAGE_SIZE = 16
"""Height and width of the images that the workload's mixer sees, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to each photo to get more images of it.

    Args:
        copies: Altered copies of a photo beside the photo itself, at least 0.
        rotation_degrees: Largest rotation either way, in degrees, 0 to 180.
        flip: Mirror every second copy (at random) left to right.
        crop_area: Smallest and largest area of the part that is cut out and enlarged, as a
            fraction of the photo. A draw that does not fit into the photo is repeated, so an
            upper end above 1 only shapes the distribution.
        crop_aspect: Largest ratio of the sides of that part, at least 1.
    Raises:
        ConfigurationError: A value is out of its range.

    Example:
        >>> Augmentation(copies=1, rotation_degrees=10.0).flip
        False
    """

    copies: int
    rotation_degrees: float = 0.0
    flip: bool = False
    crop_area: tuple[float, float] = (1.0, 1.0)
    crop_aspect: float = 1.0

    def __post_init__(self) -> None:
        if self.copies < 0:
            raise ConfigurationError(f"expected copies of at least 0, found {self.copies}.")
        if not 0.0 <= self.rotation_degrees <= 180.0:
            raise ConfigurationError(
                f"expected rotation_degrees from 0 to 180, found {self.rotation_degrees}."
            )
        smallest, largest = self.crop_area
        if not 0.0 < smallest <= min(largest, 1.0):
            raise ConfigurationError(
                "expected crop_area=(smallest, largest) with 0 < smallest <= 1 and smallest <= "
                f"largest, found {self.crop_area}."
            )
        if not self.crop_aspect >= 1.0:
            raise ConfigurationError(
                f"expected crop_aspect of at least 1, found {self.crop_aspect}."
            )


def augment(
    photos: Tensor, augmentation: Augmentation, generator: Generator, *, size: int = IMAGE_SIZE
) -> Tensor:
    """Return every photo and altered copies of it, scaled to the model's size.

    A copy is rotated (black beyond the edge), flipped and cropped, in this order, by one bilinear
    resampling at the photo's own resolution.

    Args:
        photos: Brightness in [0, 1], shape ``(n, 1, height, height)``.
        augmentation: What to do.
        generator: Source of all randomness.
        size: Height and width of the images, in pixels.
    Returns:
        Shape ``((1 + copies)·n, 1, size, size)``: all photos, then one copy of each, and so on.

    Example:
        >>> augment(torch.rand(3, 1, 64, 64), Augmentation(copies=2), Generator()).shape
        torch.Size([9, 1, 16, 16])
    """
    originals = photos.repeat(augmentation.copies, 1, 1, 1)
    drawn = max(photos.shape[-1], size)
    maps = _random_maps(len(originals), augmentation, generator)
    grid = functional.affine_grid(maps, [len(originals), 1, drawn, drawn], align_corners=False)
    copies = functional.grid_sample(originals, grid, padding_mode="zeros", align_corners=False)
    return torch.cat([_resize(photos, size), _resize(copies, size)])


def _resize(images: Tensor, size: int) -> Tensor:
    """Scale square images; antialiasing averages the pixels that a smaller one covers."""
    return functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def _random_maps(count: int, augmentation: Augmentation, generator: Generator) -> Tensor:
    """Draw maps from a copy's coordinates in [-1, 1] to its photo's, shape ``(count, 2, 3)``."""
    limit = math.radians(augmentation.rotation_degrees)
    angle = limit * (2.0 * torch.rand(count, generator=generator) - 1.0)
    mirrored = torch.rand(count, generator=generator) < 0.5 if augmentation.flip else angle > 4.0
    sides, centres = _random_crops(count, augmentation, generator)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1)
    rotation = rotation.view(count, 2, 2)
    rotation[mirrored, :, 0] *= -1.0
    return torch.cat([rotation * sides[:, None, :], rotation @ centres[:, :, None]], dim=-1)


def _random_crops(
    count: int, augmentation: Augmentation, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Draw sides (fractions of the photo) and centres (in [-1, 1]) of crops, ``(count, 2)`` each.

    As torchvision's RandomResizedCrop 0.29: area uniform, log of the aspect ratio uniform, the
    first of ten draws that fits; the whole photo if none does. Its crops are whole pixels, ours
    are not.
    """
    attempts = 10
    smallest, largest = augmentation.crop_area
    log_aspect = math.log(augmentation.crop_aspect)
    area = smallest + (largest - smallest) * torch.rand(count, attempts, generator=generator)
    root_aspect = (
        0.5 * log_aspect * (2.0 * torch.rand(count, attempts, generator=generator) - 1.0)
    ).exp()
    sides = area.sqrt()[..., None] * torch.stack([root_aspect, 1.0 / root_aspect], dim=-1)
    fits = (sides <= 1.0).all(dim=-1)
    first = sides[torch.arange(count), fits.int().argmax(dim=1)]
    sides = torch.where(fits.any(dim=1, keepdim=True), first, 1.0)
    return sides, (1.0 - sides) * (2.0 * torch.rand(count, 2, generator=generator) - 1.0)
