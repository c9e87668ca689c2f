"""What is left once the adapter is off, and how far it moves each layer.

An adapter on frozen arrays suppresses; the arrays still hold what was learnt. With the adapter off
the accuracy on the forgotten data is expected to be that of the model before unlearning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError, UnsupportedTileError
from aihwkit_lora.tiles.freeze import plain_name
from aihwkit_lora.unlearning.metrics.evaluation import Batch, model_accuracy


def adapter_off_accuracy(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    off: Callable[[], AbstractContextManager[Any]] | None = None,
    audit: Callable[[], AbstractContextManager[Any]] = nullcontext,
    seed: int = 0,
) -> float:
    """Accuracy on forgotten samples while all adapters are off, the simplest of attacks.

    ``#{i: predicted = true label} / N``, from 0 to 1. Ideal: that of a retrained model. For an
    adapter on frozen arrays it is, without exception, that of the model before unlearning; which is
    the reason for naming the level "suppressed". The model is left as it was.

    Args:
        model: A PEFT model.
        batches: Inputs and targets of forgotten samples, on the model's device.
        off: Makes the block in which adapters are off; PEFT's ``model.disable_adapter`` by default.
        audit: Makes the block around it that a sealed model asks for, for example
            ``lambda: unlearning.audit(model, reason="adapter off")``.
        seed: Of read noise.
    Raises:
        ConfigurationError: The model has no ``disable_adapter``, and ``off`` is not given.
        DataError: There is no sample, or shapes do not fit.
        SealError: The model is sealed, and ``audit`` is not given.

    Example:
        >>> from contextlib import contextmanager
        >>> from aihwkit_lora.unlearning.metrics.evaluation import model_accuracy
        >>> model, samples = nn.Linear(2, 2, bias=False), (torch.eye(2), torch.tensor([0, 1]))
        >>> @contextmanager
        ... def base_only():
        ...     kept, model.weight.data = model.weight.data, torch.eye(2)
        ...     yield
        ...     model.weight.data = kept
        >>> model.weight.data = torch.eye(2).flip(0)
        >>> model_accuracy(model, [samples]), adapter_off_accuracy(model, [samples], off=base_only)
        (0.0, 1.0)
    """
    switch = off or getattr(model, "disable_adapter", None)
    if switch is None:
        raise ConfigurationError(
            f"{type(model).__name__}: expected a PEFT model with disable_adapter(), got one "
            "without. Pass off=, which makes a block in which the adapters are off."
        )
    with _same_gradients(model), audit(), switch():
        return model_accuracy(model, batches, seed=seed)


@contextmanager
def _same_gradients(model: nn.Module) -> Iterator[None]:
    # The exit of PEFT 0.21's disable_adapter makes every adapter trainable, frozen ones too.
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def layer_distance(model: nn.Module, reference: nn.Module | None = None) -> dict[str, float]:
    """Relative distance of each layer's weight from where it was, or from another model's.

    ``||W + dW - V||_F / ||V||_F`` with ``dW`` the sum of the active LoRA branches. Without a
    reference ``V = W``, so that it is ``||dW||_F / ||W||_F`` of layers that have an adapter; else
    ``V`` is the other model's weight, branches included. 0 or more. Ideal: the distance between two
    retrained models; 0 for layers that unlearning should not touch. Source: survey
    arXiv:2209.02299.

    Args:
        model: A model with LoRA adapters or, with a reference, any.
        reference: A model with layers of the same names and shapes.
    Returns:
        Distances by the layer's name, without what PEFT puts around it.
    Raises:
        DataError: There is nothing to compare, or a layer is missing or of another shape.
        UnsupportedTileError: An adapter is no LoRA that adds to the weight, such as DoRA.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
        >>> list(layer_distance(model))
        ['0']
    """
    moved = dict(_adapted(model))
    if reference is None:
        pairs = {name: (base + delta, base) for name, (base, delta) in moved.items()}
    else:
        pairs = _paired(_weights(model), _weights(reference))
    if not pairs:
        raise DataError("layer_distance: expected a model with LoRA layers, found none.")
    return {name: _relative(ours, theirs) for name, (ours, theirs) in pairs.items()}


def _relative(weight: Tensor, reference: Tensor) -> float:
    distance = torch.linalg.vector_norm(weight - reference)
    return float(distance / torch.linalg.vector_norm(reference))


def _adapted(model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Name, base weight and sum of the branches of each layer that PEFT has wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            base = _weight(layer.get_base_layer())
            yield plain_name(name), (base, _branches(name, layer, base))


def _branches(name: str, layer: Any, base: Tensor) -> Tensor:
    from peft.tuners.lora import LoraLayer

    plain = isinstance(layer, LoraLayer)
    active = [adapter for adapter in layer.active_adapters if not plain or adapter in layer.r]
    if not plain or any(adapter in layer.lora_variant for adapter in active):
        raise UnsupportedTileError(
            f"layer '{name}': expected LoRA branches that add to the weight, got a "
            f"{type(layer).__name__} with {active}. Leave the layer out of that adapter, or "
            "compare outputs instead."
        )
    deltas = [layer.get_delta_weight(adapter).detach().double() for adapter in active]
    return torch.stack(deltas).sum(dim=0) if deltas else torch.zeros_like(base)


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach().double()
    return weight


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of all layers with branches added in; the branches' own matrices are left out."""
    found = {name: base + delta for name, (base, delta) in _adapted(model)}
    wrapped = tuple(f"{name}." for name in found)
    for full_name, layer in model.named_modules():
        name = plain_name(full_name)
        own = name not in found and not name.startswith(wrapped)
        if own and isinstance(getattr(layer, "weight", None), Tensor):
            found[name] = _weight(layer)
    return found


def _paired(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    shapes = [{name: tuple(w.shape) for name, w in weights.items()} for weights in (ours, theirs)]
    if shapes[0] != shapes[1]:
        odd = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise DataError(
            f"layer_distance: expected layers of the same names and shapes, got '{odd[0]}' with "
            f"{shapes[0].get(odd[0], 'no weight')} and {shapes[1].get(odd[0], 'no weight')}."
        )
    return {name: (ours[name], theirs[name]) for name in ours}
