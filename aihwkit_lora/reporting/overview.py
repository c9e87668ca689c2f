"""All workloads on all chips: which runs belong together, and what each arm of them gave."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.reporting.comparison import ComparedValue, RunGroup, compare
from aihwkit_lora.reporting.formatting import MISSING
from aihwkit_lora.reporting.records import StageRecord
from aihwkit_lora.reporting.run_report import RunReport

ARMS = ("hybrid", "reprogram", "deploy_once", "in_situ", "digital")
"""Arms in the order of the page; others follow."""

_EXPECTED = (("hybrid",), ("reprogram", "deploy_once"), ("digital",))
"""One of each is what the page compares; where all are missing, the first is shown as not run."""

NO_ADAPTATION = frozenset({"learn", "program", "noise", "drift", "restore"})
"""Stages that adapt nothing to new requests: what is before them, and what happens to the chip."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What one arm took to adapt, all its stages together, each number a mean over seeds.

    Args:
        stages: Their names: ``forget`` and ``continue`` in most recipes.
        pulses: SET and RESET pulses.
        energy_j: In joules, with the range of the prices; None if nothing is priced.
        latency_s: Time on the chip in seconds, likewise.
        metrics: Of the last of them.
    """

    stages: tuple[str, ...]
    pulses: float
    energy_j: Interval | None
    latency_s: Interval | None
    metrics: Mapping[str, ComparedValue]


@dataclass(frozen=True)
class Cell:
    """One workload on one chip: runs that differ in their seed only.

    Args:
        runs: The runs.
    """

    runs: RunGroup

    @cached_property
    def values(self) -> tuple[ComparedValue, ...]:
        """All numbers, over seeds."""
        return tuple(compare(self.runs.reports).values())

    @cached_property
    def stages(self) -> Mapping[str, Mapping[str, tuple[StageRecord, ...]]]:
        """Records over seeds, by arm and stage."""
        found: dict[str, dict[str, list[StageRecord]]] = {}
        for report in self.runs.reports:
            for arm, stages in report.arms.items():
                own = found.setdefault(arm, {})
                for stage in stages:
                    own.setdefault(stage.name, []).append(stage)
        return {arm: {k: tuple(v) for k, v in stages.items()} for arm, stages in found.items()}

    def metrics(self, arm: str, stage: str) -> dict[str, ComparedValue]:
        """Metrics of one stage, over seeds.

        Args:
            arm: Name of the arm.
            stage: Name of the stage.
        """
        place = (arm, stage, "metric")
        return {v.name: v for v in self.values if (v.arm, v.stage, v.kind) == place}

    def adaptation(self, arm: str) -> Adaptation | None:
        """Sum up what an arm took after programming, write noise and restoring apart.

        Args:
            arm: Name of the arm.
        Returns:
            Nothing if the arm was not run, or adapts nothing.
        """
        stages = {k: v for k, v in self.stages.get(arm, {}).items() if k not in NO_ADAPTATION}
        if not stages:
            return None
        return Adaptation(
            stages=tuple(stages),
            pulses=sum(mean_of([record.pulses for record in each]) for each in stages.values()),
            energy_j=_sum(mean_energy(each) for each in stages.values()),
            latency_s=_sum(mean_latency(each) for each in stages.values()),
            metrics=self.metrics(arm, list(stages)[-1]),
        )

    def wall_s(self, arm: str) -> float:
        """Mean time that simulating an arm took, in seconds; nothing about the chip.

        Args:
            arm: Name of the arm.
        """
        stages = self.stages[arm].values()
        return sum(mean_of([record.wall_s for record in each]) for each in stages)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Runs of one recipe and one configuration, on any chips and of any seeds.

    Args:
        title: Recipe, and what tells this configuration from others of the recipe.
        recipe: Name of the recipe.
        cells: By chip.
    """

    title: str
    recipe: str
    cells: Mapping[str, Cell]

    @property
    def settings(self) -> dict[str, str]:
        """Configuration and versions, flat; without chip and seed."""
        return _settings(next(iter(self.cells.values())).runs.reports[0])

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms that were run, and those to compare with that were not."""
        run = {arm: None for cell in self.cells.values() for arm in cell.stages}
        missing = [names[0] for names in _EXPECTED if not run.keys() & set(names)]
        # Recipes that compare something else, such as objectives, have arms of their own.
        names = [*run, *(missing if "hybrid" in run else ())]
        return tuple(sorted(names, key=lambda arm: ARMS.index(arm) if arm in ARMS else len(ARMS)))


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Everything that a page shows.

    Args:
        workloads: In the order in which they were given.
        chips: All chips that anything was run on, sorted.
    """

    workloads: tuple[Workload, ...]
    chips: tuple[str, ...]

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return sum(
            len(cell.runs.reports) for each in self.workloads for cell in each.cells.values()
        )


def overview(reports: Iterable[RunReport]) -> Overview:
    """Sort runs by workload, chip and seed.

    Runs are one workload if recipe, configuration and versions are the same, apart from chip and
    seed. Nothing else is ever averaged.

    Args:
        reports: Runs of any recipes, chips, configurations and seeds.
    Raises:
        ConfigurationError: There is no run, or one is given twice.

    Example:
        >>> from dataclasses import replace
        >>> faces = RunReport(
        ...     recipe="face_recognition",
        ...     chip="rm-180nm",
        ...     seed=0,
        ...     config={"rank": 6},
        ...     environment={},
        ...     arms={},
        ...     ratios=(),
        ... )
        >>> runs = [faces, replace(faces, seed=1), replace(faces, chip="hermes-14nm")]
        >>> runs.append(replace(faces, config={"rank": 8}))
        >>> found = overview(runs)
        >>> [workload.title for workload in found.workloads], found.chips
        (['face_recognition: rank = 6', 'face_recognition: rank = 8'], ('hermes-14nm', 'rm-180nm'))
        >>> found.workloads[0].cells["rm-180nm"].runs.seeds
        (0, 1)
    """
    sorted_out: dict[str, list[RunReport]] = {}
    for report in reports:
        key = json.dumps([report.recipe, _settings(report)], sort_keys=True)
        sorted_out.setdefault(key, []).append(report)
    if not sorted_out:
        raise ConfigurationError("page: expected at least one report, got none.")
    groups = list(sorted_out.values())
    workloads = (
        Workload(
            title=title,
            recipe=runs[0].recipe,
            cells={chip: _cell([run for run in runs if run.chip == chip]) for chip in _chips(runs)},
        )
        for title, runs in zip(_titles([runs[0] for runs in groups]), groups, strict=True)
    )
    return Overview(
        workloads=tuple(sorted(workloads, key=lambda each: each.recipe)),
        chips=_chips([run for runs in groups for run in runs]),
    )


def mean_of(known: Sequence[float]) -> float:
    """Mean, which rounding never puts beyond equal numbers.

    Args:
        known: One or more numbers.
    """
    return min(max(fmean(known), min(known)), max(known))


def mean_energy(records: Sequence[StageRecord]) -> Interval | None:
    """Mean energy of a stage over seeds, in joules; None if nothing that happened has a price.

    Args:
        records: One or more.
    """
    if not any(record.energy.energy_by_event for record in records):
        return None
    return _mean([record.energy.energy_j for record in records])


def mean_latency(records: Sequence[StageRecord]) -> Interval | None:
    """Mean time of a stage on the chip over seeds, in seconds; None if nothing has a price.

    Args:
        records: One or more.
    """
    if not any(record.energy.latency_by_event for record in records):
        return None
    return _mean([record.energy.latency_s for record in records])


def _mean(known: Sequence[Interval]) -> Interval:
    ends = ([getattr(each, end) for each in known] for end in ("value", "low", "high"))
    return Interval(*(mean_of(end) for end in ends))


def _sum(known: Iterable[Interval | None]) -> Interval | None:
    there = [each for each in known if each is not None]
    return Interval.sum(there) if there else None


def _cell(runs: Sequence[RunReport]) -> Cell:
    # Refuses two runs of one seed.
    (group,) = compare(runs).groups
    return Cell(group)


def _chips(runs: Sequence[RunReport]) -> tuple[str, ...]:
    return tuple(sorted({run.chip for run in runs}))


def _settings(report: RunReport) -> dict[str, str]:
    settings = RunGroup(label="", reports=(report,)).settings()
    return {name: value for name, value in settings.items() if name != "chip"}


def _titles(firsts: Sequence[RunReport]) -> list[str]:
    """Recipe, and the settings in which its workloads differ."""
    titles = []
    for report in firsts:
        settings = [_settings(each) for each in firsts if each.recipe == report.recipe]
        names = dict.fromkeys(name for each in settings for name in each)
        told = [n for n in names if len({each.get(n, MISSING) for each in settings}) > 1]
        own = _settings(report)
        # Said whatever the other workloads are: nobody shall take a smoke test for a result.
        quick = " (quick)" if report.config.get("quick") is True else ""
        parts = ", ".join(f"{name} = {own.get(name, MISSING)}" for name in told)
        titles.append(f"{report.recipe}{quick}" + f": {parts}" * bool(parts))
    return titles
