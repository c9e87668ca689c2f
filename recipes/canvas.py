"""What a diffusion model draws on: the pixels of images, or an autoencoder's latents of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes.image_data import PATCH

_AT_ONCE = 32


class Pixels:
    """Images as they are.

    Args:
        shape: Of an image: channels, height and width.

    Example:
        >>> Pixels((1, 20, 20)).encode(torch.zeros(3, 1, 20, 20)).shape
        torch.Size([3, 1, 20, 20])
    """

    patch_size = PATCH
    """Height and width of the patches that what is drawn is cut into."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)

    def encode(self, images: Tensor) -> Tensor:
        """From images, shape ``(n, channels, height, width)``, to what the model shall draw."""
        return images

    def decode(self, drawn: Tensor) -> Tensor:
        """From what the model drew to images."""
        return drawn


class Latents(Pixels):
    """Latents of an autoencoder, as in latent diffusion (Rombach et al., arXiv:2112.10752).

    The autoencoder is digital, is never trained, and what it computes is not counted: it turns
    training images into latents once, and drawn latents into pictures for the judge.

    Args:
        vae: An ``AutoencoderKL`` of diffusers.
        shape: Of an image: channels, height and width.
    Raises:
        DataError: Its images have another number of channels, or are not cut evenly.
    """

    patch_size = 2

    def __init__(self, vae: Any, shape: Sequence[int]) -> None:
        self._vae = vae.eval().requires_grad_(False)
        channels, height, _ = shape
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if channels != vae.config.in_channels:
            raise DataError(
                f"vae: expected images of {vae.config.in_channels} channels, found {channels}. "
                "Set data='folder', or leave vae empty."
            )
        if height % (factor * self.patch_size):
            raise DataError(
                f"vae: expected images of a multiple of {factor * self.patch_size} pixels (latents "
                f"are {factor} times smaller, patches {self.patch_size} wide), found {height}. Set "
                "image_size."
            )
        side = height // factor
        super().__init__((vae.config.latent_channels, side, side))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Modes of the latents' distributions, shifted and scaled as the autoencoder says."""
        parts = [self._vae.encode(part).latent_dist.mode() for part in images.split(_AT_ONCE)]
        latents: Tensor = (torch.cat(parts) - self._shift) * self._vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def decode(self, drawn: Tensor) -> Tensor:
        """Images of latents."""
        latents = drawn / self._vae.config.scaling_factor + self._shift
        return torch.cat([self._vae.decode(part).sample for part in latents.split(_AT_ONCE)])

    @property
    def _shift(self) -> float:
        return self._vae.config.shift_factor or 0.0


def canvas(vae: str, shape: Sequence[int]) -> Pixels:
    """Choose what to draw on.

    Args:
        vae: Folder, or name on the Hugging Face hub, of an ``AutoencoderKL`` of diffusers; empty
            for pixels.
        shape: Of an image: channels, height and width.
    Raises:
        ConfigurationError: diffusers is not installed, or there is no such autoencoder.
        DataError: See :class:`Latents`.

    Example:
        >>> canvas("", (1, 20, 20)).patch_size
        4
    """
    if not vae:
        return Pixels(shape)
    return Latents(pretrained("vae", "AutoencoderKL", vae), shape)


def pretrained(option: str, kind: str, name: str) -> Any:
    """Load a model of diffusers.

    Args:
        option: Of the recipe, for messages.
        kind: Name of the class.
        name: Folder, or name on the Hugging Face hub.
    Raises:
        ConfigurationError: diffusers is not installed, or there is no such model.
    """
    try:
        models = importlib.import_module("diffusers")
    except ImportError as error:
        raise ConfigurationError(
            f"{option}='{name}': expected diffusers to be installed, found none. Install "
            f"aihwkit-lora[diffusers], or leave {option} empty."
        ) from error
    try:
        return getattr(models, kind).from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{option}: expected a folder, or a name on the Hugging Face hub, of {kind}, "
            f"found '{name}': {error}"
        ) from error
