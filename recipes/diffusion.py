"""A class-conditional diffusion transformer and flow matching, for the image workload.

The network is DiT (Peebles and Xie, arXiv:2212.09748) with adaLN-Zero: a condition (time, style and
object) shifts, scales and gates every block. Blocks mix patches by attention or, as in the workload
of arXiv:2601.10037, by a 7 × 7 depthwise convolution (ConvNeXt, arXiv:2201.03545).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from aihwkit_lora.errors import ConfigurationError

LORA_TARGETS = r"blocks\.\d+\.fc[12]|.*\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)"
"""Layers that get a LoRA branch, as a pattern for PEFT's ``target_modules``: MLPs of our blocks, or
of those of diffusers."""

Mixing = Literal["attention", "convnext"]
"""How a block mixes patches."""

_TIME_FEATURES = 64
_FASTEST = 1000.0
_TIME_SHIFT = 0.6
# As large as what the time says; with the usual 0.02 labels are learnt several times later.
_ROW_SIZE = 0.5
_MAP_SIZE = 0.02


@dataclass(frozen=True, kw_only=True)
class DiffusionShape:
    """Size of a diffusion transformer.

    Args:
        image_size: Height and width of an image (or latent), in pixels.
        channels: Of an image.
        patch_size: Height and width of a patch, in pixels; divides ``image_size``.
        width: Features of a patch.
        depth: Number of blocks.
        heads: Attention heads; divides ``width``.
        mlp_ratio: Hidden units of a block's MLP, as a multiple of ``width``.
        styles: Rows of the style embedding.
        objects: Rows of the object embedding.
        block: How blocks mix patches: ``"attention"`` or ``"convnext"``.
        object_maps: Whether an object adds to each patch something of its own, too: where its
            parts are. ``patches · width`` more values for each object, in digital memory.
    Raises:
        ConfigurationError: A size is below 1, patches do not tile the image, heads do not divide
            the width, or there is no such block.

    Example:
        >>> DiffusionShape(image_size=20, patch_size=4, width=96, depth=4).patches
        25
    """

    image_size: int = 20
    channels: int = 1
    patch_size: int = 4
    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    styles: int = 10
    objects: int = 26
    block: Mixing = "attention"
    object_maps: bool = False

    def __post_init__(self) -> None:
        choices = ("block", "object_maps")
        sizes = {name: value for name, value in vars(self).items() if name not in choices}
        for name, value in sizes.items():
            if value < 1:
                raise ConfigurationError(f"expected {name} of at least 1, found {value}.")
        for whole, part in (("image_size", "patch_size"), ("width", "heads")):
            if sizes[whole] % sizes[part]:
                raise ConfigurationError(
                    f"expected {part} to divide {whole}, found {part}={sizes[part]} and "
                    f"{whole}={sizes[whole]}."
                )
        if self.block not in ("attention", "convnext"):
            raise ConfigurationError(
                f"expected block 'attention' or 'convnext', found {self.block!r}."
            )

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


DIT_B2_CONVNEXT = DiffusionShape(
    image_size=16,
    channels=4,
    patch_size=2,
    width=768,
    depth=12,
    heads=12,
    styles=10,
    objects=3,
    block="convnext",
)
"""The network of arXiv:2601.10037: DiT-B/2 on latents of 16 × 16 × 4, ConvNeXt blocks."""


class Attention(nn.Module):
    """Multi-head self-attention over patches.

    The four projections are linear layers and can be arrays; products of activations with
    activations, and the softmax, have no stored weight and stay digital.

    Args:
        shape: Size of the network.

    Example:
        >>> Attention(DiffusionShape(width=8, heads=2))(torch.zeros(3, 25, 8)).shape
        torch.Size([3, 25, 8])
    """

    def __init__(self, shape: DiffusionShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.projection = nn.Linear(shape.width, shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix patches; shape ``(images, patches, width)`` in and out."""
        images, patches, width = tokens.shape
        split = self.qkv(tokens).view(images, patches, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.projection(mixed.transpose(1, 2).reshape(images, patches, width))
        return out


class DepthwiseMixing(nn.Module):
    """A 7 × 7 depthwise convolution over the grid of patches, in place of attention.

    It stays digital on a chip: a depthwise kernel has 49 weights for one column, so an array of 128
    rows would hold one kernel per tile. It is 2 % of the weights of the paper's network.

    Args:
        shape: Size of the network.

    Example:
        >>> DepthwiseMixing(DiffusionShape(width=8))(torch.zeros(3, 25, 8)).shape
        torch.Size([3, 25, 8])
    """

    def __init__(self, shape: DiffusionShape) -> None:
        super().__init__()
        self.side = shape.image_size // shape.patch_size
        self.depthwise = nn.Conv2d(shape.width, shape.width, 7, padding=3, groups=shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix patches; shape ``(images, patches, width)`` in and out."""
        grid = tokens.mT.unflatten(2, (self.side, self.side))
        mixed: Tensor = self.depthwise(grid).flatten(2).mT
        return mixed


class DiffusionBlock(nn.Module):
    """Mix patches, then features, each normalised, shifted, scaled and gated by the condition.

    The gates start at zero (adaLN-Zero), so that a fresh block passes its input on.

    Args:
        shape: Size of the network.

    Example:
        >>> block = DiffusionBlock(DiffusionShape(width=8))
        >>> tokens = torch.randn(3, 25, 8)
        >>> torch.equal(block(tokens, torch.randn(3, 8)), tokens)
        True
    """

    def __init__(self, shape: DiffusionShape) -> None:
        super().__init__()
        width, hidden = shape.width, shape.mlp_ratio * shape.width
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        mixing = Attention if shape.block == "attention" else DepthwiseMixing
        self.mixing = mixing(shape)
        self.fc1 = nn.Linear(width, hidden)
        self.activation = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)
        self.modulation = _zero(nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Transform patches.

        Args:
            tokens: Shape ``(images, patches, width)``.
            condition: Shape ``(images, width)``.
        """
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        tokens = tokens + gate * self.mixing(_modulated(self.norm(tokens), shift, scale))
        features = _modulated(self.norm(tokens), mlp_shift, mlp_scale)
        out: Tensor = tokens + mlp_gate * self.fc2(self.activation(self.fc1(features)))
        return out


class Row(nn.Module):
    """One row of an embedding, a module of its own so that it can be trained alone.

    Args:
        width: Features of the row.
        size: Standard deviation of what it starts from.

    Example:
        >>> Row(8)().shape
        torch.Size([8])
    """

    def __init__(self, width: int, size: float = _ROW_SIZE) -> None:
        super().__init__()
        self.value = nn.Parameter(size * torch.randn(width))

    def forward(self) -> Tensor:
        """Return the row, shape ``(width,)``."""
        return self.value


class Embedding(nn.Module):
    """Look up rows by number; digital memory on a chip.

    Args:
        rows: How many.
        width: Features of a row.
        size: Standard deviation of what rows start from.

    Example:
        >>> Embedding(3, 8)(torch.tensor([0, 2])).shape
        torch.Size([2, 8])
    """

    def __init__(self, rows: int, width: int, size: float = _ROW_SIZE) -> None:
        super().__init__()
        self.rows = nn.ModuleList(Row(width, size) for _ in range(rows))

    def row(self, index: int) -> nn.Parameter:
        """One row, as a parameter.

        Args:
            index: Its number.
        """
        return cast(Row, self.rows[index]).value

    def forward(self, index: Tensor) -> Tensor:
        """Look up rows: ``(n,)`` to ``(n, width)``."""
        return torch.stack([row() for row in self.rows])[index]


class DiffusionTransformer(nn.Module):
    """Predict a clean image from a noisy one, its time and its label.

    A label is a pair: ``style · objects + object``. What is drawn is added to every patch, the
    in-context way of DiT (arXiv:2212.09748, section 3.2), and with ``object_maps`` to each in its
    own way; how it is drawn modulates every block, beside the time. So a pair that was never
    trained still has a meaning.

    Args:
        shape: Size of the network.

    Example:
        >>> model = DiffusionTransformer(DiffusionShape(width=16, depth=1))
        >>> model(torch.randn(3, 1, 20, 20), torch.rand(3), torch.tensor([0, 27, 259])).shape
        torch.Size([3, 1, 20, 20])
    """

    def __init__(self, shape: DiffusionShape) -> None:
        super().__init__()
        self.shape = shape
        patch, width = shape.channels * shape.patch_size**2, shape.width
        self.patch_embedding = nn.Linear(patch, width)
        self.position = nn.Parameter(0.02 * torch.randn(shape.patches, width))
        self.time = nn.Sequential(
            nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.style = Embedding(shape.styles, width)
        self.object = Embedding(shape.objects, width)
        self.object_maps = (
            Embedding(shape.objects, shape.patches * width, _MAP_SIZE)
            if shape.object_maps
            else None
        )
        self.activation = nn.SiLU()
        self.blocks = nn.ModuleList(DiffusionBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = _zero(nn.Linear(width, 2 * width))
        self.head = _zero(nn.Linear(width, patch))

    def forward(self, noisy: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Predict the clean image.

        Args:
            noisy: Shape ``(n, channels, image_size, image_size)``.
            time: Shape ``(n,)``, 0 for pure noise to 1 for the image.
            label: ``style · objects + object``, shape ``(n,)``.
        Returns:
            Shape ``(n, channels, image_size, image_size)``.
        """
        style, item = label // self.shape.objects, label % self.shape.objects
        patches = self.patch_embedding(self._patches(noisy))
        tokens = patches + self.position + self.object(item)[:, None]
        if self.object_maps is not None:
            tokens = tokens + self.object_maps(item).view_as(tokens)
        condition = self.activation(self.time(time_features(time)) + self.style(style))
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self._image(self.head(_modulated(self.norm(tokens), shift, scale)))

    def _patches(self, images: Tensor) -> Tensor:
        return F.unfold(images, self.shape.patch_size, stride=self.shape.patch_size).mT

    def _image(self, patches: Tensor) -> Tensor:
        size, patch = self.shape.image_size, self.shape.patch_size
        return F.fold(patches.mT, (size, size), patch, stride=patch)


def digital_modules(model: nn.Module) -> list[str]:
    """Name the layers that stay digital on a chip: depthwise convolutions.

    Args:
        model: A diffusion transformer.
    Returns:
        For ``al.convert(model, chip, exclude_modules=...)``.

    Example:
        >>> shape = DiffusionShape(width=8, depth=1, block="convnext")
        >>> digital_modules(DiffusionTransformer(shape))
        ['blocks.0.mixing.depthwise']
    """
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]


def time_features(time: Tensor) -> Tensor:
    """Sines and cosines of a time at geometrically spaced frequencies.

    Args:
        time: Shape ``(n,)``, from 0 to 1.
    Returns:
        Shape ``(n, 64)``.

    Example:
        >>> time_features(torch.tensor([0.0])).sum().item()
        32.0
    """
    half = _TIME_FEATURES // 2
    steps = torch.arange(half, device=time.device) / half
    angles = time[:, None] * _FASTEST * torch.exp(-math.log(10_000.0) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def interpolate(images: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Go from noise at time 0 to images at time 1 in a straight line.

    Args:
        images: Shape ``(n, …)``.
        noise: The same shape.
        time: Shape ``(n,)``.

    Example:
        >>> interpolate(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0.25]))
        tensor([[0.2500, 0.2500]])
    """
    along = time.view(-1, *[1] * (images.dim() - 1))
    return along * images + (1 - along) * noise


def draw_times(count: int, generator: Generator) -> Tensor:
    """Draw times to train on, most of them where the image is half visible already.

    Mean squared errors of predicted images at these times stand for those of velocities at the
    logit-normal times of Li and He, arXiv:2511.13720: there each is weighted by 1 / (1 - t)².

    Args:
        count: How many.
        generator: Draws them.

    Example:
        >>> times = draw_times(1000, torch.Generator().manual_seed(0))
        >>> 0.6 < times.median() < 0.7
        tensor(True)
    """
    return torch.sigmoid(_TIME_SHIFT + torch.randn(count, generator=generator))


@torch.no_grad()
def sample(model: nn.Module, label: Tensor, *, noise: Tensor, steps: int = 10) -> Tensor:
    """Generate images by Euler's method.

    Args:
        model: Predicts clean images.
        label: ``style · objects + object``, shape ``(n,)``.
        noise: Where to start, shape ``(n, channels, image_size, image_size)``.
        steps: Evaluations of the model, at least 1.
    Returns:
        Images of the noise's shape.
    """
    training = model.training
    model.eval()
    images = noise
    for step in range(steps):
        time = torch.full((len(noise),), step / steps)
        clean = model(images, time, label)
        images = images + (clean - images) / (steps - step)
    model.train(training)
    return images


def _modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return tokens * (1 + scale) + shift


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
