"""What programming a model took: pulses, reads, failures and remaining errors, per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aihwkit_lora.chips.chip import Chip
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.pricing import EnergyReport, price
from aihwkit_lora.programming.write_verify import WriteResult
from aihwkit_lora.tiles.record import Cells


@dataclass(frozen=True, kw_only=True)
class LayerProgramming:
    """What writing one layer took.

    Args:
        layer: Full name of the layer.
        counts: Pulses, verify reads, cells and failures.
        rms_error_siemens: Root mean square distance of the cells from their targets.
        max_error_siemens: Largest distance, failed cells included.
        most_worn: Pulses that the most worn cell has taken in all writings so far.
    """

    layer: str
    counts: Counts
    rms_error_siemens: float
    max_error_siemens: float
    most_worn: int

    @property
    def failed_fraction(self) -> float:
        """Failed cells per programmed cell, 0 to 1."""
        return self.counts["failed_cells"] / max(1, self.counts["programmed_cells"])


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """What :func:`~aihwkit_lora.programming.program.program_` did.

    Args:
        chip: The chip that was programmed.
        layers: One entry per layer, in the order of the model.

    Example:
        >>> import aihwkit_lora as al
        >>> from torch import nn
        >>> chip = al.chips.get("rm-180nm")
        >>> report = al.program_(al.convert(nn.Sequential(nn.Linear(3, 2)), chip), chip, seed=0)
        >>> report.counts["programmed_cells"], str(report.energy.level)
        (6, 'simulated')
    """

    chip: Chip
    layers: tuple[LayerProgramming, ...]

    @property
    def counts(self) -> Counts:
        """Events of all layers together."""
        return Counts.sum(layer.counts for layer in self.layers)

    @property
    def pulses(self) -> int:
        """SET and RESET pulses of all cells together."""
        return self.counts.pulses

    @property
    def failed_fraction(self) -> float:
        """Failed cells per programmed cell, 0 to 1."""
        return self.counts["failed_cells"] / max(1, self.counts["programmed_cells"])

    @property
    def most_worn(self) -> int:
        """Pulses that the most worn cell of all layers has taken in all writings so far."""
        return max((layer.most_worn for layer in self.layers), default=0)

    @property
    def endurance_used(self) -> float | None:
        """Most worn cell's share of the pulses that the chip's cells are taken to survive.

        None if the chip does not say how many these are.
        """
        endurance = self.chip.endurance_pulses
        return None if endurance is None else self.most_worn / endurance.value

    @property
    def energy(self) -> EnergyReport:
        """Joules and seconds on the chip."""
        return price(self.counts, self.chip)


def layer_programming(
    layer: str, cells: list[Cells], goals: list[Tensor], results: list[WriteResult]
) -> LayerProgramming:
    """Sum up the tiles of a layer.

    Args:
        layer: Full name of the layer.
        cells: Cells of each tile after writing.
        goals: Cell states that were asked for, also of cells that were not tried again.
        results: What writing each tile did.
    """
    errors = torch.cat(
        [
            (tile.state.apparent - goal).flatten() * tile.encoding.siemens_per_state
            for tile, goal in zip(cells, goals, strict=True)
        ]
    ).double()
    return LayerProgramming(
        layer=layer,
        counts=Counts.sum(result.counts() for result in results),
        rms_error_siemens=float(errors.square().mean().sqrt()),
        max_error_siemens=float(errors.abs().max()),
        most_worn=max(int(tile.wear.max()) for tile in cells),
    )
