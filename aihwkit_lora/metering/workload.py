"""Counts from the shapes of layers alone, without a model and without running one.

:func:`~aihwkit_lora.metering.observe.observe` counts what a model does. The functions here tell
beforehand what it would do, on a chip of any geometry. Everything that follows from shapes is
exact. What depends on data is not known from shapes, and its level says so: drives of active rows
follow from the stated density of the inputs (``mean``; all rows, ``bound``, where it is 1), and
cells are read as if every input were full scale (``bound``), at the middle of their window.

A density makes some counts fractions. Each is rounded once, to a whole number per layer, event and
sample; everything larger is a multiple of those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from math import ceil
from types import MappingProxyType
from typing import TYPE_CHECKING

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.metering.events import X2G_STEPS

if TYPE_CHECKING:
    from aihwkit_lora.chips.chip import Chip

_PICO = 1e12


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """All that counting needs to know of a linear layer.

    Args:
        inputs: Length of an input vector; 1 or more. Of a convolution: of an unfolded patch.
        outputs: Length of an output vector; 1 or more.
        vectors_per_sample: Input vectors of one sample: tokens, patches or time steps; 1 or more.
        adapter_rank: Rank of the LoRA branch beside it; 0 for none.
        density: Fraction of the inputs that are not zero, 0 to 1, such as the spikes per time step.
        input_bits: Bits of an input that a row's driver gets, 1 for spikes; those of the chip's DAC
            if None.
        analog: Whether its weights are on arrays; a digital unit computes it otherwise.
    Raises:
        ConfigurationError: A number is out of its range.

    Example:
        >>> layer = LayerShape(inputs=20, outputs=32, vectors_per_sample=16, adapter_rank=6)
        >>> layer.weights, layer.macs
        (640, 10240)
    """

    inputs: int
    outputs: int
    vectors_per_sample: int = 1
    adapter_rank: int = 0
    density: float | Fraction = 1.0
    input_bits: int | None = None
    analog: bool = True

    def __post_init__(self) -> None:
        for name, expected, satisfied in (
            ("inputs", "1 or more", self.inputs >= 1),
            ("outputs", "1 or more", self.outputs >= 1),
            ("vectors_per_sample", "1 or more", self.vectors_per_sample >= 1),
            ("adapter_rank", "0 or more", self.adapter_rank >= 0),
            ("density", "0 to 1", 0 <= self.density <= 1),
            ("input_bits", "1 or more, or None", self.input_bits is None or self.input_bits >= 1),
        ):
            if not satisfied:
                raise ConfigurationError(
                    f"LayerShape.{name}: expected {expected}, got {getattr(self, name)!r}."
                )

    @property
    def weights(self) -> int:
        """Weights of the layer, without bias and adapter."""
        return self.inputs * self.outputs

    @property
    def macs(self) -> int:
        """Multiply–accumulates per sample, zeros included."""
        return self.vectors_per_sample * self.weights


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The layers of a network, as far as counting needs them.

    Args:
        layers: Shapes by name.

    Example:
        >>> layer = LayerShape(inputs=20, outputs=32, vectors_per_sample=16, adapter_rank=6)
        >>> workload = Workload(layers={"fc1": layer, "head": LayerShape(inputs=20, outputs=6)})
        >>> workload.weights, workload.macs
        (760, 10360)
        >>> workload.adapters().weights, workload.adapters().macs, list(workload.adapters().layers)
        (312, 4992, ['fc1.lora_A', 'fc1.lora_B'])
    """

    layers: Mapping[str, LayerShape]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    @property
    def weights(self) -> int:
        """Weights of all layers, without biases and adapters."""
        return sum(layer.weights for layer in self.layers.values())

    @property
    def macs(self) -> int:
        """Multiply–accumulates per sample, zeros included."""
        return sum(layer.macs for layer in self.layers.values())

    def where(self, keep: Callable[[str, LayerShape], bool]) -> Workload:
        """Leave out all other layers.

        Args:
            keep: Told name and shape; whether the layer stays.
        """
        return Workload(layers={n: layer for n, layer in self.layers.items() if keep(n, layer)})

    def on_arrays(self) -> Workload:
        """The layers whose weights are on arrays."""
        return self.where(lambda _, layer: layer.analog)

    def off_arrays(self) -> Workload:
        """The layers that a digital unit computes."""
        return self.where(lambda _, layer: not layer.analog)

    def adapters(self) -> Workload:
        """The LoRA branches, as digital layers of their own: two for each layer that has one.

        The first takes the inputs of its layer, and their density; what it gives is dense.
        """
        branches = {}
        for name, layer in self.layers.items():
            if layer.adapter_rank:
                branches[f"{name}.lora_A"] = replace(
                    layer, outputs=layer.adapter_rank, adapter_rank=0, analog=False
                )
                branches[f"{name}.lora_B"] = LayerShape(
                    inputs=layer.adapter_rank,
                    outputs=layer.outputs,
                    vectors_per_sample=layer.vectors_per_sample,
                    analog=False,
                )
        return Workload(layers=branches)


class Reuse(StrEnum):
    """How often a digital unit reads a weight from its SRAM."""

    STATIONARY = "stationary"
    """Once per sample; registers hold it for all vectors."""

    REFETCHED = "refetched"
    """Once per multiply–accumulate."""


@dataclass(frozen=True, kw_only=True)
class DigitalExecution:
    """How a digital unit computes layers.

    Args:
        reuse: How often it reads a weight from SRAM. There is no default: the energy of a digital
            baseline changes by a factor of about 2.5 with it.
        skips_zeros: Whether inputs of zero cost neither MACs nor SRAM traffic.
        bits: Of weights and activations, 2 to 16.
    Raises:
        ConfigurationError: There is no such reuse, or the bits are out of their range.

    Example:
        >>> str(DigitalExecution(reuse=Reuse.REFETCHED, skips_zeros=True))
        '8 bit, weights refetched, zeros skipped'
    """

    reuse: Reuse
    skips_zeros: bool = False
    bits: int = 8

    def __post_init__(self) -> None:
        if self.reuse not in list(Reuse):
            raise ConfigurationError(
                f"DigitalExecution.reuse: expected {' or '.join(Reuse)}, got {self.reuse!r}."
            )
        if not 2 <= self.bits <= 16:
            raise ConfigurationError(
                f"DigitalExecution.bits: expected 2 to 16, got {self.bits!r}. For floats, see "
                "digital_training."
            )

    def __str__(self) -> str:
        zeros = "zeros skipped" if self.skips_zeros else "zeros computed"
        return f"{self.bits} bit, weights {self.reuse}, {zeros}"


def analog_forward(workload: Workload, chip: Chip) -> Counts:
    """Reads of arrays for one sample, forwards.

    Args:
        workload: Layers; those off the arrays are left out.
        chip: Whose arrays: rows, columns, cells per weight, bits of the DAC.
    Returns:
        What ``observe`` counts for one sample, except that the inputs are not known: active rows
        by the density, cells at full scale.

    Example:
        >>> from aihwkit_lora import chips
        >>> layer = LayerShape(inputs=300, outputs=20, vectors_per_sample=5)
        >>> counts = analog_forward(Workload(layers={"0": layer}), chips.get("rm-180nm"))
        >>> counts["tile_reads"], counts["row_drives"], counts["adc_conversions"]
        (15, 1500, 300)
    """
    return Counts.sum(_read(layer, chip) for layer in workload.on_arrays().layers.values())


def _read(layer: LayerShape, chip: Chip) -> Counts:
    vectors, density = layer.vectors_per_sample, Fraction(layer.density)
    in_tiles, out_tiles = _tiles(layer, chip)
    drives, conversions = vectors * layer.inputs * out_tiles, vectors * layer.outputs * in_tiles
    cells, bits = layer.macs * chip.mapping.cells_per_weight, layer.input_bits or chip.dac_bits
    exact = {
        "array_cycles": vectors,
        "tile_reads": vectors * in_tiles * out_tiles,
        "row_drives": drives,
        "row_drive_bits": drives * bits,
        "cell_reads": cells,
        "adc_conversions": conversions,
        "shift_adds": conversions,
    }
    active = {
        "active_row_drives": round(density * drives),
        "active_row_drive_bits": round(density * drives * bits),
    }
    full_scale = {"cell_read_x2g": _at_full_scale(density * cells, chip)}
    return (
        Counts(exact)
        + Counts(active, level=Level.BOUND if density == 1 else Level.MEAN)
        + Counts(full_scale, level=Level.BOUND)
    )


def analog_backward(workload: Workload, chip: Chip) -> Counts:
    """Reads of arrays for one sample, backwards: gradients towards the inputs of layers.

    Args:
        workload: Layers that gradients pass through; those off the arrays are left out. Training
            sends none to the input of the network, see :meth:`Workload.where`.
        chip: Whose arrays.
    Returns:
        What ``observe`` counts for one sample, with every gradient at full scale.

    Example:
        >>> from aihwkit_lora import chips
        >>> layer = LayerShape(inputs=300, outputs=20, vectors_per_sample=5)
        >>> counts = analog_backward(Workload(layers={"0": layer}), chips.get("rm-180nm"))
        >>> counts["transposed_row_drives"], counts["transposed_adc_conversions"]
        (300, 1500)
    """
    return Counts.sum(_read_back(layer, chip) for layer in workload.on_arrays().layers.values())


def _read_back(layer: LayerShape, chip: Chip) -> Counts:
    vectors = layer.vectors_per_sample
    in_tiles, out_tiles = _tiles(layer, chip)
    drives, conversions = vectors * layer.outputs * in_tiles, vectors * layer.inputs * out_tiles
    cells = layer.macs * chip.mapping.cells_per_weight
    exact = {
        "transposed_array_cycles": vectors,
        "transposed_tile_reads": vectors * in_tiles * out_tiles,
        "transposed_row_drives": drives,
        "transposed_row_drive_bits": drives * chip.dac_bits,
        "transposed_cell_reads": cells,
        "transposed_adc_conversions": conversions,
        "transposed_shift_adds": conversions,
    }
    full_scale = {"transposed_cell_read_x2g": _at_full_scale(cells, chip)}
    return Counts(exact) + Counts(full_scale, level=Level.BOUND)


def _tiles(layer: LayerShape, chip: Chip) -> tuple[int, int]:
    return ceil(layer.inputs / chip.rows), ceil(layer.outputs / chip.columns)


def _at_full_scale(cells: Fraction | int, chip: Chip) -> int:
    return round(cells * round(chip.mapping.middle_siemens * _PICO) * X2G_STEPS**2)


def digital_forward(workload: Workload, execution: DigitalExecution) -> Counts:
    """MACs in integers and SRAM traffic of one sample, forwards, all layers in a digital unit.

    Weights are read as the execution says, inputs once per vector, and outputs are written once:
    what ``observe`` counts of layers that ``digitize_`` has put into the unit, for a batch of one.

    Args:
        workload: Layers, wherever their weights are; ``workload.adapters()`` for the LoRA branches.
        execution: Bits, reuse of weights, and whether zeros are skipped.

    Example:
        >>> layer = Workload(layers={"fc": LayerShape(inputs=20, outputs=30, vectors_per_sample=4)})
        >>> once = digital_forward(layer, DigitalExecution(reuse=Reuse.STATIONARY))
        >>> once["forward_macs_int8"], once["sram_read_bits"], once["sram_write_bits"]
        (2400, 5440, 960)
    """
    return Counts.sum(_compute(layer, execution) for layer in workload.layers.values())


def _compute(layer: LayerShape, execution: DigitalExecution) -> Counts:
    density = Fraction(layer.density) if execution.skips_zeros else Fraction(1)
    stationary = execution.reuse == Reuse.STATIONARY
    fetched = layer.weights if stationary else density * layer.macs
    vectors = layer.vectors_per_sample
    macs = "forward_macs_int8" if execution.bits <= 8 else "forward_macs_int16"
    counts: dict[str, Fraction] = {
        macs: density * layer.macs,
        "sram_read_bits": execution.bits * (fetched + density * vectors * layer.inputs),
        "sram_write_bits": Fraction(execution.bits * vectors * layer.outputs),
    }
    level = Level.EXACT if density == 1 else Level.MEAN
    return Counts({event: round(count) for event, count in counts.items()}, level=level)


def additions(workload: Workload) -> Counts:
    """Add the outputs of the LoRA branches to those of their layers, for one sample.

    Args:
        workload: Layers, with their adapters.

    Example:
        >>> layer = LayerShape(inputs=20, outputs=30, vectors_per_sample=4, adapter_rank=2)
        >>> dict(additions(Workload(layers={"fc": layer})))
        {'additions': 120}
    """
    adapted = (layer for layer in workload.layers.values() if layer.adapter_rank)
    return Counts({"additions": sum(one.vectors_per_sample * one.outputs for one in adapted)})


def digital_training(workload: Workload) -> Counts:
    """MACs of one training sample in a digital unit, in 16-bit floats: output and both gradients.

    Args:
        workload: Layers; ``workload.adapters()`` for the LoRA branches.

    Example:
        >>> layer = Workload(layers={"fc": LayerShape(inputs=20, outputs=30)})
        >>> dict(digital_training(layer))
        {'forward_macs': 600, 'input_gradient_macs': 600, 'weight_gradient_macs': 600}
    """
    kinds = ("forward_macs", "input_gradient_macs", "weight_gradient_macs")
    return Counts(dict.fromkeys(kinds, workload.macs))


def programming(workload: Workload, chip: Chip) -> Counts:
    """Program all weights that are on arrays once, every cell with the chip's mean of pulses.

    Pulses are SET and RESET in equal parts. A cell of n pulses is verified n + 1 times. Every cell
    is taken to need the mean, whether or not others go together with it, and whatever its target:
    cells of a differential pair that stay reset in fact need none, see ``program_``.

    Args:
        workload: Layers; those off the arrays are left out.
        chip: Cells per weight, array size and write policy.
    Returns:
        Counts of level ``mean``.

    Example:
        >>> from aihwkit_lora import chips
        >>> layer = Workload(layers={"fc": LayerShape(inputs=10, outputs=10)})
        >>> counts = programming(layer, chips.get("rm-180nm"))
        >>> counts.pulses, counts["verify_reads"]
        (852, 952)
    """
    policy, layers = chip.write_policy, workload.on_arrays().layers.values()
    mean = Fraction(policy.statistics.mean_pulses)
    extents = [_extents(layer, chip) for layer in layers]
    cells, lines, groups = (
        sum(found[extent] for found in extents) for extent in ("cell", "row", policy.together)
    )
    pulses, slots = round(cells * mean), round(groups * mean)
    verifications = pulses + cells
    reads = verifications * policy.reads_per_verify
    digitised = policy.verify_with == "adc"
    counts = {
        "set_pulses": pulses - pulses // 2,
        "reset_pulses": pulses // 2,
        "verify_reads": reads,
        "verify_conversions": reads * digitised,
        "verify_comparisons": verifications * (not digitised),
        "programmed_cells": cells,
        "pulsed_cells": cells if mean else 0,
        "row_selects": round(lines * (mean + 1)) if policy.order == "array" else lines,
        "set_slots": slots - slots // 2,
        "reset_slots": slots // 2,
        "verify_slots": (slots + groups) * policy.reads_per_verify,
    }
    return Counts(counts, level=Level.MEAN)


def _extents(layer: LayerShape, chip: Chip) -> dict[str, int]:
    """Cells of a layer, word lines that they lie on, and arrays."""
    in_tiles, out_tiles = _tiles(layer, chip)
    of_each = {
        "cell": layer.weights,
        "row": layer.inputs * out_tiles,
        "array": in_tiles * out_tiles,
    }
    return {extent: n * chip.mapping.cells_per_weight for extent, n in of_each.items()}


def loading(workload: Workload, *, bits: int = 8, offchip: bool = False) -> Counts:
    """Load the LoRA branches of a workload into SRAM, once.

    Args:
        workload: Layers, with their adapters.
        bits: Of an adapter's weight; 1 or more.
        offchip: Whether they are read from memory outside the chip.

    Example:
        >>> layer = LayerShape(inputs=20, outputs=30, adapter_rank=2)
        >>> dict(loading(Workload(layers={"fc": layer}), offchip=True))
        {'adapter_loads': 1, 'sram_write_bits': 800, 'offchip_read_bits': 800}
    """
    moved = bits * workload.adapters().weights
    adapted = sum(layer.adapter_rank > 0 for layer in workload.layers.values())
    written = Counts({"adapter_loads": adapted, "sram_write_bits": moved})
    return written + Counts({"offchip_read_bits": moved if offchip else 0})
