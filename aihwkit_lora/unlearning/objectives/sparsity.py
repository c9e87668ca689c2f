"""GS-LoRA's group lasso: adapters in few layers, and the rest of the SRAM free."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, StageError
from aihwkit_lora.unlearning.objectives.objective import Batch, Objective
from aihwkit_lora.unlearning.reference import adapted_layers, adapter_parameters


@dataclass(frozen=True, kw_only=True)
class GroupLasso(Objective):
    """An objective plus the norms of blocks of the adapter; made by :func:`group_lasso`."""

    name: ClassVar[str] = "group_lasso"
    objective: Objective
    strength: float
    warm_up: float
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the fields, and take over what the objective says of itself."""
        self.require("strength", "above 0", self.strength > 0)
        self.require("warm_up", "from 0 to 1", 0 <= self.warm_up <= 1)
        inner = self.objective
        said = {
            "name": f"{inner.name}+group_lasso",
            "summary": f"{inner.summary}; few layers adapted",
            "formula": f"{inner.formula} + strength·Σ_blocks ‖(A, B)‖₂",
            "source": f"{inner.source}; GS-LoRA, arXiv:2403.11530",
            "needs": inner.needs,
            "bounded": inner.bounded,
        }
        for field, value in said.items():
            object.__setattr__(self, field, value)

    def loss(self, model: nn.Module, batch: Batch, *, progress: float = 0.0) -> Tensor:
        """Add the penalty, which grows linearly while it warms up."""
        loss = self.objective.loss(model, batch, progress=progress)
        share = min(1.0, progress / self.warm_up) if self.warm_up else 1.0
        return loss + self.strength * share * self.penalty(model)

    def penalty(self, model: nn.Module) -> Tensor:
        """Sum the norms of all blocks of the adapters in training.

        Args:
            model: Holds them.
        Raises:
            StageError: There is none.
        """
        blocks: dict[str, list[Tensor]] = {}
        for name, matrices in _matrices(model):
            if trained := [matrix for matrix in matrices if matrix.requires_grad]:
                blocks.setdefault(self._group(name), []).extend(trained)
        if not blocks:
            raise StageError(
                "group_lasso: expected a LoRA that is being trained, got none. Call "
                "get_peft_model(model, config) first."
            )
        return torch.stack([_norm(matrices) for matrices in blocks.values()]).sum()

    def _group(self, layer: str) -> str:
        inside = (group for group in self.groups if f"{layer}.".startswith(f"{group}."))
        return next(inside, layer)


def group_lasso(
    objective: Objective,
    strength: float = 0.01,
    *,
    warm_up: float = 0.2,
    groups: tuple[str, ...] = (),
) -> Objective:
    """Let an objective prefer adapters that use few layers (GS-LoRA, arXiv:2403.11530).

    Layers that come out unused can leave the SRAM: :func:`prune_unused_`.

    Args:
        objective: What to minimise besides.
        strength: Weight of the sum of the blocks' norms, above 0.
        warm_up: Fraction of the training in which the weight rises to ``strength``, 0 to 1. Without
            one, a fresh adapter, which has no effect yet, may vanish before it gets any.
        groups: Names of modules, for example ``("blocks.0", "blocks.1")``, whose layers make one
            block each. Any other layer is a block of its own.
    Returns:
        An objective with the same needs.
    Raises:
        ConfigurationError: A number is out of its range.

    Example:
        >>> from aihwkit_lora.unlearning import objectives
        >>> sparse = group_lasso(objectives.get("bounded_ga")(), 0.01, warm_up=0.2)
        >>> sparse.name, sorted(sparse.needs)
        ('bounded_ga+group_lasso', ['forget', 'retain'])
    """
    return GroupLasso(objective=objective, strength=strength, warm_up=warm_up, groups=groups)


def block_norms(model: nn.Module, adapter: str) -> dict[str, float]:
    """Measure ‖(A, B)‖₂ of an adapter in every layer that has it.

    Args:
        model: Holds the adapter.
        adapter: Its name.
    Returns:
        Norms by name of the layer.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> peft = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
        >>> list(block_norms(peft, "default"))
        ['0']
    """
    return {name: _norm(found).item() for name, found in _matrices(model, adapter)}


def prune_unused_(model: nn.Module, adapter: str, threshold: float) -> tuple[str, ...]:
    """Remove an adapter from layers where its norm is below a threshold, and free their SRAM.

    The adapter's configuration excludes these layers from now on, so they do not come back when it
    is saved and loaded. An optimiser that goes on holds their parameters to no effect.

    Args:
        model: Holds the adapter, on a digital unit or not.
        adapter: Its name.
        threshold: Norm ‖(A, B)‖₂ below which a layer does without; see :func:`block_norms`.
    Returns:
        Names of the layers that lost it.
    Raises:
        ConfigurationError: The model has no such adapter, or it would lose all of it.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> peft = get_peft_model(net, LoraConfig(target_modules=["0", "1"]))
        >>> _ = nn.init.zeros_(net[0].lora_A["default"].weight)
        >>> prune_unused_(peft, "default", threshold=1e-3)
        ('0',)
    """
    norms = block_norms(model, adapter)
    unused = tuple(name for name, norm in norms.items() if norm < threshold)
    if len(unused) == len(norms):
        largest = max(norms.values(), default=0.0)
        raise ConfigurationError(
            f"prune_unused_: expected a threshold that leaves some of adapter {adapter!r}, got "
            f"{threshold} where the largest of {len(norms)} norms is {largest:.4g}. Name an "
            "adapter of the model and lower the threshold."
        )
    for name, layer in adapted_layers(model):
        if name in unused and adapter in adapter_parameters(layer):
            _remove(layer, adapter)
    _exclude(model, adapter, unused)
    return unused


def _remove(layer: Any, adapter: str) -> None:
    # PEFT 0.21 makes the adapters trainable that stay active after one of them is deleted. It
    # leaves them alone if none is.
    active, layer._active_adapter = layer._active_adapter, []
    try:
        layer.delete_adapter(adapter)
    finally:
        layer._active_adapter = active


def _exclude(model: nn.Module, adapter: str, layers: tuple[str, ...]) -> None:
    config = getattr(model, "peft_config", {}).get(adapter)
    if config is None or not layers:
        return
    patterns = [re.escape(name) for name in layers]
    before = getattr(config, "exclude_modules", None)
    if isinstance(before, str):
        patterns.append(before)
    elif before:
        patterns += [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(before)]
    config.exclude_modules = "|".join(f"(?:{pattern})" for pattern in patterns)


def _matrices(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, list[Tensor]]]:
    """The factors A and B of one adapter, or of all, in each LoRA layer."""
    kinds = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    for name, layer in adapted_layers(model):
        parts = [part for kind in kinds for part in getattr(layer, kind, {}).items()]
        found = [getattr(part, "weight", part) for key, part in parts if adapter in (None, key)]
        if found:
            yield name, found


def _norm(matrices: list[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.cat([each.flatten() for each in matrices]))
    return norm
