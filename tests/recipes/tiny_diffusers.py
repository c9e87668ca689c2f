"""Models of diffusers, tiny and with random weights."""

import pytest

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")


def autoencoder(**options):
    """Latents half as large as its images of three channels."""
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8],
        norm_num_groups=2,
        **options,
    )


def transformer(**options):
    """Draws 20 × 20 pixels of one channel."""
    settings = {"in_channels": 1, "sample_size": 20, "patch_size": 4, "num_layers": 2}
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, **settings | options
    )
