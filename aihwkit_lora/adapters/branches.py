"""LoRA layers whose branches a digital unit runs.

Modules stay what and where they are; only their classes change, to subclasses of PEFT's and torch's
own. So parameters, hooks, optimisers and the names in a ``state_dict`` are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from aihwkit_lora.adapters.budget import Footprint
from aihwkit_lora.adapters.fixed_point import ON_UNIT, OnUnit
from aihwkit_lora.adapters.sram import Slot, Sram
from aihwkit_lora.errors import UnsupportedTileError
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.digital_probe import AdapterProbe
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.tiles.freeze import plain_name
from aihwkit_lora.tiles.layers import FrozenLayer


class BranchesOnUnit(nn.Module, LoraLayer):
    """A LoRA layer whose branches run on the digital unit."""

    sram: Sram
    slots: dict[str, Slot]
    full_name: str

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Load what is about to run and is not there, then run as PEFT does."""
        self.fetch(running(self, options.get("adapter_names")))
        y: Tensor = super().forward(x, *args, **options)
        return y

    def fetch(
        self, adapters: tuple[str, ...], ledger: Ledger | None = None, phase: str = ""
    ) -> None:
        """Load this layer's part of some adapters, unless the SRAM holds it.

        Args:
            adapters: All that run together, also those that other layers have and this one lacks.
            ledger: Counts the load; the model's observers if None.
            phase: Name of the phase in the ledger.
        Raises:
            ConfigurationError: They do not fit together.
            UnsupportedTileError: One is of a kind that the unit cannot run.
        """
        self.adopt(adapters)
        self.sram.require(adapters)
        for slot in (self.slots[adapter] for adapter in adapters if adapter in self.slots):
            if not slot.resident:
                slot.resident = True
                self._count(slot, ledger, phase)

    def _count(self, slot: Slot, ledger: Ledger | None, phase: str) -> None:
        bits = self.sram.bits(slot)
        load = Counts({"adapter_loads": 1, "offchip_read_bits": bits, "sram_write_bits": bits})
        if ledger is not None:
            ledger.add(load, phase=phase, layer=slot.layer)
            return
        for hook in self._forward_hooks.values():
            if isinstance(hook, AdapterProbe):
                hook.on_load(load)

    def adopt(self, adapters: Iterable[str]) -> None:
        """Put matrices on the unit that are not there yet.

        Args:
            adapters: Names; those that this layer lacks do not matter.
        Raises:
            UnsupportedTileError: One is of a kind that the unit cannot run.
        """
        for adapter in adapters:
            if adapter in self.lora_A and not self._is_on_unit(adapter):
                require_known(self.full_name, self, [adapter])
                self._forget(adapter)
                self.slots[adapter] = slot_of(self.full_name, self, adapter)
                self.sram.add(self.slots[adapter])
                for matrix in self._matrices(adapter):
                    matrix.__class__ = ON_UNIT.get(type(matrix), type(matrix))
                    matrix.unit = self.sram.unit

    def _is_on_unit(self, adapter: str) -> bool:
        matrices = self._matrices(adapter)
        return adapter in self.slots and all(isinstance(matrix, OnUnit) for matrix in matrices)

    def _matrices(self, adapter: str) -> tuple[Any, Any]:
        return self.lora_A[adapter], self.lora_B[adapter]

    def _forget(self, adapter: str) -> None:
        if adapter in self.slots:
            self.sram.remove(self.slots.pop(adapter))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete as PEFT does, and free the memory."""
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Multiply the weights that the unit holds, which are not quite the trained ones."""
        self.adopt([adapter])
        down, up = self._matrices(adapter)
        with down.holding(), up.holding():
            delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
            return delta


class LinearOnUnit(BranchesOnUnit, Linear):
    """PEFT's LoRA of a linear layer."""


class Conv1dOnUnit(BranchesOnUnit, Conv1d):
    """PEFT's LoRA of a one-dimensional convolution."""


class Conv2dOnUnit(BranchesOnUnit, Conv2d):
    """PEFT's LoRA of a two-dimensional convolution."""


class Conv3dOnUnit(BranchesOnUnit, Conv3d):
    """PEFT's LoRA of a three-dimensional convolution."""


class TunerOnUnit(LoraModel):
    """PEFT's tuner, which puts every new adapter on the unit."""

    sram: Sram

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **options: Any
    ) -> None:
        """Inject as PEFT does. What the unit cannot run is refused when it is to run."""
        super().inject_adapter(model, adapter_name, *args, **options)
        for name, layer in branches(model):
            if unknown(layer, [adapter_name]) is None:
                place_(name, layer, self.sram, [adapter_name])


_LAYERS: dict[type, type[BranchesOnUnit]] = {
    Linear: LinearOnUnit,
    Conv1d: Conv1dOnUnit,
    Conv2d: Conv2dOnUnit,
    Conv3d: Conv3dOnUnit,
}
_ORDINARY: dict[type, type] = {
    **{on_unit: ordinary for ordinary, on_unit in _LAYERS.items()},
    **{on_unit: ordinary for ordinary, on_unit in ON_UNIT.items()},
    TunerOnUnit: LoraModel,
}


def branches(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Find what PEFT has put around frozen layers, with the layers' names.

    Args:
        model: Any module.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), FrozenLayer):
            yield plain_name(name), module


def running(layer: LoraLayer, adapter_names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Names of the adapters that the next pass takes, those included that this layer lacks.

    Args:
        layer: A LoRA layer.
        adapter_names: One name for each sample, where samples take different adapters.
    """
    if layer.disable_adapters:
        return ()
    names = layer.active_adapters if adapter_names is None else adapter_names
    return tuple(dict.fromkeys(name for name in names if name != "__base__"))


def unknown(layer: Any, adapters: Iterable[str]) -> str | None:
    """Say what the unit cannot run.

    Args:
        layer: What PEFT has put around a frozen layer.
        adapters: Which of its adapters are asked about.
    Returns:
        Method, kind of adapter or type of matrix; None if there is nothing.
    """
    if type(layer) not in _LAYERS and not isinstance(layer, BranchesOnUnit):
        method = type(layer).__module__.split(".")[2]  # peft.tuners.<method>.layer
        return f"{method}.{type(layer).__name__}"
    for adapter in (name for name in adapters if name in layer.lora_A):
        if adapter in layer.lora_variant and not layer.use_dora[adapter]:
            return type(layer.lora_variant[adapter]).__name__
        for matrix in (layer.lora_A[adapter], layer.lora_B[adapter]):
            if type(matrix) not in ON_UNIT and not isinstance(matrix, OnUnit):
                return f"a matrix that is a {type(matrix).__name__}"
    return None


def require_known(name: str, layer: BaseTunerLayer, adapters: Iterable[str]) -> None:
    """Refuse what the unit cannot run.

    Args:
        name: Full name of the frozen layer.
        layer: What PEFT has put around it.
        adapters: Which of its adapters are to run.
    Raises:
        UnsupportedTileError: There is something, and the message names it.
    """
    found = unknown(layer, adapters)
    if found is not None:
        raise UnsupportedTileError(
            f"layer '{name}': expected adapters that the digital unit can run (LoRA, rsLoRA or "
            f"DoRA), got {found}. Leave the layer out of that adapter, or keep the model off the "
            "unit."
        )


def slot_of(name: str, layer: Any, adapter: str) -> Slot:
    """Measure what an adapter of a layer takes.

    Args:
        name: Full name of the frozen layer.
        layer: PEFT's layer around it.
        adapter: Name of the adapter.
    """
    down, up, rank = layer.lora_A[adapter], layer.lora_B[adapter], layer.r[adapter]
    dora = layer.lora_magnitude_vector
    footprint = Footprint(
        rank=rank,
        per_rank=(down.weight.numel() + up.weight.numel()) // rank,
        biases=0 if up.bias is None else up.bias.numel(),
        magnitudes=dora[adapter].weight.numel() if adapter in dora else 0,
    )
    return Slot(name, adapter, footprint)


def place_(name: str, layer: Any, sram: Sram, adapters: Iterable[str]) -> BranchesOnUnit:
    """Put a layer's branches on a unit.

    Args:
        name: Full name of the frozen layer.
        layer: PEFT's layer around it, on this unit already, on another one, or on none.
        sram: Memory of the unit.
        adapters: Which of its adapters.
    Returns:
        The layer itself.
    """
    if getattr(layer, "sram", None) is not sram:
        layer.__class__ = _LAYERS.get(type(layer), type(layer))
        layer.sram, layer.slots, layer.full_name = sram, {}, name
    placed: BranchesOnUnit = layer
    placed.adopt(adapters)
    return placed


def restore_(module: nn.Module) -> None:
    """Give a module of a unit its ordinary class back, and its branches theirs.

    Args:
        module: Any module; others stay as they are.
    """
    if type(module) not in _ORDINARY:
        return
    module.__class__ = _ORDINARY[type(module)]
    for name in ("sram", "slots", "full_name", "unit"):
        module.__dict__.pop(name, None)
