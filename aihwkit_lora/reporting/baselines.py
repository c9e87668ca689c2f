"""What a ratio compares: the hybrid chip, and the machines and ways of working it is held against.

A :class:`Case` is one side of a ratio: what is done, what that counts, and at whose prices. The
functions here make cases from the shapes of a :class:`~aihwkit_lora.metering.workload.Workload`.
A recipe makes them from what it has counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.pricing import Priced, PriceList, Quantity, Status
from aihwkit_lora.metering.workload import (
    DigitalExecution,
    Workload,
    additions,
    analog_backward,
    analog_forward,
    digital_forward,
    digital_training,
    loading,
    programming,
)

if TYPE_CHECKING:
    from aihwkit_lora.chips.chip import Chip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One side of a ratio.

    Args:
        name: What is done, in a few words that tell it from other cases.
        counts: What that takes.
        chip: Whose prices to take.
        detail: What else a reader must know of it, such as the number of steps.

    Example:
        >>> import aihwkit_lora as al
        >>> counts = al.Counts({"optimizer_updates": 1404}).scaled(16)
        >>> chip = al.chips.get("rm-180nm")
        >>> print(Case(name="hybrid", detail="16 steps", counts=counts, chip=chip))
        hybrid: 16 steps
    """

    name: str
    counts: Counts
    chip: Priced
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" if self.detail else self.name


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long training takes.

    Args:
        steps: Optimiser steps; 1 or more.
        batch: Samples of a step; 1 or more.
    Raises:
        ConfigurationError: A number is out of its range.

    Example:
        >>> Schedule(steps=200, batch=960).samples
        192000
    """

    steps: int
    batch: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"Schedule.{name}: expected 1 or more, got {getattr(self, name)!r}."
                )

    @property
    def samples(self) -> int:
        """Samples seen in all steps together."""
        return self.steps * self.batch

    def __str__(self) -> str:
        return f"{self.steps:,} steps of {self.batch:,} samples"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A graphics card as a price list: its power over the MACs that it gets done.

    Args:
        model: Name of the card.
        power: Board power, in watts.
        flops: Peak of floating-point operations per second, two for a multiply–accumulate.
        utilisation: Part of that peak that the workload reaches, above 0 and at most 1. It has no
            default, because small networks reach a thousandth of the peak or less.
    Raises:
        ConfigurationError: The utilisation is out of its range.

    Example:
        >>> gpu = rtx_4090(utilisation=0.5)
        >>> gpu.name, f"{gpu.prices.energy['forward_macs'].value:.3g} J"
        ('RTX 4090 at 50 % of its peak', '2.18e-11 J')
    """

    model: str
    power: Quantity
    flops: Quantity
    utilisation: float

    def __post_init__(self) -> None:
        if not 0.0 < self.utilisation <= 1.0:
            raise ConfigurationError(
                f"{self.model}: expected a utilisation above 0 and at most 1, got "
                f"{self.utilisation!r}. Measure which part of its peak your workload reaches."
            )

    @property
    def name(self) -> str:
        """Name for reports."""
        return f"{self.model} at {100 * self.utilisation:g} % of its peak"

    @cached_property
    def prices(self) -> PriceList:
        """The energy of a MAC; idle time is part of it, by the utilisation."""
        joules = 2.0 * self.power.value / (self.flops.value * self.utilisation)
        source = f"2 × {self.power.source} ÷ {self.flops.source}, at the stated utilisation"
        mac = Quantity(value=joules, unit="J", source=source, status=Status.DERIVED)
        return PriceList(energy={"forward_macs": mac}, latency={})


def rtx_4090(*, utilisation: float) -> Gpu:
    """The training card that the code of arXiv:2601.10037 names, in 32-bit floats.

    Args:
        utilisation: Part of its peak that the workload reaches, above 0 and at most 1.
    Raises:
        ConfigurationError: The utilisation is out of its range.

    Example:
        >>> picojoules = rtx_4090(utilisation=1.0).prices.energy["forward_macs"].value * 1e12
        >>> round(picojoules, 1)
        10.9
    """
    sheet = "of NVIDIA's data sheet of the GeForce RTX 4090"
    power = Quantity(value=450.0, unit="W", source=f"450 W {sheet}", status=Status.CITED)
    flops = Quantity(
        value=82.6e12, unit="1/s", source=f"82.6 TFLOPS FP32 {sheet}", status=Status.CITED
    )
    return Gpu(model="RTX 4090", power=power, flops=flops, utilisation=utilisation)


def infer_hybrid(workload: Workload, chip: Chip, execution: DigitalExecution) -> Case:
    """One sample through frozen arrays and the LoRA branches beside them.

    Args:
        workload: Layers; those off the arrays run in the digital unit as well.
        chip: Where.
        execution: How its digital unit computes the branches.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit_lora.metering.workload import Reuse
        >>> from aihwkit_lora.reporting import FACES
        >>> chip = al.chips.get("rm-180nm")
        >>> way = DigitalExecution(reuse=Reuse.STATIONARY)
        >>> infer_hybrid(FACES.layers, chip, way).counts["forward_macs_int8"]
        20124
    """
    branches = digital_forward(workload.adapters(), execution) + additions(workload)
    rest = digital_forward(workload.off_arrays(), execution)
    return Case(
        name="hybrid",
        detail=f"adapters in {execution}",
        counts=analog_forward(workload, chip) + branches + rest,
        chip=chip,
    )


def infer_analog_only(workload: Workload, chip: Chip) -> Case:
    """One sample through the arrays alone.

    Args:
        workload: Layers; adapters and layers off the arrays are left out.
        chip: Where.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit_lora.reporting import FACES
        >>> chip = al.chips.get("rm-180nm")
        >>> infer_analog_only(FACES.layers, chip).counts["cell_reads"]
        87160
    """
    return Case(name="arrays alone", counts=analog_forward(workload, chip), chip=chip)


def infer_digital(workload: Workload, chip: Chip, execution: DigitalExecution) -> Case:
    """One sample through a digital unit that holds all weights in SRAM; adapters are merged.

    Args:
        workload: Layers.
        chip: Whose digital prices to take: a baseline of the same technology.
        execution: How it computes. Dense unless it skips zeros.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit_lora.metering.workload import Reuse
        >>> from aihwkit_lora.reporting import FACES
        >>> chip = al.chips.get("rm-180nm")
        >>> way = DigitalExecution(reuse=Reuse.REFETCHED)
        >>> infer_digital(FACES.layers, chip, way).name
        'digital, refetched, dense'
    """
    return Case(
        name=f"digital, {execution.reuse}, {'sparse' if execution.skips_zeros else 'dense'}",
        detail=str(execution),
        counts=digital_forward(workload, execution),
        chip=chip,
    )


def infer_gpu(workload: Workload, gpu: Gpu) -> Case:
    """One sample on a graphics card, zeros computed.

    Args:
        workload: Layers.
        gpu: With its utilisation.

    Example:
        >>> from aihwkit_lora.reporting import FACES
        >>> print(infer_gpu(FACES.layers, rtx_4090(utilisation=0.01)))
        RTX 4090 at 1 % of its peak
    """
    return Case(name=gpu.name, counts=Counts({"forward_macs": workload.macs}), chip=gpu)


def train_hybrid(workload: Workload, chip: Chip, schedule: Schedule) -> Case:
    """Train the LoRA branches in 16-bit floats; arrays are read both ways and never written.

    Gradients are taken to pass through all layers. A framework stops them at the first adapter.

    Args:
        workload: Layers.
        chip: Where.
        schedule: Steps and samples.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit_lora.reporting import FACES
        >>> chip = al.chips.get("rm-180nm")
        >>> case = train_hybrid(FACES.layers, chip, FACES.hybrid)
        >>> case.counts.pulses, case.counts["optimizer_updates"]
        (0, 22464)
    """
    adapters = workload.adapters()
    sample = _passes(workload, chip) + digital_training(adapters) + additions(workload)
    step = Counts({"optimizer_updates": adapters.weights})
    counts = sample.scaled(schedule.samples) + step.scaled(schedule.steps)
    return Case(name="hybrid", detail=str(schedule), counts=counts, chip=chip)


def train_on_arrays(
    workload: Workload, chip: Chip, schedule: Schedule, *, written: Literal["every step", "once"]
) -> Case:
    """Train all weights: arrays are read both ways, and all cells written by write–verify.

    Args:
        workload: Layers.
        chip: Where.
        schedule: Steps and samples.
        written: Whether the arrays are written after every step or, from a digital copy, once at
            the end.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit_lora.reporting import FACES
        >>> chip = al.chips.get("rm-180nm")
        >>> once = train_on_arrays(FACES.layers, chip, FACES.full, written="once")
        >>> once.counts["programmed_cells"]
        5048
    """
    sample = _passes(workload, chip) + Counts({"weight_gradient_macs": workload.macs})
    step = Counts({"optimizer_updates": workload.weights})
    writes = programming(workload, chip).scaled(schedule.steps if written == "every step" else 1)
    return Case(
        name=f"arrays written {written}",
        detail=str(schedule),
        counts=sample.scaled(schedule.samples) + step.scaled(schedule.steps) + writes,
        chip=chip,
    )


def _passes(workload: Workload, chip: Chip) -> Counts:
    """Forwards and backwards through one sample, weights left alone."""
    digital = dict.fromkeys(("forward_macs", "input_gradient_macs"), workload.off_arrays().macs)
    arrays = analog_forward(workload, chip) + analog_backward(workload, chip)
    return arrays + Counts(digital)


def train_digital(workload: Workload, chip: Chip, schedule: Schedule) -> Case:
    """Train all weights in 16-bit floats, in a digital unit alone.

    Args:
        workload: Layers.
        chip: Whose digital prices to take.
        schedule: Steps and samples.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit_lora.reporting import FACES
        >>> chip = al.chips.get("rm-180nm")
        >>> print(train_digital(FACES.layers, chip, FACES.full))
        digital: 200 steps of 960 samples
    """
    sample = digital_training(workload)
    step = Counts({"optimizer_updates": workload.weights})
    counts = sample.scaled(schedule.samples) + step.scaled(schedule.steps)
    return Case(name="digital", detail=str(schedule), counts=counts, chip=chip)


def deploy_on_arrays(workload: Workload, chip: Chip, *, offchip_bits: int = 0) -> Case:
    """Bring all weights onto the arrays, by write–verify.

    Args:
        workload: Layers.
        chip: Where.
        offchip_bits: Bits of a weight that is read from off-chip memory first; 0 for none.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit_lora.reporting import FACES
        >>> chip = al.chips.get("rm-180nm")
        >>> print(deploy_on_arrays(FACES.layers, chip, offchip_bits=8))
        all weights from off-chip: written into arrays, 8 bit each
    """
    fetched = offchip_bits * workload.on_arrays().weights
    return Case(
        name="all weights" + " from off-chip" * bool(offchip_bits),
        detail="written into arrays" + f", {offchip_bits} bit each" * bool(offchip_bits),
        counts=programming(workload, chip) + Counts({"offchip_read_bits": fetched}),
        chip=chip,
    )


def deploy_adapters(
    workload: Workload, chip: Chip, *, bits: int = 8, offchip: bool = False
) -> Case:
    """Bring the LoRA branches into SRAM.

    Args:
        workload: Layers.
        chip: Where.
        bits: Of an adapter's weight.
        offchip: Whether they are read from off-chip memory first.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit_lora.reporting import FACES
        >>> chip = al.chips.get("rm-180nm")
        >>> deploy_adapters(FACES.layers, chip).counts["sram_write_bits"]
        11232
    """
    return Case(
        name=f"{bits}-bit adapters" + " from off-chip" * offchip,
        detail="written into SRAM",
        counts=loading(workload, bits=bits, offchip=offchip),
        chip=chip,
    )
