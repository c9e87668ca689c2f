"""Word lines, rounds and slots: the steps of write–verify that pass one after another.

An array of cells has the shape ``(..., columns, rows)``. A word line reaches the cells of one row,
that is of one index of the last dimension, across all columns. Leading dimensions, for example the
two cells of a differential pair, are arrays of their own, each with its own word lines; a single
dimension is a single column.

Cells that take turns go through rounds. In round 0 each is verified; in every later round each cell
that is still open gets one pulse and is verified again. A cell that takes n pulses is therefore
open in the rounds 0 to n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aihwkit_lora.chips.write_policy import Extent, WritePolicy


@dataclass(frozen=True, kw_only=True)
class WriteSlots:
    """Steps of writing one array of cells that pass one after another, for latency.

    Attributes:
        row_selects: Selections of a word line. In the orders ``"cell"`` and ``"row"``, each word
            line is selected once; in the order ``"array"``, once in every round in which it has
            open cells. A selection lasts for the pulses and the verifications of its round.
        set_slots: Pulse times with SET pulses. The cells that go ``together`` share one per round,
            if any of them takes a SET pulse.
        reset_slots: The same for RESET, which needs another voltage and thus a time of its own.
        verify_slots: Read times. The cells that go ``together`` share those of a verification.
    """

    row_selects: int
    set_slots: int
    reset_slots: int
    verify_slots: int


@dataclass(frozen=True)
class Groups:
    """The cells of an array in groups, each as large as an extent.

    Attributes:
        shape: Shape of the array, ``(..., columns, rows)``.
        extent: What makes a group.
    """

    shape: tuple[int, ...]
    extent: Extent

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Arrays, columns of each and rows of each."""
        *arrays, columns, rows = (1, 1, *self.shape)
        return math.prod(arrays), columns, rows

    def __len__(self) -> int:
        arrays, columns, rows = self.sizes
        within = {"cell": columns * rows, "row": rows, "array": 1}[self.extent]
        return arrays * within if columns * rows else 0

    def of(self, cells: Tensor) -> Tensor:
        """The group of each cell.

        Args:
            cells: Indices into the flat array.
        """
        _, columns, rows = self.sizes
        if self.extent == "cell":
            return cells
        array = cells // (columns * rows)
        return array * rows + cells % rows if self.extent == "row" else array

    def total(self, per_cell: Tensor) -> int:
        """Sum of the largest value of each group.

        Args:
            per_cell: Whole numbers of 0 or more, in the shape of the array.
        """
        if self.extent == "cell" or per_cell.numel() == 0:
            return int(per_cell.sum())
        values = per_cell.view(self.sizes)
        return int(values.amax(dim=1 if self.extent == "row" else (1, 2)).sum())


def least_slots(set_pulses: Tensor, reset_pulses: Tensor, policy: WritePolicy) -> WriteSlots:
    """Tell the slots of writing from how many pulses each cell took.

    All but ``set_slots`` and ``reset_slots`` follow from these numbers. For those two it matters
    which pulse came when: the cells that go together are taken to have theirs in as few rounds as
    possible, so the two are the sums, over the groups, of the most pulses of a cell.

    Args:
        set_pulses: SET pulses of each cell, shape ``(..., columns, rows)``.
        reset_pulses: RESET pulses of each cell, same shape.
        policy: Order, cells that go together, and reads of a verification.

    Example:
        >>> from aihwkit.simulator.presets.devices import IdealizedPresetDevice
        >>> policy = WritePolicy(
        ...     device=IdealizedPresetDevice, tolerance=0.1, order="row", together="row"
        ... )
        >>> ups, downs = torch.tensor([[2, 0], [1, 0]]), torch.tensor([[0, 3], [1, 0]])
        >>> least_slots(ups, downs, policy)
        WriteSlots(row_selects=2, set_slots=2, reset_slots=4, verify_slots=7)
    """
    shape = tuple(set_pulses.shape)
    lines, groups = Groups(shape, "row"), Groups(shape, policy.together)
    rounds = set_pulses + reset_pulses + 1
    return WriteSlots(
        row_selects=lines.total(rounds) if policy.order == "array" else len(lines),
        set_slots=groups.total(set_pulses),
        reset_slots=groups.total(reset_pulses),
        verify_slots=policy.reads_per_verify * groups.total(rounds),
    )


class SlotCounter:
    """Counts the slots of a closed loop, round by round.

    Args:
        shape: Shape of the array, ``(..., columns, rows)``.
        policy: Order, cells that go together, and reads of a verification.
    """

    def __init__(self, shape: tuple[int, ...], policy: WritePolicy) -> None:
        self._policy = policy
        self._groups = Groups(shape, policy.together)
        # A cell that waits for no other has a slot for every pulse.
        self._alone = len(self._groups) == math.prod(shape)
        self._set_slots = self._reset_slots = 0
        self._now: Tensor | None = None  # groups with a RESET pulse, then groups with a SET pulse

    def pulse(self, cells: Tensor, up: Tensor) -> None:
        """Note the pulses that some of the cells take in the present round.

        Args:
            cells: Indices of the cells into the flat array.
            up: True for SET, False for RESET; one per cell.
        """
        if self._alone:
            return
        if self._now is None:
            self._now = cells.new_zeros(2 * len(self._groups), dtype=torch.bool)
        self._now.scatter_(0, self._groups.of(cells) + len(self._groups) * up.long(), True)

    def end_round(self) -> None:
        """Add up the groups that took pulses in the present round."""
        if self._now is None:
            return
        reset_groups, set_groups = self._now.view(2, -1).sum(dim=1).tolist()
        self._reset_slots += reset_groups
        self._set_slots += set_groups
        self._now = None

    def slots(self, set_pulses: Tensor, reset_pulses: Tensor) -> WriteSlots:
        """Tell the slots of the whole array, once it is written.

        Args:
            set_pulses: SET pulses of each cell, in the shape of the array.
            reset_pulses: RESET pulses of each cell, same shape.
        """
        least = least_slots(set_pulses, reset_pulses, self._policy)
        if self._alone:
            return least
        return replace(least, set_slots=self._set_slots, reset_slots=self._reset_slots)
