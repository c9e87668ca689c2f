"""What may be trained on a frozen model: adapters, and digital heads that are named."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from aihwkit.nn.modules.base import AnalogLayerBase
from torch import nn
from torch.optim import Optimizer

from aihwkit_lora.errors import StageError
from aihwkit_lora.tiles import frozen_layers
from aihwkit_lora.unlearning.reference import adapted_layers


def trainable(model: nn.Module, heads: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """Find the parameters that are to be trained, and see that nothing else is.

    Args:
        model: Holds a frozen model with adapters.
        heads: Full names of digital modules that are trained as well.
    Returns:
        Parameters that ask for gradients, by full name.
    Raises:
        StageError: No layer is frozen, nothing is trainable, a parameter is trainable that is
            neither an adapter's nor of a head, or a head is analogue.

    Example:
        >>> import aihwkit_lora as al
        >>> from peft import LoraConfig, get_peft_model
        >>> net = al.convert(nn.Sequential(nn.Linear(4, 2)), al.chips.get("rm-180nm"))
        >>> net = al.freeze_(net, programmed_by="example")
        >>> model = get_peft_model(net, LoraConfig(r=1, target_modules=["0"]))
        >>> [name.removeprefix("base_model.model.") for name in trainable(model)]
        ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    if not any(True for _ in frozen_layers(model)):
        raise StageError(
            f"{type(model).__name__}: expected a model with frozen layers, got none. Call "
            "freeze_(model) and put adapters on it first."
        )
    _require_digital(model, heads)
    allowed = {id(parameter) for parameter in _of_adapters(model)}
    allowed |= {id(parameter) for name in heads for parameter in _part(model, name).parameters()}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [name for name, parameter in found.items() if id(parameter) not in allowed]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise StageError(
            f"parameter '{others[0]}'{more}: expected only adapters to be trainable, got one "
            "outside of them. Call requires_grad_(False) on it, or name its digital module in "
            "heads=."
        )
    if not found:
        raise StageError(
            f"{type(model).__name__}: expected an adapter that is trainable, got none. Add one "
            "with add_adapter_(model, name, config)."
        )
    return found


def restrict_(configured: Any, parameters: Collection[nn.Parameter]) -> Any:
    """Take all parameters but some out of optimisers; groups stay, so schedulers still fit.

    Args:
        configured: What ``configure_optimizers`` gives: optimisers, in whatever form.
        parameters: What they may train.
    Returns:
        What was given.
    Raises:
        StageError: They have none of these parameters.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> restrict_(optimizer, [layer.bias]).param_groups[0]["params"] == [layer.bias]
        True
    """
    wanted = {id(parameter) for parameter in parameters}
    left = 0
    for optimizer in _optimizers(configured):
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in wanted]
            left += len(group["params"])
    if not left:
        raise StageError(
            "configure_optimizers: expected an optimiser over parameters of the adapters, got none "
            "of them. Build it from self.parameters() when it is asked for, or pass optimizer=."
        )
    return configured


def _require_digital(model: nn.Module, heads: Collection[str]) -> None:
    for name in heads:
        if any(isinstance(module, AnalogLayerBase) for module in _part(model, name).modules()):
            raise StageError(
                f"head '{name}': expected a digital module, got one with analogue layers. Train "
                "an adapter on it, or name the digital rows inside that grow_head_ has added."
            )


def _part(model: nn.Module, name: str) -> nn.Module:
    known: dict[str, nn.Module] = dict(model.named_modules())
    if name not in known:
        close = ", ".join(sorted(n for n in known if n.endswith(name.rsplit(".", 1)[-1]))) or "none"
        raise StageError(
            f"head '{name}': expected the full name of a module, got one that is not there. "
            f"Of that last name: {close}."
        )
    return known[name]


def _of_adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Find what PEFT has added to layers; heads that it trains as copies count too."""
    for _, layer in adapted_layers(model):
        copied: nn.Module | None = getattr(layer, "original_module", None)
        original = layer.get_base_layer() if copied is None else copied
        base = {id(parameter) for parameter in original.parameters()}
        yield from (parameter for parameter in layer.parameters() if id(parameter) not in base)


def _optimizers(configured: Any) -> Iterator[Optimizer]:
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, dict):
        yield from _optimizers(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for one in configured:
            yield from _optimizers(one)
