"""Watching a model run: tile reads, conversions, digital MACs and optimiser updates."""

from __future__ import annotations

from collections.abc import Callable

from aihwkit.nn.modules.base import AnalogLayerBase
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.digital_probe import (
    ActivationProbe,
    AdapterProbe,
    DigitalProbe,
    Probe,
    adds_adapters,
    applies_activation,
)
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.macs import counter_of
from aihwkit_lora.metering.tile_probe import TileProbe
from aihwkit_lora.tiles.freeze import plain_name
from aihwkit_lora.tiles.layers import FrozenLayer


class Observer:
    """Counts what a model does while it is started. Made by :func:`observe`.

    Args:
        model: See :func:`observe`.
        ledger: See :func:`observe`.
        phase: See :func:`observe`; may be changed while it runs.
        mapping: See :func:`observe`.
    """

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        *,
        phase: str,
        mapping: ConductanceMapping | None = None,
    ) -> None:
        self.model, self.ledger, self.phase = model, ledger, phase
        self._mapping = mapping
        self._undo: list[Callable[[], None]] = []
        self._stepping = False
        self._own: frozenset[nn.Parameter] = frozenset()

    def start(self) -> Observer:
        """Begin to count.

        Raises:
            StageError: This observer runs already, the model is observed with this ledger by
                another one, a layer is analogue but not frozen, or its conductances are unknown.
        """
        if self._undo:
            raise StageError("observe: expected an observer that is not running, got one that is.")
        self._require_countable()
        try:
            self._watch()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End counting; harmless if it is not running."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Observer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add(self, layer: str, counts: Counts) -> None:
        """Add to the ledger, under the present phase; nothing unless it is running."""
        if not self._undo:
            return  # a gradient that arrives after the block
        self.ledger.add(counts, phase=self.phase, layer=layer)

    def _require_countable(self) -> None:
        for name, module in self.model.named_modules():
            analog = isinstance(module, AnalogLayerBase) and not module.IS_CONTAINER
            if analog and not isinstance(module, FrozenLayer):
                raise StageError(
                    f"layer '{name}': expected a frozen layer, got {type(module).__name__}, whose "
                    "reads cannot be counted. Call freeze_(model) first."
                )
            if any(probe.ledger is self.ledger for probe in _probes_of(module)):
                raise StageError(
                    f"layer '{name}': expected a ledger that does not observe this model yet, got "
                    "one that does; everything would count twice. Stop the other observer, or "
                    "use a ledger of its own."
                )

    def _watch(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, FrozenLayer):
                self._watch_tiles(plain_name(name), module)
            else:
                self._watch_digital(plain_name(name), module)
        self._undo.append(register_optimizer_step_pre_hook(self._before_optimizer_step).remove)
        self._undo.append(register_optimizer_step_post_hook(self._on_optimizer_step).remove)

    def _watch_tiles(self, name: str, layer: FrozenLayer) -> None:
        probes = layer.analog_module.probes
        known = layer.analog_module.programming.mapping or self._mapping
        if known is None:
            raise StageError(
                f"layer '{name}': expected known conductances, got an array frozen as "
                f"'{layer.analog_module.programming.source}'. Pass observe(..., "
                "mapping=chip.mapping)."
            )
        probe = TileProbe(self, name, layer, known)
        probes.append(probe)
        self._undo.append(lambda: probes.remove(probe))

    def _watch_digital(self, name: str, module: nn.Module) -> None:
        hook = module.register_forward_hook
        if (macs := counter_of(module)) is not None:
            self._undo.append(hook(DigitalProbe(self, name, macs), with_kwargs=True).remove)
        if adds_adapters(module):
            self._undo.append(hook(AdapterProbe(self, name), with_kwargs=True).remove)
        if applies_activation(module):
            self._undo.append(hook(ActivationProbe(self, name)).remove)

    def _before_optimizer_step(self, *_: object) -> None:
        self._stepping = True

    def _on_optimizer_step(self, optimizer: Optimizer, *_: object) -> None:
        # torch calls this again for the step around a step: of a class that calls its parent's, as
        # aihwkit's optimisers do. The innermost is the one that updates.
        if not self._stepping:
            return
        self._stepping = False
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not self._own.issuperset(parameters):  # an adapter came in the meantime
            self._own = frozenset(self.model.parameters())
        own = (p for p in parameters if p in self._own and p.grad is not None)
        updated = sum(parameter.numel() for parameter in own)
        if updated:
            self.add("", Counts({"optimizer_updates": updated}))


def _probes_of(module: nn.Module) -> list[TileProbe | Probe]:
    """Everything that observes a layer already."""
    tiles = module.analog_module.probes if isinstance(module, FrozenLayer) else []
    hooks = (*tiles, *module._forward_hooks.values())
    return [hook for hook in hooks if isinstance(hook, TileProbe | Probe)]


def observers(model: nn.Module) -> list[Observer]:
    """Find whoever counts what a model does at the moment.

    Args:
        model: Any model.

    Example:
        >>> import aihwkit_lora as al
        >>> model = nn.Linear(3, 2)
        >>> with al.observe(model, al.Ledger(), phase="train") as observer:
        ...     print(observers(model) == [observer])
        True
        >>> observers(model)
        []
    """
    probes = (probe for module in model.modules() for probe in _probes_of(module))
    found = {id(probe.sink): probe.sink for probe in probes}
    return [sink for sink in found.values() if isinstance(sink, Observer)]


def observe(
    model: nn.Module,
    ledger: Ledger,
    *,
    phase: str,
    mapping: ConductanceMapping | None = None,
) -> Observer:
    """Count what frozen tiles, digital layers and optimisers do, until the ``with`` block ends.

    Counted exactly: reads of every tile in both directions with their row drives and conversions,
    the data-dependent sum Σx²·G of all cells read forwards, multiply–accumulates of digital linear
    and convolutional layers (adapters included) forwards and backwards, values that LoRA layers add
    to their outputs, values of activation modules of torch and transformers, and parameters updated
    by optimisers. On a digital unit (``digitize_``) also adapters loaded, and the SRAM traffic of
    forward passes. Not counted: activation functions called as functions, which no hook sees;
    norms, softmax inside attention and sums of activations; SRAM traffic of backward passes.

    Args:
        model: A model whose analogue layers are all frozen, plain or wrapped by PEFT.
        ledger: Where counts are added, by layer.
        phase: Under which name.
        mapping: Conductance window of layers that were programmed by other means.
    Returns:
        A context manager; its ``phase`` may be changed inside the block.
    Raises:
        StageError: On entering; see :meth:`Observer.start`.

    Example:
        >>> import torch
        >>> import aihwkit_lora as al
        >>> chip, ledger = al.chips.get("rm-180nm"), al.Ledger()
        >>> model = al.convert(nn.Sequential(nn.Linear(300, 20)), chip)
        >>> _ = al.program_(model, chip, seed=0)
        >>> model = al.freeze_(model)
        >>> with al.observe(model, ledger, phase="infer"):
        ...     _ = model(torch.ones(5, 300))
        >>> counts = ledger.total(phase="infer")
        >>> counts["tile_reads"], counts["row_drives"], counts["adc_conversions"]
        (15, 1500, 300)
    """
    return Observer(model, ledger, phase=phase, mapping=mapping)
