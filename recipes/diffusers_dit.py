"""diffusers' diffusion transformer as the model of the image recipe."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.canvas import Pixels, pretrained
from aihwkit_lora.recipes.diffusion import Embedding

_LAST_STEP = 999.0


class PairEmbedding(nn.Module):
    """Embed labels that are pairs: the sum of a style's row and an object's.

    Args:
        styles: How many.
        objects: How many.
        width: Features of a row.

    Example:
        >>> import torch
        >>> PairEmbedding(3, 4, 8)(torch.tensor([0, 11])).shape
        torch.Size([2, 8])
    """

    def __init__(self, styles: int, objects: int, width: int) -> None:
        super().__init__()
        self.style, self.object = Embedding(styles, width), Embedding(objects, width)
        self._objects = objects

    def forward(self, label: Tensor) -> Tensor:
        """Look up ``style · objects + object``: ``(n,)`` to ``(n, width)``."""
        rows: Tensor = self.style(label // self._objects) + self.object(label % self._objects)
        return rows


class DiffusersDiT(nn.Module):
    """A ``DiTTransformer2DModel`` of diffusers that draws objects in styles.

    It keeps its blocks, and its times: there they count noise from 999 down. Its class labels are
    replaced, since joint labels of each block (and those of ImageNet) could not say what a pair
    means that was never trained: all blocks share one row for each style and one for each object.

    Args:
        dit: Changed: its label embeddings are replaced.
        styles: How many.
        objects: How many.

    Example:
        >>> import torch
        >>> from diffusers import DiTTransformer2DModel
        >>> size = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}
        >>> dit = DiTTransformer2DModel(**size, in_channels=1, sample_size=20, patch_size=4)
        >>> model = DiffusersDiT(dit, styles=3, objects=4)
        >>> model(torch.randn(2, 1, 20, 20), torch.rand(2), torch.tensor([0, 11])).shape
        torch.Size([2, 1, 20, 20])
    """

    def __init__(self, dit: Any, *, styles: int, objects: int) -> None:
        super().__init__()
        labels = PairEmbedding(styles, objects, dit.inner_dim)
        for block in dit.transformer_blocks:
            block.norm1.emb.class_embedder = labels
        self.dit, self.style = dit, labels.style

    def forward(self, noisy: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Predict the clean image.

        Args:
            noisy: Shape ``(n, channels, size, size)``.
            time: Shape ``(n,)``, 0 for pure noise to 1 for the image.
            label: ``style · objects + object``, shape ``(n,)``.
        Returns:
            Shape ``(n, channels, size, size)``; variances, where it predicts some, are left out.
        """
        noise = _LAST_STEP * (1.0 - time)
        drawn: Tensor = self.dit(noisy, timestep=noise, class_labels=label).sample
        return drawn[:, : noisy.shape[1]]


def load_dit(name: str, canvas: Pixels, *, styles: int, objects: int) -> DiffusersDiT:
    """Load a diffusion transformer of diffusers.

    Args:
        name: Folder, or name on the Hugging Face hub.
        canvas: What it draws on.
        styles: How many.
        objects: How many.
    Raises:
        ConfigurationError: diffusers is not installed, there is no such model, or it draws
            something of another size.
    """
    dit = pretrained("dit", "DiTTransformer2DModel", name)
    channels, side, _ = canvas.shape
    found = (dit.config.in_channels, dit.config.sample_size)
    if found != (channels, side):
        raise ConfigurationError(
            f"dit='{name}': expected a model for {channels} channels of {side} × {side}, found one "
            f"for {found[0]} of {found[1]} × {found[1]}. Set image_size or vae, or choose another."
        )
    # It comes ready for use; here it will be trained first.
    return DiffusersDiT(dit.train(), styles=styles, objects=objects)
