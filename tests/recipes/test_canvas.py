"""Pixels, and latents of an autoencoder of diffusers."""

import sys

import pytest
import torch

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes.canvas import Pixels, canvas

from .tiny_diffusers import autoencoder, diffusers

IMAGES = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module", params=[None, 0.7])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    vae = autoencoder(latent_channels=2, scaling_factor=0.5, shift_factor=request.param)
    vae.save_pretrained(path)
    return path


def test_pixels_stay_as_they_are():
    pixels = canvas("", (3, 16, 16))
    assert type(pixels) is Pixels
    assert (pixels.shape, pixels.patch_size) == ((3, 16, 16), 4)
    assert pixels.encode(IMAGES) is IMAGES
    assert pixels.decode(IMAGES) is IMAGES


def test_latents_are_those_of_the_autoencoder_in_its_own_units(folder):
    vae = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    shift = vae.config.shift_factor or 0.0
    latents = canvas(str(folder), (3, 16, 16))
    assert (latents.shape, latents.patch_size) == ((2, 8, 8), 2)
    drawn = latents.encode(IMAGES)
    with torch.no_grad():
        modes = vae.encode(IMAGES).latent_dist.mode()
        torch.testing.assert_close(drawn, (modes - shift) * 0.5)
        torch.testing.assert_close(latents.decode(drawn), vae.decode(modes).sample)
    assert not drawn.requires_grad


def test_other_images_are_refused(folder):
    with pytest.raises(DataError, match=r"images of 3 channels, found 1\. Set data='f"):
        canvas(str(folder), (1, 16, 16))
    with pytest.raises(DataError, match=r"a multiple of 4 pixels .* found 18\. Set image_size"):
        canvas(str(folder), (3, 18, 18))


def test_a_missing_autoencoder_or_library_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"vae: .* of AutoencoderKL, found '.*none'"):
        canvas(str(tmp_path / "none"), (3, 16, 16))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigurationError, match=r"aihwkit-lora\[diffusers\], or leave vae empty"):
        canvas(str(tmp_path), (3, 16, 16))
