"""A small decoder-only transformer whose linear layers can be arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes.lm_tokens import END, PAD, padded

LORA_TARGETS = r"blocks\.\d+\.(query|key|value|out|fc1|fc2)"
"""Layers that get a LoRA branch, as a pattern for PEFT's ``target_modules``: all but the head."""


@dataclass(frozen=True, kw_only=True)
class LmShape:
    """Size of a language model.

    Args:
        vocabulary: Number of tokens.
        length: Longest sequence, in tokens.
        width: Features of a token.
        depth: Number of blocks.
        heads: Attention heads; divides ``width``.
        mlp_ratio: Hidden units of a block's MLP, as a multiple of ``width``.
    Raises:
        ConfigurationError: A size is below 1, or heads do not divide the width.

    Example:
        >>> LmShape(vocabulary=100, length=20).width
        128
    """

    vocabulary: int
    length: int
    width: int = 128
    depth: int = 3
    heads: int = 4
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigurationError(f"expected {name} of at least 1, found {value}.")
        if self.width % self.heads:
            raise ConfigurationError(
                f"expected heads to divide width, found heads={self.heads} and width={self.width}."
            )


class LmBlock(nn.Module):
    """Causal self-attention and an MLP, each behind a norm and beside a shortcut.

    The six linear layers can be arrays. Products of activations with activations, the softmax and
    the norms have no stored matrix and stay digital.

    Args:
        shape: Size of the model.

    Example:
        >>> block = LmBlock(LmShape(vocabulary=9, length=5, width=8, heads=2))
        >>> block(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, shape: LmShape) -> None:
        super().__init__()
        width, hidden = shape.width, shape.width * shape.mlp_ratio
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute features: shape ``(n, t, width)`` to the same."""
        tokens = tokens + self._attend(self.norm1(tokens))
        mlp: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return tokens + mlp

    def _attend(self, tokens: Tensor) -> Tensor:
        parts = (layer(tokens) for layer in (self.query, self.key, self.value))
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in parts
        )
        # By hand, because torch.func.vmap, which computes many chips at once, has no fused form.
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(dim=-1) @ value
        attended: Tensor = self.out(mixed.transpose(-3, -2).flatten(-2))
        return attended


class CausalTransformer(nn.Module):
    """Predict the next token of every position (GPT-2's layout).

    The embedding and the head share nothing, because an array cannot follow a digital embedding.

    Args:
        shape: Size of the model.

    Example:
        >>> model = CausalTransformer(LmShape(vocabulary=9, length=5, width=8, depth=1))
        >>> model(torch.tensor([[1, 2, 3], [1, 4, 0]])).shape
        torch.Size([2, 3, 9])
    """

    def __init__(self, shape: LmShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Parameter(0.02 * torch.randn(shape.length, shape.width))
        self.blocks = nn.ModuleList(LmBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary)
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the next tokens.

        Args:
            tokens: Shape ``(n, t)``, ``t`` at most ``length``; what pads a row stands behind it.
        Returns:
            Logits, shape ``(n, t, vocabulary)``.
        Raises:
            DataError: The sequences are too long.
        """
        length = tokens.shape[1]
        if length > self.shape.length:
            raise DataError(
                f"expected at most {self.shape.length} tokens, found {length}. Build the model "
                "with a larger length, or shorten the text."
            )
        features = self.embedding(tokens) + self.position[:length]
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.head(self.norm(features))
        return logits


_EMBEDDING = 0.3


@torch.no_grad()
def answer_greedily(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, longest: int
) -> list[list[int]]:
    """Let a model go on after some prompts, always by its likeliest token.

    Args:
        model: From tokens to logits.
        prompts: At least one, each of at least one token.
        longest: Most tokens of prompt and answer together.
    Returns:
        What the model adds to each, without the end token.

    Example:
        >>> model = CausalTransformer(LmShape(vocabulary=9, length=6, width=8, depth=1))
        >>> answers = answer_greedily(model, [[1, 5, 2], [1, 2]], longest=6)
        >>> len(answers), max(len(answer) for answer in answers) <= 4
        (2, True)
    """
    tokens = padded([*prompts, [PAD] * longest], PAD)[:-1]
    place = torch.tensor([len(each) for each in prompts])
    rows = torch.arange(len(prompts))
    open_ = place < longest
    while bool(open_.any()):
        logits = model(tokens[open_][:, : int(place[open_].max())])
        chosen = logits[torch.arange(len(logits)), place[open_] - 1].argmax(dim=-1)
        tokens[rows[open_], place[open_]] = chosen
        place[open_] += 1
        going = (chosen != END) & (place[open_] < longest)
        open_[rows[open_]] = going
    return [_added(row, len(each)) for row, each in zip(tokens.tolist(), prompts, strict=True)]


def _added(row: list[int], start: int) -> list[int]:
    answer = row[start:]
    return answer[: answer.index(END)] if END in answer else answer
