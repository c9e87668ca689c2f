"""The model as it was before its present adapters: the same one, without them for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from aihwkit_lora.errors import StageError
from aihwkit_lora.tiles.freeze import plain_name


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """Run the model, inside the block, without the adapters that are being trained.

    Those are the ones with a parameter that requires a gradient, and what PEFT's
    ``modules_to_save`` trains beside them. Adapters that are frozen, sealed ones for example, stay
    in force. The whole model is in evaluation mode meanwhile, since a reference neither drops
    activations nor updates statistics. Nothing is copied, no random number is drawn, and on exit,
    also after an error, everything is as it was. The arrays are read as in any other pass, so
    whoever observes the model counts these reads.

    Trainable parameters outside adapters, such as a new row of a digital head, stay as they are.
    Gradients are the caller's business: a reference usually runs under ``torch.no_grad()``.

    Args:
        model: Any model with adapters of PEFT, on a digital unit or not.
    Raises:
        StageError: The model has no adapter, none is being trained, or one that is trained has been
            merged into its layer.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> x = torch.ones(1, 3)
        >>> before = net(x)
        >>> options = {"target_modules": ["0"], "init_lora_weights": False}
        >>> peft = get_peft_model(net, LoraConfig(**options))
        >>> with reference(peft):
        ...     print(torch.equal(peft(x), before))
        True
        >>> torch.equal(peft(x), before)
        False
    """
    layers = dict(adapted_layers(model))
    left_out = _in_training(model, layers)
    before = {name: layer._active_adapter for name, layer in layers.items()}
    training = [module for module in model.modules() if module.training]
    try:
        for layer in layers.values():
            # PEFT 0.21's own switches, set_adapter and the way out of disable_adapter, would make
            # frozen adapters trainable.
            layer._active_adapter = [a for a in layer.active_adapters if a not in left_out]
        for module in training:
            module.training = False
        yield
    finally:
        for name, layer in layers.items():
            layer._active_adapter = before[name]
        for module in training:
            module.training = True


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Find what PEFT has put around layers, with the layers' names.

    Args:
        model: Any module.

    Example:
        >>> list(adapted_layers(nn.Linear(2, 1)))
        []
    """
    # Told by its parts, since importing PEFT takes seconds.
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "_active_adapter"):
            yield plain_name(name), module


def adapter_parameters(layer: Any) -> dict[str, list[nn.Parameter]]:
    """List the parameters of each adapter of a layer.

    Args:
        layer: One that :func:`adapted_layers` has found.
    Returns:
        Parameters by name of the adapter.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for kind in layer.adapter_layer_names:
        for adapter, part in getattr(layer, kind).items():
            parameters = part.parameters() if isinstance(part, nn.Module) else [part]
            found.setdefault(adapter, []).extend(parameters)
    return found


def adapters_in_training(model: nn.Module) -> frozenset[str]:
    """Name the adapters that have a parameter which requires a gradient.

    Args:
        model: Any module.

    Example:
        >>> adapters_in_training(nn.Linear(2, 1))
        frozenset()
    """
    return frozenset(
        adapter
        for _, layer in adapted_layers(model)
        for adapter, parameters in adapter_parameters(layer).items()
        if any(parameter.requires_grad for parameter in parameters)
    )


def _in_training(model: nn.Module, layers: dict[str, Any]) -> frozenset[str]:
    if not layers:
        raise StageError(
            f"reference: expected a model with adapters, got a {type(model).__name__} without any. "
            "Call get_peft_model(model, config) first; the reference is the model without them."
        )
    names = adapters_in_training(model)
    if not names:
        raise StageError(
            "reference: expected an adapter that is being trained, got only frozen ones. Add one "
            "for the forgetting, or set requires_grad on the parameters of the one to train."
        )
    for name, layer in layers.items():
        if merged := sorted(names & {*getattr(layer, "merged_adapters", ())}):
            raise StageError(
                f"layer '{name}': expected adapters beside the layer, got {merged[0]!r} merged "
                "into it. Call unmerge_adapter() first."
            )
    return names
