"""The lines of the picture: accuracy and cumulative energy of an arm over optimiser steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from aihwkit_lora.errors import DataError
from aihwkit_lora.reporting.records import StageRecord
from aihwkit_lora.reporting.run_report import RunReport

Line = tuple[list[float], list[float]]
"""Positions on the step axis, and a value at each."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Where each stage begins and ends on the common axis of optimiser steps.

    A stage is as wide as the arm that needs most steps for it, so that it starts at one place for
    all arms; an arm that is done earlier keeps what it has until the next stage.

    Args:
        spans: Start and end of each stage with steps, in order.
        waits: Whether some arm needs fewer steps for a stage than another.

    Example:
        >>> Timeline(spans={"forget": (0, 16), "continue": (16, 116)}).last
        116
    """

    spans: Mapping[str, tuple[int, int]]
    waits: bool = False

    @classmethod
    def of(cls, report: RunReport) -> Timeline:
        """Lay the stages of all arms one after the other, beginning after programming.

        Args:
            report: A run.
        Raises:
            DataError: No stage after ``program`` has steps.
        """
        lengths: dict[str, set[int]] = {}
        for stages in report.arms.values():
            for stage in _programmed(stages)[1]:
                if stage.steps:
                    lengths.setdefault(stage.name, set()).add(stage.steps[-1].step)
        if not lengths:
            raise DataError(
                "report: expected a stage with optimiser steps after 'program', got none. Draw a "
                "run that trained on the chip."
            )
        stops = list(accumulate(max(found) for found in lengths.values()))
        spans = zip((0, *stops[:-1]), stops, strict=True)
        return cls(
            spans=dict(zip(lengths, spans, strict=True)),
            waits=any(len(found) > 1 for found in lengths.values()),
        )

    @property
    def last(self) -> int:
        """The right end of the axis."""
        return max(stop for _, stop in self.spans.values())

    def accuracy(self, stages: Sequence[StageRecord], metric: str) -> Line:
        """Place a metric of one arm on the axis.

        Args:
            stages: All stages of the arm.
            metric: Key in the metrics of steps and stages.
        Returns:
            A point wherever the metric was evaluated; none where it does not exist.
        """
        program, after = _programmed(stages)
        points: dict[float, float] = {}
        if program is not None and metric in program.metrics:
            points[0] = program.metrics[metric]
        for stage in after:
            if not stage.steps:
                continue
            start, stop = self.spans[stage.name]
            evaluated = [(start + step.step, step.metrics) for step in stage.steps]
            evaluated.append((evaluated[-1][0], stage.metrics))
            points |= {x: metrics[metric] for x, metrics in evaluated if metric in metrics}
            if points:
                points[stop] = points[max(points)]
        return list(points), list(points.values())

    def energy(self, stages: Sequence[StageRecord]) -> Line:
        """Place the energy of one arm on the axis, added up from the initial programming on.

        Args:
            stages: All stages of the arm.
        Returns:
            Joules: at 0 those of programming, then the sum after each step.
        """
        program, after = _programmed(stages)
        total = 0.0 if program is None else program.energy.energy_j.value
        points: dict[float, float] = {0: total}
        for stage in after:
            if not stage.steps:
                continue
            start, stop = self.spans[stage.name]
            for step in stage.steps:
                total += step.energy_j
                points[start + step.step] = total
            points[stop] = total
        return list(points), list(points.values())


def _programmed(
    stages: Sequence[StageRecord],
) -> tuple[StageRecord | None, Sequence[StageRecord]]:
    for place, stage in enumerate(stages):
        if stage.name == "program":
            return stage, stages[place + 1 :]
    return None, stages
