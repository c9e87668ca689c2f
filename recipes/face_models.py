"""Networks of the face recipe by name: the workload's mixer, and a small vision transformer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.metering.macs import Macs, count_macs
from aihwkit_lora.recipes.face_augmentation import IMAGE_SIZE
from aihwkit_lora.recipes.mixer import Mlp, MlpMixer, patches_of
from aihwkit_lora.registry import Registry

Build = Callable[[int, int], nn.Module]
"""From the height of an image, in pixels, and the number of outputs to a fresh network."""

MODELS = Registry[Build]("model")
"""Networks by name. Their blocks have the mixer's names, so that ``LORA_TARGETS`` fits them all."""


class AttentionProducts(nn.Module):
    """Compute attention from queries, keys and values: softmax(Q·Kᵀ/√d)·V for each head.

    Both products are of activations with activations: no array can hold a factor, so they stay
    digital, and are counted as such.

    Args:
        heads: Divides the width of queries, keys and values.

    Example:
        >>> AttentionProducts(heads=2)(torch.zeros(3, 16, 24)).shape
        torch.Size([3, 16, 8])
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, projected: Tensor) -> Tensor:
        """Mix tokens.

        Args:
            projected: Queries, keys and values side by side, ``(images, tokens, 3·width)``.
        Returns:
            Shape ``(images, tokens, width)``.
        """
        query, key, value = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Written out: torch's fused form has no pass for several chips at once (vmap).
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        mixed: Tensor = (weights @ value).transpose(1, 2).flatten(2)
        return mixed


@count_macs(AttentionProducts)
def _products(layer: AttentionProducts, output: Tensor) -> Macs:
    # One MAC per token, output value and product; each product has two factors to differentiate.
    macs = output.numel() * output.shape[1]
    return Macs(forward=2 * macs, input_gradient=4 * macs, weight_gradient=0)


class Attention(nn.Module):
    """Mix tokens by multi-head self-attention whose projections are linear layers without bias.

    Args:
        width: Features of a token.
        heads: Divides ``width``.

    Example:
        >>> Attention(width=8, heads=2)(torch.zeros(3, 16, 8)).shape
        torch.Size([3, 16, 8])
    """

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.products = AttentionProducts(heads)
        self.projection = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape, ``(images, tokens, width)``."""
        mixed: Tensor = self.projection(self.products(self.qkv(tokens)))
        return mixed


class AttentionBlock(nn.Module):
    """A mixer's block with attention in place of the MLP across patches.

    Args:
        width: Features of a token.
        heads: Attention heads; divides ``width``.
        hidden: Hidden units of the MLP.

    Example:
        >>> AttentionBlock(width=8, heads=2, hidden=32)(torch.zeros(3, 16, 8)).shape
        torch.Size([3, 16, 8])
    """

    def __init__(self, *, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.token_norm = nn.RMSNorm(width)
        self.attention = Attention(width=width, heads=heads)
        self.channel_norm = nn.RMSNorm(width)
        self.channel_mixing = Mlp(width, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape, ``(images, tokens, width)``."""
        tokens = tokens + self.attention(self.token_norm(tokens))
        mixed: Tensor = tokens + self.channel_mixing(self.channel_norm(tokens))
        return mixed


class VisionTransformer(nn.Module):
    """Classify grey images by attention between patches (ViT, arXiv:2010.11929).

    Differs from the paper as the mixer does: root-mean-square norms, no biases, and the mean of
    all tokens instead of a class token. Positions are a digital parameter; every other weight is
    in a linear layer and fits an array.

    Args:
        image_size: Height and width of an image, in pixels.
        patch_size: Height and width of a patch, in pixels; divides ``image_size``.
        width: Features of a patch.
        heads: Attention heads; divides ``width``.
        hidden: Hidden units of a block's MLP.
        blocks: Number of blocks.
        outputs: Number of logits.
    Raises:
        ConfigurationError: A size is below 1, patches do not tile the image, or heads do not
            divide the width.

    Example:
        >>> network = VisionTransformer(outputs=41)
        >>> network(torch.zeros(3, 1, 64, 64)).shape
        torch.Size([3, 41])
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        patch_size: int = 8,
        width: int = 64,
        heads: int = 4,
        hidden: int = 128,
        blocks: int = 2,
        outputs: int = 6,
    ) -> None:
        super().__init__()
        smallest = min(image_size, patch_size, width, heads, hidden, blocks, outputs)
        if smallest < 1:
            raise ConfigurationError(
                f"expected every size of the transformer to be at least 1, found {smallest}. Check "
                "image_size, patch_size, width, heads, hidden, blocks and outputs."
            )
        for whole, part, names in (
            (image_size, patch_size, "patch_size that divides image_size"),
            (width, heads, "heads that divide width"),
        ):
            if whole % part:
                raise ConfigurationError(f"expected {names}, found {part} and {whole}.")
        self.image_size, self.patch_size = image_size, patch_size
        tokens = (image_size // patch_size) ** 2
        self.patch_embedding = nn.Linear(patch_size**2, width, bias=False)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(
            AttentionBlock(width=width, heads=heads, hidden=hidden) for _ in range(blocks)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, outputs, bias=False)

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
                f"{tuple(images.shape)}. Resize them, or set the transformer's image_size."
            )
        tokens = self.patch_embedding(patches_of(images, self.patch_size)) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens).mean(dim=1))
        return logits


def build_model(name: str, *, image_size: int, outputs: int) -> nn.Module:
    """Make a fresh network.

    Args:
        name: Of a registered model.
        image_size: Height and width of an image, in pixels.
        outputs: Number of logits: everybody who is enrolled or joins later.
    Raises:
        UnknownNameError: There is no such model.
        ConfigurationError: It has no patches for images of this size.

    Example:
        >>> build_model("vit", image_size=64, outputs=6).head
        Linear(in_features=64, out_features=6, bias=False)
    """
    return MODELS.get(name)(image_size, outputs)


@MODELS.register("mixer")
def _mixer(image_size: int, outputs: int) -> nn.Module:
    """The workload's own at 16 pixels; wider, on 8 × 8 patches, where there is more to see."""
    if image_size <= IMAGE_SIZE:
        return MlpMixer(image_size=image_size, outputs=outputs)
    patch_size = _an_eighth(image_size)
    return MlpMixer(
        image_size=image_size, patch_size=patch_size, channels=64, hidden=128, outputs=outputs
    )


@MODELS.register("vit")
def _transformer(image_size: int, outputs: int) -> nn.Module:
    """On 4 × 4 patches at 16 pixels or fewer, on 8 × 8 patches above."""
    patch_size = 4 if image_size <= IMAGE_SIZE else _an_eighth(image_size)
    return VisionTransformer(image_size=image_size, patch_size=patch_size, outputs=outputs)


def _an_eighth(image_size: int) -> int:
    if image_size % 8:
        raise ConfigurationError(
            f"expected an image_size above {IMAGE_SIZE} that 8 divides, found {image_size}. Take "
            "32 or 64."
        )
    return image_size // 8
