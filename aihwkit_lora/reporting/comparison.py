"""Several runs of one recipe side by side: seeds averaged, everything else told apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.reporting.formatting import (
    MISSING,
    format_fraction,
    format_interval,
    format_number,
)
from aihwkit_lora.reporting.records import Ratio, StageRecord
from aihwkit_lora.reporting.run_report import RunReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LOWER_IS_BETTER: set[str] = {
    "forget_accuracy",
    "forget_probability",
    "forget_rouge",
    "forgotten_",
    "frechet",
    "relapse",
}
"""Parts of the names of metrics whose worst value over seeds is the largest; add yours. Of all
others it is the smallest."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class RunGroup:
    """Runs that differ in their seed only.

    Args:
        label: Letter that stands for them.
        reports: The runs, by seed.
    """

    label: str
    reports: tuple[RunReport, ...]

    @property
    def chip(self) -> str:
        """Chip that they were priced for."""
        return self.reports[0].chip

    @property
    def seeds(self) -> tuple[int, ...]:
        """Their seeds, in order."""
        return tuple(report.seed for report in self.reports)

    def settings(self) -> dict[str, str]:
        """Chip, configuration and versions, flat, without the seed."""
        first = self.reports[0]
        return {"chip": first.chip, **_flat("", first.config), **_flat("", first.environment)}


@dataclass(frozen=True, kw_only=True)
class ComparedValue:
    """One number of a comparison.

    Args:
        group: Label of the runs.
        arm: Arm; empty for ratios.
        stage: Stage; empty for ratios.
        kind: ``"metric"``, ``"count"``, ``"energy"`` in joules, ``"latency"`` in seconds or
            ``"ratio"``.
        name: Of the metric, event or ratio.
        mean: Over seeds.
        worst: Over seeds: for metrics see :data:`LOWER_IS_BETTER`; the largest count, energy and
            latency, the smallest ratio.
        low: Low end: over seeds for metrics and counts; else of the prices, averaged over seeds.
        high: High end, likewise.
        seeds: How many runs have it.
        deviation: Standard deviation over seeds, with n − 1 in the denominator; 0 for one seed.
    """

    group: str
    arm: str
    stage: str
    kind: Literal["metric", "count", "energy", "latency", "ratio"]
    name: str
    mean: float
    worst: float
    low: float
    high: float
    seeds: int
    deviation: float

    @property
    def interval(self) -> Interval:
        """Mean and range."""
        return Interval(self.mean, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs of one recipe, grouped by everything but their seeds.

    Args:
        recipe: Name of the recipe.
        groups: Groups in the order in which they were given.
    """

    recipe: str
    groups: tuple[RunGroup, ...]

    def differences(self) -> dict[str, tuple[str, ...]]:
        """What differs between groups.

        Returns:
            Names in chip, configuration and versions, each with its value by group; a dash where a
            group has no such name.
        """
        settings = [group.settings() for group in self.groups]
        names = dict.fromkeys(name for found in settings for name in found)
        values = {n: tuple(found.get(n, MISSING) for found in settings) for n in names}
        return {name: found for name, found in values.items() if len(set(found)) > 1}

    def values(self) -> list[ComparedValue]:
        """All numbers, one by one: metrics, counts, energies and latencies, then ratios."""
        return [value for group in self.groups for value in (*_staged(group), *_ratios(group))]


def compare(reports: Iterable[RunReport]) -> Comparison:
    """Put runs of one recipe side by side.

    Args:
        reports: Any number of runs: of any seeds, chips, configurations and versions.
    Returns:
        The runs in groups that share all but their seed.
    Raises:
        ConfigurationError: There is no run, there are runs of several recipes, a run is given
            twice, or there are more than 26 groups.

    Example:
        >>> from dataclasses import replace
        >>> run = RunReport(
        ...     recipe="face_recognition",
        ...     chip="rm-180nm",
        ...     seed=0,
        ...     config={"rank": 6, "seed": 0},
        ...     environment={},
        ...     arms={},
        ...     ratios=(),
        ... )
        >>> other = replace(run, seed=1, config={"rank": 6, "seed": 1})
        >>> wider = replace(run, config={"rank": 8, "seed": 0})
        >>> comparison = compare([run, other, wider])
        >>> [group.seeds for group in comparison.groups], comparison.differences()
        ([(0, 1), (0,)], {'rank': ('6', '8')})
    """
    found = list(reports)
    if not found:
        raise ConfigurationError("compare: expected at least one report, got none.")
    recipes = sorted({report.recipe for report in found})
    if len(recipes) > 1:
        raise ConfigurationError(
            f"compare: expected reports of one recipe, got {', '.join(recipes)}. Their stages and "
            "metrics mean different things; compare them separately."
        )
    grouped: dict[str, list[RunReport]] = {}
    for report in found:
        key = json.dumps(RunGroup(label="", reports=(report,)).settings(), sort_keys=True)
        grouped.setdefault(key, []).append(report)
    if len(grouped) > len(_LETTERS):
        raise ConfigurationError(
            f"compare: expected at most {len(_LETTERS)} groups of runs, got {len(grouped)}."
        )
    groups = (
        RunGroup(label=label, reports=_by_seed(runs))
        for label, runs in zip(_LETTERS, grouped.values(), strict=False)
    )
    return Comparison(recipe=recipes[0], groups=tuple(groups))


def _by_seed(reports: list[RunReport]) -> tuple[RunReport, ...]:
    ordered = sorted(reports, key=lambda report: report.seed)
    for earlier, later in pairwise(ordered):
        if earlier.seed == later.seed:
            raise ConfigurationError(
                f"compare: expected runs of different seeds, got two of '{later.recipe}' on "
                f"'{later.chip}' with seed {later.seed} and the same configuration. Leave one out."
            )
    return tuple(ordered)


def _flat(name: str, value: Any) -> dict[str, str]:
    """Names and values of nested settings; the seed apart, which is not a setting."""
    if isinstance(value, Mapping):
        inner = ((f"{name}.{key}".lstrip("."), part) for key, part in value.items())
        return {k: v for key, part in inner if key != "seed" for k, v in _flat(key, part).items()}
    return {name: value if isinstance(value, str) else json.dumps(value)}


def _staged(group: RunGroup) -> Iterator[ComparedValue]:
    places = dict.fromkeys(
        (arm, stage.name)
        for report in group.reports
        for arm, stages in report.arms.items()
        for stage in stages
    )
    for arm, name in places:
        stages = [s for r in group.reports for s in r.arms.get(arm, ()) if s.name == name]
        yield from _of_stage(stages, {"group": group.label, "arm": arm, "stage": name})


def _of_stage(stages: Sequence[StageRecord], place: Mapping[str, str]) -> Iterator[ComparedValue]:
    for name in _names(stage.metrics for stage in stages):
        worst = max if any(part in name for part in LOWER_IS_BETTER) else min
        known = [stage.metrics[name] for stage in stages if name in stage.metrics]
        yield _over_seeds(known, worst, kind="metric", name=name, **place)
    for name in _names(stage.counts for stage in stages):
        counts = [float(stage.counts[name]) for stage in stages]
        yield _over_seeds(counts, max, kind="count", name=name, **place)
    energies = [s.energy.energy_j for s in stages if s.energy.energy_by_event]
    latencies = [s.energy.latency_s for s in stages if s.energy.latency_by_event]
    for kind, found in (("energy", energies), ("latency", latencies)):
        if found:
            yield _over_prices(found, max, kind=kind, name=kind, **place)


def _ratios(group: RunGroup) -> Iterator[ComparedValue]:
    named: dict[str, list[Ratio]] = {}
    for report in group.reports:
        for ratio in report.ratios:
            named.setdefault(ratio.name, []).append(ratio)
    for name, found in named.items():
        place = {"group": group.label, "arm": "", "stage": "", "kind": "ratio", "name": name}
        yield _over_prices([ratio.interval for ratio in found], min, **place)


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _over_seeds(
    known: Sequence[float], worst: Callable[[Sequence[float]], float], **place: Any
) -> ComparedValue:
    # Rounding can push a mean of equal numbers past them.
    low, high = min(known), max(known)
    mean = min(max(fmean(known), low), high)
    return ComparedValue(
        mean=mean,
        worst=worst(known),
        low=low,
        high=high,
        seeds=len(known),
        deviation=_deviation(known),
        **place,
    )


def _over_prices(
    known: Sequence[Interval], worst: Callable[[Sequence[float]], float], **place: Any
) -> ComparedValue:
    parts = {end: [getattr(one, end) for one in known] for end in ("value", "low", "high")}
    return ComparedValue(
        mean=fmean(parts["value"]),
        worst=worst(parts["value"]),
        low=fmean(parts["low"]),
        high=fmean(parts["high"]),
        seeds=len(known),
        deviation=_deviation(parts["value"]),
        **place,
    )


def _deviation(known: Sequence[float]) -> float:
    return stdev(known) if len(known) > 1 else 0.0


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print what differs, then metrics, costs and ratios, one column for each group and arm.

    Args:
        comparison: What :func:`compare` gave.
        console: Where to print; the terminal if None. Reads best from 100 columns on.

    Example:
        >>> from rich.console import Console
        >>> run = RunReport(
        ...     recipe="face_recognition",
        ...     chip="mine",
        ...     seed=0,
        ...     config={},
        ...     environment={},
        ...     arms={},
        ...     ratios=(),
        ... )
        >>> print_comparison(compare([run]), Console(width=80))
        face_recognition
        A: mine, seed 0
    """
    from rich.console import Console

    console = console or Console()
    console.print(comparison.recipe, style="bold")
    for group in comparison.groups:
        seeds = ", ".join(map(str, group.seeds))
        plural = "s" if len(group.seeds) > 1 else ""
        console.print(f"{group.label}: {group.chip}, seed{plural} {seeds}", highlight=False)
    for table in _tables(comparison):
        console.print(table)
    if any(len(group.seeds) > 1 for group in comparison.groups):
        console.print("Mean over seeds (worst); ranges in brackets are those of the prices.")


def _tables(comparison: Comparison) -> Iterator[Table]:
    differences, values = comparison.differences(), comparison.values()
    labels = [group.label for group in comparison.groups]
    if differences:
        table = _table("What differs", labels)
        for name, found in differences.items():
            _add(table, name, found)
        yield table
    staged = [v for v in values if v.kind != "ratio"]
    columns = list(dict.fromkeys((v.group, v.arm) for v in staged))
    shown = [v for v in staged if v.kind != "count" or v.name in _SHOWN_COUNTS]
    if shown:
        table = _table("Metrics and costs", [f"{group} {arm}" for group, arm in columns])
        for stage, of_stage in groupby(_by_stage(shown), key=lambda v: v.stage):
            _add_stage(table, stage, list(of_stage), columns)
        yield table
    ratios = [v for v in values if v.kind == "ratio"]
    if ratios:
        table = _table("Ratios", labels)
        for name in dict.fromkeys(v.name for v in ratios):
            cells = {v.group: _cell(v) for v in ratios if v.name == name}
            _add(table, name, [cells.get(label, MISSING) for label in labels])
        yield table


_SHOWN_COUNTS = ("set_pulses", "reset_pulses", "verify_reads", "failed_cells")
"""Counts in the table; :meth:`Comparison.values` has all."""


def _by_stage(values: Sequence[ComparedValue]) -> list[ComparedValue]:
    order = list(dict.fromkeys(value.stage for value in values))
    return sorted(values, key=lambda value: order.index(value.stage))


def _add_stage(
    table: Table, stage: str, values: Sequence[ComparedValue], columns: Sequence[tuple[str, str]]
) -> None:
    _add(table, stage, [""] * len(columns), style="bold cyan")
    there = {(v.group, v.arm) for v in values}
    for kind in ("metric", "count", "energy", "latency"):
        for name in dict.fromkeys(v.name for v in values if v.kind == kind):
            found = {(v.group, v.arm): _cell(v) for v in values if (v.kind, v.name) == (kind, name)}
            # An event that nobody counted did not happen; a metric may not exist.
            none = {column: "0" for column in there if kind == "count"}
            cells = [found.get(column, none.get(column, MISSING)) for column in columns]
            _add(table, f"  {name.replace('_', ' ')}", cells)


def _cell(value: ComparedValue) -> str:
    if value.kind in ("energy", "latency"):
        return format_interval(value.interval, "J" if value.kind == "energy" else "s")
    if value.kind == "ratio":
        ends = f" [{format_number(value.low)}, {format_number(value.high)}]"
        return format_number(value.mean) + ends * (value.low < value.high)
    if value.kind == "count":
        return f"{value.mean:,.0f}"
    write = format_fraction if value.name.endswith("_accuracy") else format_number
    return write(value.mean) + f" ({write(value.worst)})" * (value.seeds > 1)


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _add(table: Table, name: str, cells: Sequence[str], style: str = "") -> None:
    # Text, because rich takes the brackets of a range in a plain string for markup.
    from rich.text import Text

    table.add_row(Text(name, style=style), *(Text(cell) for cell in cells))
