"""Decoupled adaptation: directions of earlier adapters stay, their magnitudes are learnt again."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from aihwkit_lora.continual.objectives.catalogue import register
from aihwkit_lora.continual.objectives.objective import Data, Penalised
from aihwkit_lora.unlearning.reference import adapted_layers, adapters_in_training

MAGNITUDES = "sd_magnitudes"
"""Attribute of a LoRA layer under which the magnitudes in training are kept."""


@register
@dataclass(frozen=True, kw_only=True)
class SDLoRA(Penalised):
    """Learn the new adapter and, of each earlier one, how strongly it acts.

    :meth:`prepare_` splits each earlier adapter of a layer into a fixed direction and a number in
    training: ``s·B_i A_i = α_i · B_i A_i / ‖B_i A_i‖_F``. α_i starts where it is, so that the
    function is as before (the authors start all at 0.8), and each layer has its own (theirs share
    one). :meth:`finish_` fixes the α again, as PEFT's scaling, and notes them in the
    configurations, which is what PEFT saves. The new adapter is trained as always.

    An adapter that forgets must not fade: sealed ones are left alone, and so are those named in
    ``fixed``.

    Args:
        fixed: Earlier adapters whose magnitudes stay.
    """

    name: ClassVar[str] = "sd_lora"
    summary: ClassVar[str] = "Fix directions of earlier adapters, learn their magnitudes again"
    formula: ClassVar[str] = "CE; W + Σ_{i<t} α_i·B_i A_i/‖B_i A_i‖_F + s·B_t A_t, α_i trained"
    source: ClassVar[str] = "Wu et al. 2025, arXiv:2501.13198"
    fixed: tuple[str, ...] = ()

    def prepare_(self, model: nn.Module, data: Data = ()) -> None:
        """Put the magnitudes of earlier adapters into training."""
        self.finish_(model)
        left_alone = adapters_in_training(model) | {*self.fixed, *_sealed(model)}
        for _, layer in adapted_layers(model):
            old = [a for a in layer.active_adapters if a in layer.lora_A and a not in left_alone]
            split_(layer, [adapter for adapter in old if _norm(layer, adapter) > 0])

    def finish_(self, model: nn.Module, data: Data = ()) -> None:
        """Fix the magnitudes where they are now."""
        configs = _configs(model)
        for name, layer in adapted_layers(model):
            for adapter, alpha in join_(layer).items():
                if adapter in configs:
                    configs[adapter] = _with_alpha(configs[adapter], name, alpha)


class Scaling(dict[str, Any]):
    """PEFT's factor of each adapter of a layer, where some are magnitudes in training.

    Args:
        factors: As PEFT has them.
        magnitudes: α by name of the adapter.
        norms: ‖BA‖_F by name of the adapter.

    Example:
        >>> import torch
        >>> alpha = nn.ParameterDict({"a": nn.Parameter(torch.tensor(6.0))})
        >>> scaling = Scaling({"a": 1.0, "b": 2.0}, alpha, {"a": torch.tensor(3.0)})
        >>> scaling["a"].item(), scaling["b"]
        (2.0, 2.0)
    """

    def __init__(
        self, factors: dict[str, Any], magnitudes: nn.ParameterDict, norms: dict[str, Tensor]
    ) -> None:
        super().__init__(factors)  # what the factors were before
        self.magnitudes, self.norms = magnitudes, norms

    def __getitem__(self, adapter: str) -> Any:
        if adapter not in self.norms:
            return super().__getitem__(adapter)
        alpha: Tensor = self.magnitudes[adapter]
        return alpha / self.norms[adapter].to(alpha)


def split_(layer: Any, adapters: list[str]) -> None:
    """Split adapters of a layer into direction and magnitude; the layer computes as before.

    Args:
        layer: PEFT's LoRA layer.
        adapters: Names, none of which adds nothing.
    """
    if not adapters:
        return
    norms = {adapter: _norm(layer, adapter) for adapter in adapters}
    magnitudes = nn.ParameterDict(
        {a: nn.Parameter(layer.scaling[a] * norm) for a, norm in norms.items()}
    )
    setattr(layer, MAGNITUDES, magnitudes)
    layer.scaling = Scaling(layer.scaling, magnitudes, norms)


def join_(layer: Any) -> dict[str, float]:
    """Turn magnitudes back into fixed factors.

    Args:
        layer: PEFT's LoRA layer; nothing happens to one without magnitudes.
    Returns:
        ``lora_alpha`` of each adapter that had a magnitude in training.
    """
    if not isinstance(layer.scaling, Scaling):
        return {}
    learnt = {adapter: float(layer.scaling[adapter].detach()) for adapter in layer.scaling.norms}
    before = dict(layer.scaling.items())
    for adapter, factor in learnt.items():
        # PEFT divides by the rank, or by its root.
        layer.lora_alpha[adapter] *= factor / before[adapter]
    layer.scaling = {**before, **learnt}
    delattr(layer, MAGNITUDES)
    return {adapter: layer.lora_alpha[adapter] for adapter in learnt}


def _sealed(model: nn.Module) -> tuple[str, ...]:
    from aihwkit_lora.unlearning.seal import seals  # imports PEFT, which takes seconds

    return tuple(seal.adapter for seal in seals(model))


def _configs(model: nn.Module) -> dict[str, Any]:
    found = (getattr(module, "peft_config", None) for module in model.modules())
    return next((configs for configs in found if isinstance(configs, dict)), {})


def _norm(layer: Any, adapter: str) -> Tensor:
    """Frobenius norm of B A, by way of two small matrices: ‖BA‖² = tr(BᵀB · AAᵀ)."""
    down = layer.lora_A[adapter].weight.detach().flatten(1).double()
    up = layer.lora_B[adapter].weight.detach().flatten(1).double()
    squared = ((up.T @ up) * (down @ down.T)).sum()
    norm: Tensor = squared.clamp(min=0).sqrt().to(layer.lora_A[adapter].weight.dtype)
    return norm


def _with_alpha(config: Any, name: str, alpha: float) -> Any:
    """Write a layer's factor to where PEFT looks for it when it loads an adapter."""
    changed = copy.copy(config)  # Adapters may share one.
    key = f"^{re.escape(name)}"
    # PEFT takes the first pattern that matches.
    others = {k: v for k, v in (config.alpha_pattern or {}).items() if k != key}
    changed.alpha_pattern = {key: alpha, **others}
    return changed
