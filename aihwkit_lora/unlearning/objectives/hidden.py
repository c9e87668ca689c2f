"""Misdirecting hidden features of forgotten samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.registry import nearest
from aihwkit_lora.tiles.freeze import plain_name
from aihwkit_lora.unlearning.objectives.catalogue import register
from aihwkit_lora.unlearning.objectives.objective import ForgetRetain
from aihwkit_lora.unlearning.objectives.terms import run
from aihwkit_lora.unlearning.reference import reference


@register
@dataclass(frozen=True, kw_only=True)
class RMU(ForgetRetain):
    """Drive a hidden layer to one random direction on the forget set, keep it on the retain set.

    What the layers behind make of that direction is left to them: check that it is not the
    forgotten answer, or take another seed. Features are on the last axis of the layer's output.

    Args:
        layer: Full name of the layer as in the model before PEFT, for example ``"blocks.1"``. The
            adapters in training have to sit in it or before it.
        coefficient: Length of the vector to drive to, above 0.
        seed: Of the direction.
    """

    name: ClassVar[str] = "rmu"
    summary: ClassVar[str] = "Drive a hidden layer to a random direction u on the forget set"
    formula: ClassVar[str] = "mean_f ‖h − coefficient·u‖² + retain_weight·mean_r ‖h − h0‖²"
    source: ClassVar[str] = "WMDP, arXiv:2403.03218"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "reference"})
    bounded: ClassVar[bool] = True
    layer: str
    coefficient: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        self.require("coefficient", "above 0", self.coefficient > 0)

    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Measure the squared distance to the direction."""
        h = self.hidden(model, inputs)
        if torch.is_grad_enabled() and not h.requires_grad:
            raise ConfigurationError(
                f"objective '{self.name}': expected adapters in training in layer '{self.layer}' "
                "or before it, got none there. Name a later layer, or adapt earlier ones."
            )
        return (h - self.coefficient * self.direction(h)).square().sum(dim=-1).mean()

    def retain_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Measure the squared distance to the reference."""
        with torch.no_grad(), reference(model):
            before = self.hidden(model, inputs)
        return (self.hidden(model, inputs) - before).square().sum(dim=-1).mean()

    def direction(self, h: Tensor) -> Tensor:
        """Draw the unit vector, any direction as likely as any other.

        The source takes entries from [0, 1), so that all its directions lie close together.

        Args:
            h: Output of the layer, features last.
        """
        u = torch.randn(h.shape[-1], generator=torch.Generator().manual_seed(self.seed))
        unit: Tensor = u / torch.linalg.vector_norm(u)
        return unit.to(h)

    def hidden(self, model: nn.Module, inputs: Any) -> Tensor:
        """Run the model and take what the layer gives; the first part if it gives several.

        Args:
            model: Holds the layer.
            inputs: What it is given.
        Raises:
            ConfigurationError: No such layer, or it gave no tensor.
        """
        given: list[Any] = []
        hook = self._find(model).register_forward_hook(lambda *passed: given.append(passed[-1]))
        try:
            run(model, inputs)
        finally:
            hook.remove()
        found = given[-1] if given else None
        found = found[0] if isinstance(found, tuple) else found
        if not isinstance(found, Tensor):
            raise ConfigurationError(
                f"objective '{self.name}': expected layer '{self.layer}' to give a tensor, got "
                f"{type(found).__name__}. Name a layer that runs in every pass."
            )
        return found

    def _find(self, model: nn.Module) -> nn.Module:
        layers: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            # PEFT's layer comes before the one inside it, and its output is the one to take.
            layers.setdefault(plain_name(name), module)
        if self.layer not in layers:
            raise ConfigurationError(
                f"objective '{self.name}': expected the name of a layer, got {self.layer!r}. "
                f"{nearest(self.layer, filter(None, layers))}"
            )
        return layers[self.layer]
