"""Objectives for language models: logits ``(n, t, vocabulary)``, labels ``(n, t)``, −100 left out.

Labels are shifted here: position i predicts label i + 1, as causal models in transformers do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from aihwkit_lora.unlearning.objectives.catalogue import register
from aihwkit_lora.unlearning.objectives.objective import ForgetRetain
from aihwkit_lora.unlearning.objectives.preference import npo, simnpo
from aihwkit_lora.unlearning.objectives.terms import run, run_reference, token_nll


@dataclass(frozen=True, kw_only=True)
class TokenLevel(ForgetRetain):
    """A loss on forgotten sequences, and cross-entropy of all tokens of retained ones."""

    def retain_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Average over tokens."""
        return token_cross_entropy(run(model, inputs), targets)


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood over all tokens that count; 0 if none does.

    Args:
        logits: Shape ``(n, t, vocabulary)``.
        labels: Shape ``(n, t)``, not shifted yet.

    Example:
        >>> import torch
        >>> token_cross_entropy(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]]))
        tensor(1.3863)
    """
    sums, counts = token_nll(logits, labels)
    return sums.sum() / counts.sum().clamp(min=1)


@register
@dataclass(frozen=True, kw_only=True)
class TokenGA(TokenLevel):
    """Gradient ascent on forgotten tokens (GA; GradDiff with a retain set). Without a bound.

    Args:
        weight: Of the ascent, above 0.
    """

    name: ClassVar[str] = "token_ga"
    summary: ClassVar[str] = "Gradient ascent on forgotten tokens, few steps only"
    formula: ClassVar[str] = "−weight·CE_f over tokens + retain_weight·CE_r over tokens"
    source: ClassVar[str] = "TOFU, arXiv:2401.06121"
    bounded: ClassVar[bool] = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("weight", "above 0", self.weight > 0)

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Ascend."""
        return -self.weight * token_cross_entropy(run(model, inputs), targets)


@register
@dataclass(frozen=True, kw_only=True)
class TokenNPO(TokenLevel):
    """Make forgotten sequences less likely than the reference does (arXiv:2404.05868).

    Args:
        beta: Sharpness, above 0; it multiplies a sum over tokens, so it is small.
    """

    name: ClassVar[str] = "token_npo"
    summary: ClassVar[str] = "Forgotten sequences get less likely than they were"
    formula: ClassVar[str] = "mean_f −(2/beta)·log σ(−beta·Σ_tokens log(p/p0)) + retain_weight·CE_r"
    source: ClassVar[str] = "arXiv:2404.05868"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "reference"})
    bounded: ClassVar[bool] = True
    beta: float = 0.1

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("beta", "above 0", self.beta > 0)

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare whole sequences with the reference."""
        before, _ = token_nll(run_reference(model, inputs), targets)
        return npo(token_nll(run(model, inputs), targets)[0], before, self.beta)


@register
@dataclass(frozen=True, kw_only=True)
class TokenSimNPO(TokenLevel):
    """Negative preference without a reference, by length (arXiv:2410.07163).

    Args:
        beta: Sharpness, above 0.
        delta: Margin, in nats for each token.
    """

    name: ClassVar[str] = "token_simnpo"
    summary: ClassVar[str] = "As token_npo, without a reference and by length"
    formula: ClassVar[str] = (
        "mean_f −(2/beta)·log σ(beta·(NLL/tokens − delta)) + retain_weight·CE_r"
    )
    source: ClassVar[str] = "arXiv:2410.07163"
    bounded: ClassVar[bool] = True
    beta: float = 2.5
    delta: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("beta", "above 0", self.beta > 0)

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Look at the mean loss of each sequence."""
        sums, counts = token_nll(run(model, inputs), targets)
        return simnpo(sums / counts.clamp(min=1), self.beta, self.delta)
