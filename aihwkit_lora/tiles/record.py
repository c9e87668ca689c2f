"""What is known about how a layer's arrays came to hold what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aihwkit_lora.chips.mapping import CellEncoding, ConductanceMapping
from aihwkit_lora.programming.response import CellState, PulseResponse


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of one array and where they stand.

    Args:
        response: How each cell moves under a pulse. Like all tensors here of shape
            ``(cells_per_weight, out_size, rows)``.
        state: Where each cell stands, in cell-state units.
        encoding: Between weights and cell states.
        goal: Wanted cell states of the last writing.
        failed: Cells that did not get there within their pulse budget.
        wear: Pulses that each cell has taken in all writings so far.
    """

    response: PulseResponse
    state: CellState
    encoding: CellEncoding
    goal: Tensor
    failed: Tensor
    wear: Tensor

    def reachable(self, goal: Tensor, tolerance: float) -> Tensor:
        """Spare cells that failed already from another round of pulses towards the same goal.

        Args:
            goal: Newly wanted cell states.
            tolerance: How far a goal must move before a failed cell is tried again.
        Returns:
            ``goal``, but the present state for cells that are not worth trying.
        """
        hopeless = self.failed & ((goal - self.goal).abs() <= tolerance)
        return torch.where(hopeless, self.state.apparent, goal)

    @property
    def weight(self) -> Tensor:
        """Normalised weights that a read sees, shape ``(out_size, rows)``."""
        return self.encoding.to_weights(self.state.apparent)

    @property
    def wanted_weight(self) -> Tensor:
        """Normalised weights that were to be written, shape ``(out_size, rows)``."""
        return self.encoding.to_weights(self.goal)

    @property
    def siemens(self) -> Tensor:
        """Conductances that a read sees, 64 bit; a simulated cell below zero conducts nothing."""
        return self.encoding.to_siemens(self.state.apparent.double()).clamp(min=0.0)


@dataclass(frozen=True, eq=False)
class AihwkitDrift:
    """What aihwkit drew for the drift of one array when its ``program_weights`` programmed it.

    Args:
        target: Normalised weights that were to be programmed, shape ``(out_size, rows)``.
        programmed: What the array held right afterwards, same shape.
        parameters: What its noise model drew for each conductance of a weight.
    """

    target: Tensor
    programmed: Tensor
    parameters: tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Programming:
    """How a layer was programmed.

    Args:
        source: Name of the chip, or the words of whoever programmed it by other means.
        mapping: From normalised weights to siemens, None if unknown.
        cells: One entry per tile, inputs first; empty if the arrays were programmed elsewhere.
        digest: What aihwkit's tiles held right afterwards, to notice later changes.
        drift: How the cells of each tile drift, if aihwkit has programmed them.
    """

    source: str
    mapping: ConductanceMapping | None = None
    cells: tuple[Cells, ...] = ()
    digest: str = ""
    drift: tuple[AihwkitDrift, ...] = ()
