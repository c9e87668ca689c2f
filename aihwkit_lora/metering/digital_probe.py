"""What watches digital layers: multiply–accumulates, activation functions, adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.macs import MacCounter
from aihwkit_lora.metering.sink import Sink


@runtime_checkable
class UnitLayer(Protocol):
    """A layer that a digital unit executes, with its operands in SRAM."""

    @property
    def mac_event(self) -> str:
        """Under which name its multiply–accumulates are counted."""

    def memory_traffic(self, x: Tensor, y: Tensor) -> Mapping[str, int]:
        """Count the bits that a pass reads and writes, by event."""


class Probe:
    """A forward hook that counts.

    Copies of an observed model are not observed: they get a hook that does nothing.

    Args:
        sink: Gets the counts.
        name: Full name of the layer.
    """

    def __init__(self, sink: Sink, name: str) -> None:
        self.sink, self._name = sink, name

    @property
    def ledger(self) -> Ledger:
        """Where counts end up."""
        return self.sink.ledger

    def _add(self, counts: Mapping[str, int]) -> None:
        self.sink.add(self._name, Counts(counts))

    def __reduce__(self) -> tuple[type[_Nothing], tuple[()]]:
        return _Nothing, ()


class _Nothing:
    """What a copy of an observed layer has instead of a probe."""

    def __call__(self, *_: Any) -> None:
        return None


class DigitalProbe(Probe):
    """Counts the multiply–accumulates of a digital layer, forwards and backwards.

    Args:
        sink: Gets the counts.
        name: Full name of the layer.
        macs: Counts those of a layer of its type.
    """

    def __init__(self, sink: Sink, name: str, macs: MacCounter) -> None:
        super().__init__(sink, name)
        self._macs = macs
        self._kind: type[nn.Module] = nn.Module
        self._on_unit = False

    def __call__(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Tensor
    ) -> None:
        """Count a pass, and its gradients when they arrive."""
        macs = self._macs(layer, output)
        first = inputs[0] if inputs else next(iter(named.values()), None)
        if isinstance(first, Tensor) and (unit := self._unit(layer)) is not None:
            traffic = unit.memory_traffic(first, output)
            self._add({unit.mac_event: macs.forward, **traffic})
        else:
            self._add({"forward_macs": macs.forward})
        if not output.requires_grad:
            return
        backward = {
            "input_gradient_macs": macs.input_gradient * _wants_gradient(first),
            "weight_gradient_macs": macs.weight_gradient
            * _wants_gradient(getattr(layer, "weight", None)),
        }
        output.register_hook(lambda _: self._add(backward))

    def _unit(self, layer: nn.Module) -> UnitLayer | None:
        # Asked once for each class: Python looks for all parts of a protocol, which takes longer
        # than counting. Layers change their class when they come to a unit.
        if type(layer) is not self._kind:
            self._kind, self._on_unit = type(layer), isinstance(layer, UnitLayer)
        return cast(UnitLayer, layer) if self._on_unit else None


class ActivationProbe(Probe):
    """Counts the values of an activation function."""

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Count a pass."""
        self._add({"activation_functions": output.numel()})


class AdapterProbe(Probe):
    """Counts the values that the adapters of a layer add to its output, and their loads."""

    def __call__(
        self, layer: Any, inputs: tuple[Any, ...], named: Mapping[str, Any], output: object
    ) -> None:
        """Count a pass."""
        if not isinstance(output, Tensor) or layer.disable_adapters or layer.merged:
            return
        present = {*layer.lora_A, *layer.lora_embedding_A}
        # One name per sample where samples take different adapters; else all samples take all.
        by_sample = named.get("adapter_names")
        adapters = layer.active_adapters if by_sample is None else by_sample
        added = sum(adapter in present for adapter in adapters)
        values = output.numel() if by_sample is None else output[:1].numel()
        self._add({"additions": added * values})

    def on_load(self, counts: Counts) -> None:
        """Count an adapter of this layer on its way into SRAM.

        Args:
            counts: What loading it took.
        """
        self.sink.add(self._name, counts)


def adds_adapters(layer: nn.Module) -> bool:
    """Tell whether a module is a LoRA layer that adds its adapters' outputs to its own.

    Args:
        layer: Any module.

    Example:
        >>> adds_adapters(nn.Linear(2, 1))
        False
    """
    # Told by its parts, since importing PEFT takes seconds. LoRA on single parameters, and on
    # attention, changes weights instead of outputs; the latter returns a tuple.
    parts = ("lora_A", "lora_embedding_A", "active_adapters", "disable_adapters")
    return all(hasattr(layer, part) for part in parts) and not hasattr(layer, "parameter_name")


def applies_activation(layer: nn.Module) -> bool:
    """Tell whether a module is an activation function of torch or transformers.

    Args:
        layer: Any module; subclasses of torch's count.

    Example:
        >>> applies_activation(nn.GELU()), applies_activation(nn.Linear(2, 1))
        (True, False)
    """
    return isinstance(layer, _ACTIVATIONS) or type(layer).__module__ == "transformers.activations"


_ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in nn.modules.activation.__all__
    if name != "MultiheadAttention"  # a layer with products of its own
)


def _wants_gradient(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.requires_grad
