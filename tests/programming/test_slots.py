"""What passes one after another: counted by the loop, and step by step by a slow programmer."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from aihwkit.simulator.configs.devices import ConstantStepDevice, PulsedDevice
from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.programming.response import CellState, PulseResponse
from aihwkit_lora.programming.slots import Groups, WriteSlots, least_slots
from aihwkit_lora.programming.write_verify import WriteResult, write_verify

# Pairs of an order and of the cells that go together within it.
ALLOWED = [("cell", "cell"), ("row", "cell"), ("row", "row")]
ALLOWED += [("array", together) for together in ("cell", "row", "array")]
SHAPES = [(), (5,), (3, 4), (4, 1), (1, 4), (2, 3, 4), (2, 1, 3, 2), (0, 4), (4, 0), (0, 2, 3)]

Cell = tuple[int, ...]


def policy(**fields: Any) -> WritePolicy:
    return WritePolicy(**{"device": ReRamArrayOMPresetDevice, "tolerance": 0.1} | fields)


def quiet_om() -> PulsedDevice:
    """The OM cells with their device-to-device spread only: no randomness in a pulse."""
    return ReRamArrayOMPresetDevice(write_noise_std=0.0, dw_min_std=0.0)


def blank(shape: tuple[int, ...]) -> CellState:
    return CellState(torch.zeros(shape), torch.zeros(shape))


def some_of(cells: PulseResponse, part: Any) -> PulseResponse:
    return replace(cells, parameters={name: of[part] for name, of in cells.parameters.items()})


def array_of(cell: Cell) -> Cell:
    return cell[:-2]


def line_of(cell: Cell) -> Cell:
    return (*cell[:-2], cell[-1])


def history(cell: PulseResponse, target: Tensor, settings: WritePolicy) -> str:
    """The pulses of one cell, written all by itself: "+" for SET, "-" for RESET."""
    state, pulses = blank((1,)), ""
    while len(pulses) < settings.max_pulses:
        error = target - state.apparent
        if bool(error.abs() <= settings.tolerance):
            break
        state = cell.pulse(state, error > 0, Generator())
        pulses += "+" if bool(error > 0) else "-"
    return pulses


def in_order(histories: dict[Cell, str], order: str) -> Iterator[list[Cell]]:
    """Cells that take turns, array after array and word line after word line."""
    cells = sorted(histories, key=lambda cell: (line_of(cell), cell))
    unit = {"cell": lambda cell: cell, "row": line_of, "array": array_of}[order]
    for _, members in groupby(cells, key=unit):
        yield list(members)


def by_hand(histories: dict[Cell, str], settings: WritePolicy) -> WriteSlots:
    """Walk through the programming of an array and note every step."""
    steps = {"row_selects": 0, "set_slots": 0, "reset_slots": 0, "verify_slots": 0}
    together = {"cell": lambda cell: cell, "row": line_of, "array": array_of}[settings.together]
    selected = None
    for turn in in_order(histories, settings.order):
        for spent in range(settings.max_pulses + 1):
            still_open = [cell for cell in turn if len(histories[cell]) >= spent]
            if settings.order == "array":
                selected = None
            for line, _ in groupby(still_open, key=line_of):
                steps["row_selects"] += line != selected
                selected = line
            for _, members in groupby(still_open, key=together):
                pulses = [histories[cell][spent - 1] for cell in members] if spent else []
                steps["set_slots"] += "+" in pulses
                steps["reset_slots"] += "-" in pulses
                steps["verify_slots"] += settings.reads_per_verify
    return WriteSlots(**steps)


def written(
    shape: tuple[int, ...], seed: int, settings: WritePolicy
) -> tuple[WriteResult, dict[Cell, str]]:
    """Write an array of cells without noise, at once and each of them alone."""
    generator = Generator().manual_seed(seed)
    cells = PulseResponse.draw(quiet_om(), shape, generator)
    target = 0.5 * torch.randn(shape, generator=generator)
    result = write_verify(target, blank(shape), cells, settings, generator)
    places = product(*map(range, (1,) * (2 - len(shape)) + shape))
    histories = {
        place: history(cells.flat().span(number, number + 1), goal, settings)
        for number, (place, goal) in enumerate(zip(places, target.flatten(), strict=True))
    }
    return result, histories


@pytest.mark.parametrize(("order", "together"), ALLOWED)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32),
    block=st.integers(1, 13),
    budget=st.integers(0, 9),
    reads=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_slots_are_those_of_a_slow_programmer(
    order: str,
    together: str,
    shape: tuple[int, ...],
    seed: int,
    block: int,
    budget: int,
    reads: int,
) -> None:
    chosen = policy(order=order, together=together, max_pulses=budget, verify_averages=reads)
    # The package exports the function under the module's own name, so ask for the module.
    module = importlib.import_module("aihwkit_lora.programming.write_verify")
    with patch.object(module, "_BLOCK", block):
        result, histories = written(shape, seed, chosen)
    flat = result.set_pulses.flatten().tolist(), result.reset_pulses.flatten().tolist()
    assert list(zip(*flat, strict=True)) == [
        (pulses.count("+"), pulses.count("-")) for pulses in histories.values()
    ]
    assert result.slots == by_hand(histories, chosen)


@given(seed=st.integers(0, 2**32), cut=st.integers(1, 3), together=st.sampled_from(["cell", "row"]))
@settings(max_examples=25, deadline=None)
def test_counts_add_up_over_arrays_and_over_word_lines(seed: int, cut: int, together: str) -> None:
    chosen = policy(order="array", together=together)
    generator = Generator().manual_seed(seed)
    cells = PulseResponse.draw(quiet_om(), (4, 3, 4), generator)
    target = 0.5 * torch.randn((4, 3, 4), generator=generator)

    def write_part(target: Tensor, cells: PulseResponse) -> WriteResult:
        return write_verify(target, blank(tuple(target.shape)), cells, chosen, generator)

    whole = write_part(target, cells).counts()
    for parts in (
        [(slice(0, cut),), (slice(cut, 4),)],
        [(..., slice(0, cut)), (..., slice(cut, 4))],
    ):
        counts = Counts.sum(
            write_part(target[part], some_of(cells, part)).counts() for part in parts
        )
        assert counts == whole


def by_tenths(target: Tensor, step: Tensor | None = None, **fields: Any) -> WriteResult:
    """Write cells that start at 0 and move by a tenth per pulse, or by steps of their own."""
    device = ConstantStepDevice(
        dw_min=0.1,
        dw_min_dtod=0.0,
        dw_min_std=0.0,
        up_down_dtod=0.0,
        w_max_dtod=0.0,
        w_min_dtod=0.0,
    )
    shape, seeded = tuple(target.shape), Generator().manual_seed(0)
    cells = PulseResponse.draw(device, shape, seeded)
    if step is not None:
        parameters = {**cells.parameters, "dwmin_up": step, "dwmin_down": step}
        cells = replace(cells, parameters=parameters)
    return write_verify(target, blank(shape), cells, policy(tolerance=0.04, **fields), seeded)


def test_arrays_are_written_one_after_another() -> None:
    # The two cells of a pair for one column and three rows.
    target = torch.tensor([[[0.2, 0.0, -0.3]], [[0.4, -0.1, 0.0]]])
    assert by_tenths(target, order="array", together="array").slots == WriteSlots(
        row_selects=(3 + 1 + 4) + (5 + 2 + 1),
        set_slots=2 + 4,
        reset_slots=3 + 1,
        verify_slots=4 + 5,
    )


def test_set_and_reset_need_slots_of_their_own() -> None:
    target = torch.tensor([[0.2, 0.0], [-0.2, 0.1]])
    assert by_tenths(target, order="row", together="row").slots == WriteSlots(
        row_selects=2, set_slots=2 + 1, reset_slots=2, verify_slots=3 + 2
    )


def test_pulses_of_different_rounds_need_slots_of_their_own() -> None:
    # The second cell overshoots downwards, so it takes its SET when the first one is done.
    target, step = torch.tensor([[0.1], [-0.2]]), torch.tensor([[0.1], [0.25]])
    result = by_tenths(target, step, order="row", together="row", max_pulses=2)
    assert result.set_pulses.tolist() == [[1], [1]]
    assert result.reset_pulses.tolist() == [[0], [1]]
    assert result.slots == WriteSlots(row_selects=1, set_slots=2, reset_slots=1, verify_slots=3)
    # From the numbers of pulses alone, this cannot be told.
    apart = least_slots(result.set_pulses, result.reset_pulses, policy(order="row", together="row"))
    assert apart == replace(result.slots, set_slots=1)


@given(seed=st.integers(0, 2**32), together=st.sampled_from(["cell", "row", "array"]))
@settings(max_examples=25, deadline=None)
def test_least_slots_are_no_more_than_a_loop_takes(seed: int, together: str) -> None:
    chosen = policy(order="array", together=together, max_pulses=9)
    result, _ = written((2, 3, 4), seed, chosen)
    least = least_slots(result.set_pulses, result.reset_pulses, chosen)
    assert least.set_slots <= result.slots.set_slots
    assert least.reset_slots <= result.slots.reset_slots
    rest = {"row_selects", "verify_slots"}
    assert all(getattr(least, name) == getattr(result.slots, name) for name in rest)
    rounds = least.verify_slots - len(Groups((2, 3, 4), chosen.together))  # that have pulses
    assert max(least.set_slots, least.reset_slots) <= rounds
    assert rounds <= least.set_slots + least.reset_slots


def test_an_array_without_cells_selects_no_word_line() -> None:
    for shape in ((0, 4), (4, 0), (0, 2, 3)):
        none = torch.zeros(shape, dtype=torch.int32)
        for order, together in ALLOWED:
            slots = least_slots(none, none, policy(order=order, together=together))
            assert slots == WriteSlots(row_selects=0, set_slots=0, reset_slots=0, verify_slots=0)
