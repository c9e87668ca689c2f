"""Multiply–accumulates of digital layers, by type of layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Multiply–accumulates of one pass through a layer.

    Args:
        forward: Of the output.
        input_gradient: Of the gradient towards the input, if the input wants one.
        weight_gradient: Of the gradient of the weight, if the weight wants one.
    """

    forward: int
    input_gradient: int
    weight_gradient: int


MacCounter = Callable[[Any, Tensor], Macs]
"""From a layer and its output to what computing it took."""

_COUNTERS: dict[type[nn.Module], MacCounter] = {}


def count_macs(*types: type[nn.Module]) -> Callable[[MacCounter], MacCounter]:
    """Return a decorator that makes a function count the MACs of layers of some types.

    Args:
        types: Classes of layers; a subclass without a counter of its own uses its parent's.
    Raises:
        ConfigurationError: A type has a counter already.

    Example:
        >>> class Doubled(nn.Linear): ...
        >>> @count_macs(Doubled)
        ... def twice(layer, output):
        ...     macs = 2 * output.numel() * layer.in_features
        ...     return Macs(forward=macs, input_gradient=macs, weight_gradient=macs)
    """
    taken = [kind.__name__ for kind in types if kind in _COUNTERS]
    if taken:
        raise ConfigurationError(
            f"count_macs: expected types without a counter, got {', '.join(taken)}. Derive a class "
            "of your own."
        )

    def store(counter: MacCounter) -> MacCounter:
        _COUNTERS.update(dict.fromkeys(types, counter))
        return counter

    return store


def counter_of(layer: nn.Module) -> MacCounter | None:
    """Find the counter of a layer's type, or of its nearest parent type.

    Args:
        layer: Any module.
    Returns:
        None if layers of this type do no counted multiply–accumulates of their own.
    """
    return next((_COUNTERS[kind] for kind in type(layer).__mro__ if kind in _COUNTERS), None)


@count_macs(nn.Linear)
def _linear(layer: nn.Linear, output: Tensor) -> Macs:
    macs = output.numel() * layer.in_features
    return Macs(forward=macs, input_gradient=macs, weight_gradient=macs)


@count_macs(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(layer: nn.Conv2d, output: Tensor) -> Macs:
    # shape (out_channels, in_channels / groups, *kernel): what one output value takes
    macs = output.numel() * layer.weight[0].numel()
    return Macs(forward=macs, input_gradient=macs, weight_gradient=macs)
