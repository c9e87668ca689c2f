"""Reports of programming: sums over layers and tiles, errors in siemens, price."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Generator

import aihwkit_lora as al
from aihwkit_lora.chips import CellEncoding
from aihwkit_lora.metering import Quantity, Status
from aihwkit_lora.metering.counts import Level
from aihwkit_lora.programming.report import LayerProgramming, layer_programming
from aihwkit_lora.programming.response import CellState, PulseResponse
from aihwkit_lora.programming.slots import WriteSlots
from aihwkit_lora.programming.write_verify import WriteResult
from aihwkit_lora.tiles.record import Cells

CHIP = al.chips.get("rm-180nm")


ENCODING = CellEncoding(mapping=CHIP.mapping, states=(-7.5, 7.5))
"""4 µS per unit of state."""


def tile(
    apparent: list[float], sets: list[int], resets: list[int], worn: int = 0
) -> tuple[Cells, WriteResult]:
    shape = (1, 1, len(apparent))
    state = CellState(torch.zeros(shape), torch.tensor(apparent).view(shape))
    up, down = torch.tensor(sets).view(shape), torch.tensor(resets).view(shape)
    failed = down >= 9
    result = WriteResult(
        state=state,
        set_pulses=up,
        reset_pulses=down,
        verify_reads=up + down + 1,
        failed=failed,
        slots=WriteSlots(row_selects=1, set_slots=2, reset_slots=3, verify_slots=4),
        verify_with="adc",
        level=Level.SIMULATED,
    )
    response = PulseResponse.draw(CHIP.write_policy.device(), shape, Generator().manual_seed(0))
    goal = torch.zeros(shape)
    return Cells(response, state, ENCODING, goal, failed, up + down + worn), result


def layer(name: str, worn: int = 0, **counts: int) -> LayerProgramming:
    return LayerProgramming(
        layer=name,
        counts=al.Counts(counts),
        rms_error_siemens=0.0,
        max_error_siemens=0.0,
        most_worn=worn,
    )


def test_tiles_of_different_sizes_are_summed_up_cell_by_cell() -> None:
    # Errors 3, 0 | -4 | 0, 0, 0 cell states: of six cells, not averaged tile by tile.
    tiles = [
        tile([4.0, 1.0], [1, 2], [0, 3]),
        tile([-3.0], [0], [9], worn=7),
        tile([0.5, 0.5, 0.5], [5, 0, 0], [0, 0, 1]),
    ]
    goals = [torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0]]]), torch.full((1, 1, 3), 0.5)]
    cells, results = [list(part) for part in zip(*tiles, strict=True)]
    summed = layer_programming("head", cells, goals, results)
    assert summed.layer == "head"
    assert summed.rms_error_siemens == pytest.approx((25 / 6) ** 0.5 * 4e-6, rel=1e-6)
    assert summed.max_error_siemens == pytest.approx(16e-6, rel=1e-6)
    assert summed.most_worn == 16
    assert dict(summed.counts) == {
        "set_pulses": 8,
        "reset_pulses": 13,
        "verify_reads": 27,
        "verify_conversions": 27,
        "row_selects": 3,
        "set_slots": 6,
        "reset_slots": 9,
        "verify_slots": 12,
        "programmed_cells": 6,
        "pulsed_cells": 5,
        "failed_cells": 1,
    }
    assert summed.counts.level is Level.SIMULATED
    assert summed.failed_fraction == 1 / 6


def test_layers_are_weighed_by_their_cells() -> None:
    report = al.ProgramReport(
        chip=CHIP,
        layers=(
            layer("a", programmed_cells=10, failed_cells=5, set_pulses=3, verify_reads=13),
            layer("b", programmed_cells=80, failed_cells=0, reset_pulses=4, verify_reads=84),
            layer("c", programmed_cells=10, failed_cells=1, set_pulses=1, reset_pulses=1),
        ),
    )
    assert report.pulses == 9
    assert report.failed_fraction == 0.06
    assert [part.failed_fraction for part in report.layers] == [0.5, 0.0, 0.1]
    assert report.counts["verify_reads"] == 97
    assert report.energy == al.price(report.counts, CHIP)


def test_no_cells_no_failures() -> None:
    assert al.ProgramReport(chip=CHIP, layers=()).failed_fraction == 0.0
    assert al.ProgramReport(chip=CHIP, layers=()).pulses == 0
    assert al.ProgramReport(chip=CHIP, layers=()).most_worn == 0
    assert layer("empty").failed_fraction == 0.0


def test_the_most_worn_cell_decides_how_much_of_the_endurance_is_used() -> None:
    endurance = Quantity(value=1000.0, unit="1", source="test", status=Status.ASSUMED)
    chip = replace(CHIP, endurance_pulses=endurance)
    layers = (layer("a", worn=40), layer("b", worn=250), layer("c"))
    assert al.ProgramReport(chip=chip, layers=layers).most_worn == 250
    assert al.ProgramReport(chip=chip, layers=layers).endurance_used == 0.25
    unknown = replace(CHIP, endurance_pulses=None)
    assert al.ProgramReport(chip=unknown, layers=layers).endurance_used is None
