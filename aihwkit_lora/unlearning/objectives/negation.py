"""Learning the forget set into an adapter, then subtracting the adapter instead of adding it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, StageError
from aihwkit_lora.unlearning.objectives.catalogue import register
from aihwkit_lora.unlearning.objectives.objective import Batch, Objective
from aihwkit_lora.unlearning.objectives.terms import nll, run
from aihwkit_lora.unlearning.reference import adapted_layers, adapter_parameters


@register
@dataclass(frozen=True, kw_only=True)
class Negation(Objective):
    """Learn the forget set; afterwards :func:`apply_negation_` turns the adapter round.

    There is no retain term: turned round, it would do the opposite.
    """

    name: ClassVar[str] = "negation"
    summary: ClassVar[str] = "Learn the forget set, then subtract what was learnt"
    formula: ClassVar[str] = "CE_f, deployed as W − strength·ΔW"
    source: ClassVar[str] = "arXiv:2306.14870; task arithmetic, arXiv:2212.04089"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})
    bounded: ClassVar[bool] = True

    def loss(self, model: nn.Module, batch: Batch, *, progress: float = 0.0) -> Tensor:
        """Learn the forget set."""
        inputs, targets = self.part(batch, "forget")
        return nll(run(model, inputs), targets).mean()


def apply_negation_(model: nn.Module, adapter: str, strength: float = 1.0) -> None:
    """Turn a trained adapter round: what it adds is from now on subtracted. Freezes the adapter.

    The factors B change their sign, not the scale beside them: PEFT saves the one and not the
    other, so an adapter that was loaded again would strengthen what it shall suppress.

    Args:
        model: Holds the adapter, on a digital unit or not.
        adapter: Its name; in training, so that it is not turned twice.
        strength: Factor besides the sign, above 0. Tune it on validation data.
    Raises:
        ConfigurationError: The strength is not above 0, or the adapter is no plain LoRA, whose
            effect is a product with B.
        StageError: No such adapter is in training.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> options = {"target_modules": ["0"], "init_lora_weights": False}
        >>> peft = get_peft_model(net, LoraConfig(**options))
        >>> before = peft.base_model.model[0].get_delta_weight("default")
        >>> apply_negation_(peft, "default", strength=2.0)
        >>> torch.equal(peft.base_model.model[0].get_delta_weight("default"), -2.0 * before)
        True
    """
    if not strength > 0:
        raise ConfigurationError(f"apply_negation_: expected strength above 0, got {strength}.")
    layers = [found for found in adapted_layers(model) if adapter in adapter_parameters(found[1])]
    parameters = [p for _, layer in layers for p in adapter_parameters(layer)[adapter]]
    if not any(parameter.requires_grad for parameter in parameters):
        raise StageError(
            f"apply_negation_: expected adapter {adapter!r} in training, got none, or a frozen "
            "one. Call it once, after training with the objective 'negation'."
        )
    factors = [factor for name, layer in layers for factor in _up_factors(name, layer, adapter)]
    with torch.no_grad():
        for factor in factors:
            factor.mul_(-strength)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None  # which is enough for an optimiser to move it once more


def _up_factors(name: str, layer: Any, adapter: str) -> list[Tensor]:
    if adapter in getattr(layer, "lora_variant", {}) or not hasattr(layer, "lora_B"):
        raise ConfigurationError(
            f"layer '{name}': expected a plain LoRA, got another kind of adapter, which has no "
            "negative. Train 'negation' with LoraConfig(use_dora=False)."
        )
    if adapter in layer.lora_B:
        return list(layer.lora_B[adapter].parameters())
    return [layer.lora_embedding_B[adapter]]
