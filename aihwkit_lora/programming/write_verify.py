"""The closed loop that programs cells: pulse, verify, and repeat until each is in tolerance."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Generator, Tensor

from aihwkit_lora.chips.write_policy import Verifier, WritePolicy
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.programming.devices import normal
from aihwkit_lora.programming.response import CellState, PulseResponse
from aihwkit_lora.programming.slots import SlotCounter, WriteSlots

# Cells worked on at a time: few enough to stay in a processor's cache, to bound the memory, and
# for torch to use a single thread (its elementwise functions start others for more), which wait for
# each other at length where processors are busy; enough that the overhead of calls does not show.
_BLOCK = 1 << 15


@dataclass(frozen=True, eq=False)
class WriteResult:
    """What writing did to an array of cells. All tensors have the array's shape.

    Attributes:
        state: The cells afterwards, failed ones included.
        set_pulses: SET pulses each cell took, int32.
        reset_pulses: RESET pulses each cell took, int32.
        verify_reads: Reads of each cell by its verifications, int32.
        failed: Whether the budget ran out before the cell verified.
        slots: What passed one after another, for latency.
        verify_with: What told whether a cell is in tolerance.
        level: How sure the counts are.

    Example:
        >>> from aihwkit.simulator.presets.devices import IdealizedPresetDevice
        >>> seeded = Generator().manual_seed(0)
        >>> policy = WritePolicy(device=IdealizedPresetDevice, tolerance=0.01)
        >>> cells = PulseResponse.draw(policy.device(), (3, 4), seeded)
        >>> state = cells.hold(torch.full((3, 4), 0.1), seeded)
        >>> result = write_verify(state.apparent, state, cells, policy, seeded)
        >>> int(result.pulses.sum()), int(result.verify_reads.sum()), result.slots.row_selects
        (0, 12, 4)
    """

    state: CellState
    set_pulses: Tensor
    reset_pulses: Tensor
    verify_reads: Tensor
    failed: Tensor
    slots: WriteSlots
    verify_with: Verifier
    level: Level

    @property
    def pulses(self) -> Tensor:
        """Pulses of either polarity that each cell took."""
        return self.set_pulses + self.reset_pulses

    def counts(self) -> Counts:
        """Sum up the events of all cells, ready for a ledger."""
        pulses, reads = self.pulses, int(self.verify_reads.sum())
        totals = {
            "set_pulses": int(self.set_pulses.sum()),
            "reset_pulses": int(self.reset_pulses.sum()),
            "verify_reads": reads,
            "programmed_cells": self.failed.numel(),
            "pulsed_cells": int((pulses > 0).sum()),
            "failed_cells": int(self.failed.sum()),
        }
        if self.verify_with == "adc":
            totals["verify_conversions"] = reads
        else:  # one verification before the first pulse, and one after each
            totals["verify_comparisons"] = pulses.numel() + int(pulses.sum())
        return Counts(totals | asdict(self.slots), level=self.level)


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

    Cells do not disturb each other, so the order in which a chip takes them and the cells that it
    pulses together change no pulse. They decide what passes one after another: ``slots``.

    Args:
        target: Wanted apparent weight per cell, shape ``(..., columns, rows)``, in cell-state
            units. Targets outside a cell's bounds are allowed: the chip does not know these, and
            the cell will fail.
        state: Where the cells stand now, for example ``response.fresh(generator)``.
        response: The cells.
        policy: Tolerance, budget, verify reads, ramp, and order.
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
    written = array = _Array.start(target, state, response)
    counter = SlotCounter(tuple(target.shape), policy)
    still_open = array.index
    for pulses in range(policy.max_pulses + 1):
        waiting = [array.verify(cells, policy, generator) for cells in still_open.split(_BLOCK)]
        still_open = torch.cat([cells for cells, _ in waiting])
        if still_open.numel() == 0 or pulses == policy.max_pulses:
            break
        for cells, up in waiting:
            array.pulse(cells, up, policy, generator)
            counter.pulse(array.index.index_select(0, cells), up)
        counter.end_round()
        if 2 * still_open.numel() < array.index.numel():
            array.store(written)
            array = array.select(still_open)
            still_open = torch.arange(still_open.numel(), device=target.device)
    array.store(written)
    failed = torch.zeros(target.numel(), dtype=torch.bool, device=target.device)
    failed.scatter_(0, array.index.index_select(0, still_open), True)
    return written.result(failed, target.shape, policy, counter)


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
            "write–verify: expected targets, state and cells of one shape, got "
            f"{tuple(target.shape)}, {tuple(state.apparent.shape)} and {tuple(expected)}."
        )
    missing = int(target.isnan().sum())
    if missing:
        raise ConfigurationError(
            f"write–verify: expected a number as every target, got NaN for {missing} of "
            f"{target.numel()} cells. Check the weights that are to be programmed."
        )


@dataclass(eq=False)
class _Array:
    """Cells while they are written, by their place in flat tensors of one length.

    The further the loop gets, the fewer cells it has to do with. Once less than half of them are
    still open, these move to an array of their own, where they are neighbours in memory.
    """

    index: Tensor
    """Places of the cells in the whole array."""
    goal: Tensor
    cells: PulseResponse
    state: CellState
    set_pulses: Tensor
    pulses: Tensor
    run: Tensor
    """Pulses in a row of the present polarity: positive for SET, negative for RESET."""

    @classmethod
    def start(cls, target: Tensor, state: CellState, response: PulseResponse) -> _Array:
        index = torch.arange(target.numel(), device=target.device)
        none = torch.zeros_like(index, dtype=torch.int32)
        counts = (none, none.clone(), none.clone())
        return cls(index, target.flatten(), response.flat(), state.select(index), *counts)

    def select(self, cells: Tensor) -> _Array:
        index, goal, *counts = (
            values.index_select(0, cells)
            for values in (self.index, self.goal, self.set_pulses, self.pulses, self.run)
        )
        return _Array(index, goal, self.cells.select(cells), self.state.select(cells), *counts)

    def store(self, whole: _Array) -> None:
        """Put what came of these cells where they belong in the whole array."""
        if whole is self:
            return
        _put(whole.state, self.index, self.state)
        whole.set_pulses.scatter_(0, self.index, self.set_pulses)
        whole.pulses.scatter_(0, self.index, self.pulses)

    def verify(
        self, cells: Tensor, policy: WritePolicy, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Read some cells; return those out of tolerance, and which of them need a SET pulse."""
        error = self.goal.index_select(0, cells) - self.state.apparent.index_select(0, cells)
        if policy.verify_noise > 0.0:
            noise = policy.verify_noise / policy.verify_averages**0.5
            error = error + noise * normal(error, generator)
        waiting = (error.abs() > policy.tolerance).nonzero().squeeze(1)
        return cells.index_select(0, waiting), error.index_select(0, waiting) > 0

    def pulse(self, cells: Tensor, up: Tensor, policy: WritePolicy, generator: Generator) -> None:
        """Give some cells one pulse each."""
        strength = self._strength(cells, up, policy) if policy.ramp_increment > 0.0 else 1.0
        response, before = self.cells.select(cells), self.state.select(cells)
        after = response.pulse(before, up, generator, strength=strength)
        _put(self.state, cells, after)
        self.set_pulses.index_add_(0, cells, up.int())
        self.pulses.index_add_(0, cells, torch.ones_like(up, dtype=torch.int32))

    def _strength(self, cells: Tensor, up: Tensor, policy: WritePolicy) -> Tensor:
        run = self.run.index_select(0, cells)
        repeats = torch.where((run > 0) == up, run.abs(), 0)
        self.run.scatter_(0, cells, torch.where(up, repeats + 1, -repeats - 1))
        return (1.0 + policy.ramp_increment * repeats).clamp(max=policy.ramp_limit)

    def result(
        self, failed: Tensor, shape: torch.Size, policy: WritePolicy, counter: SlotCounter
    ) -> WriteResult:
        set_pulses = self.set_pulses.view(shape)
        reset_pulses = (self.pulses - self.set_pulses).view(shape)
        state = CellState(self.state.persistent.view(shape), self.state.apparent.view(shape))
        return WriteResult(
            state=state,
            set_pulses=set_pulses,
            reset_pulses=reset_pulses,
            verify_reads=((self.pulses + 1) * policy.reads_per_verify).view(shape),
            failed=failed.view(shape),
            slots=counter.slots(set_pulses, reset_pulses),
            verify_with=policy.verify_with,
            level=Level.SIMULATED,
        )


def _put(state: CellState, cells: Tensor, after: CellState) -> None:
    state.persistent.scatter_(0, cells, after.persistent)
    state.apparent.scatter_(0, cells, after.apparent)
