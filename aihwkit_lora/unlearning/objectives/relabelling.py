"""Teaching forgotten samples another answer: a random one, all of them, or the nearest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aihwkit_lora.errors import DataError
from aihwkit_lora.unlearning.objectives.catalogue import register
from aihwkit_lora.unlearning.objectives.objective import Batch, ForgetRetain
from aihwkit_lora.unlearning.objectives.terms import kl, mark, mse, nll, other_outputs, run
from aihwkit_lora.unlearning.reference import reference

Target = Literal["ce", "mse"]


@dataclass(frozen=True, kw_only=True)
class Relabels(ForgetRetain):
    """Forgotten samples get answers among ``outputs``, never their own.

    Args:
        outputs: To choose from, two at least; all if None. Name the kept ones where several classes
            are forgotten, or where some outputs wait for classes to come.
    """

    outputs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("outputs", "two or more different ones, or None", self._outputs_are_usable())

    def _outputs_are_usable(self) -> bool:
        if self.outputs is None:
            return True
        return len(set(self.outputs)) == len(self.outputs) >= 2


@register
@dataclass(frozen=True, kw_only=True)
class RandomLabel(Relabels):
    """Give forgotten samples a random other label, drawn anew in every batch.

    With ``target="mse"`` both sets are compared with one-hot vectors, as arXiv:2601.10037's code
    does for speakers.

    Args:
        target: ``"ce"``, cross-entropy, or ``"mse"``, mean squared error to one-hot vectors.
    """

    name: ClassVar[str] = "random_label"
    summary: ClassVar[str] = "Forgotten samples get a random other label in every batch"
    formula: ClassVar[str] = "L_f(random other label) + retain_weight·L_r, L = CE or MSE to one-hot"
    source: ClassVar[str] = "arXiv:2601.10037 (code, speakers); SalUn, arXiv:2310.12508"
    bounded: ClassVar[bool] = True
    target: Target = "ce"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("target", "'ce' or 'mse'", self.target in get_args(Target))

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare with labels drawn for this batch."""
        logits = run(model, inputs)
        others = other_outputs(logits, targets, self.outputs)
        return self._compare(logits, torch.multinomial(others.float(), 1)[:, 0])

    def retain_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare with the true labels."""
        return self._compare(run(model, inputs), targets)

    def _compare(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.target == "ce":
            return nll(logits, labels).mean()
        return mse(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype))


@register
@dataclass(frozen=True, kw_only=True)
class KLUniform(Relabels):
    """Forgotten samples shall look like any of the other classes equally.

    Args:
        margin: On every sample, how far the largest unwanted output has to stay below the largest
            of the rest, in logits; None asks for nothing. Unwanted are ``forgotten``, and the own
            label of a sample to forget.
        forgotten: Outputs that shall win nowhere, not on retained samples either.
        pooled: Whether every sample counts the same, whichever set it is from, instead of
            ``retain_weight``.

    Example:
        >>> loss = KLUniform(outputs=(0, 1, 3, 4), forgotten=(2,), margin=5.0, pooled=True)
        >>> batch = {
        ...     "forget": (torch.zeros(1, 2), torch.tensor([2])),
        ...     "retain": (torch.zeros(1, 2), torch.tensor([0])),
        ... }
        >>> nothing_yet = nn.Linear(2, 6, bias=False)  # (ln 6 − ln 4 + ln 6) / 2 + 5
        >>> loss.loss(nothing_yet, batch)
        tensor(6.0986, grad_fn=<MeanBackward0>)
    """

    name: ClassVar[str] = "kl_uniform"
    summary: ClassVar[str] = "Forgotten samples shall look like any other class; optional margin"
    formula: ClassVar[str] = (
        "mean_f KL(U_others ‖ p) + retain_weight·CE_r"
        " [+ mean max(0, margin + max z_unwanted − max z_rest)]"
    )
    source: ClassVar[str] = "a uniform teacher, after Bad-T, arXiv:2205.08096; margin: this package"
    bounded: ClassVar[bool] = True
    margin: float | None = None
    forgotten: tuple[int, ...] = ()
    pooled: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("margin", "of 0 or more, or None", self.margin is None or self.margin >= 0)
        fine = not {*self.forgotten} & {*(self.outputs or ())}
        self.require("forgotten", "outside of outputs", fine)
        self.require(
            "retain_weight", "above 0 if pooled", not self.pooled or self.retain_weight > 0
        )

    def loss(self, model: nn.Module, batch: Batch, *, progress: float = 0.0) -> Tensor:
        """Average over both sets together, or add their averages."""
        if not self.pooled:
            return super().loss(model, batch, progress=progress)
        forget = self._forget_losses(model, *self.part(batch, "forget"))
        retain = self._retain_losses(model, *self.part(batch, "retain"))
        return torch.cat([forget, retain]).mean()

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare with the mix of all other outputs."""
        return self._forget_losses(model, inputs, targets).mean()

    def retain_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare with the true labels."""
        return self._retain_losses(model, inputs, targets).mean()

    def _forget_losses(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        logits = run(model, inputs)
        kept = set(range(logits.shape[1])) - {*self.forgotten}
        others = other_outputs(logits, targets, self.outputs or tuple(sorted(kept))).to(logits)
        losses = kl(others / others.sum(dim=1, keepdim=True), logits)
        if self.margin is None:
            return losses
        unwanted = ~other_outputs(logits, targets) | mark(logits, self.forgotten)
        return losses + hinge(logits, unwanted, self.margin)

    def _retain_losses(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        logits = run(model, inputs)
        losses = nll(logits, targets)
        if self.margin is None or not self.forgotten:
            return losses
        return losses + hinge(logits, mark(logits, self.forgotten), self.margin)


def hinge(logits: Tensor, unwanted: Tensor, margin: float) -> Tensor:
    """max(0, margin + largest unwanted logit − largest of the rest), for each sample.

    Args:
        logits: Shape ``(n, outputs)``.
        unwanted: Shape ``(n, outputs)``, True for at least one output of each sample, not for all.
        margin: By how much the unwanted ones shall stay below.

    Example:
        >>> logits = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
        >>> hinge(logits, torch.tensor([[True, False]] * 2), margin=2.0)
        tensor([0., 3.])
    """
    worst = logits.masked_fill(~unwanted, -math.inf).amax(dim=1)
    rest = logits.masked_fill(unwanted, -math.inf).amax(dim=1)
    return F.relu(margin + worst - rest)


@register
@dataclass(frozen=True, kw_only=True)
class BoundaryShrink(Relabels):
    """Give each forgotten sample the class across its nearest decision boundary.

    That class is what the reference takes the sample for, its own label aside, after one step of
    the fast gradient sign method. The backward pass through the reference reads the arrays as well.

    Args:
        step: Size of the step on every input value, in the unit of the inputs.
    """

    name: ClassVar[str] = "boundary_shrink"
    summary: ClassVar[str] = "Forgotten samples get the label across their nearest boundary"
    formula: ClassVar[str] = (
        "CE_f(argmax_{v≠y} z0(x + step·sign ∇x CE(z0(x), y))) + retain_weight·CE_r"
    )
    source: ClassVar[str] = "Boundary Unlearning, arXiv:2303.11570"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "reference"})
    bounded: ClassVar[bool] = True
    step: float = 0.1

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("step", "above 0", self.step > 0)

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare with the labels of the nearest neighbours."""
        nearest = self.nearest(model, inputs, targets)
        return nll(run(model, inputs), nearest).mean()

    def nearest(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Find the label across the nearest boundary, for each sample.

        Args:
            model: Has a reference.
            inputs: A tensor of floats.
            targets: Shape ``(n,)``, the samples' own labels.
        Raises:
            DataError: The inputs are something else, which has no gradient.
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise DataError(
                f"objective '{self.name}': expected inputs that are one tensor of floats, got "
                f"{getattr(inputs, 'dtype', type(inputs).__name__)}. Take another objective."
            )
        with torch.enable_grad(), reference(model):
            x = inputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(nll(run(model, x), targets).sum(), x)
        with torch.no_grad(), reference(model):
            logits = run(model, inputs + self.step * slope.sign())
        others = other_outputs(logits, targets, self.outputs)
        return logits.masked_fill(~others, -math.inf).argmax(dim=1)
