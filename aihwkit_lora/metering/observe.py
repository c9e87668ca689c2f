"""Watching a model run: tile reads, conversions, digital MACs and optimiser updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from aihwkit.nn.modules.base import AnalogLayerBase
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.macs import MacCounter, counter_of
from aihwkit_lora.tiles.freeze import frozen_layers, plain_name
from aihwkit_lora.tiles.frozen import FrozenLinear

_FULL_SCALE = 2**16
"""Steps of a row's drive in ``cell_read_x2g``."""

_PICO = 1e12


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
        """Add to the ledger, under the present phase."""
        self.ledger.add(counts, phase=self.phase, layer=layer)

    def _require_countable(self) -> None:
        for name, module in self.model.named_modules():
            analog = isinstance(module, AnalogLayerBase) and not module.IS_CONTAINER
            if analog and not isinstance(module, FrozenLinear):
                raise StageError(
                    f"layer '{name}': expected a frozen layer, got {type(module).__name__}, whose "
                    "reads cannot be counted. Call freeze_(model) first."
                )
        for name, layer in frozen_layers(self.model):
            array = layer.analog_module
            if any(getattr(p, "ledger", None) is self.ledger for p in array.probes):
                raise StageError(
                    f"layer '{name}': expected a ledger that does not observe this model yet, got "
                    "one that does; everything would count twice. Stop the other observer, or "
                    "use a ledger of its own."
                )

    def _watch(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, FrozenLinear):
                self._watch_tiles(plain_name(name), module)
            elif (macs := counter_of(module)) is not None:
                self._watch_digital(plain_name(name), module, macs)
        self._undo.append(register_optimizer_step_post_hook(self._on_optimizer_step).remove)

    def _watch_tiles(self, name: str, layer: FrozenLinear) -> None:
        probes = layer.analog_module.probes
        known = layer.analog_module.programming.mapping or self._mapping
        if known is None:
            raise StageError(
                f"layer '{name}': expected known conductances, got an array frozen as "
                f"'{layer.analog_module.programming.source}'. Pass observe(..., "
                "mapping=chip.mapping)."
            )
        probe = _TileProbe(self, name, layer, known)
        probes.append(probe)
        self._undo.append(lambda: probes.remove(probe))

    def _watch_digital(self, name: str, module: nn.Module, macs: MacCounter) -> None:
        def on_forward(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            found = macs(layer, output)
            self.add(name, Counts({"forward_macs": found.forward}))
            if not output.requires_grad:
                return
            weight = getattr(layer, "weight", None)
            backward = {
                "input_gradient_macs": found.input_gradient * _wants_gradient(*inputs[:1]),
                "weight_gradient_macs": found.weight_gradient * _wants_gradient(weight),
            }
            output.register_hook(lambda _: self.add(name, Counts(backward)))

        self._undo.append(module.register_forward_hook(on_forward).remove)

    def _on_optimizer_step(self, optimizer: Optimizer, *_: object) -> None:
        own = {id(parameter) for parameter in self.model.parameters()}
        updated = sum(
            parameter.numel()
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in own and parameter.grad is not None
        )
        if updated:
            self.add("", Counts({"optimizer_updates": updated}))


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
    and convolutional layers (adapters included) forwards and backwards, and parameters updated by
    optimisers. Not counted: activation functions, norms, additions of activations.

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


class _TileProbe:
    """Counts the reads of one frozen layer's tiles."""

    def __init__(
        self,
        observer: Observer,
        name: str,
        layer: FrozenLinear,
        fallback: ConductanceMapping,
    ) -> None:
        self._observer, self._name, self._layer, self._fallback = observer, name, layer, fallback
        self._array: nn.Module | None = None
        self._row_sums = torch.empty(0)

    @property
    def ledger(self) -> Ledger:
        return self._observer.ledger

    def on_read(self, drive: Tensor) -> None:
        blocks, vectors = self._layer.analog_module.blocks, drive.shape[1]
        in_tiles, out_tiles = len(blocks.in_sizes), len(blocks.out_sizes)
        squares = _sum_of_squares(drive, dim=1)
        conversions = vectors * blocks.out_features * in_tiles
        counts = {
            "array_cycles": vectors,
            "tile_reads": vectors * blocks.tiles,
            "row_drives": vectors * blocks.in_features * out_tiles,
            "active_row_drives": int(drive.count_nonzero()) * out_tiles,
            "cell_reads": vectors * blocks.in_features * blocks.out_features,
            "cell_read_x2g": _exact_dot(squares, self._sums().sum(dim=1)),
            "adc_conversions": conversions,
            "shift_adds": conversions,
        }
        self._observer.add(self._name, Counts(counts))

    def on_repeat(self, in_tile: int, out_tile: int, drive: Tensor) -> None:
        blocks, vectors = self._layer.analog_module.blocks, drive.shape[0]
        rows, columns = blocks.in_sizes[in_tile], blocks.out_sizes[out_tile]
        sums = self._sums()[in_tile, out_tile]
        counts = {
            "array_cycles": vectors,
            "tile_reads": vectors,
            "row_drives": vectors * rows,
            "active_row_drives": int(drive.count_nonzero()),
            "cell_reads": vectors * rows * columns,
            "cell_read_x2g": _exact_dot(_sum_of_squares(drive, dim=0), sums),
            "adc_conversions": vectors * columns,
        }
        self._observer.add(self._name, Counts(counts))

    def on_transposed_read(self, vectors: int) -> None:
        blocks = self._layer.analog_module.blocks
        in_tiles, out_tiles = len(blocks.in_sizes), len(blocks.out_sizes)
        conversions = vectors * blocks.in_features * out_tiles
        counts = {
            "transposed_array_cycles": vectors,
            "transposed_tile_reads": vectors * blocks.tiles,
            "transposed_row_drives": vectors * blocks.out_features * in_tiles,
            "transposed_cell_reads": vectors * blocks.in_features * blocks.out_features,
            "transposed_adc_conversions": conversions,
            "shift_adds": conversions,
        }
        self._observer.add(self._name, Counts(counts))

    def _sums(self) -> Tensor:
        """Conductance of each row of each tile in whole pS, ``(in_tiles, out_tiles, rows)``."""
        array = self._layer.analog_module
        if array is not self._array:
            mapping = array.programming.mapping or self._fallback
            self._array, self._row_sums = array, _row_sums(self._layer, mapping)
        return self._row_sums


def _row_sums(layer: FrozenLinear, mapping: ConductanceMapping) -> Tensor:
    array = layer.analog_module
    blocks = array.blocks
    sums = torch.zeros(len(blocks.in_sizes), len(blocks.out_sizes), blocks.rows, dtype=torch.int64)
    for in_tile, out_tile in array.positions():
        weight = array.tile(in_tile, out_tile)[0].detach().double().cpu()
        # A simulated cell far below the window would conduct less than nothing.
        cells = (mapping.to_siemens(weight).clamp(min=0.0) * _PICO).round().long()
        sums[in_tile, out_tile, : blocks.in_sizes[in_tile]] = cells.sum(dim=0)
    return sums


def _sum_of_squares(drive: Tensor, dim: int) -> Tensor:
    """Squares of the drives in steps of 2⁻¹⁶, summed over vectors, exactly."""
    steps = (drive.detach().abs().double() * _FULL_SCALE).round().long()
    return steps.square().sum(dim=dim).cpu()


def _exact_dot(squares: Tensor, sums: Tensor) -> int:
    # Python integers: the product of the two sums passes 2⁶³.
    pairs = zip(squares.flatten().tolist(), sums.flatten().tolist(), strict=True)
    return sum(x * g for x, g in pairs)


def _wants_gradient(*tensors: object) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
