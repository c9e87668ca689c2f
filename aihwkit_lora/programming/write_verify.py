"""The closed loop that programs cells: pulse, verify, and repeat until each is in tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from aihwkit_lora.chips.write_policy import Together, WritePolicy
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.programming.devices import normal
from aihwkit_lora.programming.response import CellState, PulseResponse

# Cells worked on at a time: few enough to stay in a processor's cache and to bound the memory,
# enough that the overhead of torch's calls does not show.
_BLOCK = 1 << 17


@dataclass(frozen=True, eq=False)
class WriteResult:
    """What write-verify did to an array of cells. All tensors have the array's shape.

    Attributes:
        state: The cells afterwards, failed ones included.
        set_pulses: SET pulses each cell took, int32.
        reset_pulses: RESET pulses each cell took, int32.
        verify_reads: Reads of each cell by its verifications, int32.
        failed: Whether the budget ran out before the cell verified.
        level: How sure the counts are.

    Example:
        >>> from aihwkit.simulator.presets.devices import IdealizedPresetDevice
        >>> seeded = Generator().manual_seed(0)
        >>> policy = WritePolicy(device=IdealizedPresetDevice, tolerance=0.01)
        >>> cells = PulseResponse.draw(policy.device(), (3, 4), seeded)
        >>> state = cells.hold(torch.full((3, 4), 0.1), seeded)
        >>> result = write_verify(state.apparent, state, cells, policy, seeded)
        >>> int(result.pulses.sum()), int(result.verify_reads.sum()), result.pulse_slots("row")
        (0, 12, 0)
    """

    state: CellState
    set_pulses: Tensor
    reset_pulses: Tensor
    verify_reads: Tensor
    failed: Tensor
    level: Level

    @property
    def pulses(self) -> Tensor:
        """Pulses of either polarity that each cell took."""
        return self.set_pulses + self.reset_pulses

    def counts(self) -> Counts:
        """Sum up the events of all cells, ready for a ledger."""
        totals = {
            "set_pulses": int(self.set_pulses.sum()),
            "reset_pulses": int(self.reset_pulses.sum()),
            "verify_reads": int(self.verify_reads.sum()),
            "programmed_cells": self.failed.numel(),
            "pulsed_cells": int((self.pulses > 0).sum()),
            "failed_cells": int(self.failed.sum()),
        }
        return Counts(totals, level=self.level)

    def pulse_slots(self, together: Together) -> int:
        """Count the pulse times that pass one after another, for latency.

        Args:
            together: Which cells are pulsed at once. A ``"row"`` is a word line: the cells of one
                input, that is of one index of the last dimension.
        Returns:
            Sum, over the groups of cells that wait for each other, of the longest pulse sequence
            in a group. SET and RESET are taken to share a slot; a driver that needs them apart
            takes up to twice as long when ``together`` is not ``"cell"``.
        """
        pulses = self.pulses
        if together == "cell" or pulses.numel() == 0:
            return int(pulses.sum())
        if together == "array":
            return int(pulses.max())
        return int(pulses.reshape(-1, pulses.shape[-1]).amax(dim=0).sum())


def write_verify(
    target: Tensor,
    state: CellState,
    response: PulseResponse,
    policy: WritePolicy,
    generator: Generator,
) -> WriteResult:
    """Program every cell to its target by pulses and verify reads, and count them per cell.

    A verification reads a cell and compares with its target. A cell out of tolerance takes one
    pulse, SET if it reads too low and RESET if too high, and is verified again. Cells in tolerance
    are left alone; cells that spend the budget stay where they are and count as failed. A cell
    that needs n pulses is therefore verified n + 1 times.

    Args:
        target: Wanted apparent weight per cell, in cell-state units. Targets outside a cell's
            bounds are allowed: the chip does not know these, and the cell will fail.
        state: Where the cells stand now, for example ``response.fresh(generator)``.
        response: The cells.
        policy: Tolerance, budget, verify reads and ramp.
        generator: Source of all randomness, on the device of the tensors.
    Returns:
        New state, and pulses, reads and failures per cell, at level ``simulated``.
    Raises:
        ConfigurationError: Shapes differ, or a target is not a number.

    Example:
        >>> from aihwkit.simulator.presets.devices import IdealizedPresetDevice
        >>> seeded = Generator().manual_seed(0)
        >>> policy = WritePolicy(device=IdealizedPresetDevice, tolerance=0.01, max_pulses=5000)
        >>> cells = PulseResponse.draw(policy.device(), (3, 4), seeded)
        >>> target = torch.full((3, 4), 0.1)
        >>> result = write_verify(target, cells.fresh(seeded), cells, policy, seeded)
        >>> bool(((result.state.apparent - target).abs() <= 0.01).all())
        True
    """
    require_matching(target, state, response.shape)
    goal, cells, start = target.flatten(), response.flat(), state.flat()
    done = _Finished.empty(goal)
    for first in range(0, goal.numel(), _BLOCK):
        end = min(first + _BLOCK, goal.numel())
        index = torch.arange(first, end, device=goal.device)
        part = _OpenCells.start(index, goal, start.span(first, end), cells.span(first, end))
        for finished in _program(part, policy, generator):
            done.take(finished)
    return done.result(target.shape, policy)


def require_matching(target: Tensor, state: CellState, shape: torch.Size | None = None) -> None:
    """Raise unless targets, state and cells belong together.

    Args:
        target: Wanted weights.
        state: Where the cells stand.
        shape: Shape of the array of cells, where one is known.
    Raises:
        ConfigurationError: Shapes differ, or a target is not a number.
    """
    expected = target.shape if shape is None else shape
    if not target.shape == state.apparent.shape == state.persistent.shape == expected:
        raise ConfigurationError(
            "write-verify: expected targets, state and cells of one shape, got "
            f"{tuple(target.shape)}, {tuple(state.apparent.shape)} and {tuple(expected)}."
        )
    missing = int(target.isnan().sum())
    if missing:
        raise ConfigurationError(
            f"write-verify: expected a number as every target, got NaN for {missing} of "
            f"{target.numel()} cells. Check the weights that are to be programmed."
        )


@dataclass(eq=False)
class _OpenCells:
    """The cells still being written: flat arrays of one length, which shrink together."""

    index: Tensor
    goal: Tensor
    state: CellState
    cells: PulseResponse
    set_pulses: Tensor
    pulses: Tensor
    run: Tensor
    """Pulses in a row of the present polarity: positive for SET, negative for RESET."""
    failed: bool = False

    @classmethod
    def start(
        cls, index: Tensor, goal: Tensor, state: CellState, cells: PulseResponse
    ) -> _OpenCells:
        none = torch.zeros(index.shape, dtype=torch.int32, device=index.device)
        return cls(index, goal[index], state, cells, none, none, none)

    def select(self, mask: Tensor) -> _OpenCells:
        kept = mask.nonzero().squeeze(1)
        return _OpenCells(
            self.index[kept],
            self.goal[kept],
            self.state.select(kept),
            self.cells.select(kept),
            self.set_pulses[kept],
            self.pulses[kept],
            self.run[kept],
        )

    def verify(self, policy: WritePolicy, generator: Generator) -> Tensor:
        """Distance still to go: target minus the average of the verification's reads."""
        error = self.goal - self.state.apparent
        if policy.verify_noise > 0.0:
            noise = policy.verify_noise / policy.verify_averages**0.5
            error = error + noise * normal(error, generator)
        return error

    def pulse(self, up: Tensor, policy: WritePolicy, generator: Generator) -> None:
        strength: Tensor | float = 1.0
        if policy.ramp_increment > 0.0:
            same = (self.run > 0) == up
            repeats = torch.where(same, self.run.abs(), 0)
            strength = (1.0 + policy.ramp_increment * repeats).clamp(max=policy.ramp_limit)
            self.run = torch.where(up, repeats + 1, -repeats - 1)
        self.state = self.cells.pulse(self.state, up, generator, strength=strength)
        self.set_pulses = self.set_pulses + up
        self.pulses = self.pulses + 1


def _program(part: _OpenCells, policy: WritePolicy, generator: Generator) -> Iterator[_OpenCells]:
    """Run the loop on some cells; yields groups of them as they finish."""
    for spent in range(policy.max_pulses + 1):
        error = part.verify(policy, generator)
        waiting = error.abs() > policy.tolerance
        yield part.select(~waiting)
        part, error = part.select(waiting), error[waiting]
        if part.index.numel() == 0 or spent == policy.max_pulses:
            break
        part.pulse(error > 0, policy, generator)
    part.failed = True
    yield part


@dataclass(eq=False)
class _Finished:
    """Where finished cells are collected: flat arrays over all cells."""

    persistent: Tensor
    apparent: Tensor
    set_pulses: Tensor
    pulses: Tensor
    failed: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> _Finished:
        counts = torch.zeros(like.shape, dtype=torch.int32, device=like.device)
        failed = torch.zeros_like(counts, dtype=torch.bool)
        return cls(torch.empty_like(like), torch.empty_like(like), counts, counts.clone(), failed)

    def take(self, cells: _OpenCells) -> None:
        self.persistent[cells.index] = cells.state.persistent
        self.apparent[cells.index] = cells.state.apparent
        self.set_pulses[cells.index] = cells.set_pulses
        self.pulses[cells.index] = cells.pulses
        self.failed[cells.index] = cells.failed

    def result(self, shape: torch.Size, policy: WritePolicy) -> WriteResult:
        return WriteResult(
            state=CellState(self.persistent.view(shape), self.apparent.view(shape)),
            set_pulses=self.set_pulses.view(shape),
            reset_pulses=(self.pulses - self.set_pulses).view(shape),
            verify_reads=((self.pulses + 1) * policy.reads_per_verify).view(shape),
            failed=self.failed.view(shape),
            level=Level.SIMULATED,
        )
