"""Reports of programming: sums over layers and tiles, errors in siemens, price."""

from __future__ import annotations

import pytest
import torch

import aihwkit_lora as al
from aihwkit_lora.metering.counts import Level
from aihwkit_lora.programming.report import LayerProgramming, layer_programming
from aihwkit_lora.programming.response import CellState
from aihwkit_lora.programming.write_verify import WriteResult

CHIP = al.chips.get("rm-180nm")


def result(apparent: list[float], sets: list[int], resets: list[int]) -> WriteResult:
    state = torch.tensor([apparent])
    up, down = torch.tensor([sets]), torch.tensor([resets])
    return WriteResult(
        state=CellState(persistent=torch.zeros_like(state), apparent=state),
        set_pulses=up,
        reset_pulses=down,
        verify_reads=up + down + 1,
        failed=torch.tensor([[pulses >= 9 for pulses in resets]]),
        level=Level.SIMULATED,
    )


def layer(name: str, **counts: int) -> LayerProgramming:
    return LayerProgramming(
        layer=name, counts=al.Counts(counts), rms_error_siemens=0.0, max_error_siemens=0.0
    )


def test_tiles_of_different_sizes_are_summed_up_cell_by_cell() -> None:
    # Errors 3, 0 | -4 | 0, 0, 0 cell states: of six cells, not averaged tile by tile.
    results = [
        result([4.0, 1.0], [1, 2], [0, 3]),
        result([-3.0], [0], [9]),
        result([0.5, 0.5, 0.5], [5, 0, 0], [0, 0, 1]),
    ]
    targets = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]]), torch.full((1, 3), 0.5)]
    summed = layer_programming("head", targets, results, siemens_per_state=2e-6)
    assert summed.layer == "head"
    assert summed.rms_error_siemens == pytest.approx((25 / 6) ** 0.5 * 2e-6, rel=1e-12)
    assert summed.max_error_siemens == pytest.approx(8e-6, rel=1e-12)
    assert dict(summed.counts) == {
        "set_pulses": 8,
        "reset_pulses": 13,
        "verify_reads": 27,
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
    assert layer("empty").failed_fraction == 0.0
