"""The MLP-Mixer of the face-recognition workload: 5,148 parameters, 87,160 MAC per image."""

from __future__ import annotations

from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError

LORA_TARGETS = r"blocks\.\d+\.channel_mixing\.fc[12]|head"
"""Layers that get a LoRA branch, as a pattern for PEFT's ``target_modules``."""


class Mlp(nn.Module):
    """Apply two linear layers without bias and a GELU between them to the last axis.

    Args:
        width: Size of the last axis, before and after.
        hidden: Size in between.

    Example:
        >>> import torch
        >>> Mlp(20, 32)(torch.zeros(3, 16, 20)).shape
        torch.Size([3, 16, 20])
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape, ``(..., width)``."""
        mixed: Tensor = self.fc2(self.activation(self.fc1(features)))
        return mixed


class MixerBlock(nn.Module):
    """Mix information across patches, then across channels, each around a residual path.

    Args:
        tokens: Number of patches.
        channels: Number of features of a patch.
        hidden: Hidden units of both MLPs.

    Example:
        >>> import torch
        >>> MixerBlock(tokens=16, channels=20, hidden=32)(torch.zeros(3, 16, 20)).shape
        torch.Size([3, 16, 20])
    """

    def __init__(self, *, tokens: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.token_norm = nn.RMSNorm(channels)
        self.token_mixing = Mlp(tokens, hidden)
        self.channel_norm = nn.RMSNorm(channels)
        self.channel_mixing = Mlp(channels, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape, ``(images, tokens, channels)``."""
        across_patches = self.token_mixing(self.token_norm(tokens).transpose(1, 2)).transpose(1, 2)
        tokens = tokens + across_patches
        mixed: Tensor = tokens + self.channel_mixing(self.channel_norm(tokens))
        return mixed


class MlpMixer(nn.Module):
    """Classify small grey images with linear layers only, so that every weight fits a crossbar.

    The defaults are those of arXiv:2601.10037's face recognition: 5,048 weights in linear layers
    without bias, 100 normalisation gains that stay digital, one output for each person who is
    enrolled or may join later.

    Args:
        image_size: Height and width of an image, in pixels.
        patch_size: Height and width of a patch, in pixels; divides ``image_size``.
        channels: Features of a patch.
        hidden: Hidden units of the token- and channel-mixing MLPs.
        blocks: Number of mixer blocks.
        outputs: Number of logits.
    Raises:
        ConfigurationError: A size is below 1, or patches do not tile the image.

    Example:
        >>> import torch
        >>> mixer = MlpMixer()
        >>> sum(parameter.numel() for parameter in mixer.parameters())
        5148
        >>> mixer(torch.zeros(3, 1, 16, 16)).shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        *,
        image_size: int = 16,
        patch_size: int = 4,
        channels: int = 20,
        hidden: int = 32,
        blocks: int = 2,
        outputs: int = 6,
    ) -> None:
        super().__init__()
        smallest = min(image_size, patch_size, channels, hidden, blocks, outputs)
        if smallest < 1:
            raise ConfigurationError(
                f"expected every size of the mixer to be at least 1, found {smallest}. "
                "Check image_size, patch_size, channels, hidden, blocks and outputs."
            )
        if image_size % patch_size:
            raise ConfigurationError(
                f"expected patches that tile the image, found patch_size={patch_size} and "
                f"image_size={image_size}. Choose a patch_size that divides image_size."
            )
        self.image_size = image_size
        self.patch_size = patch_size
        tokens = (image_size // patch_size) ** 2
        self.patch_embedding = nn.Linear(patch_size**2, channels, bias=False)
        self.blocks = nn.ModuleList(
            MixerBlock(tokens=tokens, channels=channels, hidden=hidden) for _ in range(blocks)
        )
        self.norm = nn.RMSNorm(channels)
        self.head = nn.Linear(channels, outputs, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Score grey images.

        Args:
            images: Shape ``(images, 1, image_size, image_size)``, brightness in [0, 1].
        Returns:
            Logits, shape ``(images, outputs)``.
        Raises:
            DataError: The images have another shape.
        """
        if images.shape[1:] != (1, self.image_size, self.image_size):
            raise DataError(
                f"expected images of shape (n, 1, {self.image_size}, {self.image_size}), found "
                f"{tuple(images.shape)}. Resize them, or set the mixer's image_size."
            )
        tokens = self.patch_embedding(patches_of(images, self.patch_size))
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens).mean(dim=1))
        return logits


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """Cut grey images into rows of patches, centred so that rows of an array are driven both ways.

    Args:
        images: Shape ``(images, 1, height, width)``, brightness in [0, 1].
        patch_size: Height and width of a patch, in pixels; divides both.
    Returns:
        Shape ``(images, tokens, patch_size²)``.

    Example:
        >>> import torch
        >>> patches_of(torch.ones(3, 1, 16, 16), 8).shape
        torch.Size([3, 4, 64])
    """
    centred = (images - 0.5) / 0.25
    return nn.functional.unfold(centred, patch_size, stride=patch_size).mT
