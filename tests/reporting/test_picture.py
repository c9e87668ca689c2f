"""The picture: its lines are exact, its file is what was asked for, and it leaves pyplot alone."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest

from aihwkit_lora.errors import DataError
from aihwkit_lora.reporting import RunReport, StageRecord, StepRecord, draw
from aihwkit_lora.reporting.timeline import Timeline


def size(path: Path) -> tuple[int, ...]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:])


def without_steps(report: RunReport) -> RunReport:
    arms = {k: tuple(replace(s, steps=()) for s in arm) for k, arm in report.arms.items()}
    return replace(report, arms=arms)


def trained(stage: StageRecord, joules: list[float], **metrics: list[float | None]) -> StageRecord:
    steps = tuple(
        StepRecord(
            step=number + 1,
            energy_j=energy,
            pulses=0,
            metrics={k: v for k, values in metrics.items() if (v := values[number]) is not None},
        )
        for number, energy in enumerate(joules)
    )
    return replace(stage, metrics={}, steps=steps)


@pytest.fixture
def small(report: RunReport) -> RunReport:
    _, program, forget, resume = report.arms["hybrid"]
    return replace(
        report,
        arms={
            "hybrid": (
                program,
                trained(forget, [1.0, 2.0], forget_accuracy=[None, 0.25]),
                trained(resume, [4.0], forget_accuracy=[0.0], new_accuracy=[0.5]),
            ),
            "reprogram": (trained(forget, [8.0, 8.0, 8.0], forget_accuracy=[0.5, None, None]),),
        },
    )


def test_stages_begin_together_and_are_as_wide_as_the_slowest_arm(small: RunReport) -> None:
    timeline = Timeline.of(small)
    assert timeline == Timeline(spans={"forget": (0, 3), "continue": (3, 4)}, waits=True)
    assert timeline.last == 4
    same = replace(small, arms={"hybrid": small.arms["hybrid"]})
    assert not Timeline.of(same).waits


def test_accuracy_starts_at_programming_and_holds_until_the_next_stage(small: RunReport) -> None:
    hybrid, reprogram = small.arms.values()
    timeline = Timeline.of(small)
    assert timeline.accuracy(hybrid, "forget_accuracy") == ([0, 2, 3, 4], [1.0, 0.25, 0.25, 0.0])
    assert timeline.accuracy(hybrid, "new_accuracy") == ([4], [0.5])
    assert timeline.accuracy(reprogram, "forget_accuracy") == ([1, 3], [0.5, 0.5])
    assert timeline.accuracy(reprogram, "new_accuracy") == ([], [])


def test_the_metrics_of_a_stage_are_those_after_its_last_step(small: RunReport) -> None:
    program, forget, resume = small.arms["hybrid"]
    judged = (program, replace(forget, metrics={"retain_accuracy": 0.9}), resume)
    timeline = Timeline.of(small)
    assert timeline.accuracy(judged, "retain_accuracy") == (
        [0, 2, 3, 4],
        [0.9688, 0.9, 0.9, 0.9],
    )


def test_energy_starts_with_programming_and_adds_up(small: RunReport) -> None:
    hybrid, reprogram = small.arms.values()
    start = hybrid[0].energy.energy_j.value
    timeline = Timeline.of(small)
    assert timeline.energy(hybrid) == (
        [0, 1, 2, 3, 4],
        [*accumulate((start, 1.0, 2.0, 0.0, 4.0))],
    )
    assert timeline.energy(reprogram) == ([0, 1, 2, 3], [0.0, 8.0, 16.0, 24.0])


def test_steps_of_learning_are_not_drawn(report: RunReport) -> None:
    step = StepRecord(step=500, energy_j=1.0, pulses=0, metrics={})
    learn, *rest = report.arms["hybrid"]
    arms = {"hybrid": (replace(learn, steps=(step,)), *rest)}
    assert Timeline.of(replace(report, arms=arms)).spans == {
        "forget": (0, 16),
        "continue": (16, 116),
    }


def test_draw_makes_a_png_of_the_agreed_size(report: RunReport, tmp_path: Path) -> None:
    draw(report, tmp_path / "new" / "run.png")
    assert size(tmp_path / "new" / "run.png") == (1350, 1050)


def one_arm(report: RunReport) -> RunReport:
    return replace(report, arms={"hybrid": report.arms["hybrid"]})


def four_arms(report: RunReport) -> RunReport:
    stages = report.arms["hybrid"]
    return replace(report, arms=dict.fromkeys(("hybrid", "a", "b", "c"), stages))


def free(report: RunReport) -> RunReport:
    _, _, forget, _ = report.arms["hybrid"]
    return replace(report, arms={"hybrid": (trained(forget, [0.0, 0.0]),)})


@pytest.mark.parametrize("change", [one_arm, four_arms, free])
def test_unusual_runs_can_be_drawn(
    report: RunReport, tmp_path: Path, change: Callable[[RunReport], RunReport]
) -> None:
    draw(change(report), tmp_path / "run.png")
    assert size(tmp_path / "run.png") == (1350, 1050)


def test_a_run_without_steps_is_refused(report: RunReport, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a stage with optimiser steps after 'program'"):
        draw(without_steps(report), tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_drawing_does_not_need_pyplot(
    report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    draw(report, tmp_path / "run.png")
