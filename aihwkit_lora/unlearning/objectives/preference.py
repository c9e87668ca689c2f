"""Negative preference: make the forgotten answer less likely, and lose interest as it gets so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from aihwkit_lora.unlearning.objectives.catalogue import register
from aihwkit_lora.unlearning.objectives.objective import ForgetRetain
from aihwkit_lora.unlearning.objectives.terms import nll, run, run_reference


def npo(nll_now: Tensor, nll_before: Tensor, beta: float) -> Tensor:
    """Mean of −(2/β)·log σ(−β·log(p/p₀)) (arXiv:2404.05868).

    Args:
        nll_now: −log p of each sample, shape ``(n,)``.
        nll_before: −log p₀, of the reference.
        beta: Sharpness; towards 0 it is gradient ascent.

    Example:
        >>> import torch
        >>> npo(torch.tensor([0.0]), torch.tensor([0.0]), beta=1.0)  # 2·ln 2
        tensor(1.3863)
    """
    return 2.0 / beta * F.softplus(beta * (nll_before - nll_now)).mean()


def simnpo(mean_nll: Tensor, beta: float, delta: float) -> Tensor:
    """Mean of −(2/β)·log σ(β·(ℓ − δ)) (arXiv:2410.07163).

    Args:
        mean_nll: ℓ = −log p of each sample divided by its length, shape ``(n,)``.
        beta: Sharpness.
        delta: Margin, in nats.

    Example:
        >>> import torch
        >>> simnpo(torch.tensor([0.5]), beta=2.0, delta=0.5)  # ln 2
        tensor(0.6931)
    """
    return 2.0 / beta * F.softplus(-beta * (mean_nll - delta)).mean()


@register
@dataclass(frozen=True, kw_only=True)
class NPO(ForgetRetain):
    """Make forgotten answers less likely than the reference does (arXiv:2404.05868).

    Args:
        beta: Sharpness, above 0; towards 0 it is gradient ascent.
    """

    name: ClassVar[str] = "npo"
    summary: ClassVar[str] = "Forgotten answers get less likely than they were, ever more gently"
    formula: ClassVar[str] = "mean_f −(2/beta)·log σ(−beta·log(p_y/p0_y)) + retain_weight·CE_r"
    source: ClassVar[str] = "arXiv:2404.05868"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "reference"})
    bounded: ClassVar[bool] = True
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("beta", "above 0", self.beta > 0)

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare with the reference."""
        before = nll(run_reference(model, inputs), targets)
        return npo(nll(run(model, inputs), targets), before, self.beta)


@register
@dataclass(frozen=True, kw_only=True)
class SimNPO(ForgetRetain):
    """Negative preference without a reference (arXiv:2410.07163).

    Args:
        beta: Sharpness, above 0.
        delta: Margin by which the loss should exceed nothing, in nats.
    """

    name: ClassVar[str] = "simnpo"
    summary: ClassVar[str] = "As npo, without a reference: one pass less"
    formula: ClassVar[str] = "mean_f −(2/beta)·log σ(beta·(CE − delta)) + retain_weight·CE_r"
    source: ClassVar[str] = "arXiv:2410.07163"
    bounded: ClassVar[bool] = True
    beta: float = 1.0
    delta: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("beta", "above 0", self.beta > 0)

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Look at the loss alone."""
        return simnpo(nll(run(model, inputs), targets), self.beta, self.delta)
