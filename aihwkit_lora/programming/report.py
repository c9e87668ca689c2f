"""What programming a model took: pulses, reads, failures and remaining errors, per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aihwkit_lora.chips.chip import Chip
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.pricing import EnergyReport, price
from aihwkit_lora.programming.write_verify import WriteResult


@dataclass(frozen=True, kw_only=True)
class LayerProgramming:
    """What writing one layer took.

    Args:
        layer: Full name of the layer.
        counts: Pulses, verify reads, cells and failures.
        rms_error_siemens: Root mean square distance of the cells from their targets.
        max_error_siemens: Largest distance, failed cells included.
    """

    layer: str
    counts: Counts
    rms_error_siemens: float
    max_error_siemens: float

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
    def energy(self) -> EnergyReport:
        """Joules and seconds on the chip."""
        return price(self.counts, self.chip)


def layer_programming(
    layer: str, targets: list[Tensor], results: list[WriteResult], siemens_per_state: float
) -> LayerProgramming:
    """Sum up the tiles of a layer.

    Args:
        layer: Full name of the layer.
        targets: Wanted cell states of each tile.
        results: What writing each tile did.
        siemens_per_state: Conductance of one unit of cell state.
    """
    errors = torch.cat(
        [(r.state.apparent - t).flatten() for t, r in zip(targets, results, strict=True)]
    )
    return LayerProgramming(
        layer=layer,
        counts=Counts.sum(result.counts() for result in results),
        rms_error_siemens=float(errors.double().square().mean().sqrt()) * siemens_per_state,
        max_error_siemens=float(errors.abs().max()) * siemens_per_state,
    )
