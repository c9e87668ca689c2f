"""Objectives for diffusion models, ``model(x_t, t, label)``, whatever they predict.

A target is what the user's model regresses to: the noise ε, the velocity v, or the image x.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import DataError
from aihwkit_lora.unlearning.objectives.catalogue import register
from aihwkit_lora.unlearning.objectives.objective import ForgetRetain
from aihwkit_lora.unlearning.objectives.terms import mse, run, run_reference


@dataclass(frozen=True, kw_only=True)
class Diffusion(ForgetRetain):
    """Mean squared error to another target on the forget set, to the usual one on the retain set.

    Inputs are tuples ``(x_t, t, label)``; targets have the shape of the model's prediction.
    """

    bounded: ClassVar[bool] = True

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare with the other target."""
        wanted = self.wanted(model, inputs, targets)
        return mse(run(model, inputs), wanted)

    def retain_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compare with the usual target."""
        return mse(run(model, inputs), targets)

    @abstractmethod
    def wanted(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Make the target of forgotten samples.

        Args:
            model: Has a reference, where one is needed.
            inputs: ``(x_t, t, label)``.
            targets: The usual target.
        """

    def conditions(self, inputs: Any) -> tuple[Any, Any, Tensor]:
        """Take inputs apart.

        Args:
            inputs: ``(x_t, t, label)``.
        Raises:
            DataError: The inputs are something else.
        """
        if not isinstance(inputs, tuple | list) or len(inputs) != 3:
            raise DataError(
                f"objective '{self.name}': expected inputs (x_t, t, label), got a "
                f"{type(inputs).__name__}. Let the loader give these three, in this order."
            )
        x_t, t, label = inputs
        return x_t, t, label


@register
@dataclass(frozen=True, kw_only=True)
class GaussianTarget(Diffusion):
    """Forgotten labels predict fresh Gaussian noise, whose mean is zero.

    A model of ε learns to remove nothing, one of x to show the mean image, 0.
    """

    name: ClassVar[str] = "gaussian_target"
    summary: ClassVar[str] = "Forgotten labels regress to Gaussian noise"
    formula: ClassVar[str] = "MSE_f(N(0, I)) + retain_weight·MSE_r"
    source: ClassVar[str] = "the unbiased form of uniform_target"

    def wanted(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn_like(targets)


@register
@dataclass(frozen=True, kw_only=True)
class UniformTarget(Diffusion):
    """Forgotten labels predict uniform noise in [0, 1), as arXiv:2601.10037's code has it.

    For comparison only: the mean of that target is 0.5, so what is learnt is a constant bias.
    """

    name: ClassVar[str] = "uniform_target"
    summary: ClassVar[str] = "Forgotten labels regress to uniform noise; biased, its mean is 0.5"
    formula: ClassVar[str] = "MSE_f(U[0, 1)) + retain_weight·MSE_r"
    source: ClassVar[str] = "arXiv:2601.10037 (code, images)"

    def wanted(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Draw uniform numbers."""
        return torch.rand_like(targets)


@register
@dataclass(frozen=True, kw_only=True)
class PseudoClass(Diffusion):
    """Forgotten labels predict what the reference predicts for another label.

    Args:
        other: Label to predict instead, for each forgotten one.
        classes: Number of labels, where the next one, modulo this, will do. Not for several
            forgotten labels in a row, which would teach each other.

    Example:
        >>> PseudoClass(other={3: 5, 4: 5}).other_label(torch.tensor([3, 4]))
        tensor([5, 5])
        >>> PseudoClass(classes=10).other_label(torch.tensor([3, 9]))
        tensor([4, 0])
    """

    name: ClassVar[str] = "pseudo_class"
    summary: ClassVar[str] = "Forgotten labels give what the reference gives for another label"
    formula: ClassVar[str] = "MSE_f(prediction0(x_t, t, other label)) + retain_weight·MSE_r"
    source: ClassVar[str] = "SalUn (DDPM), arXiv:2310.12508"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "reference"})
    other: Mapping[int, int] | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        one = (self.other is None) != (self.classes is None)
        self.require("classes", "or other, one of them", one)
        self.require("classes", "of 2 or more", self.classes is None or self.classes >= 2)

    def other_label(self, label: Tensor) -> Tensor:
        """Replace labels.

        Args:
            label: Any shape, forgotten labels.
        Raises:
            DataError: There is nothing to replace one with.
        """
        if self.classes is not None:
            return (label + 1) % self.classes
        other = self.other or {}
        flat = label.flatten().tolist()
        if missing := sorted({*flat} - other.keys()):
            raise DataError(
                f"objective '{self.name}': expected labels in other, {sorted(other)}, got "
                f"{missing[0]}. Say what to predict instead."
            )
        return torch.tensor([other[each] for each in flat]).to(label).view_as(label)

    def wanted(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Ask the reference for the other label."""
        x_t, t, label = self.conditions(inputs)
        return run_reference(model, (x_t, t, self.other_label(label)))


@register
@dataclass(frozen=True, kw_only=True)
class ESD(Diffusion):
    """Forgotten labels predict the opposite of what the reference would be guided to.

    The formula is linear in the prediction, so it holds for ε, v and x alike.

    Args:
        null_label: The label that stands for none.
        eta: Strength of the guidance, 0 or more; 0 is the unconditional prediction.
    """

    name: ClassVar[str] = "esd"
    summary: ClassVar[str] = "Forgotten labels are guided away from themselves"
    formula: ClassVar[str] = "MSE_f(e0(∅) − eta·(e0(label) − e0(∅))) + retain_weight·MSE_r"
    source: ClassVar[str] = "arXiv:2303.07345"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "reference"})
    null_label: int
    eta: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("eta", "of 0 or more", self.eta >= 0)

    def wanted(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Ask the reference twice, with the label and without."""
        x_t, t, label = self.conditions(inputs)
        without = run_reference(model, (x_t, t, torch.full_like(label, self.null_label)))
        return without - self.eta * (run_reference(model, (x_t, t, label)) - without)
