"""The arithmetic of two published workloads: every named ratio on a chip, from shapes alone.

Both are tasks of arXiv:2601.10037 at the sizes and schedules of its code
(github.com/MrLinNing/RMAdaptiveMachine). Nothing is trained, nothing measured: what stands here is
what the definitions of the ratios and the prices of a chip amount to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from aihwkit_lora.metering.workload import DigitalExecution, LayerShape, Reuse, Workload
from aihwkit_lora.reporting.baselines import (
    Gpu,
    Schedule,
    deploy_adapters,
    deploy_on_arrays,
    infer_analog_only,
    infer_digital,
    infer_gpu,
    infer_hybrid,
    train_digital,
    train_hybrid,
    train_on_arrays,
)
from aihwkit_lora.reporting.formatting import format_number
from aihwkit_lora.reporting.ratios import (
    deployment_energy_ratio,
    deployment_time_ratio,
    inference_energy_ratio,
    parameter_ratio,
    training_energy_ratio,
    update_count_ratio,
    update_energy_ratio,
)
from aihwkit_lora.reporting.records import Ratio

if TYPE_CHECKING:
    from rich.console import Console

    from aihwkit_lora.chips.chip import Chip


@dataclass(frozen=True, kw_only=True)
class PublishedWorkload:
    """Layers and schedules of a published adaptation.

    Args:
        title: What it is.
        layers: Shapes, with the adapters of forgetting.
        full: Schedule of training all weights.
        hybrid: Schedule of training the adapters.

    Example:
        >>> print(FACES.full, "or", FACES.hybrid)
        200 steps of 960 samples or 16 steps of 1,200 samples
    """

    title: str
    layers: Workload
    full: Schedule
    hybrid: Schedule


def _mixer() -> Workload:
    layers = {"patch_embedding": LayerShape(inputs=16, outputs=20, vectors_per_sample=16)}
    for block in range(2):
        for mixing, width, vectors, rank in (("token", 16, 20, 0), ("channel", 20, 16, 6)):
            ends = (("fc1", width, 32), ("fc2", 32, width))
            for name, inputs, outputs in ends:
                layers[f"blocks.{block}.{mixing}_mixing.{name}"] = LayerShape(
                    inputs=inputs, outputs=outputs, vectors_per_sample=vectors, adapter_rank=rank
                )
    return Workload(layers=layers | {"head": LayerShape(inputs=20, outputs=6, adapter_rank=6)})


FACES = PublishedWorkload(
    title="faces (MLP-Mixer)",
    layers=_mixer(),
    full=Schedule(steps=200, batch=960),
    hybrid=Schedule(steps=16, batch=1200),
)
"""Face recognition: the mixer of the recipe; both schedules take all images in every step."""

SPEAKERS = PublishedWorkload(
    title="speakers (spiking net)",
    layers=Workload(
        layers={
            "input": LayerShape(
                inputs=140, outputs=512, vectors_per_sample=10, adapter_rank=8, density=0.1
            ),
            "recurrent": LayerShape(
                inputs=512,
                outputs=512,
                vectors_per_sample=10,
                adapter_rank=8,
                density=0.1,
                input_bits=1,
            ),
            "head": LayerShape(inputs=512, outputs=5),
        }
    ),
    full=Schedule(steps=480, batch=128),
    hybrid=Schedule(steps=480, batch=128),
)
"""Speaker authentication: ten time steps, of whose inputs one in ten is assumed not to be zero."""

PUBLISHED: Mapping[str, PublishedWorkload] = MappingProxyType(
    {"faces": FACES, "speakers": SPEAKERS}
)
"""Published workloads by name."""


def published_ratios(published: PublishedWorkload, chip: Chip, gpu: Gpu) -> tuple[Ratio, ...]:
    """Work out every named ratio of a workload on a chip.

    Adapters have 8 bit and go into SRAM through a port of 64 bit, in 10 ns. In inference they skip
    zeros, and reuse weights as the baseline does: registers hold them for a sample, unless the
    baseline refetches.

    Args:
        published: Layers and schedules.
        chip: Where.
        gpu: What else inference is held against, with its utilisation.

    Example:
        >>> from aihwkit_lora import chips
        >>> from aihwkit_lora.reporting.baselines import rtx_4090
        >>> found = published_ratios(FACES, chips.get("rm-180nm"), rtx_4090(utilisation=1.0))
        >>> found[0].name, round(found[0].value, 2)
        ('trainable parameters', 3.6)
    """
    layers = published.layers
    written, loaded = deploy_on_arrays(layers, chip), deploy_adapters(layers, chip)
    fetched = (
        deploy_on_arrays(layers, chip, offchip_bits=8),
        deploy_adapters(layers, chip, offchip=True),
    )
    return (
        parameter_ratio(layers.weights, layers.adapters().weights),
        *_training(published, chip),
        deployment_energy_ratio(written, loaded),
        deployment_energy_ratio(*fetched),
        deployment_time_ratio(written, loaded, port_bits=64, cycle_s=1e-8),
        *_inference(layers, chip, gpu),
    )


def _training(published: PublishedWorkload, chip: Chip) -> tuple[Ratio, ...]:
    layers, schedule = published.layers, published.full
    hybrid = train_hybrid(layers, chip, published.hybrid)
    every_step = train_on_arrays(layers, chip, schedule, written="every step")
    once = train_on_arrays(layers, chip, schedule, written="once")
    digital = train_digital(layers, chip, schedule)
    return (
        update_count_ratio(every_step, hybrid),
        update_energy_ratio(every_step, hybrid),
        *(training_energy_ratio(full, hybrid) for full in (every_step, once, digital)),
    )


def _inference(layers: Workload, chip: Chip, gpu: Gpu) -> tuple[Ratio, ...]:
    hybrid = {
        reuse: infer_hybrid(layers, chip, DigitalExecution(reuse=reuse, skips_zeros=True))
        for reuse in Reuse
    }
    digital = [
        inference_energy_ratio(infer_digital(layers, chip, execution), hybrid[execution.reuse])
        for sparse in (False, True)
        for execution in (DigitalExecution(reuse=reuse, skips_zeros=sparse) for reuse in Reuse)
    ]
    others = (infer_gpu(layers, gpu), infer_analog_only(layers, chip))
    return (*digital, *(inference_energy_ratio(c, hybrid[Reuse.STATIONARY]) for c in others))


def print_published_ratios(chips: Iterable[Chip], gpu: Gpu, console: Console | None = None) -> None:
    """Print the named ratios of both published workloads, chip by chip.

    Args:
        chips: Where.
        gpu: What else inference is held against.
        console: Where to print; the terminal if None. Reads best from 110 columns on.

    Example:
        >>> import aihwkit_lora as al
        >>> from rich.console import Console
        >>> from aihwkit_lora.reporting.baselines import rtx_4090
        >>> gpu, chip = rtx_4090(utilisation=0.01), al.chips.get("rm-180nm")
        >>> print_published_ratios([chip], gpu, Console(width=120))  # doctest: +ELLIPSIS
        rm-180nm...
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for chip in chips:
        table = Table(title=chip.name, title_justify="left", title_style="bold", box=box.SIMPLE)
        table.add_column("ratio")
        for published in PUBLISHED.values():
            table.add_column(published.title, justify="right")
        columns = [published_ratios(published, chip, gpu) for published in PUBLISHED.values()]
        for row in zip(*columns, strict=True):
            table.add_row(*(Text(cell) for cell in (row[0].name, *map(format_ratio, row))))
        console.print(table)


def format_ratio(ratio: Ratio) -> str:
    """Write a ratio and its range, three significant digits each.

    Args:
        ratio: Any ratio.

    Example:
        >>> format_ratio(parameter_ratio(5048, 1404))
        '3.60'
    """
    if ratio.low == ratio.high:
        return format_number(ratio.value)
    return f"{format_number(ratio.value)} [{format_number(ratio.low)}, {format_number(ratio.high)}]"
